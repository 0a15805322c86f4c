"""Similarity-preserving distillation: Tung and Mori (ICCV 2019), arXiv 1907.09682."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from kd.core.stage import Batch, Formula, Need
from kd.losses.maps import FeatureSpec, unit


def similarity(features: Tensor) -> Tensor:
    """How similar the samples of a batch are [sample, sample]: products of their features, each row of length 1."""
    rows = features.flatten(1)
    return unit(rows @ rows.T)


def similarity_distance(net: Tensor, guide: Tensor) -> Tensor:
    """Σ of the squared differences of the similarities, divided by the square of the batch size."""
    return mse_loss(similarity(net), similarity(guide))


class SP(FeatureSpec, Formula):
    """ce·CE + weight·similarity_distance(net's last map, guide's last map) (equation 4).

    It depends on which samples share a batch. Under torchrun each rank compares the samples of its own share.
    Shapes of maps may differ.
    """

    name: Literal["sp"] = "sp"
    needs: ClassVar[frozenset[Need]] = frozenset({"stages"})
    weight: float = Field(3000.0, gt=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        return self.total(batch, similarity_distance(batch.net.stages[-1], batch.guide.stages[-1]))
