"""The data sets: a table of plain data; resolve() tells what a stage will see, load() brings the images."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.datasets.base import DatasetConfig, Entry, Facts
from kd.spec import KnownError
from kd.stage import DatasetSpec

if TYPE_CHECKING:
    from kd.datasets.data import Data

DATASETS: dict[str, Entry] = {
    "digits": Entry(
        read="kd.datasets.digits.read",
        facts=Facts(10, 16, mean=(0.30543,) * 3, std=(0.37534,) * 3),
    ),
    "fashion_mnist": Entry(
        read="kd.datasets.fashion_mnist.read",
        facts=Facts(10, 32, mean=(0.219,) * 3, std=(0.3318,) * 3),
    ),
    "cifar10": Entry(
        read="kd.datasets.cifar.read_cifar10",
        facts=Facts(10, 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": Entry(
        read="kd.datasets.cifar.read_cifar100",
        facts=Facts(100, 32, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    ),
    "folder": Entry(read="kd.datasets.folder.read", prepare="kd.datasets.folder.prepare"),
    "tiny_imagenet": Entry(
        read="kd.datasets.tiny_imagenet.read",
        prepare="kd.datasets.tiny_imagenet.prepare",
        home="tiny-imagenet-200",
    ),
}


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
        facts = _attribute(str(entry.prepare))(root, data_root, threads, config.skip_unreadable)
    except OSError as error:
        raise KnownError(
            f"dataset.root: {error.filename or root} cannot be read or written ({error.strerror})"
        ) from error
    return specify(config, facts)


def specify(config: DatasetConfig, facts: Facts) -> DatasetSpec:
    """The spec of a data set of which the facts are known."""
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


def load(spec: DatasetSpec, data_root: Path, device: str) -> Data:
    """The images of a spec, as uint8 tensors on the device.

    Raises KnownError where they are absent and cannot be fetched.
    """
    from kd.datasets.data import Data

    return Data.of(spec, _attribute(DATASETS[spec.name].read)(data_root, spec.content), device)


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
