"""The data sets: a table of plain data; resolve() tells what a stage will see, load_data() brings the images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd.core.spec import Frozen, KnownError, PathText, Registry, Text, load_attribute, printable
from kd.core.stage import Augment, Background, Channels, DatasetSpec, Resize, Seed
from kd.datasets import class_names

if TYPE_CHECKING:
    from kd.datasets.data import Images


class DatasetConfig(Frozen):
    """The `dataset` section of the configuration."""

    name: str
    root: PathText | None = None  # where images that are decoded once lie
    skip_unreadable: bool = False  # leave out files that are not images; the content hash is then of the rest
    image_size: int | None = Field(None, ge=8, le=4096)  # null: squares of one size keep it; else the network's own
    resize: Resize = "short_side"  # how pictures of other shapes become squares
    background: Background = "white"  # behind what is transparent
    decode: Literal["auto", "array", "stream"] = "auto"  # once, or in every epoch
    array_budget: float = Field(20, gt=0)  # GB: decode=auto streams what would take more
    test_fraction: float = Field(0.2, gt=0, lt=1)  # of each class, where there is no test set
    augment: Augment | Literal["auto"] | None  # null: the released code's, in mode=reference; auto: by the size
    val_fraction: float = Field(ge=0, lt=1)
    split_seed: Seed
    views: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
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
    classes: tuple[str, ...] = ()  # the labels' names; empty: not known
    val_images: int = 0  # the last so many training images are the data set's own validation split
    resize: Resize | None = None  # photographs; None: squares of one size, as they are
    counts: tuple[int, ...] = ()  # the training images of each class, validation included; empty: not known
    streamed: bool = False  # decoded in every epoch


@dataclass(frozen=True)
class Reading:
    """How the pictures of a data set are read: the settings, the network's own input size, and threads."""

    config: DatasetConfig
    image_size: int = 224
    threads: int = 1


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

    A data set whose facts are not known beforehand has `prepare` instead: (root, data root, Reading) -> Facts.
    Its root is `home` below the data root unless dataset.root names another; without a home it has to.
    """

    read: str
    facts: Facts | None = None
    prepare: str | None = None
    home: str | None = None
    made: str = ""  # what its images are made from, in words, where that is not pictures of their size
    recipe: str = "cifar10"  # the recipe that trains its networks in mode=paper, where none has its own name


def statistics(images: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel of images [sample, height, width, 3], in [0, 1], to 5 digits."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1024):  # in parts, because bincount needs eight bytes for each pixel
        for c in range(3):
            counts[c] += np.bincount(images[start : start + 1024, ..., c].ravel(), minlength=256)
    return statistics_of(counts)


def statistics_of(counts: NDArray[np.int64]) -> tuple[Channels, Channels]:
    """The same, from how often each value occurs in each channel [channel, 256].

    The deviation of a channel that never changes is given as 1, so that one can divide by it.
    """
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
        made="scans of 8×8 with each pixel doubled",
        facts=Facts(10, 16, (0.30543,) * 3, (0.37534,) * 3, images=(1_437, 360), classes=class_names.DIGITS),
    ),
    "fashion_mnist": DatasetEntry(
        read="kd.datasets.fashion_mnist.read",
        made="pictures of 28×28 with a black border of 2 pixels",
        facts=Facts(10, 32, (0.219,) * 3, (0.3318,) * 3, images=(60_000, 10_000), classes=class_names.FASHION_MNIST),
    ),
    "cifar10": DatasetEntry(
        read="kd.datasets.cifar.read_cifar10",
        facts=Facts(
            num_classes=10,
            image_size=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            images=(50_000, 10_000),
            classes=class_names.CIFAR10,
        ),
    ),
    "cifar100": DatasetEntry(
        read="kd.datasets.cifar.read_cifar100",
        facts=Facts(
            num_classes=100,
            image_size=32,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            images=(50_000, 10_000),
            classes=class_names.CIFAR100,
        ),
    ),
    "folder": DatasetEntry(read="kd.datasets.folder.read", prepare="kd.datasets.folder.prepare"),
    "tiny_imagenet": DatasetEntry(
        read="kd.datasets.tiny_imagenet.read",
        prepare="kd.datasets.tiny_imagenet.prepare",
        home="tiny-imagenet-200",
    ),
    "imagenet": DatasetEntry(
        read="kd.datasets.folder.read_imagenet",
        prepare="kd.datasets.folder.prepare_imagenet",
        home="imagenet",
        recipe="imagenet",
    ),
}
DATASETS: Registry[DatasetEntry] = Registry("kd.datasets", _OWN, DatasetEntry)


LARGE = 64  # pixels: larger images are photographs
_NAMED = 5  # classes that a message names
_VIEWS = 16  # of a photograph: a teacher's outputs are cached for each


def resolve(config: DatasetConfig, data_root: Path, threads: int = 1, image_size: int = 224) -> DatasetSpec:
    """What a stage will see of the configured data set.

    Images are opened only of data sets that are decoded once, the first time that they are seen; `threads` decode
    them. Photographs become images of dataset.image_size, or else of the network's own `image_size`. Raises KnownError
    where such a data set is absent or not what it should be.
    """
    entry = DATASETS[config.name]
    if entry.facts is not None:
        _refuse_unused(config)
        return specify(config, entry.facts)
    root = data_root / str(entry.home) if config.root is None else Path(os.path.expanduser(config.root))
    try:
        facts = load_attribute(str(entry.prepare))(root, data_root, Reading(config, image_size, threads))
    except OSError as error:
        raise KnownError(
            f"dataset.root: {error.filename or root} cannot be read or written ({error.strerror})"
        ) from error
    spec = specify(config, facts)
    _say_choices(config, spec)
    if facts.classes:
        _say_missing(config, spec, facts.counts)
    return spec


def _refuse_unused(config: DatasetConfig) -> None:
    """Raise KnownError for settings of how pictures are read, where no pictures are read."""
    names = ("skip_unreadable", "image_size", "resize", "background", "decode", "array_budget", "test_fraction")
    given = [name for name in names if getattr(config, name) != DatasetConfig.model_fields[name].default]
    if given:
        why = f"{config.name} is no folder of images: leave this setting out"
        raise KnownError("\n".join(f"dataset.{name}: {why}" for name in given))


def _say_choices(config: DatasetConfig, spec: DatasetSpec) -> None:
    """A line for each choice that the configuration left to us."""
    if spec.val_images and config.val_fraction:
        print(f"{config.title}: its own {spec.val_images:,} validation images validate, not dataset.val_fraction")
    if spec.image_size > LARGE and "auto" in (config.augment, config.views):
        size, views = spec.image_size, "all" if spec.views is None else spec.views
        print(f"{config.title}: images of {size}×{size}: augment={spec.augment}, views={views}", flush=True)


def _say_missing(config: DatasetConfig, spec: DatasetSpec, counts: tuple[int, ...]) -> None:
    """Lines that name the classes without a validation image, and those without a training image."""
    if not spec.val_fraction:
        return
    out = [held_out(count, spec.val_fraction) for count in counts]
    parts = {
        "validation": (out, "they have one image each"),
        "training": (np.subtract(counts, out), f"dataset.val_fraction={spec.val_fraction:g} takes all of theirs"),
    }
    for part, (left, why) in parts.items():
        bare = [printable(name) for name, images in zip(spec.classes, left, strict=True) if not images]
        if bare:
            more = f" and {len(bare) - _NAMED:,} more" if bare[_NAMED:] else ""
            print(f"{config.title}: no {part} image of {', '.join(bare[:_NAMED])}{more}: {why}", flush=True)


def held_out(images: int, fraction: float) -> int:
    """How many of a class's images validate: `fraction` of them, and at least one where there are two."""
    return round(fraction * images) or int(fraction > 0 and images > 1)


