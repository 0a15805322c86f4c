"""The networks of RepDistiller's CIFAR-100 benchmark, and the taps of all networks."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kd.core.spec import KnownError
from kd.models import MODELS, build
from kd.models.taps import Tapped
from tests.test_given import LAYOUTS, load, network_of, same_logits
from tests.test_models import ONE_OF_EACH, PUBLISHED, modules_in_order, names, on_meta, spelled_out


class Benchmark(NamedTuple):
    """Parameters for 100 classes, entries of the state_dict, and the ends of the stages for 32×32 images."""

    parameters: int
    entries: int
    stages: str
    pooled: int


_X4 = "64×32 128×16 256×8"
_NARROW, _WIDE = "16×32 32×16 64×8", "32×32 64×16 128×8"
_VGG = "128×16 256×8 512×4 512×4"
BENCHMARK = {
    "resnet8x4": Benchmark(1_233_540, 62, _X4, 256),
    "resnet32x4": Benchmark(7_433_860, 206, _X4, 256),
    "wrn_16_1": Benchmark(180_916, 82, _NARROW, 64),
    "wrn_16_2": Benchmark(703_284, 83, _WIDE, 128),
    "wrn_40_1": Benchmark(569_780, 226, _NARROW, 64),
    "wrn_40_2": Benchmark(2_255_156, 227, _WIDE, 128),
    "vgg8": Benchmark(3_965_028, 37, _VGG, 512),
    "vgg11": Benchmark(9_277_284, 58, _VGG, 512),
    "vgg13": Benchmark(9_462_180, 72, _VGG, 512),
    "vgg16": Benchmark(14_774_436, 93, _VGG, 512),
    "vgg19": Benchmark(20_086_692, 114, _VGG, 512),
    "mobilenetv2_half": Benchmark(812_836, 320, "12×16 16×8 48×4 160×2", 1280),
    "shufflenetv1": Benchmark(949_258, 296, "240×16 480×8 960×4", 960),
    "shufflenetv2_rd": Benchmark(1_355_528, 338, "116×16 232×8 464×4", 1024),
}
# The same of the networks whose published weights fit two projects, and of the others.
OTHERS = {
    "resnet20": (_NARROW, 64),
    "resnet110": (_NARROW, 64),
    "resnet50": ("256×32 512×16 1024×8 2048×4", 2048),
    "resnet18": ("64×32 128×16 256×8 512×4", 512),
    "preresnet20": (_NARROW, 64),
    "preresnet44": ("64×32 128×16 256×8", 256),
    "resnext29_8x64d": ("256×32 512×16 1024×8", 1024),
    "densenet121": ("256×32 512×16 1024×8 1024×4", 1024),
    "mobilenetv2": ("16×34 24×17 32×9 320×5", 1280),
    "shufflenetv2": ("116×16 232×8 464×4", 1024),
    "net": ("32×16 64×8 128×4", 128),
    "plane2": ("32×16 32×8", 2048),
    "plane6": ("32×16 64×8 128×8", 8192),
    "plane8": ("32×16 64×8 128×4 256×2", 64),
    "mlp": ("", 512),
}
SMALLEST = ["resnet8x4", "wrn_16_1", "wrn_16_2", "vgg8", "mobilenetv2_half", "shufflenetv1", "shufflenetv2_rd"]
# Each takes seconds in each of the tests below: they are for `make test-slow`.
LARGE = ("resnet50", "resnext29_8x64d", "densenet121")
SOME = [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
    for name in ("plane2", "plane8", "resnet8", *ONE_OF_EACH, *SMALLEST)
]
MAPPED = [name for name in SOME if name != "mlp"]


def tapped(network: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The maps, the pooled features and the logits."""
    has_maps = bool(network.taps())  # type: ignore[operator]
    taps = Tapped(network, has_maps, has_maps, True)
    logits = network(x)
    maps, pooled = taps.take()
    taps.close()
    assert pooled is not None
    return maps, pooled, logits


def images(size: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, size, size)


def shapes(name: str) -> tuple[str, str, int]:
    maps, pooled, _ = tapped(on_meta(name, 100), torch.zeros(2, 3, 32, 32, device="meta"))
    stages = [f"{m.shape[1]}×{m.shape[2]}" for m in maps.values()]
    half = len(stages) // 2
    assert [*maps] == [f"stage{i + 1}" for i in range(half)] + [f"stage{i + 1}_pre" for i in range(half)]
    return " ".join(stages[:half]), " ".join(stages[half:]), pooled.shape[1]


