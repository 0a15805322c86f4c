"""Variational information distillation: Ahn et al. (CVPR 2019), arXiv 1904.05835."""

from __future__ import annotations

from math import expm1, log
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from kd.core.stage import Batch, LossContext, Need
from kd.losses.maps import FeatureSpec, level, stage_pairs

_LEAST = 1e-5  # variance


def gaussian_distance(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """−log N(target; mean, variance) without its constant, a mean over all elements.

    Target and mean are [sample, channel, height, width], the variance is [channel].
    """
    wide = variance[:, None, None]
    return 0.5 * ((target - mean).square() / wide + wide.log()).mean()


class VID(FeatureSpec):
    """ce·CE + weight·Σ over the stages of −log q(guide's map | net's map).

    q is a Gaussian. Its mean is a regression of the net's map by three 1×1 convolutions. Each channel has a variance
    of its own, softplus(a) + 1e-5. Both are trained with the net.
    """

    name: Literal["vid"] = "vid"
    needs: ClassVar[frozenset[Need]] = frozenset({"stages"})
    weight: float = Field(1.0, gt=0)
    variance: float = Field(5.0, gt=_LEAST)  # at the start

    def build(self, context: LossContext) -> nn.Module:
        return _Variational(self, stage_pairs(context.net.outputs.stages, context.guide.outputs.stages))


class _Variational(nn.Module):
    def __init__(self, spec: VID, pairs: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.spec = spec
        self.stages = nn.ModuleList(_Gaussian(net.shape[1], guide.shape[1], spec.variance) for net, guide in pairs)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        pairs = stage_pairs(batch.net.stages, batch.guide.stages)
        distances = [stage(*level(*pair)) for stage, pair in zip(self.stages, pairs, strict=True)]
        return self.spec.total(batch, torch.stack(distances).sum())


class _Gaussian(nn.Module):
    def __init__(self, channels: int, wanted: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels, wanted, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(wanted, wanted, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(wanted, wanted, 1, bias=False),
        )
        # A parameter, so that it is trained and saved. In mdistiller it is neither: there the loss is a scaled MSE.
        # log(expm1(v)) is the inverse of softplus; for a large v it is v, where expm1 overflows.
        v = variance - _LEAST
        self.raw_variance = nn.Parameter(torch.full((wanted,), log(expm1(v)) if v < 30 else v))

    def forward(self, net: Tensor, guide: Tensor) -> Tensor:
        return gaussian_distance(self.mean(net), softplus(self.raw_variance) + _LEAST, guide)
