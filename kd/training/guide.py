"""The guide: a frozen network with one fixed forward pass; and the bank, which caches its logits on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kd.core import files
from kd.core.hardware import autocast, processor
from kd.core.stage import FORMAT, VIEWS
from kd.datasets.data import Data
from kd.models.normalization import Normalized

# Images in each forward pass; the last chunk is padded. With one shape, a row does not depend on the other rows or on
# its position. So logits can be cached, and computed in any order. 128 was the fastest of 64…1,000 (bench/README.md).
CHUNK = 128
# Rows computed between two writes to the bank: a killed process loses at most these.
_BLOCK = 128 * CHUNK


_SPARE = 1 << 30  # bytes that a new bank leaves free on the disk


@dataclass(frozen=True)
class Bank:
    """Cached logits of a guide. `folder` has logits.bin, a sparse file, and filled.bin, one byte per row.

    A row is marked as filled only after its data are on disk. So a process that is killed leaves no marked row with
    wrong data. Processes that fill the same row write the same bytes: a guide's logits depend only on (sample, view),
    and `header` has everything else that changes their bits.
    """

    folder: Path
    shape: tuple[int, int, int]  # samples, views, classes
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, place: Path, name: str, header: dict[str, Any], shape: tuple[int, int, int], dtype: str) -> Bank:
        """The bank of this name and header below `place`; a new one if there is none.

        Raises OSError if it cannot be written, or if the disk is too full for a new one.
        """
        described = {**header, "shape": list(shape), "dtype": dtype}
        text = json.dumps(described, indent=2, sort_keys=True)
        folder = place / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        bank = cls(folder, shape, np.dtype(dtype))
        if not (folder / "header.json").exists():
            bank._make(text)
        rows = shape[0] * shape[1]
        for file, size in (("logits.bin", rows * shape[2] * bank.dtype.itemsize), ("filled.bin", rows)):
            with (folder / file).open("r+b") as opened:  # raises if it cannot be written
                if os.fstat(opened.fileno()).st_size != size:
                    raise OSError(f"{folder / file} is damaged: remove {folder}")
        return bank

    def filled(self, samples: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of the rows [row] is filled."""
        marks = np.memmap(self.folder / "filled.bin", np.uint8, "r", shape=self.shape[:2])
        there: NDArray[np.bool_] = marks[samples, views] == 1
        return there

    def read(self, samples: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """The logits [row, class] of filled rows."""
        logits = np.memmap(self.folder / "logits.bin", self.dtype, "r", shape=self.shape)
        return np.asarray(logits[samples, views])

    def write(self, samples: NDArray[np.int64], views: NDArray[np.int64], logits: NDArray[Any]) -> None:
        """Write logits [row, class]. Raises OSError, and marks nothing, if they cannot be written."""
        rows = samples * self.shape[1] + views
        order = np.argsort(rows)  # ascending, so that neighbours share a page
        size = logits.itemsize * self.shape[2]
        data = np.ascontiguousarray(logits[order]).tobytes()
        # Not through a memory map: on a full disk that kills the process, and pwrite raises OSError.
        with (self.folder / "logits.bin").open("r+b") as file:
            for i, row in enumerate(rows[order].tolist()):
                os.pwrite(file.fileno(), data[i * size : (i + 1) * size], row * size)
            os.fdatasync(file.fileno())
        with (self.folder / "filled.bin").open("r+b") as file:
            for row in rows[order].tolist():
                os.pwrite(file.fileno(), b"\x01", row)

    def _make(self, header: str) -> None:
        """Write the files under a temporary name first. If two processes make a bank, both use the first one's."""
        samples, views, classes = self.shape
        size = samples * views * classes * self.dtype.itemsize
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder.parent).free < size + _SPARE:
            raise OSError(f"the disk has no room for {size / 1e9:.2f} GB and 1 GB to spare")
        partial = files.temporary(self.folder)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            for name, length in (("logits.bin", size), ("filled.bin", samples * views)):
                with (partial / name).open("wb") as file:
                    file.truncate(length)  # sparse: blocks are allocated when rows are written
            (partial / "header.json").write_text(header)
            files.publish(partial, self.folder)
        except OSError:
            if not (self.folder / "header.json").exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class Guide:
    """A finished network as a guide: in eval mode, without gradients, with BatchNorm folded into its convolutions.

    The maximum of each row is subtracted from its logits, which changes no softmax. They are rounded to float16
    (float32 or float64 if the student computes in fp32 or fp64). So cached and computed logits are the same.
    """

    def __init__(self, network: Normalized, data: Data, precision: str, device: str, bank: Bank | None = None) -> None:
        self._network, self._data = network.eval(), data
        self._precision, self._device, self._bank = precision, device, bank

    def logits(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> Tensor:
        """The logits [sample, class] of views of samples, on the device. `advance` gets each finished chunk's size."""
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
            print(f"the guide's logits are not cached from here on: {error}", flush=True)
            self._bank = None

    def _compute(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> Tensor:
        device, home, count = self._device, self._data.home, len(samples)
        padding = -count % CHUNK
        index, view = (torch.from_numpy(np.pad(a, (0, padding), mode="edge")).to(home) for a in (samples, views))
        rounded = logits_type(self._precision)
        # Allocated outside inference_mode: autograd cannot save an inference tensor for the backward pass.
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
        """The network that is run. It is made when a row is missing: a full bank needs no network."""
        exact = self._precision == "fp64"
        module = deepcopy(self._network.network).double() if exact else self._network.network
        folded = Normalized(fuse(module), (0.0,) * 3, (1.0,) * 3)
        folded.mean, folded.std = self._network.mean, self._network.std
        dtype = torch.float64 if exact else torch.float32
        folded = folded.to(memory_format=torch.channels_last).to(self._device, dtype).eval()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._precision)
        for part in folded.modules():
            if low is not None and isinstance(part, (nn.Conv2d, nn.Linear)):
                part.to(low)  # autocast does this for every chunk
        return folded


def logits_type(precision: str) -> torch.dtype:
    """The dtype of a guide's logits for a student of this precision."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.float16)


def open_bank(place: Path, key: str, weights: str, data: Data, precision: str, device: str) -> Bank | None:
    """The bank of the guide `key` on this data, below `place`. If nothing can be cached, print why and return None.

    `weights` is the hash of the weights: the same key has other bits if it was trained with another number of threads.
    Everything that changes a bit of the logits is part of the bank's name, so all rows of a bank can be used.
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
    shape = len(data.labels), VIEWS[spec.augment], spec.num_classes
    dtype = str(logits_type(precision)).removeprefix("torch.")
    try:
        return Bank.open(place, f"{key}-{precision}-{kind}-{spec.augment}", header, shape, dtype)
    except OSError as error:
        print(f"the guide's logits are not cached: {error}", flush=True)
        return None
