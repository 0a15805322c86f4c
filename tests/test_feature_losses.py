"""The losses on features: golden values, gradients, state, and CRD and SimKD against direct implementations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import exp, log
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import mse_loss, smooth_l1_loss

from kd.core.spec import KnownError
from kd.core.stage import Batch, Formula, Learner, LossContext, LossSpec, Outputs
from kd.datasets.data import Data
from kd.losses import LOSSES
from kd.losses.at import AT, attention_distance
from kd.losses.crd import CRD
from kd.losses.fitnet import FitNet, resizing_convolution
from kd.losses.maps import FeatureSpec, level, resized, stage_pairs, unit
from kd.losses.ofd import OFD, margins, partial_distance
from kd.losses.pkt import neighbourhood_distance
from kd.losses.reviewkd import ReviewKD, hcl
from kd.losses.rkd import RKD, relations
from kd.losses.simkd import SimKD
from kd.losses.sp import SP, similarity_distance
from kd.losses.vid import VID, gaussian_distance
from kd.models import build
from kd.models.taps import Tapped, head
from kd.training.step import Step, evaluate
from tests.conftest import ROOT
from tests.test_every_loss import few, guides_of, stage_of

__all__ = ["few"]  # the fixture

NAMES = ["fitnet", "at", "sp", "vid", "rkd", "pkt", "crd", "reviewkd", "ofd", "simkd"]
# Of net and guide: the same shapes but depths; other widths and raw maps; other numbers of stages and sizes of maps.
PAIRS = [("resnet8", "resnet14"), ("resnet8", "wrn_16_2"), ("vgg8", "resnet8"), ("wrn_16_1", "mobilenetv2")]
CLASSES, SAMPLES = 4, 40

FS = (torch.arange(16, dtype=torch.float64) / 4 - 1).view(2, 2, 2, 2)
FT = torch.arange(16, dtype=torch.float64).cos().view(2, 2, 2, 2)
S = torch.tensor([[0, 0], [3, 4], [0, 2]], dtype=torch.float64)
T = torch.diag(torch.tensor([1, 1, 2], dtype=torch.float64))


def see(network: nn.Module, images: Tensor) -> Outputs:
    """All that a network says about images."""
    tapped = Tapped(network, stages=True, pre=True, pooled=True)
    logits = network(images)
    maps, pooled = tapped.take()
    tapped.close()
    assert pooled is not None
    return Outputs({"logits": logits, "pooled": pooled, **maps})


class World:
    """A net, its guide and a small data set, in fp64 unless said otherwise."""

    def __init__(self, net: str = "resnet8", guide: str = "resnet14", dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.net, self.guide = (build(name, num_classes=CLASSES, image_size=16).to(dtype) for name in (net, guide))
        self.guide.eval()
        self.images = torch.randn(SAMPLES, 3, 16, 16, dtype=dtype)
        self.labels = torch.arange(SAMPLES) % CLASSES
        self.train = torch.arange(5, SAMPLES)
        with torch.no_grad():
            said = [see(network.eval(), self.images[:1]) for network in (self.net, self.guide)]
        self.net.train()
        learners = [
            Learner(network, each, network.get_submodule(head(network)))
            for network, each in zip((self.net, self.guide), said, strict=True)
        ]
        self.context = LossContext(*learners, self.labels, self.train)
        self.dtype = dtype

    def loss(self, spec: LossSpec, seed: int = 0) -> Callable[[Batch], dict[str, Tensor]]:
        torch.manual_seed(seed)
        built = spec.build(self.context)
        return built.to(self.dtype) if isinstance(built, nn.Module) else built

    def batch(self, samples: Sequence[int] = range(5, 13), **more: Any) -> Batch:
        chosen = torch.tensor(samples)
        with torch.no_grad():
            guide = see(self.guide, self.images[chosen])
        return Batch(self.labels[chosen], chosen, see(self.net, self.images[chosen]), guide, **more)


def leaves(outputs: Outputs, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Outputs:
    """The same outputs, changed, with gradients of their own. The logits stay."""
    fixed = {
        name: each.detach() if name == "logits" else change(each.detach()) for name, each in outputs.tensors.items()
    }
    return Outputs({name: each.clone().requires_grad_() for name, each in fixed.items()})


def read(spec: LossSpec, outputs: Outputs) -> list[Tensor]:
    """The tensors that a loss reads of a network, the logits aside."""
    kinds = {"stages": lambda: outputs.stages, "pre": lambda: outputs.pre, "pooled": lambda: [outputs.pooled]}
    return [tensor for need in spec.needs - {"logits"} for tensor in kinds[need]()]


# Golden values: numbers of other implementations, in fp64.


def near(value: Tensor, golden: float) -> None:
    assert value.item() == pytest.approx(golden, abs=1e-10)


def test_golden_values_of_maps() -> None:
    near(mse_loss(FS, FT), 2.6501648729889684)
    near(attention_distance(FS, FT), 0.06051616917067406)
    near(similarity_distance(FS, FT), 0.08153027905927425)
    near(hcl(FS, FT), 2.4526026647670682)
    near(partial_distance(FS, FT, torch.tensor([-0.5, -0.5], dtype=torch.float64)), 18.449309432022346)
    near(gaussian_distance(FS, torch.tensor([5.0, 5.0], dtype=torch.float64), FT), 1.069735443515947)


def test_golden_values_of_pooled_features() -> None:
    l_d, l_a = (smooth_l1_loss(*pair) for pair in zip(relations(S), relations(T), strict=True))
    near(l_d, 0.09163800464235967)
    near(l_a, 0.0865284178861299)
    logits, labels = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 0])
    batch = Batch(labels, labels, Outputs({"logits": logits, "pooled": S}), Outputs({"pooled": T}))
    parts = RKD()(batch)
    near(parts["rkd"], 6.617371010365487)
    near(parts["loss"], 6.617371010365487 + log(2))
    near(neighbourhood_distance(S + 1, T), 0.018062287543978074)
    near(similarity_distance(S + 1, T), 0.3229533987890573)


def test_golden_values_of_margins() -> None:
    norm = nn.BatchNorm2d(3).double()
    norm.weight.data = torch.tensor([1, -2, 0.1], dtype=torch.float64)
    norm.bias.data = torch.tensor([0, 1, 1], dtype=torch.float64)
    expected = torch.tensor([-0.7978845608, -1.2821555407, -0.3], dtype=torch.float64)
    torch.testing.assert_close(margins(norm), expected, atol=1e-9, rtol=0)
    norm.weight.data.zero_()
    norm.bias.data = torch.tensor([0, -2, 2], dtype=torch.float64)
    torch.testing.assert_close(margins(norm), torch.tensor([0, -2, 0], dtype=torch.float64))


def test_hcl_by_hand_leaves_sizes_out_without_halving() -> None:
    net, guide = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    net[0, 0, 0, 0] = 16  # MSE 16; pooled to 2×2 a 4 in one of four: 4; pooled to 1×1: 1
    assert hcl(net, guide).item() == pytest.approx((16 + 4 / 2 + 1 / 4) / 1.75)
    assert hcl(net[:, :, :1, :1], guide[:, :, :1, :1]).item() == pytest.approx(256)


# All losses


def test_all_feature_losses_are_here() -> None:
    assert [name for name in LOSSES if LOSSES[name].needs & {"stages", "pre", "pooled"}] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_yaml_shows_every_hyperparameter(name: str) -> None:
    shown = yaml.safe_load((ROOT / f"conf/loss/{name}.yaml").read_text())
    spec = LOSSES.parse(shown)
    assert spec == LOSSES.parse({"name": name})
    assert shown.keys() == spec.dump().keys()
    assert spec.label == name
    assert LOSSES.parse({"name": name, "weight": 7}).label == f"{name} weight7"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_gradients_reach_what_the_loss_reads_and_all_its_parameters(name: str, pair: tuple[str, str]) -> None:
    world, spec = World(*pair), LOSSES.parse({"name": name})
    loss, batch = world.loss(spec), world.batch()
    batch = Batch(batch.labels, batch.samples, leaves(batch.net), leaves(batch.guide))
    parts = loss(batch)
    assert parts.keys() == {"loss", "ce", name}
    assert all(part.shape == () and part.isfinite() and part.dtype == torch.float64 for part in parts.values())
    expected = spec.ce * parts["ce"] + spec.weight * parts[name] * (1 / 20 if name == "reviewkd" else 1)
    torch.testing.assert_close(parts["loss"], expected)
    parts["loss"].backward()
    used = [each for each in read(spec, batch.net) if each.grad is not None]
    stages = min(len(batch.net.stages), len(batch.guide.stages))
    counts = {"fitnet": 1, "sp": 1, "rkd": 1, "pkt": 1, "crd": 1, "simkd": 1, "reviewkd": stages + 1}
    assert len(used) == counts.get(name, stages)
    parameters = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    assert bool(parameters) == (not isinstance(spec, Formula))
    for each in [*used, *parameters]:
        assert each.grad is not None
        assert each.grad.isfinite().all()
        # A convolution before BatchNorm has a bias that changes nothing.
        assert each.grad.abs().sum() > 0
    assert batch.net.logits.grad is not None or not spec.ce


ODD = {
    "zero": torch.zeros_like,
    "huge": lambda tensor: tensor * 1e6,
    "tiny": lambda tensor: tensor * 1e-9,
    "equal rows": lambda tensor: tensor[:1].expand_as(tensor),
    "nearly equal rows": lambda tensor: tensor[:1] * (1 + 1e-7 * torch.randn(len(tensor), *[1] * (tensor.dim() - 1))),
    "a zero row": lambda tensor: torch.cat([0 * tensor[:1], tensor[1:]]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("of", ["net", "guide", "both"])
def test_odd_features_leave_loss_and_gradients_finite_in_fp32(name: str, odd: str, of: str) -> None:
    world, spec, same = World(dtype=torch.float32), LOSSES.parse({"name": name}), lambda tensor: tensor
    loss, batch = world.loss(spec), world.batch()
    net = leaves(batch.net, ODD[odd] if of != "guide" else same)
    guide = leaves(batch.guide, ODD[odd] if of != "net" else same)
    parts = loss(Batch(batch.labels, batch.samples, net, guide))
    assert all(part.isfinite() for part in parts.values())
    parts["loss"].backward()
    read_here = [each for each in read(spec, net) if each.grad is not None]
    assert read_here
    for each in [*read_here, *(loss.parameters() if isinstance(loss, nn.Module) else [])]:
        assert each.grad is not None
        assert each.grad.isfinite().all()
    if name in ("sp", "rkd", "pkt", "at", "crd") and odd != "tiny":  # no direction is undefined and taken for one
        assert max(float(each.grad.abs().max()) for each in read_here if each.grad is not None) < 1e8


@pytest.mark.parametrize("name", ["rkd", "pkt", "sp", "at", "crd", "simkd"])
@pytest.mark.parametrize("size", [1, 2])
def test_small_batches(name: str, size: int) -> None:
    world = World(dtype=torch.float32)
    loss, batch = world.loss(LOSSES.parse({"name": name})), world.batch(range(5, 5 + size))
    batch = Batch(batch.labels, batch.samples, leaves(batch.net), leaves(batch.guide))
    parts = loss(batch)
    parts["loss"].backward()
    assert all(part.isfinite() for part in parts.values())
    assert all(each.grad.isfinite().all() for each in batch.net.tensors.values() if each.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_state_and_seed_decide_the_next_loss(name: str) -> None:
    spec = LOSSES.parse({"name": name, **({"negatives": 9} if name == "crd" else {})})

    def trained(seed: int) -> tuple[World, Callable[[Batch], dict[str, Tensor]]]:
        world = World()
        loss = world.loss(spec, seed)
        if isinstance(loss, nn.Module):
            descent = torch.optim.SGD(loss.parameters(), 0.01)
            for start in (5, 11):
                loss(world.batch(range(start, start + 6)))["loss"].backward()
                descent.step()
        return world, loss

    def following(world: World, loss: Callable[[Batch], dict[str, Tensor]]) -> float:
        torch.manual_seed(7)
        return loss(world.batch(range(20, 28)))["loss"].item()

    one, other, third = trained(0), trained(0), trained(1)
    value = following(*one)
    assert following(*other) == value
    if not isinstance(one[1], nn.Module):
        return
    assert following(*third) != value
    fresh, resumed = trained(0), trained(2)
    assert isinstance(fresh[1], nn.Module)
    assert isinstance(resumed[1], nn.Module)
    resumed[1].load_state_dict(fresh[1].state_dict())
    assert following(*resumed) == value


def test_warm_up_of_reviewkd() -> None:
    world = World()
    for warmup, epoch, ramp in [(20, 0, 0.05), (20, 9, 0.5), (20, 19, 1), (20, 50, 1), (0, 0, 1)]:
        parts = world.loss(ReviewKD(warmup=warmup))(world.batch(epoch=epoch))
        torch.testing.assert_close(parts["loss"], parts["ce"] + 5 * ramp * parts["reviewkd"])


# Single losses


def test_at_sums_all_stages_and_sp_reads_the_last() -> None:
    batch = World(guide="wrn_16_2").batch()
    pairs = [*zip(batch.net.stages, batch.guide.stages, strict=True)]
    torch.testing.assert_close(AT()(batch)["at"], sum(attention_distance(*pair) for pair in pairs))
    torch.testing.assert_close(SP()(batch)["sp"], similarity_distance(*pairs[-1]))


def nearest(maps: Tensor, size: int) -> Tensor:
    """Maps enlarged or reduced to a size that is a multiple of theirs, or the reverse."""
    if maps.shape[2] > size:
        step = maps.shape[2] // size
        return maps[:, :, ::step, ::step]
    times = size // maps.shape[2]
    return maps.repeat_interleave(times, 2).repeat_interleave(times, 3)


@pytest.mark.parametrize(("net", "guide"), [("resnet8", "wrn_16_2"), ("vgg8", "resnet8")])
def test_reviewkd_stage_by_stage(net: str, guide: str) -> None:
    world = World(net, guide)
    loss, batch = world.loss(ReviewKD(width=24)), world.batch()
    pooled = [each.pooled[:, :, None, None] for each in (batch.net, batch.guide)]
    maps, targets = [*batch.net.stages[-3:], pooled[0]], [*batch.guide.pre[-3:], pooled[1]]
    expected, left = torch.zeros(()).double(), torch.zeros(0)
    for step in (0, 1, 2, 3):
        fusion, seen, target = loss.levels[step], maps[3 - step], targets[3 - step]
        fused = fusion.narrow(seen)
        assert fused.shape[1] == 24
        if step:
            left = nearest(left, seen.shape[2])
            shares = fusion.attention(torch.cat([fused, left], 1))
            assert 0 < shares.min() < shares.max() < 1
            fused = fused * shares[:, 0].unsqueeze(1) + left * shares[:, 1].unsqueeze(1)
        fused = nearest(fused, target.shape[2])
        left = fused
        expected = expected + hcl(fusion.wide(fused), target)
    torch.testing.assert_close(loss(batch)["reviewkd"], expected)


def test_stage_pairs_and_level() -> None:
    one, two, three = (torch.randn(1, 1, size, size) for size in (8, 4, 2))
    assert [[*map(id, pair)] for pair in stage_pairs([one, two, three], [two, three])] == [
        [id(two)] * 2,
        [id(three)] * 2,
    ]
    assert [[*map(id, pair)] for pair in stage_pairs([three], [one, two])] == [[id(three), id(two)]]
    for pair in (level(one, two), level(two, one), level(two, two)):
        assert [each.shape[2:] for each in pair] == [(4, 4)] * 2
    assert level(one, two)[0][0, 0, 0, 0].item() == pytest.approx(one[0, 0, :2, :2].mean().item())


def test_unit_leaves_zero_rows_without_a_gradient() -> None:
    rows = torch.tensor([[3.0, 4], [0, 0]], requires_grad=True)
    unit(rows)[:, 0].sum().backward()
    assert unit(rows).tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]
    assert rows.grad is not None
    assert rows.grad.tolist() == [pytest.approx([0.128, -0.096]), [0, 0]]


@pytest.mark.parametrize(("side", "size"), [(8, 4), (8, 3), (7, 4), (5, 2), (3, 8), (4, 4), (9, 1)])
def test_maps_are_resized_as_by_torch_with_a_gradient_that_every_device_has(side: int, size: int) -> None:
    maps = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    ours, torchs = resized(maps, size), nn.functional.adaptive_avg_pool2d(maps, size)
    assert torch.allclose(ours, torchs, rtol=0, atol=1e-14)
    weights = torch.randn_like(ours)
    one, other = (torch.autograd.grad((each * weights).sum(), maps)[0] for each in (ours, torchs))
    assert torch.allclose(one, other, rtol=0, atol=1e-14)


def test_no_loss_has_a_gradient_that_torch_refuses_on_a_gpu() -> None:
    for path in (ROOT / "kd" / "losses").glob("*.py"):
        assert not re.search(r"(import|nn\.).*adaptive", path.read_text(), re.IGNORECASE), path.name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "simkd"])
def test_without_cross_entropy_every_parameter_still_has_a_gradient(name: str) -> None:
    """Under torchrun a parameter without one ends the run."""
    world = World()
    loss = world.loss(LOSSES[name](ce=0))
    loss(world.batch())["loss"].backward()
    assert [key for key, each in world.net.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize(("size", "wanted"), [(8, 8), (8, 4), (4, 8), (8, 3), (7, 5), (3, 8), (2, 1), (1, 1)])
def test_regressor_has_the_guides_shape(size: int, wanted: int) -> None:
    net, guide = torch.randn(2, 3, size, size), torch.randn(2, 5, wanted, wanted)
    assert resizing_convolution(net, guide)(net).shape == guide.shape


def test_fitnet_reads_one_stage_and_a_relu_bounds_its_regressor() -> None:
    world = World(guide="wrn_16_2")
    with pytest.raises(KnownError, match=r"stage: should be at most 3, .* \(got 4\)"):
        world.loss(FitNet(stage=4))
    for relu in (True, False):
        loss, batch = world.loss(FitNet(stage=3, relu=relu)), world.batch()
        assert isinstance(loss, nn.Module)
        regressed = loss.regressor(batch.net.stages[2])
        assert (regressed.min() < 0).item() != relu
        torch.testing.assert_close(loss(batch)["fitnet"], mse_loss(regressed, batch.guide.stages[2]))


def test_variances_of_vid_start_at_five_and_are_trained_and_saved() -> None:
    world = World()
    loss = world.loss(VID())
    assert isinstance(loss, nn.Module)
    raw = {name: each for name, each in loss.named_parameters() if "variance" in name}
    assert len(raw) == 3
    assert raw.keys() <= loss.state_dict().keys()
    for each in raw.values():
        torch.testing.assert_close(nn.functional.softplus(each) + 1e-5, torch.full_like(each, 5), atol=1e-6, rtol=0)
    loss(world.batch())["loss"].backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in raw.values())
    wide = world.loss(VID(variance=1000.0))
    assert isinstance(wide, nn.Module)
    assert all(each.isfinite().all() for each in wide.parameters())


@pytest.mark.parametrize("apart", [0, 1e-7])
def test_relations_of_equal_rows(apart: float) -> None:
    rows = torch.tensor([[0.0, 1], [apart, 1], [3, 5]], requires_grad=True)
    distances, cosines = relations(rows)
    if not apart:
        assert distances[0, 1] == 0
        assert distances[0, 2] == 1  # the mean is that of the positive ones
    assert cosines[0, 1].tolist() == [0, 0, 0]
    assert cosines[0, 2].tolist() == pytest.approx([0, 0, 1])
    (distances.square().sum() + cosines.sum()).backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() < 10


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("resnet8", ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]),  # not that of the shortcut
        ("resnet14", ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2"]),
        ("resnet18", ["layer2.1.bn2", "layer3.1.bn2", "layer4.1.bn2"]),  # the net has three stages
        ("wrn_16_2", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
        ("preresnet20", ["layer2.0.bn1", "layer3.0.bn1", "bn"]),
        ("vgg13", ["block2.4", "block3.4", "block4.4"]),
    ],
)
def test_ofd_finds_the_guides_norms(name: str, paths: list[str]) -> None:
    world = World(guide=name, dtype=torch.float32)
    for module in world.guide.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    loss = world.loss(OFD())
    assert isinstance(loss, nn.Module)
    for connector, path in zip(loss.connectors, paths, strict=True):
        norm = world.guide.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        torch.testing.assert_close(connector.margin, margins(norm).float())
    assert not any("margin" in each for each in loss.state_dict())


@pytest.mark.parametrize(("name", "stage"), [("net", 1), ("shufflenetv2", 1)])
def test_ofd_says_where_a_guide_has_no_norm(name: str, stage: int) -> None:
    with pytest.raises(
        KnownError, match=f"has no BatchNorm of all channels directly before the activation of stage {stage}$"
    ):
        World(guide=name, dtype=torch.float32).loss(OFD())


def test_ofd_counts_the_last_stage_fully() -> None:
    world = World()
    loss, batch = world.loss(OFD()), world.batch()
    assert isinstance(loss, nn.Module)
    triples = zip(loss.connectors, batch.net.pre, batch.guide.pre, strict=True)
    one, two, three = (partial_distance(each.wide(net), guide, each.margin) for each, net, guide in triples)
    torch.testing.assert_close(loss(batch)["ofd"], one / 4 + two / 2 + three)


# CRD


@torch.no_grad()
def crd_by_hand(loss: Any, batch: Batch, drawn: list[int], spec: CRD, world: World) -> tuple[float, Tensor]:
    """The loss and the memories after it, sample by sample. `drawn` are training samples in the order of the draw."""
    embed = [lambda row, i=i: loss.embed[i](row) / loss.embed[i](row).norm() for i in (0, 1)]
    pooled, memories, count = (batch.net.pooled, batch.guide.pooled), loss.memories.clone(), len(batch.labels)
    n, k = len(world.train), spec.negatives
    scores: list[list[list[float]]] = [[], []]
    for i in (0, 1):
        for b in range(count):
            row, label = embed[i](pooled[i][b]), int(batch.labels[b])
            negatives = [sample for sample in drawn if int(world.labels[sample]) != label][:k]
            compared = [int(batch.samples[b]), *negatives]
            assert len({*compared}) == k + 1
            scores[i].append([exp(float(row @ memories[1 - i, sample]) / spec.temperature) for sample in compared])
    total = 0.0
    for i in (0, 1):
        z = float(loss.z[i]) or n * sum(sum(each) for each in scores[i]) / (count * (k + 1))
        for first, *rest in ([score / z for score in each] for each in scores[i]):
            total -= log(first / (first + k / n + 1e-7)) / count
            total -= sum(log(k / n / (score + k / n + 1e-7)) for score in rest) / count
        for b in range(count):
            mixed = spec.momentum * memories[i, batch.samples[b]] + (1 - spec.momentum) * embed[i](pooled[i][b])
            memories[i, batch.samples[b]] = mixed / mixed.norm()
    return total, memories


def test_crd_against_loops_for_two_batches() -> None:
    world, spec = World(), CRD(negatives=7, momentum=0.3, dim=6)
    loss = world.loss(spec)
    assert isinstance(loss, nn.Module)
    zs = []
    for samples in ([5, 9, 20, 31, 38], [20, 7, 8, 9, 10]):
        batch = world.batch(samples)
        torch.manual_seed(3)
        drawn = world.train[torch.randperm(len(world.train))].tolist()
        expected, memories = crd_by_hand(loss, batch, drawn, spec, world)
        torch.manual_seed(3)
        assert loss(batch)["crd"].item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(loss.memories, memories, rtol=0, atol=1e-12)
        zs.append(loss.z.tolist())
    assert zs[0] == zs[1]
    assert min(zs[0]) > 0
    assert {"memories", "z"} <= loss.state_dict().keys()


def test_crd_draws_again_and_takes_what_there_is() -> None:
    world = World()
    loss = world.loss(CRD())
    assert isinstance(loss, nn.Module)
    # 35 training samples in four classes, nine in the largest ones.
    assert (loss.negatives, loss.drawn) == (26, 35)
    few = world.loss(CRD(negatives=5))
    batch = world.batch(range(20, 24))
    torch.manual_seed(0)
    values = {few(batch)["crd"].item() for _ in range(2)}
    assert len(values) == 2
    world.context = LossContext(world.context.net, world.context.guide, torch.zeros_like(world.labels), world.train)
    alone = world.loss(CRD())
    assert alone(world.batch(range(5, 9)))["crd"].isfinite()


def test_crd_starts_with_rows_of_length_one_on_average() -> None:
    memories = World().loss(CRD()).memories
    assert memories.square().sum(2).mean().item() == pytest.approx(1, abs=0.05)
    assert memories.abs().max() <= (3 / 128) ** 0.5


def test_ranks_of_crd_keep_the_memories_of_the_whole_batch() -> None:
    """Each rank has half of a batch; what it gathers is replayed from a run of the other alone."""
    world, halves = World(), [range(5, 9), range(9, 12)]
    own = list[list[Tensor]]()
    for half in halves:
        rows = list[Tensor]()
        torch.manual_seed(3)
        world_loss = world.loss(CRD(negatives=6))
        torch.manual_seed(3)
        world.net.eval()
        world_loss(world.batch(half, gather=lambda given, rows=rows: rows.append(given.detach().clone()) or given))
        own.append(rows)
    together = world.loss(CRD(negatives=6))
    torch.manual_seed(3)
    whole = together(world.batch(range(5, 12)))["crd"]
    losses = []
    for half in halves:
        calls = iter(zip(*own, strict=True))
        rank = world.loss(CRD(negatives=6))
        torch.manual_seed(3)
        losses.append(rank(world.batch(half, gather=lambda given, calls=calls: torch.cat(next(calls))))["crd"])
        torch.testing.assert_close(rank.memories, together.memories)
        torch.testing.assert_close(rank.z, together.z)
    torch.testing.assert_close((4 * losses[0] + 3 * losses[1]) / 7, whole)


# SimKD


def composed(world: World, loss: Any, rows: Tensor) -> Tensor:
    head = world.guide.get_submodule(world.guide.head)
    weight, bias = head.weight.flatten(1), head.bias
    logits: Tensor = loss.projector(rows) @ weight.T + bias
    return logits


def train_some(world: World, loss: Any, steps: int = 3) -> None:
    world.net.train()
    parameters = [*world.net.parameters(), *loss.parameters()]
    descent = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4, fused=True)
    for _ in range(steps):
        descent.zero_grad()
        loss(world.batch())["loss"].backward()
        descent.step()


@pytest.mark.parametrize("pair", [("resnet8", "wrn_16_2"), ("mobilenetv2", "resnet8"), ("vgg8", "mobilenetv2_half")])
@pytest.mark.parametrize("ce", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_simkd_puts_the_guides_classifier_behind_the_projector(pair: tuple[str, str], ce: float) -> None:
    world = World(*pair)
    names, head = [*world.net.state_dict()], world.net.get_submodule(world.net.head)
    numbers = sum(each.numel() for each in world.net.parameters())
    loss = world.loss(SimKD(ce=ce))
    before = loss(world.batch())["simkd"].item()
    train_some(world, loss, 5)
    assert (loss(world.batch())["simkd"].item() < before) or ce
    saved = {name: each.clone() for name, each in world.net.state_dict().items()}
    seen = see(world.net.eval(), world.images)
    torch.testing.assert_close(seen.logits, composed(world, loss, seen.pooled))
    assert [*saved] == names
    assert sum(each.numel() for each in world.net.parameters()) == numbers
    assert all(each.grad is None for each in head.parameters())
    assert all(each.grad is not None for each in loss.parameters())
    other = World(*pair).net.eval()
    other.load_state_dict(saved)
    torch.testing.assert_close(other(world.images), seen.logits)


def test_simkd_does_not_overwrite_weights_that_were_loaded() -> None:
    """The loop loads the best epoch's weights in the end, when the projector is that of the last epoch."""
    world = World()
    loss = world.loss(SimKD())
    train_some(world, loss)
    best = {name: each.clone() for name, each in world.net.state_dict().items()}
    with torch.inference_mode():
        logits = world.net.eval()(world.images)
    train_some(world, loss)
    assert not torch.equal(world.net.state_dict()["fc.weight"], best["fc.weight"])
    world.net.load_state_dict(best)
    with torch.inference_mode():
        torch.testing.assert_close(world.net.eval()(world.images), logits)
    torch.testing.assert_close(world.net.state_dict(), best)
    train_some(world, loss, 1)  # after a resumed training goes on, the projector decides again
    seen = see(world.net.eval(), world.images)
    torch.testing.assert_close(seen.logits, composed(world, loss, seen.pooled))


