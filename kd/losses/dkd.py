"""Decoupled knowledge distillation: Zhao et al. (CVPR 2022), arXiv 2203.08679."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.core.stage import Batch, Formula, Temperature
from kd.losses.distillation import kl, standardized


def others(values: Tensor, labels: Tensor) -> Tensor:
    """The columns of [sample, class] without the label's: [sample, class − 1]."""
    columns = torch.arange(values.shape[1] - 1, device=values.device)
    return values.gather(1, columns + (columns >= labels[:, None]))


def _target_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [sample, 2] of the two events "the label" and "another class"."""
    return torch.stack([logits.gather(1, labels[:, None])[:, 0], others(logits, labels).logsumexp(1)], 1)


class DKD(Formula):
    """ce·CE + ramp·T²·(α·TCKD + β·NCKD): the two parts of KD, with a weight each.

    TCKD is the KL of the label's probability at T against that of all other classes together. NCKD is the KL among
    the other classes. KD is T²·mean(TCKD + (1−p)·NCKD), with p the guide's probability of the label: α=β=1 is not KD.
    The ramp is min((epoch+1)/warmup, 1), as in the authors' code. All KLs are batchmean, and T² is kept.
    With two classes NCKD is 0. `standardize` is as in `distill`: Sun et al. (CVPR 2024) multiply α and β by a weight.
    """

    name: Literal["dkd"] = "dkd"
    growth: ClassVar[str] = "warmup"
    T: Temperature
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(8.0, ge=0)
    warmup: int = Field(20, ge=0)  # epochs; 0: none
    ce: float = Field(1.0, ge=0)
    standardize: bool = False

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        net, guide, labels = batch.net.logits, batch.guide.logits, batch.labels
        ce = cross_entropy(net, labels)
        if self.standardize:
            net, guide = standardized(net), standardized(guide)
        target = kl(_target_or_not(guide / self.T, labels), _target_or_not(net / self.T, labels), 1)
        non_target = kl(others(guide, labels), others(net, labels), self.T)
        decoupled = self.T**2 * (self.alpha * target + self.beta * non_target)
        return {"loss": self.ce * ce + self.ramp(batch.epoch) * decoupled, "ce": ce, "tckd": target, "nckd": non_target}

    @property
    def label(self) -> str:
        changed = {" α": (self.alpha, 1), " warmup": (self.warmup, 20), " ce": (self.ce, 1)}
        rest = "".join(f"{name}{value:g}" for name, (value, usual) in changed.items() if value != usual)
        return f"dkd T{self.T:g} β{self.beta:g}{rest}" + " z" * self.standardize
