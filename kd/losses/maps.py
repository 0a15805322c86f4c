"""What the losses on features share: their weights, pairs of maps, and rows of unit length."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool2d, cross_entropy

from kd.core.stage import Batch, LossSpec


class FeatureSpec(LossSpec):
    """ce·CE + weight·(a distance between features of net and guide)."""

    ce: float = Field(1.0, ge=0)
    weight: float = Field(gt=0)

    def total(self, batch: Batch, distance: Tensor, ramp: float = 1.0) -> dict[str, Tensor]:
        """The loss and its parts. `ramp` multiplies the distance in the loss; the logged part is without it."""
        ce, loss = cross_entropy(batch.net.logits, batch.labels), self.weight * ramp * distance
        # With ce=0 the classifier may be anything, and 0·inf would be NaN. Its gradient is 0 and not absent: under
        # torchrun every parameter has to have one.
        part = self.ce * ce if self.ce else (0 * batch.net.logits.nan_to_num()).sum()
        return {"loss": loss + part, "ce": ce, self.name: distance}

    @property
    def label(self) -> str:
        """The name, and the hyperparameters that differ from the defaults: "at weight500"."""
        usual = type(self).model_construct().settings.split()
        return " ".join([self.name, *(each for each in self.settings.split() if each not in usual)]).replace("=", "")


def stage_pairs(net: list[Tensor], guide: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The maps [sample, channel, height, width] of both networks, stage by stage.

    If one has more stages, its first ones are left out.
    """
    pairs = min(len(net), len(guide))
    return list(zip(net[-pairs:], guide[-pairs:], strict=True))


def level(net: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps [sample, channel, height, width] at the size of the smaller one: the larger is average-pooled."""
    if net.shape[2] > guide.shape[2]:
        return resized(net, guide.shape[2]), guide
    if net.shape[2] < guide.shape[2]:
        return net, resized(guide, net.shape[2])
    return net, guide


def resized(maps: Tensor, size: int) -> Tensor:
    """Square maps [sample, channel, size, size]: means of the same windows as torch's adaptive_avg_pool2d.

    That function has no deterministic gradient on a GPU, so torch refuses it there.
    """
    side = maps.shape[2]
    if side % size == 0:
        return avg_pool2d(maps, side // size)
    averages = maps.new_zeros(size, side)
    for i in range(size):
        first, last = i * side // size, -(-(i + 1) * side // size)
        averages[i, first:last] = 1 / (last - first)
    return averages @ maps @ averages.T


def unit(rows: Tensor, eps: float = 0.0) -> Tensor:
    """Each row [row, number] divided by (its length + eps).

    A zero row stays zero and has no gradient. Its direction is undefined, and 1/eps would be the size of its gradient.
    """
    lengths = vector_norm(rows, dim=1, keepdim=True)
    zero = lengths <= 1e-12
    directions: Tensor = rows / (lengths + eps).masked_fill(zero, 1)
    return directions.masked_fill(zero, 0)
