"""The bank: what guides say about views of images, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd.core import files
from kd.core.hardware import processor
from kd.core.spec import tilde
from kd.core.stage import FORMAT
from kd.datasets.data import Images
from kd.reporting.console import in_bytes

# Images in each forward pass of a guide; the last chunk is padded. With one shape, a row does not depend on the other
# rows or on its position. So logits can be cached, and computed in any order. 128 was the fastest of 64…1,000
# (bench/README.md).
CHUNK = 128
_LARGE_CHUNK = 32  # of photographs: a third faster than 128, in a quarter of the memory
_SPARE = 1 << 30  # bytes that a new bank leaves free on the disk
_MOST = "bytes.txt"  # a file of a bank
_LARGE = 100_000_000  # bytes; a new bank that may become larger is announced
SAID = {"logits": "logits", "pooled": "pooled features"}


@dataclass(frozen=True)
class Bank:
    """Cached logits or pooled features of a guide.

    `folder` has logits.bin or pooled.bin, a sparse file, and filled.bin, one byte per row.

    A row is marked as filled only after its data are on disk. So a process that is killed leaves no marked row with
    wrong data. Processes that fill the same row write the same bytes: a guide's logits depend only on (sample, view),
    and `header` has everything else that changes their bits.
    """

    folder: Path
    shape: tuple[int, int, int]  # samples, views, classes or features
    dtype: np.dtype[Any]
    file: str = "logits.bin"

    @classmethod
    def open(
        cls,
        place: Path,
        name: str,
        header: dict[str, Any],
        shape: tuple[int, int, int],
        dtype: str,
        file: str = "logits.bin",
        budget: float = float("inf"),
        shown: int | None = None,
    ) -> Bank:
        """The bank of this name and header below `place`; a new one if there is none.

        `shown` of its views will be filled, by default all of them. Raises OSError if it cannot be written, if the
        disk is too full for a new one, or if all banks could then have more than `budget` bytes.
        """
        described = {**header, "shape": list(shape), "dtype": dtype}
        text = json.dumps(described, indent=2, sort_keys=True)
        folder = place / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        bank = cls(folder, shape, np.dtype(dtype), file)
        if not (folder / "header.json").exists():
            bank._make(text, budget, shown or shape[1])
        rows = shape[0] * shape[1]
        for name, size in ((file, rows * shape[2] * bank.dtype.itemsize), ("filled.bin", rows)):
            with (folder / name).open("r+b") as opened:  # raises if it cannot be written
                if os.fstat(opened.fileno()).st_size != size:
                    raise OSError(f"{folder / name} is damaged: remove {folder}")
        return bank

    def filled(self, samples: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of the rows [row] is filled."""
        marks = np.memmap(self.folder / "filled.bin", np.uint8, "r", shape=self.shape[:2])
        there: NDArray[np.bool_] = marks[samples, views] == 1
        return there

    def read(self, samples: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """The values [row, class or feature] of filled rows."""
        values = np.memmap(self.folder / self.file, self.dtype, "r", shape=self.shape)
        return np.asarray(values[samples, views])

    def write(self, samples: NDArray[np.int64], views: NDArray[np.int64], values: NDArray[Any]) -> None:
        """Write values [row, class or feature]. Raises OSError, and marks nothing, if they cannot be written."""
        rows = samples * self.shape[1] + views
        order = np.argsort(rows)  # ascending, so that neighbours share a page
        size = values.itemsize * self.shape[2]
        data = np.ascontiguousarray(values[order]).tobytes()
        # Not through a memory map: on a full disk that kills the process, and write raises OSError.
        with (self.folder / self.file).open("r+b") as file:
            for i, row in enumerate(rows[order].tolist()):
                file.seek(row * size)
                file.write(data[i * size : (i + 1) * size])
            file.flush()  # until all is written, or an error: a write() of the system may take a part only
            os.fsync(file.fileno())
        with (self.folder / "filled.bin").open("r+b") as file:
            for row in rows[order].tolist():
                file.seek(row)
                file.write(b"\x01")

    def _make(self, header: str, budget: float, shown: int) -> None:
        """Write the files under a temporary name first. If two processes make a bank, both use the first one's."""
        samples, views, width = self.shape
        marks = samples * views
        size = marks * width * self.dtype.itemsize  # of the sparse file
        most = samples * shown * width * self.dtype.itemsize  # that will be on the disk
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder.parent).free < most + _SPARE:
            raise OSError(f"the disk has no room for {most / 1e9:.2f} GB and 1 GB to spare")
        held = sum(_most_of(folder) for folder in self.folder.parent.iterdir())
        if held + most + marks > budget:
            raise OSError(
                f"{in_bytes(most)} more than the {in_bytes(held)} of other caches exceed runtime.bank_budget "
                f"({in_bytes(budget)}); python -m kd.store gc --banks removes all caches"
            )
        partial = files.temporary(self.folder)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            for name, length in ((self.file, size), ("filled.bin", marks)):
                with (partial / name).open("wb") as file:
                    file.truncate(length)  # sparse: blocks are allocated when rows are written
            (partial / _MOST).write_text(str(most + marks), encoding="utf-8")
            (partial / "header.json").write_text(header, encoding="utf-8")
            files.publish(partial, self.folder)
        except OSError:
            if not (self.folder / "header.json").exists():
                raise
        else:
            if most > _LARGE:
                what = SAID[self.file.removesuffix(".bin")]
                print(f"caches the guide's {what}: up to {in_bytes(most)} in {tilde(str(self.folder))}", flush=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def rounded_type(precision: str) -> torch.dtype:
    """The dtype of what a guide says to a student of this precision."""
    return {"fp32": torch.float32, "fp64": torch.float64}.get(precision, torch.float16)


def open_bank(
    place: Path,
    key: str,
    weights: str,
    data: Images,
    precision: str,
    device: str,
    *,
    features: int | None = None,
    budget: float = float("inf"),
) -> Bank | None:
    """The bank of the guide `key` on this data, below `place`. If nothing can be cached, print why and return None.

    It is for logits, or for pooled features if their number is given. `weights` is the hash of the weights: the same
    key has other bits if it was trained with another number of threads. Everything that changes a bit of the values is
    part of the bank's name, so all rows of a bank can be used. All banks together have at most `budget` bytes.
    """
    kind, name = device.partition(":")[0], "logits" if features is None else "pooled"
    header = {
        "format": FORMAT,
        "weights": weights,
        "torch": version("torch"),
        "chunk": chunk_of(data.spec.image_size),
        "processor": processor(device),
        "threads": torch.get_num_threads(),
    }
    spec = data.spec
    if spec.view_count is None:
        print(
            f"the guide's {SAID[name]} are not cached: every epoch has new views of an image; dataset.views=16 draws "
            "from 16, which a guide sees once",
            flush=True,
        )
        return None
    shape = len(data.labels), spec.view_count, features or spec.num_classes
    dtype = str(rounded_type(precision)).removeprefix("torch.")
    called = f"{key}-{precision}-{kind}-{spec.augment}" + ("" if features is None else "-pooled")
    try:
        return Bank.open(place, called, header, shape, dtype, f"{name}.bin", budget, spec.shown_views)
    except OSError as error:
        print(f"the guide's {SAID[name]} are not cached: {error}", flush=True)
        return None


def _most_of(folder: Path) -> int:
    """How many bytes a bank may have on the disk. Not its blocks: they may still be filled."""
    try:
        return int((folder / _MOST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an earlier version, or no bank
        return sum(path.lstat().st_size for path in folder.glob("*.bin"))


def chunk_of(image_size: int) -> int:
    """The number of images in each forward pass of a guide."""
    return CHUNK if image_size <= 64 else _LARGE_CHUNK
