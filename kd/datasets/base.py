"""What a data set is before any tensor: what the user asks for, its facts, and its images as arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd.spec import Frozen, PathText, Text
from kd.stage import Augment, Channels, Seed


class DatasetConfig(Frozen):
    """The `dataset` section of the configuration."""

    name: str
    root: PathText | None = None  # where images that are decoded once lie
    skip_unreadable: bool = False  # leave out what is no image; the rest is then the content
    augment: Augment | None  # null: the released code's, in mode=reference
    val_fraction: float = Field(ge=0, lt=1)
    split_seed: Seed
    views: int | None = Field(None, ge=1)
    label: Text | None = None  # its name in tables; null is `name`

    @property
    def title(self) -> str:
        """The name that tables print."""
        return self.label or self.name


@dataclass(frozen=True)
class Facts:
    """What is known of a data set without opening it; mean and std are the training images', in [0, 1]."""

    num_classes: int
    image_size: int
    mean: Channels
    std: Channels
    content: str | None = None


@dataclass(frozen=True)
class Arrays:
    """Images uint8 [sample, height, width, 3] and labels int64 [sample], for training and for testing."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class Entry:
    """A data set of the table: the dotted path of its `read(data_root, content) -> Arrays`, and its facts.

    A data set whose facts are not known beforehand has `prepare` instead: (root, data root, threads, skip) -> Facts.
    Its root is `home` below the data root unless dataset.root names another; without a home it has to.
    """

    read: str
    facts: Facts | None = None
    prepare: str | None = None
    home: str | None = None


def statistics(images: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel of images [sample, height, width, 3], in [0, 1], to 5 digits.

    The deviation of a channel that never changes is given as 1, so that one can divide by it.
    """
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1024):  # bincount makes eight bytes of one
        for c in range(3):
            counts[c] += np.bincount(images[start : start + 1024, ..., c].ravel(), minlength=256)
    values = np.arange(256) / 255
    means = [float(np.average(values, weights=n)) for n in counts]
    stds = [float(np.average((values - m) ** 2, weights=n)) ** 0.5 for n, m in zip(counts, means, strict=True)]
    return _channels(means), _channels([std or 1.0 for std in stds])


def _channels(values: list[float]) -> Channels:
    first, second, third = (round(v, 5) for v in values)
    return first, second, third


def grey_to_rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[sample, height, width] repeated to [sample, height, width, 3]."""
    return np.repeat(images[..., None], 3, axis=-1)
