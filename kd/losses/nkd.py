"""Normalised knowledge distillation: Yang et al. (ICCV 2023), arXiv 2303.13005."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.core.stage import Batch, Formula, Temperature
from kd.losses.dkd import others


class NKD(Formula):
    """ce·CE + mean(p·CE) + γ·T²·(cross-entropy of guide and net among the classes that are not the label).

    p is the guide's probability of the label at T=1. The other classes have softmaxes of their own at T: this is what
    is normalised. Both terms are cross-entropies, so the loss is not 0 when net and guide are equal.
    The authors' code before 2023-10-10 took all classes for the last term.
    """

    name: Literal["nkd"] = "nkd"
    T: Temperature
    gamma: float = Field(1.5, ge=0)
    ce: float = Field(1.0, ge=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        net, guide, labels = batch.net.logits, batch.guide.logits, batch.labels
        each = cross_entropy(net, labels, reduction="none")
        ce, target = each.mean(), (guide.softmax(1).gather(1, labels[:, None])[:, 0] * each).mean()
        non_target = cross_entropy(others(net, labels) / self.T, (others(guide, labels) / self.T).softmax(1))
        loss = self.ce * ce + target + self.gamma * self.T**2 * non_target
        return {"loss": loss, "ce": ce, "target": target, "non_target": non_target}
