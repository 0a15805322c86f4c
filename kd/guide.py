"""The guide's logits: one frozen network, run in one fixed way whatever asks for them, and remembered in the bank."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kd.bank import Bank
from kd.datasets import views as augmentation
from kd.datasets.data import Data
from kd.hardware import autocast, processor
from kd.models.normalized import Normalized
from kd.stage import FORMAT

# Images a forward, always: the last chunk is padded. With one shape no row depends on its neighbours or its
# place, so logits may be remembered or computed in any order. 128 was the fastest of 64…1,000 (bench/README.md).
CHUNK = 128

# Rows computed between two writes to the bank: what a killed process loses at most.
_BLOCK = 128 * CHUNK


class Guide:
    """A finished network as a guide: in eval mode, without gradients, BatchNorm folded into its convolutions.

    Its logits are shifted by their maximum, which no softmax sees, and rounded to float16 (float32 or
    float64 where the student computes in fp32 or fp64): what a student learns from is the same whether computed
    now or read back from the bank.
    """

    def __init__(self, network: Normalized, data: Data, precision: str, device: str, bank: Bank | None = None) -> None:
        self._network, self._data = network.eval(), data
        self._precision, self._device, self._bank = precision, device, bank

    def logits(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> Tensor:
        """The logits [sample, class] of the views of samples, on the device; `advance` hears of every chunk done."""
        if self._bank is None:
            return self._compute(samples, views, advance).to(self._device)
        filled = self._bank.filled(samples, views)
        logits = torch.empty(len(samples), self._data.spec.num_classes, dtype=logits_type(self._precision))
        logits[torch.from_numpy(filled)] = torch.from_numpy(self._bank.read(samples[filled], views[filled]))
        advance(int(filled.sum()))
        missing = np.flatnonzero(~filled)
        for start in range(0, len(missing), _BLOCK):
            block = missing[start : start + _BLOCK]
            logits[torch.from_numpy(block)] = fresh = self._compute(samples[block], views[block], advance).cpu()
            self._remember(samples[block], views[block], fresh)
        return logits.to(self._device)

    def _remember(self, samples: NDArray[np.int64], views: NDArray[np.int64], logits: Tensor) -> None:
        if self._bank is None:
            return
        try:
            self._bank.write(samples, views, logits.numpy())
        except OSError as error:
            print(f"the guide's logits are computed and not kept from here on: {error}", flush=True)
            self._bank = None

    def _compute(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> Tensor:
        device, home, count = self._device, self._data.home, len(samples)
        padding = -count % CHUNK
        index, view = (torch.from_numpy(np.pad(a, (0, padding), mode="edge")).to(home) for a in (samples, views))
        rounded = logits_type(self._precision)
        # Allocated outside inference_mode: autograd refuses to save an inference tensor for a backward.
        logits = torch.empty(count, self._data.spec.num_classes, dtype=rounded, device=device)
        with torch.inference_mode(), autocast(self._precision, device):
            for start in range(0, count, CHUNK):
                end = start + CHUNK
                raw = self._folded(self._data.show(index[start:end], view[start:end]))
                raw = raw.to(torch.promote_types(rounded, torch.float32))
                shifted = raw - raw.amax(1, keepdim=True)
                rows = logits[start:end]
                rows.copy_(shifted.clamp(min=torch.finfo(rounded).min)[: len(rows)])
                advance(len(rows))
        return logits

    @cached_property
    def _folded(self) -> Normalized:
        """Made when the first row is missing: a warm bank needs no network."""
        exact = self._precision == "fp64"
        module = deepcopy(self._network.network).double() if exact else self._network.network
        folded = Normalized(fuse(module), (0.0,) * 3, (1.0,) * 3)
        folded.mean, folded.std = self._network.mean, self._network.std
        dtype = torch.float64 if exact else torch.float32
        folded = folded.to(memory_format=torch.channels_last).to(self._device, dtype).eval()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._precision)
        for part in folded.modules():
            if low is not None and isinstance(part, (nn.Conv2d, nn.Linear)):
                part.to(low)  # what autocast would do in every chunk
        return folded


def logits_type(precision: str) -> torch.dtype:
    """What a guide's logits are rounded to for a student of this precision."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.float16)


def open_bank(place: Path, key: str, weights: str, data: Data, precision: str, device: str) -> Bank | None:
    """The bank below `place` of the guide `key` on this data; None, with a line, where nothing can be kept.

    `weights` is their hash: trained again under another number of threads, a key has other bits. All that moves a
    bit of the logits is part of the bank's name, so that whoever opens it may take what is there.
    """
    kind = device.partition(":")[0]
    header = {
        "format": FORMAT,
        "weights": weights,
        "torch": version("torch"),
        "chunk": CHUNK,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
    }
    spec = data.spec
    shape = len(data.labels), augmentation.COUNT[spec.augment], spec.num_classes
    dtype = str(logits_type(precision)).removeprefix("torch.")
    try:
        return Bank.open(place, f"{key}-{precision}-{kind}-{spec.augment}", header, shape, dtype)
    except OSError as error:
        print(f"the guide's logits are computed and not kept: {error}", flush=True)
        return None
