"""folder: any images as root/{train,test}/<class>/*.{png,jpg,…}, decoded once into arrays."""

import os
from collections.abc import Iterator
from pathlib import Path

from kd.core.spec import KnownError, printable
from kd.datasets import Arrays, Facts, decoder


def prepare(root: Path, data_root: Path, threads: int, skip: bool = False) -> Facts:
    """The facts of a folder, whose images are decoded. Raises KnownError, with the names of files, for bad input."""
    classes = _classes(root)
    train, test = (list(_files(root, split, classes)) for split in ("train", "test"))
    return decoder.decode(decoder.Listing(root, classes, train, test), data_root / "folder", threads, skip)


def read(data_root: Path, content: str | None) -> Arrays:
    """The arrays that prepare() wrote."""
    return decoder.read_arrays(data_root / "folder" / str(content))


def _classes(root: Path) -> list[str]:
    for split in ("train", "test"):
        if not (root / split).is_dir():
            place = f"{root}/{{train,test}}/<class>/"
            raise KnownError(f"dataset.root: {root / split} is not a folder; images should be in {place}")
    train, test = ({e.name for e in os.scandir(root / s) if e.is_dir()} for s in ("train", "test"))
    if len(train) < 2:
        raise KnownError(f"dataset.root: {root / 'train'} should have two or more class folders (got {len(train)})")
    if train != test:
        odd = ", ".join(map(printable, sorted(train ^ test)))
        raise KnownError(f"dataset.root: these classes of {root} are not in both train and test: {odd}")
    return sorted(train)


def _files(root: Path, split: str, classes: list[str]) -> Iterator[decoder.File]:
    for label, name in enumerate(classes):
        yield from ((f"{split}/{name}/{file}", label) for file in decoder.image_names(root / split / name))
