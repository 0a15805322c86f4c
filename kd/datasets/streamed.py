"""Photographs that are decoded whenever they are needed, by worker processes: nothing but their names is kept."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil, floor
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.core.hardware import bring, cpu_count, unbind
from kd.core.spec import LostImageError
from kd.core.stage import DatasetSpec
from kd.datasets.data import Images, Part, choose_views, split_of
from kd.datasets.layouts import Listing
from kd.datasets.photos import centre, cut_views
from kd.datasets.pictures import PictureError, margin, measure, open_picture, read_square
from kd.datasets.views import draw_crop

_PLAIN = -1  # stands for the view of an image without augmentation
_PART = 16  # photographs that a worker decodes at once: few, so that a stop is quick and little shared memory is needed
_AHEAD = 2  # parts that each worker prepares ahead
_SHARED = Path("/dev/shm")  # through which workers hand over pixels; Docker gives it 64 MB
_FINER = 2  # a large JPEG may be opened smaller, as long as a crop has so many times the pixels of the view, each way

Wanted = tuple[NDArray[np.int64], NDArray[np.int64]]  # samples and their views


@dataclass(frozen=True, kw_only=True)
class Streamed(Images):
    """Photographs in files, decoded in every epoch.

    Evaluation sees the pixels that it would see of an array. A random resized crop is cut from the photograph itself,
    so it has all of its detail, and what is left of it beside the centre; with resize=squash or pad from the square, as
    in an array.
    """

    root: Path
    names: NDArray[np.bytes_]  # files of `labels`, below the root. An array: a list would be copied into every worker
    test_names: NDArray[np.bytes_]
    workers: int  # processes that decode, besides this one

    @classmethod
    def of(cls, spec: DatasetSpec, listing: Listing, device: str, workers: int | None = None) -> Streamed:
        """Split the files as the spec says. By default there is a worker for each of torch's threads.

        Raises KnownError for a split without images.
        """
        labels, test_labels = (np.array([label for _, label in part]) for part in (listing.train, listing.test))
        train, val = split_of(spec, labels)
        return cls(
            spec=spec,
            labels=torch.from_numpy(labels).to(device),
            train=train,
            val=val,
            test_labels=torch.from_numpy(test_labels).to(device),
            allowed_views=choose_views(spec.augment, len(labels), spec.views, spec.split_seed),
            root=listing.root,
            names=np.array([os.fsencode(name) for name, _ in listing.train]),
            test_names=np.array([os.fsencode(name) for name, _ in listing.test]),
            workers=workers or min(torch.get_num_threads(), cpu_count()),
        )

    @property
    def home(self) -> torch.device:
        return torch.device("cpu")

    def show(self, samples: Tensor, views: Tensor) -> Tensor:
        return next(self.shown(samples, views, [slice(None)]))

    def shown(self, samples: Tensor, views: Tensor, places: Sequence[slice]) -> Iterator[Tensor]:
        return self._decoded(self.names, [(samples[place].numpy(), views[place].numpy()) for place in places])

    def plain(self, part: Part, places: NDArray[np.int64]) -> Tensor:
        return next(self._plain(part, [places]))

    def batches(self, part: Part) -> Iterator[Tensor]:
        places = np.arange(len(self.val if part == "val" else self.test_labels))
        return self._plain(part, [places[i : i + self.eval_batch] for i in range(0, len(places), self.eval_batch)])

    def _plain(self, part: Part, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        names = self.test_names if part == "test" else self.names[self.val]
        return self._decoded(names, [(places, np.full(len(places), _PLAIN)) for places in batches])

    def _decoded(self, names: NDArray[np.bytes_], batches: list[Wanted]) -> Iterator[Tensor]:
        """The images of each batch, in order. Raises KnownError for a file that is gone."""
        if not batches:
            return
        ends = np.cumsum([len(samples) for samples, _ in batches])
        cuts = [
            np.append(np.arange(end - len(samples), end, _PART), end)
            for (samples, _), end in zip(batches, ends.tolist(), strict=True)
        ]
        parts = np.concatenate([np.stack([each[:-1], each[1:]], 1) for each in cuts])
        samples, views = (np.concatenate(each) for each in zip(*batches, strict=True))
        decoded = _by_workers(_Files(self.root, names, self.spec, samples, views, parts), self.workers)
        # What ends this process can leave this generator open, and workers that still wait would not let it exit.
        atexit.register(decoded.close)
        try:
            for each in cuts:
                images = torch.cat([next(decoded) for _ in each[1:]])
                yield bring(images.permute(0, 3, 1, 2), self.labels.device)
        finally:
            decoded.close()
            atexit.unregister(decoded.close)


def _by_workers(files: _Files, workers: int) -> Generator[Tensor, None, None]:
    """All parts of `files` in order: uint8 [sample, image_size, image_size, 3]. A single part needs no worker."""
    workers = min(_fitting(workers, files.spec.image_size), len(files)) if len(files) > 1 else 0
    loader = DataLoader(
        files,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        # Windows has no fork: its workers start anew.
        multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,
        # One of its own: a DataLoader draws its workers' seeds, and torch's global generator is the training's.
        generator=torch.Generator(),
        worker_init_fn=unbind,
    )
    with _signals_held():  # a signal to all processes is for the main one, which ends its workers
        decoded = iter(loader)
    try:
        for part in decoded:
            if isinstance(part, str):
                raise LostImageError(part)
            yield part
    finally:
        del decoded  # ends the workers


def _fitting(workers: int, image_size: int) -> int:
    """As many workers as have room in the shared memory, of which half stays free for others."""
    room = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None
    each = (_AHEAD + 1) * _PART * image_size**2 * 3
    if room is None or workers * each <= room // 2:
        return workers
    fitting = max(1, room // 2 // each)
    _say_once(
        f"photographs are decoded by {fitting} of {workers} workers: {_SHARED} has {room / 1e6:,.0f} MB free; in "
        "Docker --shm-size=1g makes it larger"
    )
    return fitting


@cache
def _say_once(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until the end of the block. In processes that are forked in it they wait for ever."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _Files(Dataset[Tensor | str]):
    """Parts of the wanted photographs; a text instead where one cannot be read."""

    root: Path
    names: NDArray[np.bytes_]
    spec: DatasetSpec
    samples: NDArray[np.int64]
    views: NDArray[np.int64]
    parts: NDArray[np.int64]  # [part, 2]: where each begins and ends in samples and views

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor | str:
        part = slice(*self.parts[index])
        pairs = list(zip(self.samples[part].tolist(), self.views[part].tolist(), strict=True))
        try:
            shown = {pair: self._viewed(*pair) for pair in dict.fromkeys(pairs)}  # a guide fills its last batch up
        except (PictureError, OSError) as error:
            return f"dataset.root: {self.root} has changed since it was listed: {error}"
        return torch.from_numpy(np.stack([shown[pair] for pair in pairs]))

    def _viewed(self, sample: int, view: int) -> NDArray[np.uint8]:
        """A view of a photograph: uint8 [image_size, image_size, 3]."""
        spec, path = self.spec, self.root / os.fsdecode(self.names[sample])
        if view != _PLAIN and spec.augment == "resized_crop_flip" and spec.resize == "short_side":
            return _cropped(path, sample, view, spec)
        square = torch.from_numpy(_square(path, spec))[None]
        if view == _PLAIN:
            return centre(square, spec.image_size)[0].numpy()
        shown = cut_views(square, torch.tensor([sample]), torch.tensor([view]), spec)
        return shown[0].permute(1, 2, 0).numpy()


def _square(path: Path, spec: DatasetSpec) -> NDArray[np.uint8]:
    """The square that an array has of a photograph: uint8 [side, side, 3]."""
    size = spec.image_size
    if spec.resize is not None:
        return np.array(read_square(path, margin(size, spec.resize), spec.resize, spec.background))
    picture = np.array(open_picture(path, spec.background))
    if picture.shape != (size, size, 3):
        raise PictureError(f"{path} is {picture.shape[1]}×{picture.shape[0]}, not {size}×{size}")
    return picture


def _cropped(path: Path, sample: int, view: int, spec: DatasetSpec) -> NDArray[np.uint8]:
    """A random resized crop of a photograph, perhaps flipped, as torchvision makes it of a PIL image."""
    from PIL import Image

    # A box is drawn for a picture that lies. It is turned for one that stands, which is known when it is open: its file
    # may be stored turned. Torchvision's boxes of both have the same distribution.
    shorter, longer = sorted(measure(path))
    size, ((top, left, height, width), flipped) = spec.image_size, draw_crop(sample, view, shorter, longer)
    image = open_picture(path, spec.background, least=ceil(shorter * _FINER * size / min(height, width)))
    rows, columns = shorter, longer
    if image.height > image.width:
        top, left, height, width, rows, columns = left, top, width, height, longer, shorter
    x, x_end = (edge * image.width / columns for edge in (left, left + width))
    y, y_end = (edge * image.height / rows for edge in (top, top + height))
    around = floor(x), floor(y), ceil(x_end), ceil(y_end)
    box = x - around[0], y - around[1], x_end - around[0], y_end - around[1]
    shown = image.crop(around).resize((size, size), Image.Resampling.BILINEAR, box)
    return np.array(shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else shown)
