"""Networks of timm and torchvision: their names, how they are made, and how they prepare their images."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision.models
from safetensors.torch import load_file, save_file
from torch import nn

from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec, Given, Normalization
from kd.models import MODELS, ModelEntry, build, canonical, own_size, preprocessing_of
from kd.models.folding import fold
from kd.models.libraries import LIBRARIES, stage_ends
from kd.models.normalization import Normalized
from kd.models.taps import Tapped, head, last_layers
from kd.store.foreign import fetched, fingerprint, initial_weights, load_network
from tests.conftest import ROOT
from tests.test_stage import DATASET

timm = pytest.importorskip("timm", reason="the extra kd[timm] is not installed")
huggingface_hub = pytest.importorskip("huggingface_hub")  # timm brings it

SMALL = ["timm/resnet10t", "timm/tf_efficientnet_lite0", "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224"]
SMALL += [
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/squeezenet1_1",
    "torchvision/regnet_y_400mf",
]


# names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("timm/resnet18", "timm/resnet18"),
        ("timm/resnet18?", "timm/resnet18"),
        ("timm/resnet18?drop_rate=.10", "timm/resnet18?drop_rate=0.1"),
        ("timm/resnet18?drop_rate=1e-1&act_layer=gelu", "timm/resnet18?act_layer=gelu&drop_rate=0.1"),
        ("timm/resnet18?stem_type='deep'", "timm/resnet18?stem_type='deep'"),
        ('timm/resnet18?stem_type="deep"', "timm/resnet18?stem_type=deep"),
        ("timm/resnet18?avg_down=True", "timm/resnet18?avg_down=true"),
        ("timm/resnet18?block_args={}", "timm/resnet18?block_args={}"),
        ('timm/resnet18?stem_type="a\\u0026b"', 'timm/resnet18?stem_type="a\\u0026b"'),
        ("timm/resnet18.a1_in1k", "timm/resnet18"),  # the default's tag
        ("timm/resnet18.tv_in1k", "timm/resnet18.tv_in1k"),
        ("torchvision/resnet50", "torchvision/resnet50"),
        ("plane4", "plane4"),
    ],
)
def test_one_network_has_one_spelling(text: str, spelled: str) -> None:
    assert canonical(text) == spelled == canonical(spelled)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm/resnet19", "did you mean timm/resnet18 or .* no 'resnet19'"),
        ("timm/resnet18.a9_in1k", "timm has no resnet18.a9_in1k: weights of resnet18 are called a1_in1k, "),
        ("torchvision/resnet19", "did you mean torchvision/resnet18 or "),
        ("torchvision/raft_large", "torchvision has 80 networks, and no 'raft_large'"),  # optical flow
        ("keras/resnet50", "there is no library 'keras': timm and torchvision bring networks"),
        ("timm/resnet18?drop_rate", r"options should be key=value, joined by & \(got drop_rate\)"),
        ("timm/resnet18?drop_rate=0&drop_rate=1", "the option drop_rate is given twice"),
        ("timm/resnet18?num_classes=3", "num_classes cannot be an option"),
        ("timm/resnet18?checkpoint_path=x.pth", "checkpoint_path cannot be an option"),
        ("torchvision/resnet18?weights=DEFAULT", "weights cannot be an option"),
        ("torchvision/resnet18?pretrained=true", "pretrained cannot be an option .*; published weights, .*model.init"),
    ],
)
def test_names_of_nothing(text: str, message: str) -> None:
    for check in (canonical, MODELS.known):
        with pytest.raises(ValueError, match=message) as caught:
            check(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(KnownError, match=message):
        MODELS[text]


def test_the_table_lists_its_own_networks_alone() -> None:
    assert not [name for name in MODELS if "/" in name]
    assert "timm/resnet18" in MODELS
    assert MODELS["timm/resnet50?drop_rate=0.1"][1:] == ("timm", 50, {})
    depths = {"vgg16_bn": 16, "densenet121": 121, "mobilenetv3_small_050": 0, "vit_tiny_patch16_224": 0}
    assert {arch: MODELS[f"timm/{arch}"].depth for arch in depths} == depths
    assert isinstance(MODELS["torchvision/vgg11"], ModelEntry)


def test_without_timm_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.models.libraries.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^timm/resnet26 needs the package timm: pip install timm$"):
        canonical("timm/resnet26")


# networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_logits_of_a_librarys_network(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=5, image_size=96)
    again = torch.get_rng_state()
    how = preprocessing_of(name)
    assert how is not None
    seeing = Normalized.of(network, how).eval()
    with torch.inference_mode():
        logits = seeing(torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    torch.manual_seed(0)
    twin = build(name, num_classes=5, image_size=96)
    assert torch.equal(torch.get_rng_state(), again)
    assert all(map(torch.equal, network.state_dict().values(), twin.state_dict().values()))


def test_options_reach_the_network() -> None:
    assert build("timm/resnet10t?drop_rate=0.25", num_classes=2, image_size=64).drop_rate == 0.25
    assert build("torchvision/mobilenet_v2?width_mult=0.5", num_classes=2, image_size=64).last_channel == 1280
    wide, thin = (
        sum(p.numel() for p in build(f"torchvision/mobilenet_v2{query}", num_classes=2, image_size=64).parameters())
        for query in ("", "?width_mult=0.5")
    )
    assert thin < wide / 2


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm/resnet10t?colour=red", 64, r"^timm/resnet10t\?colour=red: .*unexpected keyword argument 'colour'"),
        ("torchvision/alexnet", 32, "^torchvision/alexnet: 32×32 images: .*too small"),
        ("timm/hrnet_w18_small", 72, "^timm/hrnet_w18_small: 72×72 images: .*; try a size that is a multiple of 32$"),
        (
            "torchvision/googlenet",
            64,
            r"gives GoogLeNetOutputs and not only logits .*aux_logits=false",
        ),
    ],
)
def test_a_network_that_cannot_be_used(name: str, size: int, message: str) -> None:
    with pytest.raises(KnownError, match=message):
        build(name, num_classes=3, image_size=size)


# images -----------------------------------------------------------------------------------------------------------

HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "statistics", "size", "interpolation", "own"),
    [
        ("timm/tf_efficientnet_lite0", HALF, None, "bicubic", 224),
        ("timm/vit_tiny_patch16_224", HALF, 224, "bicubic", 224),
        ("timm/vit_tiny_patch16_224?img_size=96", HALF, 96, "bicubic", 96),
        ("timm/resnet18", IMAGENET, None, "bicubic", 224),
        ("timm/resnet18.tv_in1k", IMAGENET, None, "bilinear", 224),
        ("torchvision/resnet18", IMAGENET, None, "bilinear", 224),
        ("torchvision/efficientnet_b4", IMAGENET, None, "bicubic", 380),
        ("torchvision/vit_b_16", IMAGENET, 224, "bilinear", 224),
        ("torchvision/vit_b_16?image_size=64", IMAGENET, 64, "bilinear", 64),
    ],
)
def test_how_networks_see_images(name: str, statistics: object, size: int, interpolation: str, own: int) -> None:
    how = preprocessing_of(name)
    assert isinstance(how, Normalization)
    assert (how.mean, how.std) == statistics
    assert (how.size, how.interpolation, own_size(name)) == (size, interpolation, own)


def test_the_tables_networks_see_what_the_data_set_says() -> None:
    assert preprocessing_of("resnet8") is None
    assert own_size("resnet8") is None


def test_images_are_resized_before_they_are_normalised() -> None:
    network = Normalized(torch.nn.Identity(), (0.25,) * 3, (0.5,) * 3, size=4, interpolation="bicubic")
    plain = torch.full((1, 3, 9, 9), 51, dtype=torch.uint8)
    torch.testing.assert_close(network(plain), torch.full((1, 3, 4, 4), (0.2 - 0.25) / 0.5))
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    seen = network(edge) * 0.5 + 0.25
    assert (seen.min(), seen.max()) == (0, 1)  # bicubic alone would overshoot
    board = torch.zeros(1, 3, 8, 8)
    board[..., ::2] = 1
    torch.testing.assert_close(network(board)[..., 1:-1] * 0.5 + 0.25, torch.full((1, 3, 4, 2), 0.5), atol=0.1, rtol=0)
    fitting = torch.rand(2, 3, 4, 4)
    assert torch.equal(network(fitting), Normalized(torch.nn.Identity(), (0.25,) * 3, (0.5,) * 3)(fitting))


# initial weights --------------------------------------------------------------------------------------------------

LITE = ROOT.parent / "shared" / "data" / "tf_efficientnet_lite0_in1k.safetensors"


@pytest.fixture
def lite() -> Path:
    """ImageNet's weights of tf_efficientnet_lite0."""
    if not LITE.exists():
        pytest.skip(f"{LITE} is not there")
    return LITE


