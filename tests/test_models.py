"""Every network of the table: parameter counts, names, shapes, initialisation, image sizes."""

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kd.core.spec import KnownError
from kd.models import MODELS, build
from kd.models.folding import fold
from kd.models.normalization import Normalized


class Published(NamedTuple):
    """Parameters for 10, 100 and 200 classes, entries of the state_dict, 10⁶ multiplications of a 32×32 image."""

    of_10: int
    of_100: int
    of_200: int | None
    entries: int
    mmacs: float | None  # for 100 classes


PUBLISHED = {
    "plane2": Published(13_082, 215_172, None, 16, None),
    "plane4": Published(37_338, 475_652, None, 30, None),
    "plane6": Published(82_778, 1_107_204, None, 44, None),
    "plane8": Published(327_962, 1_246_276, None, 60, None),
    "plane10": Published(2_487_850, 2_931_460, None, 74, None),
    "resnet8": Published(78_042, 83_892, None, 56, 12.5),
    "resnet14": Published(175_258, 181_108, None, 92, 26.7),
    "resnet20": Published(272_474, 278_324, None, 128, 40.8),
    "resnet26": Published(369_690, 375_540, None, 164, 55.0),
    "resnet32": Published(466_906, 472_756, None, 200, 69.1),
    "resnet44": Published(661_338, 667_188, None, 272, 97.4),
    "resnet56": Published(855_770, 861_620, None, 344, 125.7),
    "resnet110": Published(1_730_714, 1_736_564, None, 668, 253.1),
    "net": Published(357_514, 369_124, 382_024, 30, 10.6),
    "mlp": Published(1_841_162, 1_887_332, 1_938_632, 6, 1.9),
    "resnet18": Published(11_173_962, 11_220_132, 11_271_432, 122, 555),
    "resnet34": Published(21_282_122, 21_328_292, 21_379_592, 218, 1_159),
    "resnet50": Published(23_520_842, 23_705_252, 23_910_152, 320, 1_298),
    "resnet101": Published(42_512_970, 42_697_380, 42_902_280, 626, None),
    "resnet152": Published(58_156_618, 58_341_028, 58_545_928, 932, None),
    "preresnet20": Published(272_282, 278_132, None, 118, 41),
    "preresnet32": Published(466_714, 472_564, None, 190, 69),
    "preresnet44": Published(683_162, 706_292, None, 389, 101),
    "preresnet56": Published(868_634, 891_764, None, 497, 127),
    "preresnet110": Published(1_703_258, 1_726_388, None, 983, 248),
    "resnext29_8x64d": Published(34_426_698, 34_518_948, 34_621_448, 188, 5_387),
    "densenet121": Published(6_956_298, 7_048_548, 7_151_048, 722, 888),
    "densenet161": Published(26_482_378, 26_681_188, 26_902_088, 962, 2_468),
    "densenet169": Published(12_493_322, 12_643_172, 12_809_672, 1_010, 1_060),
    "densenet201": Published(18_104_330, 18_277_220, 18_469_320, 1_202, None),
    "mobilenetv2": Published(2_254_090, 2_369_380, 2_497_480, 373, 64.9),
    "shufflenetv2": Published(1_268_646, 1_360_896, 1_463_396, 394, 43.7),
}
# The smallest of each family of the trained teacher's networks, and of each kind of block.
ONE_OF_EACH = ["net", "mlp", "resnet18", "resnet50", "preresnet20", "preresnet44", "resnext29_8x64d", "densenet121"]
ONE_OF_EACH += ["mobilenetv2", "shufflenetv2"]


def on_meta(name: str, classes: int = 10, size: int = 32) -> nn.Module:
    """A network without its numbers: quick to make and to run, whatever its size."""
    with torch.device("meta"):
        return build(name, num_classes=classes, image_size=size).eval()


def parameters(name: str, classes: int) -> int:
    return sum(p.numel() for p in on_meta(name, classes).parameters())


def test_every_network_of_the_papers_is_there() -> None:
    assert PUBLISHED.keys() <= MODELS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts(name: str) -> None:
    known = PUBLISHED[name]
    network = on_meta(name)
    assert sum(p.numel() for p in network.parameters()) == known.of_10
    assert len(network.state_dict()) == known.entries
    assert parameters(name, 100) == known.of_100
    assert known.of_200 is None or parameters(name, 200) == known.of_200


