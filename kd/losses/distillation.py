"""Distillation from a guide's softened predictions: Hinton et al. (2015), TAKD equation 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kd.core.spec import Neutral
from kd.core.stage import Batch, Formula, Reduction, Temperature

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_DEVIATION = 0.03  # of a row of logits, for its whole gradient


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


def standardized(logits: Tensor) -> Tensor:
    """Each row minus its mean, divided by its standard deviation (n − 1): Sun et al. (CVPR 2024).

    Logits [batch, class]. Gradients flow through mean and deviation. Where the deviation is below 0.03, the gradient is
    no larger than at 0.03. This is ours: the paper has no such bound. A classifier that begins at zero gives equal
    logits. Without the bound they have a gradient of 10⁶, and the training collapses. No value is changed.
    """
    deviation = logits.detach().std(1, keepdim=True) + 1e-7
    logits = with_gradient(logits, (deviation / _LEAST_DEVIATION).clamp(max=1))
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def with_gradient(values: Tensor, share: Tensor) -> Tensor:
    """The same values, with a share of their gradient, between 0 and 1. A share of 1 changes no bit."""
    kept = values.detach()
    return kept + share * (values - kept)


class Distill(Formula):
    """(1−λ)·CE + weight·λ·T²·KL(guide ‖ net).

    Sun et al.'s 0.1·CE + 9·KL is λ 0.9, weight 10 and `standardize`. The CE always reads the plain logits.
    """

    name: Literal["distill"] = "distill"
    option: ClassVar[str] = "kd"
    usual: ClassVar[bool] = True
    T: Temperature
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")
    reduction: Reduction = "batchmean"
    weight: Annotated[float, Field(gt=0), Neutral(1.0)] = 1.0
    standardize: Annotated[bool, Neutral(False)] = False

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        from torch.nn.functional import cross_entropy

        net, guide = batch.net.logits, batch.guide.logits
        ce = cross_entropy(net, batch.labels)
        if self.standardize:
            net, guide = standardized(net), standardized(guide)
        divergence = kl(guide, net, self.T, self.reduction)
        return {
            "loss": (1 - self.lam) * ce + self.weight * self.lam * self.T**2 * divergence,
            "ce": ce,
            "kl": divergence,
        }

    @property
    def label_weight(self) -> float:
        return 1 - self.lam

    @property
    def settings(self) -> str:
        weight = f" weight={self.weight:g}" if self.weight != 1 else ""
        standardize = " standardize=true" if self.standardize else ""
        divided = " KL/(batch·classes)" if self.reduction == "mean" else ""
        return f"T={self.T:g} lambda={self.lam:g}{weight}{standardize}{divided}"

    @property
    def label(self) -> str:
        return (
            f"T{self.T:g} λ{self.lam:g}" + (f" w{self.weight:g}" if self.weight != 1 else "") + " z" * self.standardize
        )
