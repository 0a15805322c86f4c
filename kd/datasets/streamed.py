"""Photographs that are decoded whenever they are needed, by worker processes: nothing but their names is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.core.hardware import bring, cpu_count
from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec
from kd.datasets.images import Images, Part, choose_views, split_of
from kd.datasets.layouts import Listing
from kd.datasets.photos import centre, cut_views
from kd.datasets.pictures import PictureError, margin, open_picture, read_square
from kd.datasets.views import draw_crop, stacked

_PLAIN = -1  # stands for the view of an image without augmentation


@dataclass(frozen=True, kw_only=True)
class Streamed(Images):
    """Photographs in files, decoded in every epoch.

    A random resized crop is cut from the photograph itself, so it has all of its detail.
    """

    listing: Listing

    @classmethod
    def of(cls, spec: DatasetSpec, listing: Listing, device: str) -> Streamed:
        """Split the files as the spec says. Raises KnownError for a split without images."""
        labels, test_labels = (np.array([label for _, label in part]) for part in (listing.train, listing.test))
        train, val = split_of(spec, labels)
        return cls(
            spec=spec,
            labels=torch.from_numpy(labels).to(device),
            train=train,
            val=val,
            test_labels=torch.from_numpy(test_labels).to(device),
            allowed_views=choose_views(spec.augment, len(labels), spec.views, spec.split_seed),
            listing=listing,
        )

    @property
    def home(self) -> torch.device:
        return torch.device("cpu")

    def show(self, samples: Tensor, views: Tensor) -> Tensor:
        return next(self.shown(samples, views, [slice(None)]))

    def shown(self, samples: Tensor, views: Tensor, places: Sequence[slice]) -> Iterator[Tensor]:
        batches = [(samples[place].tolist(), views[place].tolist()) for place in places]
        return self._decoded([name for name, _ in self.listing.train], batches)

    def plain(self, part: Part, places: NDArray[np.int64]) -> Tensor:
        return next(self._plain(part, [places]))

    def batches(self, part: Part) -> Iterator[Tensor]:
        places = np.arange(len(self.val if part == "val" else self.test_labels))
        return self._plain(part, [places[i : i + self.eval_batch] for i in range(0, len(places), self.eval_batch)])

    def _plain(self, part: Part, batches: Sequence[NDArray[np.int64]]) -> Iterator[Tensor]:
        files = self.listing.test if part == "test" else [self.listing.train[i] for i in self.val]
        wanted = [(places.tolist(), [_PLAIN] * len(places)) for places in batches]
        return self._decoded([name for name, _ in files], wanted)

    def _decoded(self, names: list[str], batches: list[tuple[list[int], list[int]]]) -> Iterator[Tensor]:
        """The batches of (samples, views), each decoded by one worker. Raises KnownError for a file that is gone."""
        files = _Files(self.listing.root, names, self.spec, batches)
        workers = min(cpu_count(), len(batches)) if len(batches) > 1 else 0
        # A generator of its own: a DataLoader draws its workers' seeds, and torch's global generator is the training's.
        loader = DataLoader(files, batch_size=None, num_workers=workers, generator=torch.Generator())
        for batch in loader:
            if isinstance(batch, str):
                raise KnownError(batch)
            yield bring(batch.contiguous(memory_format=torch.channels_last), self.labels.device)


@dataclass(frozen=True)
class _Files(Dataset[Tensor | str]):
    """Batches of photographs; a text instead where one cannot be read."""

    root: Path
    names: list[str]
    spec: DatasetSpec
    wanted: list[tuple[list[int], list[int]]]

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return stacked([self._viewed(*pair) for pair in zip(*self.wanted[index], strict=True)])
        except (PictureError, OSError) as error:
            return f"dataset.root: {self.root} has changed since it was listed: {error}"

    def _viewed(self, sample: int, view: int) -> Tensor:
        """A view of a photograph: uint8 [image_size, image_size, 3]."""
        size, resize = self.spec.image_size, self.spec.resize or "short_side"
        side, path = margin(size, resize), self.root / self.names[sample]
        if view != _PLAIN and self.spec.augment == "resized_crop_flip":
            from torchvision.transforms.v2.functional import horizontal_flip, pil_to_tensor, resized_crop

            image = pil_to_tensor(open_picture(path, self.spec.background))
            (top, left, height, width), flipped = draw_crop(sample, view, *image.shape[1:])
            cut = resized_crop(image, top, left, height, width, [size, size], antialias=True)
            shown: Tensor = horizontal_flip(cut) if flipped else cut
            return shown.permute(1, 2, 0)
        picture = torch.from_numpy(np.array(read_square(path, side, resize, self.spec.background)))[None]
        if view == _PLAIN:
            return centre(picture, size)[0]
        return cut_views(picture, torch.tensor([sample]), torch.tensor([view]), self.spec)[0].permute(1, 2, 0)