def specify(config: DatasetConfig, facts: Facts) -> DatasetSpec:
    """The spec of a data set whose facts are known."""
    augment = config.augment or "none"  # null: the released code decides, when the stages are planned
    if augment == "auto":
        augment = "resized_crop_flip" if facts.image_size > LARGE else "crop_flip"
    views = config.views
    if views == "auto":
        views = _VIEWS if augment == "resized_crop_flip" and not facts.streamed else None
    fraction = 0 if facts.val_images else config.val_fraction
    return DatasetSpec(
        name=config.name,
        content=facts.content,
        num_classes=facts.num_classes,
        image_size=facts.image_size,
        mean=facts.mean,
        std=facts.std,
        augment=augment,
        views=views,
        val_fraction=fraction,
        split_seed=config.split_seed,
        classes=facts.classes,
        images=facts.images,
        val_images=facts.val_images,
        resize=facts.resize,
        background=config.background if facts.content else "white",
        streamed=facts.streamed,
        rare=sum(held_out(count, fraction) > round(fraction * count) for count in facts.counts),
    )


def in_memory(spec: DatasetSpec) -> bool:
    """Whether the images are held in memory: those of a table, and small squares of a folder."""
    return not (spec.streamed or spec.resize is not None or (spec.content and spec.image_size > LARGE))


def load_data(spec: DatasetSpec, data_root: Path, device: str, workers: int | None = None) -> Images:
    """The images of a spec, which shows them as uint8 tensors on the device. `workers` decode what is streamed.

    Raises KnownError where they are absent and cannot be fetched.
    """
    from kd.datasets.data import Data

    if not in_memory(spec):
        return _photographs(spec, data_root / spec.name, device, workers)
    return Data.of(spec, load_attribute(DATASETS[spec.name].read)(data_root, spec.content), device)


def _photographs(spec: DatasetSpec, place: Path, device: str, workers: int | None) -> Images:
    """Photographs that resolve() has put below `place`."""
    from kd.datasets import decoder, resized
    from kd.datasets.photos import Photos
    from kd.datasets.streamed import Streamed

    if spec.streamed:
        return Streamed.of(spec, decoder.listing(place, str(spec.content)), device, workers)
    return Photos.of(spec, resized.stored(place, str(spec.content)), device)
