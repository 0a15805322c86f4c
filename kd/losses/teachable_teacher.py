"""The loss of a teacher that learns to teach: Trained Teacher (Displays 2023), Nasty Teacher (ICLR 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kd.core.stage import Batch, Formula, Temperature
from kd.losses.distillation import kl

if TYPE_CHECKING:
    from torch import Tensor


class TeachableTeacher(Formula):
    """CE + w·T²·KL(net ‖ guide): Trained Teacher's second stage; w < 0 makes a nasty teacher.

    The network in training is the *target* of the divergence, and the gradient flows through it:
    d/dz = w·T·p·(log(p/q) − KL)/batch, with p the network's softmax at T and q the guide's.
    With a negative w the loss has no lower bound, so training can diverge.
    """

    name: Literal["teachable_teacher"] = "teachable_teacher"
    usual: ClassVar[bool] = True
    smaller_guide: ClassVar[bool] = True
    T: Temperature
    weight: float

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        from torch.nn.functional import cross_entropy

        ce = cross_entropy(batch.net.logits, batch.labels)
        divergence = kl(batch.net.logits, batch.guide.logits, self.T)
        return {"loss": ce + self.weight * self.T**2 * divergence, "ce": ce, "kl": divergence}

    @property
    def label(self) -> str:
        return f"w{self.weight:g}"
