"""Distillation from a guide's softened predictions: Hinton et al. (2015), TAKD equation 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kd.core.stage import LossSpec, Reduction

if TYPE_CHECKING:
    from torch import Tensor


def kl(target: Tensor, logits: Tensor, T: float, reduction: Reduction = "batchmean") -> Tensor:
    """KL(softmax(target/T) ‖ softmax(logits/T)), a scalar, without the usual factor T².

    Both arguments are logits [batch, class]; gradients flow through either that requires them.
    `batchmean` divides the sum by the batch size, as in Hinton et al. (2015). `mean` divides it by
    batch size · classes, as in TAKD's released code.
    """
    from torch.nn.functional import log_softmax

    log_p, log_q = log_softmax(target / T, 1), log_softmax(logits / T, 1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    return total / (len(logits) if reduction == "batchmean" else logits.numel())


class Distill(LossSpec):
    """(1−λ)·CE + λ·T²·KL(guide ‖ net)."""

    name: Literal["distill"] = "distill"
    T: float = Field(gt=0)
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")
    reduction: Reduction = "batchmean"

    def __call__(self, logits: Tensor, labels: Tensor, guide: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, for logits [batch, class], labels [batch] and the guide's logits [batch, class]."""
        from torch.nn.functional import cross_entropy

        ce, divergence = cross_entropy(logits, labels), kl(guide, logits, self.T, self.reduction)
        return {"loss": (1 - self.lam) * ce + self.lam * self.T**2 * divergence, "ce": ce, "kl": divergence}

    @property
    def settings(self) -> str:
        divided = " KL/(batch·classes)" if self.reduction == "mean" else ""
        return f"T={self.T:g} lambda={self.lam:g}{divided}"

    @property
    def label(self) -> str:
        return f"T{self.T:g} λ{self.lam:g}"
