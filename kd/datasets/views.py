"""Augmentation as integers: a sample's view is the number of one of the ways in which it can be shown.

`none` has one view. `crop_flip`, a random crop after 4 black pixels of padding and a horizontal flip, has
9·9·2 = 162: view = (9·top + left)·2 + flip. An epoch's augmentation is so an array of integers, and a guide's
logits are a function of (sample, view).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PAD = 4
_OFFSETS = 2 * _PAD + 1
_VIEWS = 1  # the stream of the split's seed that picks views; data.py splits by 0
COUNT = {"none": 1, "crop_flip": 2 * _OFFSETS**2}


def pad(images: Tensor, augment: str) -> Tensor:
    """Images uint8 [sample, height, width, 3], with the border that the augmentation crops into."""
    border = _PAD if augment == "crop_flip" else 0
    return torch.nn.functional.pad(images, (0, 0, border, border, border, border)) if border else images


def show(padded: Tensor, samples: Tensor, views: Tensor, augment: str) -> Tensor:
    """The views [batch] of samples [batch]: uint8 [batch, 3, height, width] in channels_last order."""
    if augment == "none":
        return padded[samples].permute(0, 3, 1, 2)
    size = padded.shape[1] - 2 * _PAD
    offset, flip = views // 2, views % 2
    along = torch.arange(size, device=padded.device)
    rows = (offset // _OFFSETS)[:, None] + along
    columns = (offset % _OFFSETS)[:, None] + torch.where(flip[:, None] == 1, along.flip(0), along)
    return padded[samples[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def allowed(augment: str, samples: int, views: int | None, seed: int) -> NDArray[np.int64] | None:
    """The views [sample, `views`] that each sample keeps to, without repetition; None where it may have any."""
    count = COUNT[augment]
    if views is None or views >= count:
        return None
    rng = np.random.default_rng(np.random.SeedSequence((seed, _VIEWS)))
    return rng.random((samples, count)).argpartition(views, axis=1)[:, :views].astype(np.int64)
