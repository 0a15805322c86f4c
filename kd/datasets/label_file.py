"""Files that hold labels: a CSV file of pictures, and the annotations of Tiny-ImageNet's validation images."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

from kd.core.spec import KnownError
from kd.datasets.layouts import (
    File,
    Listing,
    PassedOver,
    described,
    folders_in,
    pictures_below,
    problem_line,
    raise_for,
    sorted_classes,
    split_here,
    split_named,
    split_off,
    val_is_test,
)

ANNOTATIONS = "val/val_annotations.txt"

# The headers of columns, in any case.
_FILE = ("file", "filename", "file_name", "path", "filepath", "file_path", "image", "image_path", "img")
_LABEL = ("label", "class", "class_name", "category", "target", "species")
_SPLIT = ("split", "set", "subset", "partition")


def read_table(path: Path, test_fraction: float) -> Listing:
    """The pictures that a CSV file names, relative to its folder, with their labels and perhaps their splits.

    Raises KnownError, with a line for each problem: columns that are missing, lines without a file or a label, files
    that are named twice or absent, splits that are not known, classes that are not in all splits.
    """
    rows = _rows(path)
    root = path.parent
    repeated = (name for name, count in Counter(name for name, _, _ in rows).items() if count > 1)
    lines = [
        problem_line(f"of {path} are named more than once", repeated),
        problem_line(f"that {path} names do not exist", (n for n, _, _ in rows if not os.path.exists(root / n))),
        problem_line(
            f"in {path} are not known: they should be train, val or test",
            sorted({split for _, _, split in rows if split is not None and not split_named(split)}),
            "splits",
        ),
    ]
    if any(lines):
        raise KnownError("\n".join(filter(None, lines)))
    classes = sorted_classes(label for _, label, _ in rows)
    if len(classes) < 2:
        raise KnownError(f"dataset.root: {path} should have two or more labels (got {len(classes)})")
    labels = {name: label for label, name in enumerate(classes)}
    listing = _parted(path, classes, [(name, labels[label], split) for name, label, split in rows], test_fraction)
    return replace(listing, remarks=described(listing))


def annotated(root: Path) -> Listing:
    """Tiny-ImageNet in the layout of its archive: train/<wnid>/images/, and val/images/ with a file of labels.

    val/ is the test set, because the archive's test images have no labels. Raises KnownError for another layout.
    """
    for folder in (root / "train", root / "val" / "images"):
        if not folder.is_dir():
            raise KnownError(f"dataset.root: {folder} is not a folder; {root} should be the unpacked Tiny-ImageNet")
    classes, passed = folders_in(root / "train"), PassedOver()
    if len(classes) < 2:
        raise KnownError(f"dataset.root: {root / 'train'} should have two classes or more (got {len(classes)})")
    bare = (name for name in classes if not (root / "train" / name / "images").is_dir())
    raise_for(f"of {root / 'train'} have no folder images/", bare, "classes")
    train: list[File] = []
    for label, name in enumerate(classes):
        found = pictures_below(root, f"train/{name}/images", passed)
        if not found:
            raise KnownError(f"dataset.root: {root / 'train' / name / 'images'} has no images")
        train += [(file, label) for file in found]
    listing = Listing(root, classes, train, _annotated_test(root, classes, passed))
    return replace(listing, remarks=(*described(listing), *passed.lines(root)))


def _annotated_test(root: Path, classes: list[str], passed: PassedOver) -> list[File]:
    """The images of val/ with their labels, sorted by name."""
    path = root / ANNOTATIONS
    if not path.is_file():
        raise KnownError(f"dataset.root: {path} is missing: it has the labels of val/images")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    raise_for(
        f"of {path} are not <file>, <wnid> and box, separated by tabs",
        (repr("\t".join(row)) for row in rows if len(row) < 2 or not all(row[:2])),
        "lines",
    )
    wnids = {row[0]: row[1] for row in rows}
    present = {name.removeprefix("val/images/") for name in pictures_below(root, "val/images", passed)}
    if len(wnids) < len(rows):
        raise KnownError(f"dataset.root: {path} names files more than once ({len(rows)} lines, {len(wnids)} files)")
    raise_for(f"that {path} names are not in val/images", sorted(wnids.keys() - present))
    raise_for(f"of val/images have no line in {path}", sorted(present - wnids.keys()))
    raise_for(f"of {path} are not in train/", sorted(set(wnids.values()) - set(classes)), "classes")
    raise_for(f"of train/ have no image in {path}", sorted(set(classes) - set(wnids.values())), "classes")
    labels = {name: label for label, name in enumerate(classes)}
    return [(f"val/images/{file}", labels[wnid]) for file, wnid in sorted(wnids.items())]


def _rows(path: Path) -> list[tuple[str, str, str | None]]:
    """File, label and split of each line; the split is None if the file has no such column."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise KnownError(f"dataset.root: {path} is no text in UTF-8: it should be a CSV file or a folder") from error
    header = text.partition("\n")[0].strip()
    rows = csv.reader(StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), skipinitialspace=True)
    try:
        table = list(rows)
    except csv.Error as error:
        raise KnownError(f"dataset.root: {path} is no CSV file ({error}); maybe a quote is not closed") from error
    names = [name.strip().lower() for name in (table or [[]])[0]]
    file, label, split = (_column(names, known) for known in (_FILE, _LABEL, _SPLIT))
    if file is None or label is None:
        raise KnownError(
            f"dataset.root: {path} should begin with the names of its columns, file and label (and split), "
            f"separated by commas (got {header[:80]!r})"
        )
    body = [(number, row) for number, row in enumerate(table[1:], 2) if row]
    asked = [column for column in (file, label, split) if column is not None]
    filled = {n for n, row in body if len(row) > max(asked) and all(row[column].strip() for column in asked)}
    short = (f"line {n}" for n, _ in body if n not in filled)
    raise_for(f"of {path} have no file, label or split", short, "lines")
    named = (_from(path.parent, r[file].strip()) for _, r in body)
    return [
        (name, r[label].strip(), None if split is None else r[split]) for name, (_, r) in zip(named, body, strict=True)
    ]


def _from(root: Path, name: str) -> str:
    """A file's one name, relative to the folder: `./a.png`, `b/../a.png` and its absolute path become `a.png`."""
    base = os.path.abspath(root)
    return os.path.relpath(os.path.join(base, name), base)


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _parted(path: Path, classes: list[str], rows: list[tuple[str, int, str | None]], test_fraction: float) -> Listing:
    root = path.parent
    parts: dict[str, list[File]] = {"train": [], "val": [], "test": []}
    for name, label, split in rows:
        parts[split_named(split or "train") or "train"].append((name, label))
    train, val, test = (sorted(parts[split]) for split in ("train", "val", "test"))
    choices: tuple[str, ...] = ()
    own_test = bool(test or val)
    if not test and val:
        val, test, choices = [], val, (val_is_test(f"val in {path}"),)
    elif not test:
        train, test = split_off(train, test_fraction)
        choices = (split_here(path, train, test, test_fraction),)
    for name, listed in (("train", train), ("val", val), ("test", test)):
        labels = {label for _, label in listed}
        bare = (c for label, c in enumerate(classes) if labels and label not in labels)
        raise_for(f"of {path} have no image in {name}", bare, "classes")
    if not train:
        raise KnownError(f"dataset.root: {path} has no images for training (split=train)")
    train.sort(key=lambda file: file[1])  # by class, as folders are
    test.sort(key=lambda file: file[1])
    return Listing(root, classes, train + val, test, len(val), own_test, choices)
