"""Distillation from a stronger teacher, by correlations: Huang et al. (NeurIPS 2022), arXiv 2205.10536."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.core.stage import Batch, Formula, Temperature

_LEAST_CHANGE = 0.004  # of a vector along its elements: its norm without its mean, as a part of its norm


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of two matrices along a dimension; 0 where either is constant.

    Where a vector hardly changes, its norm without its mean counts as 0.004 of its whole norm, so its correlation is
    nearer to 0. This is ours: the paper has no such bound. A classifier that begins at zero says nearly the same
    probability for each class. Divided by so small a norm it had a gradient of 10⁶, and the training collapsed. Other
    vectors keep every bit.
    """
    of_a, of_b = (_LEAST_CHANGE * each.detach().norm(dim=dim) for each in (a, b))
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    found: Tensor = (a * b).sum(dim) / (a.norm(dim=dim).clamp(min=of_a) * b.norm(dim=dim).clamp(min=of_b) + 1e-8)
    return found


class DIST(Formula):
    """ce·CE + T²·(β·inter + γ·intra), on the softmaxes of net and guide at T.

    `inter` is 1 − the correlation of net and guide over the classes, a mean over the samples.
    `intra` is 1 − their correlation over the samples, a mean over the classes. So it depends on which samples share a
    batch: two samples give 1 or −1, and one sample has no correlation (intra 1, no gradient). Under torchrun each
    rank takes its own share of the batch. Equal logits leave a small loss, because of the 1e-8.
    Samples or classes whose probabilities hardly change count less: see `correlation`.
    At a high T a correlation no longer depends on T, so T² makes this loss grow with T: a β fits one T only.
    """

    name: Literal["dist"] = "dist"
    T: Temperature
    beta: float = Field(2.0, ge=0)
    gamma: float = Field(2.0, ge=0)
    ce: float = Field(1.0, ge=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        net, guide = batch.net.logits, batch.guide.logits
        ce = cross_entropy(net, batch.labels)
        q, p = (net / self.T).softmax(1), (guide / self.T).softmax(1)
        inter = 1 - correlation(q, p, 1).mean()
        intra = 1 - correlation(q, p, 0).mean()
        relations = self.T**2 * (self.beta * inter + self.gamma * intra)
        return {"loss": self.ce * ce + relations, "ce": ce, "inter": inter, "intra": intra}
