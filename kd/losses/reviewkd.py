"""Distilling knowledge via knowledge review: Chen et al. (CVPR 2021), arXiv 2104.09044."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from kd.core.stage import Batch, LossContext, Need, Outputs
from kd.losses.maps import FeatureSpec, resized, stage_pairs


def hcl(net: Tensor, guide: Tensor) -> Tensor:
    """The hierarchical context loss: a weighted mean of the MSEs of two maps, as they are and pooled.

    Both are [sample, channel, height, width]. The weights are 1 and, at 4×4, 2×2 and 1×1, 1/2, 1/4 and 1/8. A size that
    is not smaller than the map is skipped, and the next size takes its weight.
    """
    distance, weight, weights = mse_loss(net, guide), 1.0, 1.0
    for size in (4, 2, 1):
        if size < net.shape[2]:
            weight /= 2
            weights += weight
            distance = distance + weight * mse_loss(resized(net, size), resized(guide, size))
    return distance / weights


class ReviewKD(FeatureSpec):
    """ce·CE + weight·ramp·Σ of hcl(F(net), guide) over the stages and the pooled features, with trained F.

    F fuses a stage of the net with the deeper ones, so that each stage of the guide teaches them all. The net's maps
    are after their activation, the guide's before it. The ramp is min((epoch+1)/warmup, 1).
    """

    name: Literal["reviewkd"] = "reviewkd"
    needs: ClassVar[frozenset[Need]] = frozenset({"stages", "pre", "pooled"})
    growth: ClassVar[str] = "warmup"
    weight: float = Field(5.0, gt=0)
    warmup: int = Field(20, ge=0)  # epochs; 0: none
    width: int = Field(512, ge=1)  # at most, of the fused maps; the net's pooled features if they are fewer

    def build(self, context: LossContext) -> nn.Module:
        return _Review(self, _levels(context.net.outputs, context.guide.outputs))


def _levels(net: Outputs, guide: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The pairs to compare, deepest first; pooled features are maps of one pixel."""
    top = net.pooled[:, :, None, None], guide.pooled[:, :, None, None]
    return [top, *reversed(stage_pairs(net.stages, guide.pre))]


class _Review(nn.Module):
    def __init__(self, spec: ReviewKD, levels: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.spec = spec
        width = min(spec.width, levels[0][0].shape[1])
        shapes = enumerate((net.shape[1], width, guide.shape[1]) for net, guide in levels)
        self.levels = nn.ModuleList(_Fusion(*channels, deepest=i == 0) for i, channels in shapes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        left, distances = None, []
        for fusion, (net, guide) in zip(self.levels, _levels(batch.net, batch.guide), strict=True):
            compared, left = fusion(net, left, guide.shape[2:])
            distances.append(hcl(compared, guide))
        return self.spec.total(batch, torch.stack(distances).sum(), self.spec.ramp(batch.epoch))


class _Fusion(nn.Module):
    """A stage of the net and the fused map of the next deeper stage, weighted by attention at each place."""

    def __init__(self, channels: int, width: int, wanted: int, *, deepest: bool) -> None:
        super().__init__()
        narrow, wide = nn.Conv2d(channels, width, 1, bias=False), nn.Conv2d(width, wanted, 3, padding=1, bias=False)
        for convolution in (narrow, wide):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.wide = nn.Sequential(wide, nn.BatchNorm2d(wanted))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(self, net: Tensor, left: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map to compare with the guide's, and what is left for the next stage."""
        fused: Tensor = self.narrow(net)
        if self.attention is not None and left is not None:
            left = interpolate(left, fused.shape[2:])
            shares = self.attention(torch.cat([fused, left], 1))
            fused = fused * shares[:, :1] + left * shares[:, 1:]
        fused = interpolate(fused, size)
        return self.wide(fused), fused
