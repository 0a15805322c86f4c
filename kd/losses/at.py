"""Attention transfer: Zagoruyko and Komodakis (ICLR 2017), arXiv 1612.03928."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from kd.core.stage import Batch, Formula, Need
from kd.losses.maps import FeatureSpec, level, stage_pairs, unit


def attention(maps: Tensor) -> Tensor:
    """Where a map is large [sample, place]: its mean square over the channels, each row of length 1."""
    return unit(maps.square().mean(1).flatten(1))


def attention_distance(net: Tensor, guide: Tensor) -> Tensor:
    """The mean squared difference of the attentions of two maps, which may differ in channels and size."""
    net, guide = level(net, guide)
    return mse_loss(attention(net), attention(guide))


class AT(FeatureSpec, Formula):
    """ce·CE + weight·Σ over the stages of mean((Q(net) − Q(guide))²), with Q = attention().

    The mean is over samples and places, as in RepDistiller and mdistiller, so stages with large maps count less. The
    paper takes the length of the difference and not its mean square, so its weight does not fit here.
    """

    name: Literal["at"] = "at"
    needs: ClassVar[frozenset[Need]] = frozenset({"stages"})
    weight: float = Field(1000.0, gt=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        pairs = stage_pairs(batch.net.stages, batch.guide.stages)
        return self.total(batch, torch.stack([attention_distance(*pair) for pair in pairs]).sum())
