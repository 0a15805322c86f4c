"""Cross-entropy with the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kd.core.stage import Batch, Formula, Need

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Formula):
    """The mean cross-entropy with the labels, in nats."""

    name: Literal["cross_entropy"] = "cross_entropy"
    usual: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        from torch.nn.functional import cross_entropy

        return {"loss": cross_entropy(batch.net.logits, batch.labels)}
