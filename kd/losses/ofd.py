"""A comprehensive overhaul of feature distillation: Heo et al. (ICCV 2019), arXiv 1904.01866."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kd.core.hardware import widest_float
from kd.core.spec import KnownError
from kd.core.stage import Batch, LossContext, Need
from kd.losses.maps import FeatureSpec, level, stage_pairs


def margins(norm: nn.BatchNorm2d) -> Tensor:
    """[channel]: the mean of what is negative of a Gaussian (bias, |weight|); −3·|weight| if that is rare."""
    weight, mean = (each.detach().to(widest_float(each.device)) for each in (norm.weight, norm.bias))
    deviation = weight.abs().clamp(min=1e-12)
    ratio = mean / deviation
    negative, density = torch.special.ndtr(-ratio), (-ratio.square() / 2).exp() / (2 * torch.pi) ** 0.5
    return torch.where(negative > 0.001, mean - deviation * density / negative, -3 * deviation)


def partial_distance(net: Tensor, guide: Tensor, margin: Tensor) -> Tensor:
    """Σ of squared differences / batch size, of maps before the ReLU. `margin` [channel] bounds the guide from below.

    Where the guide is negative, only a net above it counts: below it is as good, because the ReLU makes both 0.
    """
    target = guide.maximum(margin[:, None, None])
    return ((net - target).square() * ((net > target) | (guide > 0))).sum() / len(net)


class OFD(FeatureSpec):
    """ce·CE + weight·Σ over the stages of 2^(stage − last)·partial_distance(connector(net), guide, margins).

    All maps are before the ReLU. The connector is a 1×1 convolution and BatchNorm, trained with the net. The margins
    are of the guide's BatchNorm before its map. In a residual network this is the last one of the stage's last block,
    before the shortcut is added: an approximation. The guide is in eval mode; in mdistiller it is in train mode.
    """

    name: Literal["ofd"] = "ofd"
    needs: ClassVar[frozenset[Need]] = frozenset({"pre"})
    weight: float = Field(0.001, gt=0)

    def build(self, context: LossContext) -> nn.Module:
        pairs = stage_pairs(context.net.outputs.pre, context.guide.outputs.pre)
        stages = enumerate(pairs, len(context.guide.outputs.pre) - len(pairs) + 1)
        norms = [_norm(context.guide.network, stage, guide.shape[1]) for stage, (_, guide) in stages]
        return _Overhaul(self, [_Connector(net.shape[1], norm) for (net, _), norm in zip(pairs, norms, strict=True)])


def _norm(network: nn.Module, stage: int, channels: int) -> nn.BatchNorm2d:
    """The guide's BatchNorm before the last activation of a stage: at its tap, or the last one in that stage."""
    taps = network.taps()  # type: ignore[operator]  # it has them: its maps were read
    for tap in (taps[f"stage{stage}_pre"], taps[f"stage{stage}"]):
        within = network.get_submodule(tap.path).named_modules() if tap.of == "output" else ()
        # A shortcut's BatchNorm may come last, but the branch's is meant.
        branch = [module for name, module in within if "shortcut" not in name and "downsample" not in name]
        norms = [each for each in branch if isinstance(each, nn.BatchNorm2d)]
        if norms and norms[-1].num_features == channels:
            return norms[-1]
    raise KnownError(
        f"{type(network).__name__} has no BatchNorm of all channels directly before the activation of stage {stage}"
    )


class _Overhaul(nn.Module):
    def __init__(self, spec: OFD, connectors: list[_Connector]) -> None:
        super().__init__()
        self.spec, self.connectors = spec, nn.ModuleList(connectors)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        distance = batch.net.pre[-1].new_zeros(())
        for connector, pair in zip(self.connectors, stage_pairs(batch.net.pre, batch.guide.pre), strict=True):
            distance = distance / 2 + connector(*pair)
        return self.spec.total(batch, distance)


class _Connector(nn.Module):
    margin: Tensor

    def __init__(self, channels: int, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, norm.num_features, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        self.wide = nn.Sequential(convolution, nn.BatchNorm2d(norm.num_features))
        self.register_buffer("margin", margins(norm), persistent=False)

    def forward(self, net: Tensor, guide: Tensor) -> Tensor:
        net, guide = level(net, guide)
        return partial_distance(self.wide(net), guide, self.margin)