def begun(file: Path, model: str, classes: int, size: int = 64) -> tuple[nn.Module, str | None]:
    return initial_weights(file, fingerprint(file), model, num_classes=classes, image_size=size, key="teacher.init")


def test_imagenets_weights_with_two_classes(lite: Path) -> None:
    published = load_file(lite)
    network, line = begun(lite, "timm/tf_efficientnet_lite0", 2)
    assert line == "timm/tf_efficientnet_lite0: its classifier of 1,000 classes is made anew for 2"
    state = network.state_dict()
    assert state.pop("classifier.weight").shape == (2, 1280)
    assert state.pop("classifier.bias").shape == (2,)
    for name, tensor in state.items():
        assert torch.equal(tensor, published[name]), name
    whole, line = begun(lite, "timm/tf_efficientnet_lite0", 1000)
    assert line is None
    assert torch.equal(whole.get_parameter("classifier.weight"), published["classifier.weight"])


def test_weights_of_another_network(lite: Path) -> None:
    with pytest.raises(KnownError) as caught:
        begun(lite, "timm/mobilenetv3_small_050", 2)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("teacher.init: ")
    assert "is not a timm/mobilenetv3_small_050 of 2 classes for 64×64 images" in first
    assert any("108 unexpected: blocks.3.2.bn1" in line for line in lines)
    assert any("of another shape: conv_stem.weight [32, 3, 3, 3] instead of [16, 3, 3, 3]" in line for line in lines)


