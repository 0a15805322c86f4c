"""Probabilistic knowledge transfer: Passalis and Tefas (ECCV 2018), arXiv 1803.10837."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kd.core.stage import Batch, Formula, Need
from kd.losses.maps import FeatureSpec, unit

_EPS = 1e-7


def neighbourhood(rows: Tensor) -> Tensor:
    """The probability [i, j] that row j of [sample, feature] is a neighbour of row i: (cosine + 1)/2, over its sum."""
    directions = unit(rows, _EPS)
    similarities = (directions @ directions.T + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)


def neighbourhood_distance(net: Tensor, guide: Tensor) -> Tensor:
    """KL(guide's neighbourhoods ‖ net's), divided by the number of pairs and not of samples: hence the large weight."""
    p, q = neighbourhood(guide), neighbourhood(net)
    return (p * ((p + _EPS) / (q + _EPS)).log()).mean()


class PKT(FeatureSpec, Formula):
    """ce·CE + weight·neighbourhood_distance(net's pooled features, guide's).

    It depends on which samples share a batch. Under torchrun each rank compares the samples of its own share.
    """

    name: Literal["pkt"] = "pkt"
    needs: ClassVar[frozenset[Need]] = frozenset({"pooled"})
    weight: float = Field(30_000.0, gt=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        return self.total(batch, neighbourhood_distance(batch.net.pooled, batch.guide.pooled))
