"""Teacher-free distillation from a virtual teacher (Tf-KD_reg): Yuan et al. (CVPR 2020), arXiv 1909.11723."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.core.stage import Batch, Formula, Need
from kd.losses.distillation import kl


class TfKD(Formula):
    """(1−α)·CE + α·KL(v ‖ net), batchmean, as the authors' code computes it.

    The virtual teacher u gives the label the probability `correct`, and all other classes the same share of the rest.
    v = softmax(u/T) is taken of the probabilities u, which lie in [0, 1], so v is almost uniform at T=20. Tempering
    u itself (u^(1/T), normalised) would be another loss. The net has no T, and there is no T².
    The authors' mean over the classes, times 100 for CIFAR-100, is the batchmean here.
    """

    name: Literal["tf_kd"] = "tf_kd"
    needs: ClassVar[frozenset[Need]] = frozenset()
    alpha: float = Field(0.1, ge=0, le=1)
    T: float = Field(20.0, gt=0)  # of the virtual teacher, so it is not the method's
    correct: float = Field(0.99, gt=0, lt=1)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        net, labels = batch.net.logits, batch.labels
        virtual = torch.full_like(net, (1 - self.correct) / (net.shape[1] - 1))
        virtual.scatter_(1, labels[:, None], self.correct)
        ce, divergence = cross_entropy(net, labels), kl(virtual / self.T, net, 1)
        return {"loss": (1 - self.alpha) * ce + self.alpha * divergence, "ce": ce, "kl": divergence}