# the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARK)
def test_parameters_and_entries(name: str) -> None:
    network, known = on_meta(name, 100), BENCHMARK[name]
    assert sum(p.numel() for p in network.parameters()) == known.parameters
    assert len(network.state_dict()) == known.entries


@pytest.mark.parametrize("name", BENCHMARK)
def test_stages_are_the_benchmarks(name: str) -> None:
    known = BENCHMARK[name]
    assert shapes(name) == (known.stages, known.stages, known.pooled)


@pytest.mark.parametrize("name", OTHERS)
def test_stages_of_the_other_networks(name: str) -> None:
    stages, pooled = OTHERS[name]
    assert shapes(name) == (stages, stages, pooled)


NAMES = {
    "resnet8x4": "conv1 bn1 layer1.0.conv2 layer1.0.downsample.0 layer1.0.downsample.1 layer3.0.bn2 fc",
    "resnet32x4": "layer1.4.bn2 layer3.4.conv2",
    "wrn_16_2": "conv1 block1.layer.0.bn1 block1.layer.0.convShortcut block3.layer.1.conv2 bn1 fc",
    "wrn_40_1": "block2.layer.0.convShortcut block3.layer.5.bn2",
    "vgg8": "block0.0 block0.1 block4.0 block4.1 classifier",
    "vgg13": "block0.0 block0.1 block0.3 block0.4 block4.3",
    "vgg19": "block2.9 block2.10 block4.10",
    "mobilenetv2_half": "conv1.0 conv1.1 blocks.0.0.conv.0 blocks.3.3.conv.7 blocks.6.0.conv.3 conv2.1 classifier.0",
    "shufflenetv1": "conv1 bn1 layer1.0.conv1 layer1.3.bn3 layer2.7.conv3 layer3.3.bn1 linear",
    "shufflenetv2_rd": "conv1 bn1 layer1.0.conv5 layer1.0.bn5 layer1.3.bn3 layer2.7.conv1 layer3.3.bn2 bn2 linear",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_published_weights(name: str) -> None:
    assert {*NAMES[name].split()} <= names(name)


def test_names_end_where_the_blocks_do() -> None:
    assert "block1.layer.0.convShortcut" not in names("wrn_16_1")
    assert "layer3.4.conv1" not in names("shufflenetv2_rd")
    assert "layer3.4.conv1" not in names("shufflenetv1")


@pytest.mark.parametrize("name", BENCHMARK)
def test_depth_is_what_the_name_says_or_the_longest_path(name: str) -> None:
    weighted = [key for key, module in on_meta(name).named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    aside = ("downsample.0", "convShortcut")
    if name == "shufflenetv2_rd":
        aside = ("1.0.conv1", "1.0.conv2", "2.0.conv1", "2.0.conv2", "3.0.conv1", "3.0.conv2")
    # The wide ResNets' names count the shortcuts, and those of VGG two more linear layers.
    layers = len([key for key in weighted if not key.endswith(aside)]) + 2 * name.startswith(("wrn", "vgg"))
    assert layers == MODELS[name].depth


# Computed by RepDistiller's own code (b84f547) in float64, with the weights of `filled`: two logits; the mean absolute
# value of each stage and of the pooled features; the same of each stage before its last activation.
REPDISTILLER: dict[str, tuple[list[float], list[float], list[float]]] = {
    "resnet8x4": (
        [0.421031369, 0.454593998],
        [0.013418159, 0.001656605, 0.00013727, 0.00013727],
        [0.155953198, 0.132051103, 0.128974419],
    ),
    "wrn_16_1": (
        [0.491262597, 0.500163363],
        [0.174868218, 0.108285331, 0.080491673, 0.020551117],
        [0.183820642, 0.12424882, 0.105500723],
    ),
    "wrn_16_2": (
        [0.465220667, 0.440397817],
        [0.102460795, 0.072212583, 0.043635466, 0.01006393],
        [0.119750972, 0.099321928, 0.08448743],
    ),
    "vgg8": (
        [6.112394406, -5.219115976],
        [0.17339438, 0.160193818, 0.160073438, 0.160076546, 0.160076546],
        [0.338865852, 0.319517683, 0.318319846, 0.318334167],
    ),
    "vgg13": (
        [6.112385658, -5.219106818],
        [0.163990958, 0.160138231, 0.16007876, 0.160075057, 0.160075057],
        [0.320550029, 0.319367197, 0.318339338, 0.318331252],
    ),
    "mobilenetv2_half": (
        [1.128716266, 0.319152816],
        [0.134633402, 0.191592688, 0.198348564, 0.595334155, 0.04448043],
        [0.134633402, 0.191592688, 0.198348564, 0.595334155],
    ),
    "shufflenetv1": (
        [888.039783043, 303.485085522],
        [0.348110312, 54.85390537, 134.168286848, 134.168286848],
        [0.503250576, 86.272013902, 175.850810532],
    ),
    "shufflenetv2_rd": (
        [1.20549639, 1.214305627],
        [0.014924213, 0.013456186, 0.035229123, 0.058059356],
        [0.050309626, 0.050842553, 0.08339135],
    ),
}


def filled(network: nn.Module) -> nn.Module:
    """A network with weights that any code can make."""
    for key, tensor in network.double().eval().state_dict().items():
        if tensor.is_floating_point():
            wave = torch.arange(1, tensor.numel() + 1, dtype=torch.float64).sin().view(tensor.shape)
            around = float(key.endswith(("weight", "var")))
            tensor.copy_(wave * sqrt(4 / tensor[0].numel()) if tensor.dim() > 1 else wave / 2 + around)
    return network


@pytest.mark.parametrize("name", REPDISTILLER)
def test_maps_and_logits_are_repdistillers(name: str) -> None:
    x = torch.arange(1, 2 * 3 * 32 * 32 + 1, dtype=torch.float64).cos().view(2, 3, 32, 32)
    with torch.no_grad():
        maps, pooled, logits = tapped(filled(build(name, num_classes=10)), x)
    means = [map_.abs().mean().item() for map_ in maps.values()]
    half = len(means) // 2
    found = logits[0, :2].tolist(), [*means[:half], pooled.abs().mean().item()], means[half:]
    for mine, known in zip(found, REPDISTILLER[name], strict=True):
        assert mine == pytest.approx(known, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("name", "conv"), [("wrn_40_2", "block3.layer.5.conv1"), ("vgg8", "block4.0")])
def test_initialisation(name: str, conv: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=100)
    weight = network.get_parameter(f"{conv}.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * len(weight))) ** 0.5, rel=0.02)
    last = network.get_submodule(network.head)  # type: ignore[arg-type]
    assert isinstance(last, nn.Linear)
    assert last.bias.eq(0).all()
    assert last.weight.std().item() == pytest.approx(0.01 if name == "vgg8" else (3 * 128) ** -0.5, rel=0.02)


def test_initialisation_of_the_mobilenet() -> None:
    torch.manual_seed(0)
    network = build("mobilenetv2_half", num_classes=100)
    assert network.get_parameter("conv2.0.weight").std().item() == pytest.approx((2 / 1280) ** 0.5, rel=0.02)
    assert network.get_parameter("blocks.5.1.conv.3.weight").std().item() == pytest.approx(
        (2 / (9 * 480)) ** 0.5, rel=0.04
    )
    assert network.get_parameter("classifier.0.weight").std().item() == pytest.approx(0.01, rel=0.02)
    assert network.get_parameter("classifier.0.bias").eq(0).all()


@pytest.mark.parametrize("name", BENCHMARK)
def test_smallest_images(name: str) -> None:
    least = 8 if name.startswith("vgg") else 1
    assert on_meta(name, 10, least)(torch.zeros(2, 3, least, least, device="meta")).shape == (2, 10)
    if least > 1:
        with pytest.raises(KnownError, match=rf"^{name} .*at least 8 pixels wide \(got 7\)$"):
            on_meta(name, 10, 7)


def test_vgg_pools_once_more_for_images_of_64_pixels() -> None:
    for size, sides in ((16, [8, 4, 2, 2]), (32, [16, 8, 4, 4]), (64, [32, 16, 8, 4])):
        maps, _, _ = tapped(on_meta("vgg8", 10, size), torch.zeros(1, 3, size, size, device="meta"))
        assert [maps[f"stage{i}"].shape[-1] for i in (1, 2, 3, 4)] == sides


@pytest.mark.parametrize("name", SMALLEST)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=10, image_size=16)
    nn.functional.cross_entropy(network(images()), torch.arange(4)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


ORDERS = {
    "wrn_16_1": "conv1 block1.layer.0.bn1 .relu .conv1 .bn2 .relu .conv2 block1.layer.1.bn1",
    "wrn_16_2": "conv1 block1.layer.0.bn1 .relu .convShortcut .conv1 .bn2 .relu .conv2 block1.layer.1.bn1",
    "vgg8": "block0.0 .1 relu0 pool block1.0 .1 relu1 pool block2.0 .1 relu2 pool block3.0 .1 relu3 block4.0 .1 relu4",
    "mobilenetv2_half": "conv1.0 .1 .2 blocks.0.0.conv.0 .1 .2 .3 .4 .5 .6 .7 blocks.1.0.conv.0",
    "shufflenetv1": "conv1 bn1 relu layer1.0.conv1 .bn1 .relu .conv2 .bn2 .relu .conv3 .bn3 layer1.0.shortcut.0",
    "shufflenetv2_rd": "conv1 bn1 relu layer1.0.conv1 .bn1 .conv2 .bn2 .conv3 .bn3 .relu .conv4 .bn4 .conv5 .bn5 .relu",
}


@pytest.mark.parametrize("name", ORDERS)
def test_modules_are_applied_in_order(name: str) -> None:
    wanted = spelled_out(ORDERS[name])
    assert modules_in_order(name)[: len(wanted)] == wanted


# taps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PUBLISHED, *BENCHMARK])
def test_every_network_declares_its_taps_and_its_last_layer(name: str) -> None:
    network = on_meta(name)
    stages, pre, _ = shapes(name)
    assert stages == pre
    assert isinstance(network.head, str)
    seen: list[Tensor] = []
    network.get_submodule(network.head).register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    network(torch.zeros(2, 3, 32, 32, device="meta"))
    assert [out.flatten(1).shape for out in seen] == [(2, 10)]


@pytest.mark.parametrize("name", SOME)
def test_taps_change_neither_logits_nor_gradients(name: str) -> None:
    torch.manual_seed(0)
    network, x, gradients = build(name, num_classes=10, image_size=16), images(), []
    for reads in (False, True):
        network.zero_grad()
        logits = tapped(network, x)[2] if reads else network(x)
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        gradients.append([logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    for plain, hooked in zip(*gradients, strict=True):
        assert torch.equal(plain, hooked)


@pytest.mark.parametrize("name", MAPPED)
def test_gradients_flow_through_every_tap(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=10, image_size=16)
    maps, pooled, _ = tapped(network, images())
    first = next(network.parameters())
    for key, tensor in {**maps, "pooled": pooled}.items():
        (gradient,) = torch.autograd.grad(tensor.square().mean(), first, retain_graph=True)
        assert gradient.abs().sum() > 0, key


LINEAR = ("mobilenetv2", "mobilenetv2_half", "shufflenetv2")  # no activation of its own at the end of a stage
PRE_ACTIVATED = ("preresnet20", "preresnet44", "densenet121", "wrn_16_1", "wrn_16_2")


@pytest.mark.parametrize("name", MAPPED)
def test_what_is_read_before_the_last_activation(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, num_classes=10, image_size=16).eval()
    maps, _, _ = tapped(network, images())
    for i in range(1, len(maps) // 2 + 1):
        stage, pre = maps[f"stage{i}"], maps[f"stage{i}_pre"]
        if name in LINEAR:
            assert torch.equal(pre, stage)
        elif name not in PRE_ACTIVATED:
            assert torch.equal(pre.relu(), stage)
        if name != "shufflenetv2":
            assert (pre < 0).any()  # an activation in place has not changed it
        if name in PRE_ACTIVATED:
            norm = network.get_submodule(network.taps()[f"stage{i}_pre"].path)  # type: ignore[operator]
            assert torch.equal(pre, norm(stage))
            assert not torch.equal(pre, stage)


@pytest.mark.parametrize("name", SOME)
def test_nothing_later_changes_a_stage(name: str) -> None:
    """Some activations are in place."""
    torch.manual_seed(0)
    network, copies = build(name, num_classes=10, image_size=16).eval(), {}

    def copy(key: str, tensor: Tensor) -> None:
        copies[key] = tensor.clone()

    for key, tap in network.taps().items():  # type: ignore[operator]
        if tap.of == "output" and not key.endswith("_pre"):
            part = network.get_submodule(tap.path)
            part.register_forward_hook(lambda _module, _inputs, out, key=key: copy(key, out))
    maps, pooled, logits = tapped(network, images())
    for key, tensor in copies.items():
        assert torch.equal(maps[key], tensor), key
    head = network.get_submodule(network.head)  # type: ignore[arg-type]
    shaped = pooled[:, :, None, None] if isinstance(head, nn.Conv2d) else pooled
    torch.testing.assert_close(head(shaped).flatten(1), logits)


@pytest.mark.parametrize("name", MAPPED)
def test_pooled_features_of_a_folded_network(name: str) -> None:
    torch.manual_seed(0)
    network = network_of(name).double()
    folded, x = fuse(network), images().double()
    taps = Tapped(folded, False, False, True, of=network)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), network(x))
    maps, pooled = taps.take()
    assert not maps
    torch.testing.assert_close(pooled, tapped(network, x)[1])
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left == 0 or name in PRE_ACTIVATED  # those have some in front of a convolution


def test_taps_are_read_once_and_closed() -> None:
    network = build("resnet8", num_classes=10)
    taps = Tapped(network, True, False, False)
    network(images())
    maps, pooled = taps.take()
    assert ([*maps], pooled) == (["stage1", "stage2", "stage3"], None)
    with pytest.raises(KeyError):  # forgotten
        taps.take()
    network(images(8))
    assert taps.take()[0]["stage1"].shape[-1] == 8
    taps.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_only_what_is_asked_for_is_kept() -> None:
    network = build("wrn_16_1", num_classes=10)
    taps = Tapped(network, False, True, True)
    network(images())
    maps, pooled = taps.take()
    assert [*maps] == ["stage1_pre", "stage2_pre", "stage3_pre"]
    assert pooled is not None
    assert pooled.shape == (4, 64)


class Undeclared(nn.Module):
    """A network that says nothing of its parts, and whose `head` is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.convolution(x).relu().mean((2, 3)))
        return logits


def test_a_network_that_declares_nothing() -> None:
    network = Undeclared()
    taps = Tapped(network, False, False, True)
    logits = network(images())
    _, pooled = taps.take()
    assert pooled is not None
    assert torch.equal(network.head(pooled), logits)
    for stages, pre in ((True, False), (False, True)):
        with pytest.raises(KnownError, match=r"Undeclared declares no taps \(method taps\(\)\)$"):
            Tapped(network, stages, pre, False)
    with pytest.raises(KnownError, match=r"Flatten has no last layer: it has no nn\.Linear"):
        Tapped(nn.Flatten(), False, False, True)
    with pytest.raises(KnownError, match=r"MLP has none$"):
        Tapped(build("mlp", num_classes=10), True, False, True)


# published weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["RepDistiller, an epoch", "RepDistiller, the last", "mdistiller"])
@pytest.mark.parametrize("name", SMALLEST)
def test_published_layouts_load(name: str, layout: str, tmp_path: Path) -> None:
    file, content = LAYOUTS[layout]
    network = network_of(name)
    torch.save(content(network), tmp_path / file)
    same_logits(load(tmp_path / file, model=name), network, name)


@pytest.mark.slow
def test_a_benchmark_network_as_the_teacher_in_mdistillers_file(tmp_path: Path) -> None:
    file, content = LAYOUTS["mdistiller"]
    teacher, student = network_of("wrn_16_2"), network_of("shufflenetv1")
    tensors = content(student)
    kept = {key: tensor for key, tensor in tensors["model"].items() if "teacher" not in key}
    kept |= {f"module.teacher.{key}": tensor for key, tensor in teacher.state_dict().items()}
    torch.save({**tensors, "model": kept}, tmp_path / file)
    same_logits(load(tmp_path / file, model="wrn_16_2"), teacher, "wrn_16_2")
    same_logits(load(tmp_path / file, model="shufflenetv1", part="student"), student, "shufflenetv1")
    with pytest.raises(KnownError, match="it is a wrn_16_2 of 10 classes"):
        load(tmp_path / file, model="wrn_16_1")