def test_simkd_composes_in_full_precision_under_autocast() -> None:
    world = World(dtype=torch.float32)
    loss = world.loss(SimKD())
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        world.net.eval()(world.images)
    head = world.guide.get_submodule("fc")
    expected = head.weight @ loss.projector.weight
    torch.testing.assert_close(world.net.get_submodule("fc").weight, expected, rtol=1e-6, atol=1e-7)


def test_simkd_keeps_one_classifier() -> None:
    world = World()
    world.loss(SimKD())
    with pytest.raises(KnownError, match="one guide only"):
        world.loss(SimKD())


@pytest.mark.parametrize("declared", [True, False])
def test_simkd_takes_the_layer_that_a_network_declares_or_else_the_last(declared: bool) -> None:
    world = World()
    network = nn.Sequential(nn.Linear(64, CLASSES), nn.Conv2d(3, 3, 3), nn.Linear(64, CLASSES), nn.Conv2d(3, 3, 3))
    if declared:
        network.head = "0"
    learner = Learner(network, world.context.net.outputs, network.get_submodule(head(network)))
    SimKD().build(LossContext(learner, world.context.guide, world.labels, world.train))
    frozen = [name for name, each in network.named_parameters() if not each.requires_grad]
    assert frozen == (["0.weight", "0.bias"] if declared else ["2.weight", "2.bias"])