def test_a_given_teacher_of_imagenets_classes(lite: Path) -> None:
    given = Given(
        role="teacher",
        model="timm/tf_efficientnet_lite0",
        sha256=fingerprint(lite),
        normalize=Normalization(mean=(0.5,) * 3, std=(0.5,) * 3),
        dataset=DatasetSpec(**{**DATASET.model_dump(), "num_classes": 2, "image_size": 64}),
    )
    with pytest.raises(KnownError, match="it is a timm/tf_efficientnet_lite0 of 1000 classes") as caught:
        load_network(lite, given)
    assert str(caught.value).splitlines()[-1].startswith(f"  everything but the classifier fits: teacher.init={lite}")


def test_weights_of_torchvision(tmp_path: Path) -> None:
    network = build("torchvision/mobilenet_v3_small", num_classes=7, image_size=64)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "net.pth")
    begins, line = begun(tmp_path / "net.pth", "torchvision/mobilenet_v3_small", 4)
    assert line == "torchvision/mobilenet_v3_small: its classifier of 7 classes is made anew for 4"
    for each, tensor in begins.state_dict().items():
        same = torch.equal(tensor, network.state_dict()[each])
        assert same != each.startswith("classifier.3."), each


@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/squeezenet1_1"])
def test_published_weights_are_fetched_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, function = (timm, "create_model") if name.startswith("timm/") else (torchvision.models, "get_model")
    real, fetched_networks = getattr(package, function), []

    def offline(arch: str, **how: Any) -> nn.Module:
        network: nn.Module = real(arch, **{k: v for k, v in how.items() if k not in ("pretrained", "weights")})
        if how.get("pretrained") or how.get("weights"):
            fetched_networks.append(network)
        return network

    monkeypatch.setattr(package, function, offline)
    monkeypatch.setattr("kd.models.libraries._reach", lambda *told: None)
    place = fetched(name, tmp_path)
    assert place == tmp_path / "pretrained" / f"{name.replace('/', '-')}.safetensors"
    assert fetched(f"{name}?", tmp_path) == place
    (published,) = fetched_networks
    network, line = begun(place, name, 1000)
    assert line is None
    assert all(map(torch.equal, network.state_dict().values(), published.state_dict().values()))
    assert [each.name for each in place.parent.iterdir()] == [place.name]


