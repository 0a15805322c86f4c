"""A data set in training: uint8 images on the device, split, and shown one batch of views at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.datasets import views
from kd.datasets.base import Arrays
from kd.hardware import bring, home_of
from kd.spec import KnownError
from kd.stage import DatasetSpec

_SPLIT = 0  # the stream of the split's seed that splits; views.py has another


@dataclass(frozen=True)
class Data:
    """Images uint8 [sample, height, width, 3], and labels int64 [sample] on the device.

    The images are on the device too where it has room for them, and in main memory otherwise: `home`. `train` and
    `val` are positions in `labels`: a sample keeps its number whatever the split.
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
        """Arrays brought to the device and split as the spec says. Raises KnownError for a split without images."""

        home = home_of(arrays.images.nbytes + arrays.test_images.nbytes, device)

        def tensor(array: NDArray[np.uint8] | NDArray[np.int64], place: str = device) -> Tensor:
            return torch.from_numpy(np.array(array)).to(place)

        train, val = split(arrays.labels, spec.val_fraction, spec.split_seed)
        if len(train) == 0 or (len(val) == 0 and spec.val_fraction > 0):
            raise KnownError(
                f"dataset.val_fraction: {spec.val_fraction:g} of each class leaves {len(train)} training and "
                f"{len(val)} validation images; choose another, or 0 with train.select=last"
            )
        padded = views.pad(tensor(arrays.images, home), spec.augment)
        allowed = views.allowed(spec.augment, len(arrays.labels), spec.views, spec.split_seed)
        test = tensor(arrays.test_images, home), tensor(arrays.test_labels)
        return cls(spec, padded, tensor(arrays.labels), train, val, *test, allowed)

    def draw_views(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """A view for every sample [sample], for one epoch."""
        if self.allowed_views is None:
            return rng.integers(0, views.COUNT[self.spec.augment], len(self.labels))
        samples, choices = self.allowed_views.shape
        chosen: NDArray[np.int64] = self.allowed_views[np.arange(samples), rng.integers(0, choices, samples)]
        return chosen

    def show(self, samples: Tensor, view: Tensor) -> Tensor:
        """The given views [batch] of samples [batch], both at `home`: uint8 [batch, 3, height, width], on the device.

        The order of its memory is channels_last.
        """
        return bring(views.show(self.padded, samples, view, self.spec.augment), self.labels.device)

    @property
    def home(self) -> torch.device:
        """Where the images are."""
        return self.padded.device

    @property
    def val_images(self) -> Tensor:
        """The validation images as they are: uint8 [sample, height, width, 3]."""
        border = (self.padded.shape[1] - self.spec.image_size) // 2
        inside = slice(border, border + self.spec.image_size)
        return self.padded[torch.from_numpy(self.val).to(self.home)][:, inside, inside]

    @property
    def val_labels(self) -> Tensor:
        """The labels of the validation images: int64 [sample]."""
        return self.labels[torch.from_numpy(self.val).to(self.labels.device)]


def split(labels: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of training and validation samples, each class split alike, ascending.

    A function of the labels and of its arguments alone, so every stage of a chain, at any seed, has the same.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, _SPLIT)))
    val = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        val.append(members[: round(fraction * len(members))])
    chosen = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
