"""What a stage sees of a data set: images, their split and their views; here of one size, in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.core.hardware import bring, home_of
from kd.core.spec import KnownError
from kd.core.stage import VIEWS, Augment, DatasetSpec
from kd.datasets import Arrays, held_out
from kd.datasets.views import border_of, pad_images, show_views

Part = Literal["val", "test"]

# Two random streams of the split's seed: for the split, and for the choice of views.
_SPLIT, _VIEWS = 0, 1
_BATCH, _PIXELS = 1000, 1000 * 64 * 64  # images of a forward pass without gradients, at most


@dataclass(frozen=True, kw_only=True)
class Images(ABC):
    """Labels int64 [sample] on the device, and the images of a data set.

    `train` and `val` are positions in `labels`, so a sample has the same number under every split.
    """

    spec: DatasetSpec
    labels: Tensor
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test_labels: Tensor
    allowed_views: NDArray[np.int64] | None

    @property
    @abstractmethod
    def home(self) -> torch.device:
        """Where the numbers of samples and views are expected: the device that holds the images."""

    def begin(  # noqa: B027 (most kinds of images have nothing to prepare)
        self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]
    ) -> None:
        """Prepare the views of an epoch's samples [sample]. `advance` gets the number of images that are done."""

    @abstractmethod
    def show(self, samples: Tensor, views: Tensor) -> Tensor:
        """These views [batch] of samples [batch], both at `home`: uint8 [batch, 3, height, width], on the device.

        Its memory format is channels_last.
        """

    def shown(self, samples: Tensor, views: Tensor, places: Sequence[slice]) -> Iterator[Tensor]:
        """What show() returns for each of the `places`, in order. Images that take time are prepared ahead."""
        return (self.show(samples[place], views[place]) for place in places)

    @abstractmethod
    def plain(self, part: Part, places: NDArray[np.int64]) -> Tensor:
        """Images of a part without augmentation, by their positions in it; as from show()."""

    def batches(self, part: Part) -> Iterator[Tensor]:
        """All images of a part in order, without augmentation, in batches as from show()."""
        count, size = len(self.val if part == "val" else self.test_labels), self.eval_batch
        return (self.plain(part, np.arange(start, min(start + size, count))) for start in range(0, count, size))

    @property
    def eval_batch(self) -> int:
        """The number of images in a forward pass without gradients: fewer of large images."""
        return max(min(_BATCH, _PIXELS // self.spec.image_size**2), 32)

    @property
    def val_labels(self) -> Tensor:
        """The labels of the validation images: int64 [sample]."""
        return self.labels[torch.from_numpy(self.val).to(self.labels.device)]

    def draw_views(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw a view for every sample [sample], for one epoch."""
        if self.allowed_views is None:
            return rng.integers(0, VIEWS[self.spec.augment], len(self.labels))
        samples, choices = self.allowed_views.shape
        chosen: NDArray[np.int64] = self.allowed_views[np.arange(samples), rng.integers(0, choices, samples)]
        return chosen


@dataclass(frozen=True, kw_only=True)
class Data(Images):
    """Images uint8 [sample, height, width, 3] at `home`: on the device if they fit, otherwise in main memory.

    Training images have the black border that their augmentation needs.
    """

    padded: Tensor
    test_images: Tensor

    @classmethod
    def of(cls, spec: DatasetSpec, arrays: Arrays, device: str) -> Data:
        """Move arrays to the device, and split them as the spec says. Raises KnownError for a split without images."""
        # Resized crops are made on the CPU, where torch resizes uint8.
        near = "cpu" if spec.augment == "resized_crop_flip" else device
        home = home_of(arrays.images.nbytes + arrays.test_images.nbytes, near)

        def tensor(array: NDArray[np.uint8] | NDArray[np.int64], place: str = device) -> Tensor:
            return torch.from_numpy(np.array(array)).to(place)

        train, val = split_of(spec, arrays.labels)
        return cls(
            spec=spec,
            padded=pad_images(tensor(arrays.images, home), spec.augment),
            labels=tensor(arrays.labels),
            train=train,
            val=val,
            test_images=tensor(arrays.test_images, home),
            test_labels=tensor(arrays.test_labels),
            allowed_views=choose_views(spec.augment, len(arrays.labels), spec.views, spec.split_seed),
        )

    def show(self, samples: Tensor, views: Tensor) -> Tensor:
        return bring(show_views(self.padded, samples, views, self.spec.augment), self.labels.device)

    @property
    def home(self) -> torch.device:
        return self.padded.device

    def plain(self, part: Part, places: NDArray[np.int64]) -> Tensor:
        images = self.val_images if part == "val" else self.test_images
        return self._batch(images[torch.from_numpy(places).to(self.home)])

    def batches(self, part: Part) -> Iterator[Tensor]:
        images = self.val_images if part == "val" else self.test_images
        return map(self._batch, torch.split(images, self.eval_batch))

    def _batch(self, images: Tensor) -> Tensor:
        return bring(images, self.labels.device).permute(0, 3, 1, 2)

    @property
    def val_images(self) -> Tensor:
        """The validation images without augmentation: uint8 [sample, height, width, 3]."""
        border = border_of(self.spec.augment)
        inside = slice(border, border + self.spec.image_size)
        return self.padded[torch.from_numpy(self.val).to(self.home)][:, inside, inside]


def choose_views(augment: Augment, samples: int, views: int | None, seed: int) -> NDArray[np.int64] | None:
    """The views [sample, `views`] that each sample may have, without repetition; None if it may have all.

    Random resized crops are drawn from their numbers, so there it is the first ones.
    """
    count = VIEWS[augment]
    if views is None or views >= count:
        return None
    if augment == "resized_crop_flip":
        return np.broadcast_to(np.arange(views), (samples, views))
    rng = np.random.default_rng(np.random.SeedSequence((seed, _VIEWS)))
    return rng.random((samples, count)).argpartition(views, axis=1)[:, :views].astype(np.int64)


def split_of(spec: DatasetSpec, labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of training and validation samples. Raises KnownError for a split without images."""
    if spec.val_images:
        first = len(labels) - spec.val_images
        return np.arange(first), np.arange(first, len(labels))
    train, val = split(labels, spec.val_fraction, spec.split_seed, rare=spec.rare > 0)
    if len(train) == 0 or (len(val) == 0 and spec.val_fraction > 0):
        raise KnownError(
            f"dataset.val_fraction: {spec.val_fraction:g} of each class leaves {len(train)} training and "
            f"{len(val)} validation images; use another fraction, or 0 with train.select=last"
        )
    return train, val


def split(
    labels: NDArray[np.int64], fraction: float, seed: int, *, rare: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of training and validation samples, ascending. The split is stratified by class.

    It depends on the arguments only, so all stages of a chain have the same split, whatever their training seed.
    With `rare`, each class of two images or more has a validation image, unless `fraction` is 0.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, _SPLIT)))
    val = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        val.append(members[: held_out(len(members), fraction) if rare else round(fraction * len(members))])
    chosen = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
