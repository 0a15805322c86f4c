"""The data sets: a table of plain data; resolve() tells what a stage will see, load_data() brings the images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd.core.spec import Frozen, KnownError, PathText, Registry, Text, load_attribute
from kd.core.stage import Augment, Channels, DatasetSpec, Seed

if TYPE_CHECKING:
    from kd.datasets.data import Data


class DatasetConfig(Frozen):
    """The `dataset` section of the configuration."""

    name: str
    root: PathText | None = None  # where images that are decoded once lie
    skip_unreadable: bool = False  # leave out files that are not images; the content hash is then of the rest
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
    images: tuple[int, int] | None = None  # for training (validation included) and for testing


@dataclass(frozen=True)
class Arrays:
    """Images uint8 [sample, height, width, 3] and labels int64 [sample], for training and for testing."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True)
class DatasetEntry:
    """A data set of the table: the dotted path of its `read(data_root, content) -> Arrays`, and its facts.

    A data set whose facts are not known beforehand has `prepare` instead: (root, data root, threads, skip) -> Facts.
    Its root is `home` below the data root unless dataset.root names another; without a home it has to.
    """

    read: str
    facts: Facts | None = None
    prepare: str | None = None
    home: str | None = None
    recipe: str = "cifar10"  # the recipe that trains its networks in mode=paper, where none has its own name


def statistics(images: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel of images [sample, height, width, 3], in [0, 1], to 5 digits.

    The deviation of a channel that never changes is given as 1, so that one can divide by it.
    """
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1024):  # in parts, because bincount needs eight bytes for each pixel
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


_OWN: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        read="kd.datasets.digits.read",
        facts=Facts(10, 16, mean=(0.30543,) * 3, std=(0.37534,) * 3, images=(1_437, 360)),
    ),
    "fashion_mnist": DatasetEntry(
        read="kd.datasets.fashion_mnist.read",
        facts=Facts(10, 32, mean=(0.219,) * 3, std=(0.3318,) * 3, images=(60_000, 10_000)),
    ),
    "cifar10": DatasetEntry(
        read="kd.datasets.cifar.read_cifar10",
        facts=Facts(10, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), images=(50_000, 10_000)),
    ),
    "cifar100": DatasetEntry(
        read="kd.datasets.cifar.read_cifar100",
        facts=Facts(100, 32, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), images=(50_000, 10_000)),
    ),
    "folder": DatasetEntry(read="kd.datasets.folder.read", prepare="kd.datasets.folder.prepare"),
    "tiny_imagenet": DatasetEntry(
        read="kd.datasets.tiny_imagenet.read",
        prepare="kd.datasets.tiny_imagenet.prepare",
        home="tiny-imagenet-200",
    ),
}
DATASETS: Registry[DatasetEntry] = Registry("kd.datasets", _OWN, DatasetEntry)


def resolve(config: DatasetConfig, data_root: Path, threads: int = 1) -> DatasetSpec:
    """What a stage will see of the configured data set.

    Images are opened only of data sets that are decoded once, the first time that they are seen; `threads` decode
    them. Raises KnownError where such a data set is absent or not what it should be.
    """
    entry = DATASETS[config.name]
    if entry.facts is not None:
        return specify(config, entry.facts)
    root = data_root / str(entry.home) if config.root is None else Path(os.path.expanduser(config.root))
    try:
        facts = load_attribute(str(entry.prepare))(root, data_root, threads, config.skip_unreadable)
    except OSError as error:
        raise KnownError(
            f"dataset.root: {error.filename or root} cannot be read or written ({error.strerror})"
        ) from error
    return specify(config, facts)


def specify(config: DatasetConfig, facts: Facts) -> DatasetSpec:
    """The spec of a data set whose facts are known."""
    return DatasetSpec(
        name=config.name,
        content=facts.content,
        num_classes=facts.num_classes,
        image_size=facts.image_size,
        mean=facts.mean,
        std=facts.std,
        augment=config.augment or "none",  # null: the released code decides, when the stages are planned
        views=config.views,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
    )


def load_data(spec: DatasetSpec, data_root: Path, device: str) -> Data:
    """The images of a spec, as uint8 tensors on the device.

    Raises KnownError where they are absent and cannot be fetched.
    """
    from kd.datasets.data import Data

    return Data.of(spec, load_attribute(DATASETS[spec.name].read)(data_root, spec.content), device)
