"""Arrays of pictures in files: made once with little memory, and read in parts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from kd.core.hardware import unbind
from kd.core.spec import KnownError, LostImageError, tilde
from kd.datasets import Arrays
from kd.datasets.pictures import PictureError

_HEADER = 128  # bytes before the pixels of a file that we write
_AHEAD = 4  # pictures that are decoded ahead, for each thread
_LINE_EVERY = 30.0  # seconds between two plain lines
_PART = 1 << 22  # bytes that are read at once to be hashed

T = TypeVar("T")
Failure = tuple[Path, str]  # a file, and why it cannot be read


@dataclass(frozen=True)
class StoredArrays:
    """Pictures uint8 [sample, side, side, 3] in files, and their labels int64 [sample] in memory.

    Parts of them are read into fresh memory: a memory map would count as the process's own, page by page.
    """

    folder: Path
    side: int
    labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    offset: int  # bytes before the first picture of both files

    def read(self, split: Literal["train", "test"], indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pictures of a split by their numbers [batch]: uint8 [batch, side, side, 3]. Raises KnownError."""
        shape = (self.side, self.side, 3)
        pictures = np.empty((len(indices), *shape), np.uint8)
        path = self.folder / _NAMES[split]
        count = len(self.labels if split == "train" else self.test_labels)
        if len(indices) and not 0 <= indices.min() <= indices.max() < count:
            raise IndexError(f"numbers should be 0 to {count - 1} (got {indices.min()} to {indices.max()})")
        size = self.side * self.side * 3
        with path.open("rb", buffering=0) as file:
            for picture, index in zip(pictures, indices.tolist(), strict=True):
                file.seek(self.offset + index * size)
                if file.readinto(picture.data.cast("B")) != size:
                    raise LostImageError(f"{path} is cut off: remove {self.folder}, and start again to make it again")
        return pictures


_NAMES = {"train": "images.npy", "test": "test_images.npy"}


def read_arrays(folder: Path) -> Arrays:
    """The arrays in a folder, as memory maps. Raises KnownError if they are damaged."""
    try:
        arrays = Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Arrays.__dataclass_fields__))
        images, labels = arrays.images, arrays.labels
        fits = images.ndim == 4 and labels.shape == images.shape[:1] and images.dtype == np.uint8
        test_fits = arrays.test_labels.shape == arrays.test_images.shape[:1] and arrays.test_images.dtype == np.uint8
        if fits and test_fits and arrays.test_images.shape[1:] == images.shape[1:]:
            return arrays
        reason = "their shapes do not fit together"
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    raise KnownError(
        f"{folder}: decoded images are damaged or missing ({reason}); a run with this data set decodes them again"
    )


def stored(place: Path, content: str) -> StoredArrays:
    """The arrays of `place`/`content`, whose pictures are read when they are needed. Raises KnownError."""
    arrays = read_arrays(place / content)
    images, offsets = arrays.images, {_offset(arrays.images), _offset(arrays.test_images)}
    if images.shape[1:] != (images.shape[1], images.shape[1], 3) or len(offsets) != 1:
        raise KnownError(f"{place / content} is no array of squares: remove it, and start again to make it again")
    labels, test_labels = np.array(arrays.labels), np.array(arrays.test_labels)
    return StoredArrays(place / content, images.shape[1], labels, test_labels, offsets.pop())


def _offset(array: NDArray[np.uint8]) -> int:
    assert isinstance(array, np.memmap)
    return int(array.offset)


class Colours:
    """How often each value [channel, 256] was seen, for the mean and the deviation."""

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), np.int64)

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Count the pixels of a picture [height, width, 3]."""
        for channel in range(3):
            self.counts[channel] += np.bincount(picture[..., channel].ravel(), minlength=256)


def write_pictures(
    path: Path,
    paths: Sequence[Path],
    read: Callable[[Path], NDArray[np.uint8]],
    side: int,
    threads: int,
    advance: Callable[[], None],
) -> tuple[Colours, list[int], list[Failure]]:
    """Write what `read` makes of files, in order, as one .npy of uint8 [sample, side, side, 3].

    Returns the colours, the positions of the pictures that were written, and the files that could not be read. Threads
    read a few files ahead, so the memory does not grow with the number of files. Same files make the same bytes.
    """
    colours, kept, failed = Colours(), [], []
    with open(path, "wb") as file:
        file.write(_header(0, side))
        for index, picture in enumerate(in_order(paths, read, threads)):
            if isinstance(picture, str):
                failed.append((paths[index], picture))
            else:
                file.write(np.ascontiguousarray(picture).data)
                colours.add(picture)
                kept.append(index)
            advance()
        file.seek(0)
        file.write(_header(len(kept), side))
    return colours, kept, failed


def in_order(paths: Iterable[Path], read: Callable[[Path], T], threads: int) -> Iterator[T | str]:
    """What `read` makes of each file, in order, or the reason why it cannot be read. Few of them are in memory."""

    def attempt(path: Path) -> T | str:
        try:
            return read(path)
        except PictureError as error:
            return str(error)

    waiting: deque[Future[T | str]] = deque()
    with ThreadPoolExecutor(threads, initializer=unbind) as pool:
        try:
            for path in paths:
                waiting.append(pool.submit(attempt, path))
                if len(waiting) > _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _header(count: int, side: int) -> bytes:
    """The head of a .npy file: of one length whatever the count, which is known at the end."""
    described = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {side}, {side}, 3), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + described.ljust(_HEADER - 11).encode() + b"\n"


def pixels_of(path: Path) -> Iterator[bytes]:
    """The pixels of a file that write_pictures() wrote, in parts."""
    with open(path, "rb") as file:
        file.seek(_HEADER)
        yield from _parts(file)


def _parts(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(_PART):
        yield part


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` pictures: a bar in a terminal, a plain line every half minute elsewhere.

    Child processes print plain lines: several live bars in one terminal would overwrite each other.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = Console()
    if shown.is_terminal and parent_process() is None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=shown, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)
        return
    done, began, last = 0, time.monotonic(), time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > _LINE_EVERY:
            last = time.monotonic()
            left = (last - began) / done * (total - done)
            print(tilde(f"{what}: {done:,} of {total:,}, about {left:,.0f} s left"), flush=True)

    yield advance
