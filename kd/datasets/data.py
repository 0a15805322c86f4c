"""Images in memory: uint8 tensors, the validation split, and batches of augmented views."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.core.hardware import bring, home_of
from kd.core.spec import KnownError
from kd.core.stage import VIEWS, Augment, DatasetSpec
from kd.datasets import Arrays

_PAD = 4
_OFFSETS = 2 * _PAD + 1
_DEGREES = 20
_SPLIT, _VIEWS = 0, 1  # two random streams of the split's seed: for the split, and for the choice of views
_BORDER = {"none": 0, "crop_flip": _PAD, "rotate_flip": 1}  # black pixels that crops and rotations read


def pad_images(images: Tensor, augment: Augment) -> Tensor:
    """Images uint8 [sample, height, width, 3], with the black border that the augmentation needs."""
    border = _BORDER[augment]
    return torch.nn.functional.pad(images, (0, 0, border, border, border, border)) if border else images


def show_views(padded: Tensor, samples: Tensor, views: Tensor, augment: Augment) -> Tensor:
    """The views [batch] of samples [batch]: uint8 [batch, 3, height, width] in channels_last order."""
    if augment == "none":
        return padded[samples].permute(0, 3, 1, 2)
    size = padded.shape[1] - 2 * _BORDER[augment]
    first = samples * padded.shape[1] ** 2
    pixels = first[:, None] + _sources(augment, size, padded.device)[views]
    # index_select of whole pixels is more than twice as fast as an index for each dimension.
    shown = padded.flatten(0, 2).index_select(0, pixels.flatten())
    return shown.view(len(samples), size, size, 3).permute(0, 3, 1, 2)


@cache
def _sources(augment: Augment, size: int, device: torch.device) -> Tensor:
    """The source of each pixel of each view: positions in a padded image [view, size·size]."""
    rows, columns = {"crop_flip": _crops, "rotate_flip": _rotations}[augment](size)
    positions = rows * (size + 2 * _BORDER[augment]) + columns
    flipped = positions[:, :, ::-1]
    both = np.stack([positions, flipped], axis=1)
    return torch.from_numpy(both.reshape(VIEWS[augment], size**2)).to(device)


def _crops(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each pixel of each crop [crop, size, size], in the padded image."""
    along = np.arange(size)
    top, left = np.divmod(np.arange(_OFFSETS**2), _OFFSETS)
    rows, columns = top[:, None, None] + along[:, None], left[:, None, None] + along
    shape = (_OFFSETS**2, size, size)
    return np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)


def _rotations(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each pixel of each rotation [degree, size, size], in the padded image.

    As torchvision's rotate: counter-clockwise about the centre, nearest pixel, black outside. It is computed in
    float64, so that all devices choose the same pixels.
    """
    angles = np.deg2rad(np.arange(-_DEGREES, _DEGREES + 1))[:, None, None]
    centre = (size - 1) / 2
    x = np.arange(size) - centre
    y = x[:, None]
    columns = np.rint(np.cos(angles) * x - np.sin(angles) * y + centre).astype(np.int64)
    rows = np.rint(np.sin(angles) * x + np.cos(angles) * y + centre).astype(np.int64)
    outside = (rows < 0) | (rows >= size) | (columns < 0) | (columns >= size)
    return np.where(outside, 0, rows + 1), np.where(outside, 0, columns + 1)  # the border's corner is black


def choose_views(augment: Augment, samples: int, views: int | None, seed: int) -> NDArray[np.int64] | None:
    """The views [sample, `views`] that each sample may have, without repetition; None if it may have all."""
    count = VIEWS[augment]
    if views is None or views >= count:
        return None
    rng = np.random.default_rng(np.random.SeedSequence((seed, _VIEWS)))
    return rng.random((samples, count)).argpartition(views, axis=1)[:, :views].astype(np.int64)


@dataclass(frozen=True)
class Data:
    """Images uint8 [sample, height, width, 3], and labels int64 [sample] on the device.

    The images are at `home`: on the device if they fit, otherwise in main memory. `train` and `val` are positions in
    `labels`, so a sample has the same number under every split.
    """

    spec: DatasetSpec
    padded: Tensor
    labels: Tensor
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test_images: Tensor
    test_labels: Tensor
    allowed_views: NDArray[np.int64] | None

    @classmethod
    def of(cls, spec: DatasetSpec, arrays: Arrays, device: str) -> Data:
        """Move arrays to the device, and split them as the spec says. Raises KnownError for a split without images."""

        home = home_of(arrays.images.nbytes + arrays.test_images.nbytes, device)

        def tensor(array: NDArray[np.uint8] | NDArray[np.int64], place: str = device) -> Tensor:
            return torch.from_numpy(np.array(array)).to(place)

        train, val = split(arrays.labels, spec.val_fraction, spec.split_seed)
        if len(train) == 0 or (len(val) == 0 and spec.val_fraction > 0):
            raise KnownError(
                f"dataset.val_fraction: {spec.val_fraction:g} of each class leaves {len(train)} training and "
                f"{len(val)} validation images; use another fraction, or 0 with train.select=last"
            )
        padded = pad_images(tensor(arrays.images, home), spec.augment)
        allowed = choose_views(spec.augment, len(arrays.labels), spec.views, spec.split_seed)
        test = tensor(arrays.test_images, home), tensor(arrays.test_labels)
        return cls(spec, padded, tensor(arrays.labels), train, val, *test, allowed)

    def draw_views(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw a view for every sample [sample], for one epoch."""
        if self.allowed_views is None:
            return rng.integers(0, VIEWS[self.spec.augment], len(self.labels))
        samples, choices = self.allowed_views.shape
        chosen: NDArray[np.int64] = self.allowed_views[np.arange(samples), rng.integers(0, choices, samples)]
        return chosen

    def show(self, samples: Tensor, view: Tensor) -> Tensor:
        """The given views [batch] of samples [batch], both at `home`: uint8 [batch, 3, height, width], on the device.

        Its memory format is channels_last.
        """
        return bring(show_views(self.padded, samples, view, self.spec.augment), self.labels.device)

    @property
    def home(self) -> torch.device:
        """The device that holds the images."""
        return self.padded.device

    @property
    def val_images(self) -> Tensor:
        """The validation images without augmentation: uint8 [sample, height, width, 3]."""
        border = (self.padded.shape[1] - self.spec.image_size) // 2
        inside = slice(border, border + self.spec.image_size)
        return self.padded[torch.from_numpy(self.val).to(self.home)][:, inside, inside]

    @property
    def val_labels(self) -> Tensor:
        """The labels of the validation images: int64 [sample]."""
        return self.labels[torch.from_numpy(self.val).to(self.labels.device)]


def split(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of training and validation samples, ascending. The split is stratified by class.

    It depends on the arguments only, so all stages of a chain have the same split, whatever their training seed.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, _SPLIT)))
    val = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        val.append(members[: round(fraction * len(members))])
    chosen = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
