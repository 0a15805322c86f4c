"""Augmentation as integers: a sample's view is the number of one of the ways in which it can be shown.

`none` has one view. `crop_flip`, a random crop after 4 black pixels of padding and a horizontal flip, has
9·9·2 = 162: view = (9·top + left)·2 + flip. `rotate_flip`, a rotation by -20 … 20 whole degrees and a horizontal
flip, has 41·2 = 82: view = (degree + 20)·2 + flip; RandomRotation(20), which it stands for, draws any angle between.
An epoch's augmentation is so an array of integers, and a guide's logits are a function of (sample, view).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PAD = 4
_OFFSETS = 2 * _PAD + 1
_DEGREES = 20
_VIEWS = 1  # the stream of the split's seed that picks views; data.py splits by 0
COUNT = {"none": 1, "crop_flip": 2 * _OFFSETS**2, "rotate_flip": 2 * (2 * _DEGREES + 1)}
_BORDER = {"none": 0, "crop_flip": _PAD, "rotate_flip": 1}  # black; what a rotation turns in comes from there


def pad(images: Tensor, augment: str) -> Tensor:
    """Images uint8 [sample, height, width, 3], with the border that the augmentation looks into."""
    border = _BORDER[augment]
    return torch.nn.functional.pad(images, (0, 0, border, border, border, border)) if border else images


def show(padded: Tensor, samples: Tensor, views: Tensor, augment: str) -> Tensor:
    """The views [batch] of samples [batch]: uint8 [batch, 3, height, width] in channels_last order."""
    if augment == "none":
        return padded[samples].permute(0, 3, 1, 2)
    size = padded.shape[1] - 2 * _BORDER[augment]
    first = samples * padded.shape[1] ** 2
    pixels = first[:, None] + _sources(augment, size, padded.device)[views]
    # index_select of whole pixels: more than twice as fast as an index for each dimension.
    shown = padded.flatten(0, 2).index_select(0, pixels.flatten())
    return shown.view(len(samples), size, size, 3).permute(0, 3, 1, 2)


@cache
def _sources(augment: str, size: int, device: torch.device) -> Tensor:
    """Where each pixel of each view comes from: positions in a padded image [view, size·size]."""
    rows, columns = {"crop_flip": _crops, "rotate_flip": _rotations}[augment](size)
    positions = rows * (size + 2 * _BORDER[augment]) + columns
    flipped = positions[:, :, ::-1]
    both = np.stack([positions, flipped], axis=1)
    return torch.from_numpy(both.reshape(COUNT[augment], size**2)).to(device)


def _crops(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each pixel of each crop [crop, size, size], in the padded image."""
    along = np.arange(size)
    top, left = np.divmod(np.arange(_OFFSETS**2), _OFFSETS)
    rows, columns = top[:, None, None] + along[:, None], left[:, None, None] + along
    shape = (_OFFSETS**2, size, size)
    return np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)


def _rotations(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each pixel of each rotation [degree, size, size], in the padded image.

    As torchvision's rotate: counter-clockwise about the centre, the nearest pixel, black outside. In float64, so
    that no device's last bits decide between two pixels.
    """
    angles = np.deg2rad(np.arange(-_DEGREES, _DEGREES + 1))[:, None, None]
    centre = (size - 1) / 2
    x = np.arange(size) - centre
    y = x[:, None]
    columns = np.rint(np.cos(angles) * x - np.sin(angles) * y + centre).astype(np.int64)
    rows = np.rint(np.sin(angles) * x + np.cos(angles) * y + centre).astype(np.int64)
    outside = (rows < 0) | (rows >= size) | (columns < 0) | (columns >= size)
    return np.where(outside, 0, rows + 1), np.where(outside, 0, columns + 1)  # the border's corner is black


def allowed(augment: str, samples: int, views: int | None, seed: int) -> NDArray[np.int64] | None:
    """The views [sample, `views`] that each sample keeps to, without repetition; None where it may have any."""
    count = COUNT[augment]
    if views is None or views >= count:
        return None
    rng = np.random.default_rng(np.random.SeedSequence((seed, _VIEWS)))
    return rng.random((samples, count)).argpartition(views, axis=1)[:, :views].astype(np.int64)
