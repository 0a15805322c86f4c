"""Distillation from a stronger teacher, by correlations: Huang et al. (NeurIPS 2022), arXiv 2205.10536."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.core.stage import Batch, Formula, Temperature
from kd.losses.distillation import with_gradient

_LEAST_CHANGE = 0.004  # of a vector, for its whole gradient: its norm without its mean, as a part of its norm


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation of two matrices along a dimension; 0 where either is constant.

    Where a vector changes by less than 0.004 of its norm, its gradient is no larger than at 0.004. This is ours: the
    paper has no such bound. A classifier that begins at zero says nearly the same probability for each class. Without
    the bound it has a gradient of 10⁶, and the training collapses. No value is changed.
    """
    least = [_LEAST_CHANGE * each.detach().norm(dim=dim) for each in (a, b)]
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    of_a, of_b = a.detach().norm(dim=dim), b.detach().norm(dim=dim)
    product = of_a * of_b + 1e-8
    shares = [(product / (bound * other + 1e-8)).clamp(max=1) for bound, other in zip(least, (of_b, of_a), strict=True)]
    a, b = (with_gradient(each, share.unsqueeze(dim)) for each, share in zip((a, b), shares, strict=True))
    found: Tensor = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
    return found


class DIST(Formula):
    """ce·CE + T²·(β·inter + γ·intra), on the softmaxes of net and guide at T.

    `inter` is 1 − the correlation of net and guide over the classes, a mean over the samples.
    `intra` is 1 − their correlation over the samples, a mean over the classes. So it depends on which samples share a
    batch: two samples give 1 or −1, and one sample has no correlation (intra 1, no gradient). Under torchrun each
    rank takes its own share of the batch. Equal logits leave a small loss, because of the 1e-8.
    Where probabilities hardly change, the gradient is bounded: see `correlation`.
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
