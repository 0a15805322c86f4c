"""Weighted soft labels: Zhou et al. (ICLR 2021), arXiv 2102.00650."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.core.stage import Batch, Formula, Temperature


class WSLD(Formula):
    """ce·CE + weight·T²·mean(w·soft), with soft the cross-entropy of guide and net at T, and w a weight of each sample.

    w = 1 − exp(−CE(net)/CE(guide)), both at T=1: a sample that the net knows better than its guide counts little.
    No gradient flows through w. soft is no KL, so the loss is not 0 when net and guide are equal.
    """

    name: Literal["wsld"] = "wsld"
    T: Temperature
    weight: float = Field(2.25, gt=0)  # the paper's λ is not the method's λ
    ce: float = Field(1.0, ge=0)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        net, guide, labels = batch.net.logits, batch.guide.logits, batch.labels
        of_net, of_guide = (cross_entropy(logits, labels, reduction="none") for logits in (net, guide))
        w = -torch.expm1(-of_net.detach() / (of_guide + 1e-7))
        soft = (w * cross_entropy(net / self.T, (guide / self.T).softmax(1), reduction="none")).mean()
        ce = of_net.mean()
        return {"loss": self.ce * ce + self.weight * self.T**2 * soft, "ce": ce, "soft": soft}
