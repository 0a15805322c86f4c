"""The guide's logits: one frozen network, run in one fixed way whatever asks for them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx.experimental.optimization import fuse

from kd.datasets.data import Data
from kd.hardware import autocast
from kd.models.normalized import Normalized

# Images a forward, always: the last chunk is padded. With one shape no row depends on its neighbours or its
# place, so logits may be remembered or computed in any order. 256 was the fastest of 64…1,000 for resnet110.
CHUNK = 256


class Guide:
    """A finished network as a guide: in eval mode, without gradients, BatchNorm folded into its convolutions.

    Its logits are shifted by their maximum, which no softmax sees, and rounded to float16 (float32 or
    float64 where the student computes in fp32 or fp64): what a student learns from is the same whether computed
    now or read back.
    """

    def __init__(self, network: Normalized, data: Data, precision: str, device: str) -> None:
        network.eval()
        module = deepcopy(network.network).double() if precision == "fp64" else network.network
        folded = Normalized(fuse(module), (0.0,) * 3, (1.0,) * 3)
        folded.mean, folded.std = network.mean, network.std
        self._network = folded.to(memory_format=torch.channels_last).to(device).eval()
        self._data, self._precision, self._device = data, precision, device
        self._dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.float16)
        if precision == "fp64":
            self._network.double()

    def logits(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> Tensor:
        """The logits [sample, class] of the views of samples, on the device; `advance` hears of every chunk done."""
        device, count = self._device, len(samples)
        padding = -count % CHUNK
        index, view = (torch.from_numpy(np.pad(a, (0, padding), mode="edge")).to(device) for a in (samples, views))
        # Allocated outside inference_mode: autograd refuses to save an inference tensor for a backward.
        logits_type = torch.promote_types(self._dtype, torch.float32)
        logits = torch.empty(count, self._data.spec.num_classes, dtype=self._dtype, device=device)
        with torch.inference_mode(), autocast(self._precision, device):
            for start in range(0, count, CHUNK):
                end = start + CHUNK
                raw = self._network(self._data.show(index[start:end], view[start:end])).to(logits_type)
                shifted = raw - raw.amax(1, keepdim=True)
                rows = logits[start:end]
                rows.copy_(shifted.clamp(min=torch.finfo(self._dtype).min)[: len(rows)])
                advance(len(rows))
        return logits