def test_published_weights_of_timm_are_read_as_its_hub_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in in the cache of Hugging Face, which is read without network."""
    config = timm.get_pretrained_cfg("lcnet_050")
    place = tmp_path / f"models--{config.hf_hub_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    published = build("timm/lcnet_050", num_classes=1000)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(published.state_dict(), place / "snapshots" / ("0" * 40) / "model.safetensors")
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(tmp_path))):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    network, line = begun(fetched("timm/lcnet_050", tmp_path), "timm/lcnet_050", 3)
    said = capsys.readouterr().out
    assert said == f"timm/lcnet_050: its published weights are fetched, once, into {tmp_path}/pretrained\n"
    assert line == "timm/lcnet_050: its classifier of 1,000 classes is made anew for 3"
    assert torch.equal(network.get_parameter("conv_stem.weight"), published.get_parameter("conv_stem.weight"))


def test_published_weights_of_torchvision_are_read_as_its_hub_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in in the cache of torch.hub. Nothing else is asked for."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", None)
    published = build("torchvision/squeezenet1_1", num_classes=1000, image_size=224)
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    (tmp_path / "checkpoints").mkdir()
    torch.save(published.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    network, _ = begun(fetched("torchvision/squeezenet1_1", tmp_path), "torchvision/squeezenet1_1", 1000)
    assert all(map(torch.equal, network.state_dict().values(), published.state_dict().values()))


def test_what_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Any, timeout: float) -> None:
        assert timeout <= 10
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    for name, address in (("timm/resnet10t", "huggingface.co"), ("torchvision/resnet18", "download.pytorch.org")):
        message = (
            rf"^teacher\.init: the weights of {name} cannot be fetched: https://{address}\S* does not answer: Name or "
            r"service not known; .*where you have the weights in a file, teacher\.init=<file> takes them$"
        )
        with pytest.raises(KnownError, match=message) as caught:
            fetched(name, tmp_path, "teacher.init")
        assert "\n" not in str(caught.value)
        assert ("HF_HUB_OFFLINE" in str(caught.value)) == name.startswith("timm/")
    with pytest.raises(KnownError, match=r"^teacher\.init: timm publishes no weights of resnet50_mlp;"):
        fetched("timm/resnet50_mlp", tmp_path, "teacher.init")
    with pytest.raises(KnownError, match=r"^init: resnet8 has no published weights: only networks of timm and torch"):
        fetched("resnet8", tmp_path)
    assert not (tmp_path / "pretrained").exists()


# features ---------------------------------------------------------------------------------------------------------

# name: the sizes of its maps of a 64×64 image, and the number of its pooled features
FEATURES = {
    "timm/resnet10t": ([16, 8, 4, 2], 512),
    "timm/mobilenetv3_small_050": ([16, 8, 4, 2], 1024),
    "timm/tf_efficientnet_lite0": ([16, 8, 4, 2], 1280),
    "timm/convnext_atto": ([16, 8, 4, 2], 320),
    "timm/swin_tiny_patch4_window7_224?img_size=64": ([16, 8, 4, 2], 768),
    "torchvision/swin_t": ([16, 8, 4, 2], 768),
    "torchvision/resnet18": ([16, 8, 4, 2], 512),
    "torchvision/mobilenet_v3_small": ([16, 8, 4, 2], 1024),
    "torchvision/squeezenet1_1": ([15, 7, 3], None),
}


@pytest.mark.parametrize("name", FEATURES)
def test_maps_and_pooled_features(name: str) -> None:
    torch.manual_seed(0)
    sizes, features = FEATURES[name]
    network = build(name, num_classes=5, image_size=64).eval()
    tapped = Tapped(network, stages=True, pre=False, pooled=features is not None)
    logits = network(torch.randn(2, 3, 64, 64))
    maps, pooled = tapped.take()
    assert list(maps) == [f"stage{i}" for i in range(1, len(sizes) + 1)]
    assert [each.shape[2] for each in maps.values()] == [each.shape[3] for each in maps.values()] == sizes
    if features is not None:
        assert pooled is not None
        assert pooled.shape == (2, features)
        torch.testing.assert_close(network.get_submodule(head(network))(pooled), logits)
    total = torch.stack([each.mean() for each in maps.values()]).sum()
    gradients = torch.autograd.grad(total, next(network.parameters()))
    assert gradients[0].any()


# Of 384 pixels, the first maps have as many channels as rows.
@pytest.mark.parametrize("size", [pytest.param(224, marks=pytest.mark.slow), 384])
def test_maps_with_their_channels_last_are_turned(size: int) -> None:
    name = f"timm/swin_tiny_patch4_window7_224?img_size={size}"
    assert [each.channels_last for each in stage_ends(name)] == [True] * 4
    with torch.device("meta"), torch.no_grad():
        network = build(name, num_classes=5).eval()
        tapped = Tapped(network, stages=True, pre=False, pooled=False)
        network(torch.zeros(1, 3, size, size))
    shapes = [tuple(each.shape) for each in tapped.take()[0].values()]
    assert shapes == [(1, 96 * 2**i, size >> i + 2, size >> i + 2) for i in range(4)]
    assert not any(each.channels_last for each in stage_ends("timm/resnet10t"))


def test_a_map_that_is_turned_has_the_same_values() -> None:
    torch.manual_seed(0)
    network, seen = build("torchvision/swin_t", num_classes=5).eval(), list[torch.Tensor]()
    path = stage_ends("torchvision/swin_t")[0].path
    network.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    tapped = Tapped(network, stages=True, pre=False, pooled=False)
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    found, first = tapped.take()[0]["stage1"], seen[0]
    assert found.shape == (1, 96, 16, 16)
    assert torch.equal(found[0, 5, 3, 7], first[0, 3, 7, 5])


def test_networks_without_maps_say_what_works() -> None:
    # HRNet's stages end in several maps, LeViT's in tokens.
    convolutional = ("timm/hrnet_w18_small", "timm/levit_128s")
    for name in ("timm/vit_tiny_patch16_224", "timm/mixer_s32_224", "torchvision/vit_b_32", *convolutional):
        with torch.device("meta"):
            network = build(name, num_classes=5, image_size=224)
        message = f"no stage of {name} ends in one; losses that read logits or pooled features alone work with it$"
        with pytest.raises(KnownError, match=message):
            Tapped(network, stages=True, pre=False, pooled=False)
        if len(last_layers(network)) == 1:
            Tapped(network, stages=False, pre=False, pooled=True)
    with torch.device("meta"):
        network = build("timm/resnet10t", num_classes=5)
    with pytest.raises(
        KnownError, match=r"^losses on maps before their activation need other networks: timm/resnet10t"
    ):
        Tapped(network, stages=True, pre=True, pooled=False)


def one_of_each_file() -> list[str]:
    """The first network of each of timm's files, and every one of torchvision that gives logits alone."""
    files = {timm.model_entrypoint(name).__module__: name for name in reversed(timm.list_models())}
    skipped = ("googlenet", "inception_v3")  # they need an option
    return [f"timm/{name}" for name in files.values()] + [
        f"torchvision/{name}" for name in LIBRARIES["torchvision"].names() if name not in skipped
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each_file())
def test_every_kind_of_network(name: str) -> None:
    """It is made, and runs; its last layer gets pooled features, and each of its stages ends in a map."""
    how = preprocessing_of(name)
    size = how.size if how and how.size else own_size(name)
    assert size is not None
    with torch.device("meta"):
        network, images = build(name, num_classes=5, image_size=size).eval(), torch.zeros(2, 3, size, size)
    tapped = [Tapped(network, stages=False, pre=False, pooled=True)] if len(last_layers(network)) == 1 else []
    tapped += [Tapped(network, stages=True, pre=False, pooled=False)] if stage_ends(name) else []
    with torch.no_grad():
        assert network(images).shape == (2, 5)
    for each in tapped:
        maps, pooled = each.take()
        assert pooled is None or pooled.dim() == 2
        sides = [one.shape[2] for one in maps.values()]
        assert sides == sorted(sides, reverse=True)
        assert all(one.dim() == 4 and one.shape[2] == one.shape[3] for one in maps.values())


