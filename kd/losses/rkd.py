"""Relational knowledge distillation: Park et al. (CVPR 2019), arXiv 1904.05068."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import smooth_l1_loss

from kd.core.stage import Batch, Formula, Need
from kd.losses.maps import FeatureSpec


def relations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows [sample, feature] the distances [i, j], and the cosines [i, j, k] of the angles at row i.

    Distances are divided by the mean of the positive ones. The cosine at i is that of row j − row i and row k − row i.
    It is 0 if one of these has no direction.
    """
    differences = rows[None] - rows[:, None]
    lengths = vector_norm(differences, dim=2)
    mean = lengths.sum() / (lengths > 0).sum().clamp(min=1)
    # The gradient of a direction is 1/length. For two equal rows, or rows that differ by rounding, it would explode.
    same = (lengths <= 1e-5 * mean)[:, :, None]
    directions = (differences / lengths[:, :, None].masked_fill(same, 1)).masked_fill(same, 0)
    return lengths / mean.masked_fill(mean == 0, 1), directions @ directions.mT


class RKD(FeatureSpec, Formula):
    """ce·CE + weight·(distance·l_d + angle·l_a), on the pooled features.

    l_d and l_a are the mean Huber losses of the relations of the net and of the guide: distances of two samples, and
    angles of three. Their means are over all entries, with those of a sample and itself. It depends on which samples
    share a batch; under torchrun each rank relates the samples of its own share. Memory grows with
    batch² · (features + batch).
    """

    name: Literal["rkd"] = "rkd"
    needs: ClassVar[frozenset[Need]] = frozenset({"pooled"})
    weight: float = Field(1.0, gt=0)
    distance: float = Field(25.0, ge=0)
    angle: float = Field(50.0, ge=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        pairs = zip(relations(batch.net.pooled), relations(batch.guide.pooled), strict=True)
        l_d, l_a = (smooth_l1_loss(net, guide) for net, guide in pairs)
        return self.total(batch, self.distance * l_d + self.angle * l_a)
