"""The losses of a stage: pure functions of logits, and the specs that choose between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kd.spec import Frozen

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["batchmean", "mean"]


def kl(target: Tensor, logits: Tensor, T: float, reduction: Reduction = "batchmean") -> Tensor:
    """KL(softmax(target/T) ‖ softmax(logits/T)), a scalar, without the customary factor T².

    Both arguments are logits [batch, class]; gradients flow through either that requires them.
    `batchmean` divides the sum by the batch, the meaning of Hinton et al. (2015); `mean` divides it by
    batch·classes, which TAKD's released code computes.
    """
    from torch.nn.functional import log_softmax

    log_p, log_q = log_softmax(target / T, 1), log_softmax(logits / T, 1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    return total / (len(logits) if reduction == "batchmean" else logits.numel())


class CrossEntropy(Frozen):
    """Plain supervision: the mean cross-entropy with the labels."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def __call__(self, logits: Tensor, labels: Tensor, guide: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of logits [batch, class] against labels [batch]; a guide has no say."""
        from torch.nn.functional import cross_entropy

        return {"loss": cross_entropy(logits, labels)}


class Distill(Frozen):
    """(1−λ)·CE + λ·T²·KL(guide ‖ net): TAKD equation 3, Hinton et al. (2015)."""

    name: Literal["distill"] = "distill"
    T: float = Field(gt=0)
    lam: float = Field(ge=0, le=1, validation_alias="lambda", serialization_alias="lambda")
    reduction: Reduction = "batchmean"

    def __call__(self, logits: Tensor, labels: Tensor, guide: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, for logits [batch, class], labels [batch] and the guide's logits [batch, class]."""
        from torch.nn.functional import cross_entropy

        ce, divergence = cross_entropy(logits, labels), kl(guide, logits, self.T, self.reduction)
        return {"loss": (1 - self.lam) * ce + self.lam * self.T**2 * divergence, "ce": ce, "kl": divergence}


class TeachableTeacher(Frozen):
    """CE + w·T²·KL(net ‖ guide): Trained Teacher's second stage; w < 0 makes Nasty Teacher (ICLR 2021).

    The network in training is the *target* of the divergence, and the gradient flows through it:
    d/dz = w·T·p·(log(p/q) − KL)/batch, with p the network's softmax at T and q the guide's. A negative w
    is unbounded below and can diverge.
    """

    name: Literal["teachable_teacher"] = "teachable_teacher"
    T: float = Field(gt=0)
    weight: float

    def __call__(self, logits: Tensor, labels: Tensor, guide: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, for logits [batch, class], labels [batch] and the guide's logits [batch, class]."""
        from torch.nn.functional import cross_entropy

        ce, divergence = cross_entropy(logits, labels), kl(logits, guide, self.T)
        return {"loss": ce + self.weight * self.T**2 * divergence, "ce": ce, "kl": divergence}


# A union, not a base class: pydantic dumps a field by its declared type, and under a base class every T
# would be dumped away and share one key.
Loss = Annotated[CrossEntropy | Distill | TeachableTeacher, Field(discriminator="name")]