def test_two_classifiers_have_no_common_input() -> None:
    with torch.device("meta"):
        network = build("timm/deit_tiny_distilled_patch16_224", num_classes=5)
    assert last_layers(network) == ("head", "head_dist")
    with torch.device("meta"):
        assert head(build("timm/hrnet_w18_small", num_classes=5, image_size=64)) == "classifier"  # its .head is a text
    with pytest.raises(
        KnownError, match=r"VisionTransformerDistilled has 2 last layers \(head and head_dist\): one is needed$"
    ):
        head(network)


# folding ----------------------------------------------------------------------------------------------------------

FOLDED = ["timm/resnet10t", "torchvision/resnet18", "torchvision/mobilenet_v3_small", "timm/tf_efficientnet_lite0"]
MORE = ["mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_lite0", "vit_tiny_patch16_224"]
MORE += ["convnext_atto", "repvgg_a0", "mobileone_s0", "lcnet_050", "resnet18"]


@pytest.mark.parametrize("name", [*FOLDED, *(pytest.param(f"timm/{arch}", marks=pytest.mark.slow) for arch in MORE)])
def test_folding_changes_no_logits_of_a_librarys_network(name: str) -> None:
    torch.manual_seed(0)
    size = 224 if name.startswith("timm/vit") else 64
    network = build(name, num_classes=5, image_size=size).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for tensor in (state["running_mean"], state["bias"]):
                nn.init.normal_(tensor, 0, 0.1)
            for tensor in (state["running_var"], state["weight"]):
                nn.init.uniform_(tensor, 0.5, 1.5)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    folded = fold(network, images)
    assert network.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    with torch.inference_mode():
        tapped = Tapped(folded, stages=False, pre=False, pooled=True, of=network)
        logits = folded(images)
        torch.testing.assert_close(logits, network.eval()(images))
        _, pooled = tapped.take()
        assert pooled is not None
        torch.testing.assert_close(network.get_submodule(head(network))(pooled), logits)
    norms, left = (sum(type(m) is nn.BatchNorm2d for m in n.modules()) for n in (network, folded))
    assert left == 0 or name == "timm/tf_efficientnet_lite0" or norms == 0


def test_a_network_that_cannot_be_traced_is_copied() -> None:
    for name in ("timm/mobilevitv2_050", "timm/swin_tiny_patch4_window7_224?img_size=64"):
        network = build(name, num_classes=5, image_size=64).eval()
        images = torch.randn(1, 3, 64, 64)
        folded = fold(network, images)
        assert type(folded) is type(network)
        assert folded is not network
        with torch.inference_mode():
            torch.testing.assert_close(folded(images), network(images))
