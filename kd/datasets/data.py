"""Images in memory: uint8 tensors of one size, and batches of augmented views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.core.hardware import bring, home_of
from kd.core.stage import DatasetSpec
from kd.datasets import Arrays
from kd.datasets.images import Images, Part, choose_views, split_of
from kd.datasets.views import border_of, pad_images, show_views


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
