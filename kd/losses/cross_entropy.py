"""Cross-entropy with the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kd.core.stage import LossSpec

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(LossSpec):
    """The mean cross-entropy with the labels, in nats."""

    name: Literal["cross_entropy"] = "cross_entropy"
    guided: ClassVar[bool] = False

    def __call__(self, logits: Tensor, labels: Tensor, guide: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of logits [batch, class] against labels [batch]; `guide` is not read."""
        from torch.nn.functional import cross_entropy

        return {"loss": cross_entropy(logits, labels)}
