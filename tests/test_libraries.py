"""Networks of timm and torchvision: their names, how they are made, and how they prepare their images."""

import pytest
import torch

from kd.core.spec import KnownError
from kd.core.stage import Normalization
from kd.models import MODELS, ModelEntry, build, canonical, own_size, preprocessing_of
from kd.models.normalization import Normalized

pytest.importorskip("timm", reason="the extra kd[timm] is not installed")

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
    with pytest.raises(ValueError, match=r"^timm/resnet26 needs the package timm: pip install 'kd\[timm\]'$"):
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
