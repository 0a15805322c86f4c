"""Views: an image as an augmentation shows it, decided by a whole number."""

from __future__ import annotations

from functools import cache
from math import exp, log, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from kd.core.stage import VIEWS, Augment

_PAD = 4
_OFFSETS = 2 * _PAD + 1
_DEGREES = 20
_BORDER = {"none": 0, "crop_flip": _PAD, "rotate_flip": 1, "resized_crop_flip": 0}  # black pixels around an image
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's RandomResizedCrop


def pad_images(images: Tensor, augment: Augment) -> Tensor:
    """Images uint8 [sample, height, width, 3], with the black border that the augmentation needs."""
    border = border_of(augment)
    return pad(images, (0, 0, border, border, border, border)) if border else images


def border_of(augment: Augment) -> int:
    """The width of the black border that crops and rotations read."""
    return _BORDER[augment]


def show_views(padded: Tensor, samples: Tensor, views: Tensor, augment: Augment) -> Tensor:
    """The views [batch] of samples [batch]: uint8 [batch, 3, height, width] in channels_last order."""
    if augment == "none":
        return padded[samples].permute(0, 3, 1, 2)
    if augment == "resized_crop_flip":
        size = padded.shape[1]
        pairs = zip(samples.tolist(), views.tolist(), strict=True)
        return stacked([resized_crop(padded[sample], sample, view, size) for sample, view in pairs])
    size = padded.shape[1] - 2 * _BORDER[augment]
    first = samples * padded.shape[1] ** 2
    pixels = first[:, None] + _sources(augment, size, padded.device)[views]
    # index_select of whole pixels is more than twice as fast as an index for each dimension.
    shown = padded.flatten(0, 2).index_select(0, pixels.flatten())
    return shown.view(len(samples), size, size, 3).permute(0, 3, 1, 2)


def resized_crop(image: Tensor, sample: int, view: int, size: int) -> Tensor:
    """A random resized crop, perhaps flipped, of uint8 [height, width, 3], on the CPU: uint8 [size, size, 3].

    The sample's number and the view's decide it, so it can be shown again.
    """
    box, flipped = draw_crop(sample, view, *image.shape[:2])
    top, left, height, width = box
    crop = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
    shown = interpolate(crop, (size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return shown.flip(1) if flipped else shown


def draw_crop(sample: int, view: int, height: int, width: int) -> tuple[tuple[int, int, int, int], bool]:
    """Top, left, height and width of a view's crop; and whether it is flipped.

    It is drawn as by torchvision's RandomResizedCrop: 8 to 100 % of the area, with a ratio of sides from 3/4 to 4/3.
    If ten tries do not fit into the image, it is the largest crop at its centre whose ratio is in this range.
    """
    rng = np.random.default_rng((sample, view))
    flipped = bool(rng.random() < 0.5)
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*_AREA)
        ratio = exp(rng.uniform(log(_RATIO[0]), log(_RATIO[1])))
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w), flipped
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return ((height - h) // 2, (width - w) // 2, h, w), flipped


def stacked(images: list[Tensor]) -> Tensor:
    """Images [height, width, 3] as a batch [batch, 3, height, width] in channels_last order."""
    return torch.stack(images).permute(0, 3, 1, 2)


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
