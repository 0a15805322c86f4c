"""Contrastive representation distillation: Tian et al. (ICLR 2020), arXiv 1910.10699."""

from __future__ import annotations

from math import log, log1p
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from kd.core.stage import Batch, LossContext, Need
from kd.losses.maps import FeatureSpec, unit

_EPS = 1e-7


class CRD(FeatureSpec):
    """ce·CE + weight·(contrast of the net with the guide's memory + contrast of the guide with the net's).

    v = unit(W·pooled + b), with W and b trained, for net and guide each. A memory has a v of every sample. With n
    training samples, K negatives, c = K/n, and S_k = exp(v·memory_k/temperature)/Z, the contrast of a sample is
    −log(S_0/(S_0 + c + 1e-7)) − Σ_k log(c/(S_k + c + 1e-7)): S_0 is of the sample itself, S_k of K samples of other
    classes. Z is n·mean(S·Z) of the first batch, then constant. Then memory ← unit(momentum·memory + (1 − momentum)·v).

    A sample's negatives are a uniform draw without replacement. The samples of a batch share one permutation, so one
    product of matrices has all scores; the released code draws for each. K is at most what exists for every class.
    """

    name: Literal["crd"] = "crd"
    needs: ClassVar[frozenset[Need]] = frozenset({"pooled"})
    weight: float = Field(0.8, gt=0)
    dim: int = Field(128, ge=1)
    negatives: int = Field(16_384, ge=1)
    temperature: float = Field(0.07, ge=0.02)  # exp(1/temperature) has to fit fp32
    momentum: float = Field(0.5, ge=0, lt=1)

    def build(self, context: LossContext) -> nn.Module:
        return _Contrast(self, context)


class _Contrast(nn.Module):
    memories: Tensor  # [network, sample, number], of the net and of the guide
    z: Tensor  # [network]; 0 before the first batch
    among: Tensor  # [number and class, training sample]

    def __init__(self, spec: CRD, context: LossContext) -> None:
        super().__init__()
        self.spec = spec
        widths = (each.outputs.pooled.shape[1] for each in (context.net, context.guide))
        self.embed = nn.ModuleList(nn.Linear(width, spec.dim) for width in widths)
        classes = context.labels[context.train]
        largest = int(classes.bincount().max())
        self.negatives = min(spec.negatives, len(classes) - largest)
        self.drawn = self.negatives + largest  # so that `negatives` of them are of other classes, for every class
        self.register_buffer("among", torch.stack([context.train, classes]), persistent=False)
        spread = (3 / spec.dim) ** 0.5  # the rows of validation samples are never read
        self.register_buffer("memories", torch.empty(2, len(context.labels), spec.dim).uniform_(-spread, spread))
        self.register_buffer("z", torch.zeros(2))
        self._has_z = False  # whether z is known; also after a checkpoint

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows = [unit(self.embed[i](each.pooled)) for i, each in enumerate((batch.net, batch.guide))]
        drawn, classes = self.among[:, torch.randperm(self.among.shape[1], device=self.z.device)[: self.drawn]]
        other = batch.labels[:, None] != classes
        negative = other & (other.cumsum(1, dtype=torch.int32) <= self.negatives)
        self._has_z = self._has_z or bool((self.z > 0).all())
        contrasts = [self._contrast(i, rows[i], batch, drawn, negative) for i in (0, 1)]
        self._remember(batch, rows)
        return self.spec.total(batch, contrasts[0] + contrasts[1])

    def _contrast(self, i: int, anchors: Tensor, batch: Batch, drawn: Tensor, negative: Tensor) -> Tensor:
        """The contrast of one network's rows with the memory of the other, a mean over the batch."""
        memory, k, n = self.memories[1 - i], self.negatives, self.among.shape[1]
        # Indexing copies. The gradient needs these rows, and the memory changes before it is computed.
        hits = (anchors * memory[batch.samples]).sum(1) / self.spec.temperature
        misses = anchors @ memory[drawn].T / self.spec.temperature
        if not self._has_z:
            with torch.no_grad():
                self.z[i] = n * batch.gather((hits.exp() + (misses.exp() * negative).sum(1)) / (k + 1)).mean()
        # S/(S + c + ε) is the sigmoid of log S − log(c + ε).
        middle = log(k / n + _EPS) + self.z[i].log()
        constant = k * log1p(_EPS * n / k) if k else 0.0
        return (constant - logsigmoid(hits - middle) - (logsigmoid(middle - misses) * negative).sum(1)).mean()

    @torch.no_grad()
    def _remember(self, batch: Batch, rows: list[Tensor]) -> None:
        """Move the memories of the batch's samples, on all ranks those of the whole batch."""
        samples = batch.gather(batch.samples)
        for memory, row in zip(self.memories, rows, strict=True):
            memory[samples] = unit(torch.lerp(batch.gather(row), memory[samples], self.spec.momentum))