@pytest.mark.parametrize("name", [name for name, known in PUBLISHED.items() if known.mmacs])
def test_multiplications(name: str) -> None:
    network, macs = on_meta(name, 100), 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module.weight, torch.Tensor)
        macs += module.weight.numel() * output[0, 0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network(torch.zeros(2, 3, 32, 32, device="meta"))
    known = PUBLISHED[name].mmacs
    assert macs / 1e6 == pytest.approx(known, abs=0.06 if isinstance(known, float) else 0.5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_depth_is_what_the_name_says_or_the_layers(name: str) -> None:
    layers = [
        key
        for key, module in on_meta(name).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in key and "downsample" not in key
    ]
    depth = MODELS[name].depth
    if name in ("preresnet44", "preresnet56", "preresnet110"):  # a bottleneck's third convolution is not counted
        depth += (depth - 2) // 2
    if name.startswith("plane"):  # linear layers are not
        layers = [key for key in layers if key.startswith("conv")]
    assert len(layers) == depth


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_fresh_network(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=7).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=10, image_size=16)
    nn.functional.cross_entropy(network(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(("depth", "millions"), [(18, 11.690), (34, 21.798), (50, 25.557)])
def test_imagenets_resnets_are_those_of_torchvision(depth: int, millions: float) -> None:
    """The same parameters, maps of convolutions, and scale of initial weights."""
    from torchvision import models

    torch.manual_seed(0)
    ours, known = build(f"resnet{depth}_imagenet", num_classes=1000, image_size=64), models.get_model(f"resnet{depth}")
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    maps: list[list[tuple[int, ...]]] = []
    for network in (ours, known):
        maps.append([])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _module, _inputs, output: maps[-1].append(tuple(output.shape)))
        network.eval()(torch.zeros(1, 3, 64, 64))
    assert sorted(maps[0]) == sorted(maps[1])
    for (name, one), (_, other) in zip(convolutions(ours), convolutions(known), strict=True):
        assert one.shape == other.shape, name
        assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), name


def convolutions(network: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and weights of convolutions. A block's shortcut comes last."""
    return [(name, module.weight) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(("depth", "millions"), [(14, 5.788), (20, 11.764)])
def test_takds_small_resnets_of_imagenet(depth: int, millions: float) -> None:
    """ResNet14 has the published number of pytorchcv's. ResNet20 is ResNet18 with one block more, of 73,984."""
    network = on_meta(f"resnet{depth}_imagenet", 1000, 224)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    layers = [name for name, _ in convolutions(network) if "shortcut" not in name]
    assert len(layers) + 1 == depth
    assert network(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def names(name: str, classes: int = 10) -> set[str]:
    return {key.rsplit(".", 1)[0] for key in on_meta(name, classes).state_dict()}


def test_names_of_the_cifar_resnet() -> None:
    first = {f"layer1.0.{part}" for part in ("conv1", "bn1", "conv2", "bn2")}
    rest = {
        f"layer{i}.0.{part}"
        for i in (2, 3)
        for part in ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1")
    }
    assert names("resnet8") == {"conv1", "bn1", "fc"} | first | rest
    assert "layer3.17.bn2" in names("resnet110")
    assert "layer3.18.bn2" not in names("resnet110")


def test_names_of_plane_count_relu_and_pooling() -> None:
    assert names("plane2") == {f"conv_layers.{i}" for i in (0, 1, 4, 5)} | {"fc_layers.0"}
    assert {key for key in names("plane10") if key.startswith("fc")} == {"fc_layers.0", "fc_layers.2"}


# name: how many of its modules have weights or statistics, and some that tell its naming from others'
NAMES = {
    "net": (9, {"conv1", "bn1", "conv3", "bn3", "fc1", "fcbn1", "fc2"}),
    "mlp": (3, {"fc1", "fc2", "fc3"}),
    "resnet18": (41, {"conv1", "bn1", "layer1.0.conv2", "layer2.0.shortcut.0", "layer4.0.shortcut.1", "linear"}),
    "resnet50": (107, {"layer1.0.shortcut.1", "layer1.0.bn3", "layer3.5.conv3", "layer4.2.conv1", "linear"}),
    "preresnet20": (41, {"conv1", "layer1.0.bn1", "layer2.0.downsample.0", "layer3.2.conv2", "bn", "fc"}),
    "preresnet44": (132, {"layer1.0.downsample.0", "layer1.0.bn3", "layer3.6.conv3", "bn", "fc"}),
    "resnext29_8x64d": (
        63,
        {
            "conv_1_3x3",
            "bn_1",
            "stage_1.stage_1_bottleneck_0.shortcut.shortcut_conv",
            "stage_1.stage_1_bottleneck_0.shortcut.shortcut_bn",
            "stage_3.stage_3_bottleneck_2.conv_reduce",
            "stage_3.stage_3_bottleneck_2.bn_reduce",
            "stage_3.stage_3_bottleneck_2.conv_conv",
            "stage_3.stage_3_bottleneck_2.bn",
            "stage_3.stage_3_bottleneck_2.conv_expand",
            "stage_3.stage_3_bottleneck_2.bn_expand",
            "classifier",
        },
    ),
    "densenet121": (
        241,
        {
            "conv1",
            "features.dense_block_layer_0.bottle_neck_layer_5.bottle_neck.0",
            "features.transition_layer_2.down_sample.1",
            "features.dense_block3.bottle_neck_layer_15.bottle_neck.5",
            "features.bn",
            "linear",
        },
    ),
    "mobilenetv2": (
        107,
        {
            "pre.0",
            "pre.1",
            "stage1.residual.0",
            "stage2.1.residual.3",
            "stage6.2.residual.7",
            "stage7.residual.6",
            "conv1.0",
            "conv1.1",
            "conv2",
        },
    ),
    "shufflenetv2": (
        113,
        {
            "pre.0",
            "pre.1",
            "stage2.0.shortcut.0",
            "stage2.0.shortcut.3",
            "stage2.0.residual.3",
            "stage3.7.residual.6",
            "conv5.0",
            "conv5.1",
            "fc",
        },
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_trained_teachers_networks(name: str) -> None:
    modules, some = NAMES[name]
    assert len(names(name)) == modules
    assert some <= names(name)


def test_names_end_where_the_stages_do() -> None:
    assert "layer3.22.bn3" in names("resnet101")
    assert "layer3.23.bn3" not in names("resnet101")
    assert "layer1.0.shortcut.0" not in names("resnet18")
    assert "layer1.0.downsample.0" not in names("preresnet20")
    assert "layer2.0.downsample.1" not in names("preresnet20")  # no BatchNorm there
    assert "stage_1.stage_1_bottleneck_3.bn" not in names("resnext29_8x64d")
    assert "features.dense_block_layer_3.bottle_neck_layer_0.bottle_neck.0" not in names("densenet121")
    assert "stage2.1.shortcut.0" not in names("shufflenetv2")


def test_plane6_of_100_classes_ends_without_pooling() -> None:
    pools = [sum(isinstance(m, nn.MaxPool2d) for m in build("plane6", num_classes=c).modules()) for c in (10, 100)]
    assert pools == [3, 2]


def test_initialisation_of_the_cifar_resnet() -> None:
    torch.manual_seed(0)
    network = build("resnet110", num_classes=10)
    weight = network.get_parameter("layer3.5.conv1.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert network.get_parameter("bn1.weight").eq(1).all()


def test_initialisation_of_the_preresnet() -> None:
    torch.manual_seed(0)
    network = build("preresnet110", num_classes=10)
    weight = network.get_parameter("layer3.5.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    weight = network.get_parameter("layer3.5.conv1.weight")
    assert weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)
    assert network.get_parameter("bn.weight").eq(1).all()
    assert network.get_parameter("fc.weight").abs().max().item() <= 256**-0.5  # torch's own


def test_initialisation_of_the_resnext() -> None:
    torch.manual_seed(0)
    network = build("resnext29_8x64d", num_classes=100)
    block = "stage_2.stage_2_bottleneck_0"
    spread = {
        f"{block}.conv_conv": 9 * 1024,  # torch's fan-out does not know groups
        f"{block}.conv_reduce": 1024,
        f"{block}.shortcut.shortcut_conv": 512,
        "classifier": 1024,
    }
    for key, fan in spread.items():
        assert network.get_parameter(f"{key}.weight").std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.02), key
    assert network.get_parameter("classifier.bias").eq(0).all()
    assert network.get_parameter(f"{block}.bn.weight").eq(1).all()


def test_logits_of_the_mlp_may_be_negative() -> None:
    torch.manual_seed(0)
    assert (build("mlp", num_classes=10)(torch.randn(8, 3, 32, 32)) < 0).any()


def test_stem_of_the_mobilenetv2_pads() -> None:
    network = on_meta("mobilenetv2")
    x, sides = torch.zeros(1, 3, 32, 32, device="meta"), []
    for part in ("pre", "stage1", "stage2", "stage3", "stage4"):
        x = network.get_submodule(part)(x)
        sides.append(x.shape[-1])
    assert sides == [34, 34, 17, 9, 5]


def test_unit_of_the_shufflenetv2_keeps_a_half_and_interleaves() -> None:
    unit = build("shufflenetv2", num_classes=10).get_submodule("stage2.1").eval()
    x = torch.randn(2, 116, 4, 4)
    with torch.inference_mode():
        y = unit(x)
        assert torch.equal(y[:, 0::2], x[:, :58])
        assert torch.equal(y[:, 1::2], unit.get_submodule("residual")(x[:, 58:]))


# A third of them; `make test-slow` has all.
@pytest.mark.parametrize(
    "name", [name if i % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(MODELS)]
)
def test_other_image_sizes(name: str) -> None:
    taken = []
    for size in (16, 64):
        with suppress(KnownError):  # a network that is added may refuse a size
            taken.append(on_meta(name, 10, size)(torch.zeros(2, 3, size, size, device="meta")).shape)
    assert taken in ([(2, 10)], [(2, 10)] * 2)
    assert len(taken) == 2 or name not in PUBLISHED


LEAST = {"plane2": 4, "plane4": 4, "plane6": 8, "plane8": 16, "plane10": 16, "net": 8}
LEAST |= {name: 8 for name in PUBLISHED if name.startswith("densenet")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_least_image_size(name: str) -> None:
    least = LEAST.get(name, 1)
    assert on_meta(name, 10, least)(torch.zeros(2, 3, least, least, device="meta")).shape == (2, 10)
    if least > 1:
        with pytest.raises(KnownError, match=f"^{name} .*at least {least} pixels wide \\(got {least - 1}\\)"):
            on_meta(name, 10, least - 1)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if name not in ("mlp", "resnet50")])
def test_folding_changes_no_logits(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=10, image_size=8).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, 0, 0.1)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = fold(network, images)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), network(images))
    left, before = (sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (folded, network))
    assert left < before
    assert left == 0 or name.startswith(("preresnet", "densenet"))  # those have some in front of a convolution


class _Twice(nn.Module):
    """One convolution, called twice, each time with a BatchNorm of its own: torch.fx folds both into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.conv(self.one(self.conv(x)))).mean((2, 3))


class _Scaled(_Twice):
    """The stand-in for `scale` is not None: torch.fx takes the other branch."""

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        return self.one(self.conv(x if scale is None else x + 1)).mean((2, 3))


class _Masked(_Twice):
    """The traced copy multiplies by None."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.one(self.conv(x if mask is None else x * mask)).mean((2, 3))


@pytest.mark.parametrize("kind", [_Twice, _Scaled, _Masked])
def test_a_network_that_is_folded_wrongly_is_copied(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind()
    network(torch.randn(8, 3, 4, 4))  # statistics of its own, so that folding them matters
    before, images = deepcopy(network.state_dict()), torch.randn(2, 3, 4, 4)
    drawn = torch.get_rng_state()
    folded = fold(network, images)
    assert type(folded) is kind
    torch.testing.assert_close(folded(images), network.eval()(images))
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_normalized_takes_both_kinds_of_images() -> None:
    network = Normalized(nn.Flatten(), (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(network(images), network(images.float() / 255))
    torch.testing.assert_close(network(images), network(images.double() / 255))
    assert network(images)[0, 0].item() == pytest.approx((images[0, 0, 0, 0].item() / 255 - 0.5) / 0.5)
    assert not network.state_dict()  # statistics are no weights
    for wrong in (images[:, :1], images[0], images.long()):
        with pytest.raises(ValueError, match="images should be"):
            network(wrong)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda network: network, torch.float32),
        (lambda network: network.double(), torch.float64),
        (lambda network: network.to("cpu", torch.float64), torch.float64),
        (lambda network: network.half().double(), torch.float64),
        (lambda network: network.double().float(), torch.float32),
        (lambda network: deepcopy(network.bfloat16()).to(torch.zeros(1, dtype=torch.float64)), torch.float64),
    ],
)
def test_mean_and_std_are_exact_in_the_networks_type(convert: Callable[[nn.Module], nn.Module], dtype: Any) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    network = convert(Normalized(nn.Flatten(), mean, std))
    assert network.mean.flatten().tolist() == torch.tensor(mean, dtype=dtype).tolist()
    assert network.std.flatten().tolist() == torch.tensor(std, dtype=dtype).tolist()
    seen = network(torch.full((1, 3, 1, 1), 77, dtype=torch.uint8))[0]
    exact = [(77 / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    assert seen.tolist() == pytest.approx(exact, rel=1e-15 if dtype == torch.float64 else 1e-6)


# What counts, names and sizes cannot see: the order in which modules are applied, first to last.
ORDERS = {
    "plane2": "conv_layers.0 .1 .2 .3 .4 .5 .6 .7 fc_layers.0",
    "net": "conv1 bn1 pool relu1 conv2 bn2 pool relu2 conv3 bn3 pool relu3 fc1 fcbn1 relu fc2",
    "mlp": "fc1 relu fc2 relu fc3",
    "resnet8": "conv1 bn1 relu layer1.0.conv1 .bn1 .relu .conv2 .bn2 .relu layer2.0.downsample.0 .1",
    "resnet18": "conv1 bn1 relu layer1.0.conv1 .bn1 .relu .conv2 .bn2 .relu layer1.1.conv1 .bn1 .relu .conv2 .bn2",
    "resnet50": "conv1 bn1 relu layer1.0.conv1 .bn1 .relu .conv2 .bn2 .relu .conv3 .bn3",
    "preresnet20": "conv1 layer1.0.bn1 .relu .conv1 .bn2 .relu .conv2 layer1.1.bn1 .relu .conv1 .bn2 .relu .conv2",
    "preresnet44": "conv1 layer1.0.downsample.0 layer1.0.bn1 .relu .conv1 .bn2 .relu .conv2 .bn3 .relu .conv3",
    "resnext29_8x64d": "conv_1_3x3 bn_1 relu stage_1.stage_1_bottleneck_0.conv_reduce .bn_reduce .relu .conv_conv .bn",
    "densenet121": "conv1 features.dense_block_layer_0.bottle_neck_layer_0.bottle_neck.0 .1 .2 .3 .4 .5",
    "mobilenetv2": "pre.0 .1 .2 stage1.residual.0 .1 .2 .3 .4 .5 .6 .7 stage2.0.residual.0",
    "shufflenetv2": "pre.0 .1 stage2.0.shortcut.0 .1 .2 .3 .4 stage2.0.residual.0 .1 .2 .3 .4 .5 .6 .7",
}
ENDS = {
    "preresnet20": "bn relu fc",
    "preresnet110": "bn relu fc",
    "densenet121": "features.bn .relu linear",
    "resnext29_8x64d": "classifier",
    "mobilenetv2": "conv1.0 .1 .2 conv2",
    "shufflenetv2": "conv5.0 .1 .2 fc",
}


def modules_in_order(name: str) -> list[str]:
    from torch import fx

    with torch.device("meta"):
        traced = fx.symbolic_trace(build(name, num_classes=10))
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


def spelled_out(text: str) -> list[str]:
    """`.1` stands for the neighbour of the module before it."""
    names: list[str] = []
    for word in text.split():
        names.append(f"{names[-1].rpartition('.')[0]}{word}" if word.startswith(".") else word)
    return names


@pytest.mark.parametrize("name", ORDERS)
def test_modules_are_applied_in_order(name: str) -> None:
    wanted = spelled_out(ORDERS[name])
    assert modules_in_order(name)[: len(wanted)] == wanted


@pytest.mark.parametrize("name", ENDS)
def test_the_last_modules(name: str) -> None:
    wanted = spelled_out(ENDS[name])
    assert modules_in_order(name)[-len(wanted) :] == wanted
