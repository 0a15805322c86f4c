"""Photographs that were resized once: squares in a file, of which views are cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.core.hardware import bring, unbind
from kd.core.stage import DatasetSpec
from kd.datasets.data import Images, Part, choose_views, split_of
from kd.datasets.resized import StoredArrays
from kd.datasets.views import pad_images, resized_crop, show_views, stacked

_AHEAD = 2  # batches that are prepared ahead, each by a thread


@dataclass(frozen=True, kw_only=True)
class Photos(Images):
    """Photographs as squares in a file, read when they are needed: the memory does not grow with their number.

    A square has a margin around the `image_size` pixels that evaluation sees. Random resized crops are cut from the
    whole square.
    """

    pixels: StoredArrays

    @classmethod
    def of(cls, spec: DatasetSpec, pixels: StoredArrays, device: str) -> Photos:
        """Split the photographs as the spec says. Raises KnownError for a split without images."""
        train, val = split_of(spec, pixels.labels)
        return cls(
            spec=spec,
            labels=torch.from_numpy(pixels.labels).to(device),
            train=train,
            val=val,
            test_labels=torch.from_numpy(pixels.test_labels).to(device),
            allowed_views=choose_views(spec.augment, len(pixels.labels), spec.views, spec.split_seed),
            pixels=pixels,
        )

    @property
    def home(self) -> torch.device:
        return torch.device("cpu")

    def show(self, samples: Tensor, views: Tensor) -> Tensor:
        return bring(self._viewed(samples, views), self.labels.device)

    def shown(self, samples: Tensor, views: Tensor, places: Sequence[slice]) -> Iterator[Tensor]:
        if self.labels.device.type == "cpu":  # ahead of a GPU's step, but beside a CPU's step threads only disturb it
            yield from super().shown(samples, views, places)
            return
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(_AHEAD, initializer=unbind) as pool:
            try:
                for place in places:
                    waiting.append(pool.submit(self._viewed, samples[place], views[place]))
                    if len(waiting) > _AHEAD:
                        yield bring(waiting.popleft().result(), self.labels.device)
                while waiting:
                    yield bring(waiting.popleft().result(), self.labels.device)
            finally:
                for future in waiting:
                    future.cancel()

    def plain(self, part: Part, places: NDArray[np.int64]) -> Tensor:
        chosen = self.pixels.read("test", places) if part == "test" else self.pixels.read("train", self.val[places])
        return bring(self._centre(torch.from_numpy(chosen)).permute(0, 3, 1, 2), self.labels.device)

    def _viewed(self, samples: Tensor, views: Tensor) -> Tensor:
        squares = torch.from_numpy(self.pixels.read("train", samples.numpy()))
        return cut_views(squares, samples, views, self.spec)

    def _centre(self, squares: Tensor) -> Tensor:
        return centre(squares, self.spec.image_size)


def cut_views(squares: Tensor, samples: Tensor, views: Tensor, spec: DatasetSpec) -> Tensor:
    """The views [batch] of photographs uint8 [batch, side, side, 3], whose numbers are `samples`.

    Returns uint8 [batch, 3, image_size, image_size] in channels_last order.
    """
    if spec.augment == "resized_crop_flip":
        triples = zip(squares, samples.tolist(), views.tolist(), strict=True)
        return stacked([resized_crop(square, sample, view, spec.image_size) for square, sample, view in triples])
    middle = pad_images(centre(squares, spec.image_size), spec.augment)
    return show_views(middle, torch.arange(len(middle)), views, spec.augment)


def centre(squares: Tensor, size: int) -> Tensor:
    """The middle of squares [batch, side, side, 3]: [batch, size, size, 3]."""
    start = (squares.shape[1] - size) // 2
    return squares[:, start : start + size, start : start + size]
