"""Cross-entropy with smoothed labels: Szegedy et al. (CVPR 2016), section 7."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from kd.core.stage import Batch, Formula, Need


class LabelSmoothing(Formula):
    """(1−ε)·CE + ε·(cross-entropy with the uniform distribution over all classes), as in torch; ε is `smoothing`.

    Other code shares ε among the classes that are not the label. That is this loss with ε·classes/(classes − 1).
    """

    name: Literal["label_smoothing"] = "label_smoothing"
    needs: ClassVar[frozenset[Need]] = frozenset()
    smoothing: float = Field(0.1, ge=0, lt=1)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        ce, uniform = cross_entropy(batch.net.logits, batch.labels), -log_softmax(batch.net.logits, 1).mean()
        return {"loss": (1 - self.smoothing) * ce + self.smoothing * uniform, "ce": ce, "uniform": uniform}
