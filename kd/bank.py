"""The bank: a guide's logits kept on disk, [sample, view, class], filled as views are first met and shared by runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd import files

_SPARE = 1 << 30  # bytes that a new bank leaves free on the disk


@dataclass(frozen=True)
class Bank:
    """Two files in `folder`: logits.bin, sparse, and filled.bin, a byte a row.

    A row is marked as filled only after its data are on disk, so whoever dies while writing leaves no row that is
    marked and wrong. Processes that fill the same row write the same bytes: a guide's logits are a function of
    (sample, view), and `header` has all that moves their bits.
    """

    folder: Path
    shape: tuple[int, int, int]  # samples, views, classes
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, place: Path, name: str, header: dict[str, Any], shape: tuple[int, int, int], dtype: str) -> Bank:
        """The bank of this name and header below `place`, made if it is not there.

        Raises OSError where it cannot be, for want of a right or of room.
        """
        described = {**header, "shape": list(shape), "dtype": dtype}
        text = json.dumps(described, indent=2, sort_keys=True)
        folder = place / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        bank = cls(folder, shape, np.dtype(dtype))
        if not (folder / "header.json").exists():
            bank._make(text)
        rows = shape[0] * shape[1]
        for file, size in (("logits.bin", rows * shape[2] * bank.dtype.itemsize), ("filled.bin", rows)):
            with (folder / file).open("r+b") as opened:  # it can be written
                if os.fstat(opened.fileno()).st_size != size:
                    raise OSError(f"{folder / file} is damaged: remove {folder}")
        return bank

    def filled(self, samples: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the rows [row] are there."""
        marks = np.memmap(self.folder / "filled.bin", np.uint8, "r", shape=self.shape[:2])
        there: NDArray[np.bool_] = marks[samples, views] == 1
        return there

    def read(self, samples: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """The logits [row, class] of rows that are filled."""
        logits = np.memmap(self.folder / "logits.bin", self.dtype, "r", shape=self.shape)
        return np.asarray(logits[samples, views])

    def write(self, samples: NDArray[np.int64], views: NDArray[np.int64], logits: NDArray[Any]) -> None:
        """Keep logits [row, class]. Raises OSError, and marks nothing, where they cannot be written."""
        rows = samples * self.shape[1] + views
        order = np.argsort(rows)  # ascending, so that neighbours share a page
        size = logits.itemsize * self.shape[2]
        data = np.ascontiguousarray(logits[order]).tobytes()
        # Not through a mapping: a full disk would kill the process there, and is an OSError here.
        with (self.folder / "logits.bin").open("r+b") as file:
            for i, row in enumerate(rows[order].tolist()):
                os.pwrite(file.fileno(), data[i * size : (i + 1) * size], row * size)
            os.fdatasync(file.fileno())
        with (self.folder / "filled.bin").open("r+b") as file:
            for row in rows[order].tolist():
                os.pwrite(file.fileno(), b"\x01", row)

    def _make(self, header: str) -> None:
        """Under a name of this process first: of two that make a bank, the first wins and both use it."""
        samples, views, classes = self.shape
        size = samples * views * classes * self.dtype.itemsize
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder.parent).free < size + _SPARE:
            raise OSError(f"{size / 1e9:.2f} GB and 1 GB to spare do not fit on the disk")
        partial = files.temporary(self.folder)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            for name, length in (("logits.bin", size), ("filled.bin", samples * views)):
                with (partial / name).open("wb") as file:
                    file.truncate(length)  # sparse: blocks come with their first rows
            (partial / "header.json").write_text(header)
            files.publish(partial, self.folder)
        except OSError:
            if not (self.folder / "header.json").exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