def test_simkd_without_a_linear_layer_at_the_end() -> None:
    world = World()
    last = nn.Conv2d(3, 4, 3)
    learner = Learner(nn.Sequential(last, nn.Flatten()), world.context.net.outputs, last)
    with pytest.raises(KnownError, match="Sequential should end in a linear layer"):
        SimKD().build(LossContext(learner, world.context.guide, world.labels, world.train))


def test_simkd_with_a_classifier_on_maps() -> None:
    """SqueezeNet's: a 1×1 convolution before pooling, whose flattened input has a feature for each pixel."""
    world = World()
    last = nn.Conv2d(64, CLASSES, 1)
    guide = Learner(nn.Sequential(last, nn.Flatten()), Outputs({"pooled": torch.zeros(1, 64 * 9)}), last)
    with pytest.raises(KnownError, match="pool its maps before its classifier: that takes 64 of 576 features"):
        SimKD().build(LossContext(world.context.net, guide, world.labels, world.train))


def test_the_base_of_these_losses_is_not_a_loss() -> None:
    assert FeatureSpec not in [LOSSES[name] for name in NAMES]
    assert all(issubclass(LOSSES[name], FeatureSpec) for name in NAMES)


@pytest.mark.parametrize("name", ["fitnet", "ofd", "rkd", "reviewkd"])
def test_a_student_keeps_nothing_for_its_loss_while_it_is_evaluated(name: str, few: Data) -> None:
    stage = stage_of(name, few)
    step = Step(stage, data=few, guides=guides_of(stage, few), device="cpu")
    tapped = step._tapped
    assert tapped is not None
    step.begin_epoch(0)
    shown = few.show(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    step.network(shown)
    kept = tapped.take()
    assert kept[0] or kept[1] is not None
    accuracy = evaluate(step.network, [few.test_images[:8].permute(0, 3, 1, 2)], few.test_labels[:8], "fp32")
    assert not step.network.training
    assert tapped._kept == {}
    tapped.close()
    assert evaluate(step.network, [few.test_images[:8].permute(0, 3, 1, 2)], few.test_labels[:8], "fp32") == accuracy
