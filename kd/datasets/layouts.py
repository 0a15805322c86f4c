"""Layouts: how folders of pictures say which class a picture is of, and what it is for."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kd.core.spec import KnownError, printable

_SHOWN = 5  # names that a message shows
# The names of folders that say what pictures are for, in any case.
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# What systems and programs leave in folders, in any case. Hidden files are no data either.
_JUNK = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "__pycache__", "lost+found"}
# Endings of files that are something else. All others are tried, because the content decides whether it is a picture.
_OTHER = re.compile(
    r".*\.(txt|csv|tsv|json|jsonl|xml|md|rst|html?|css|js|pdf|svg|docx?|xlsx?|zip|t?gz|bz2|xz|zst|7z|rar|tar|py|ipynb|sh"
    r"|mat|np[yz]|pkl|pickle|pth?|h5|hdf5|parquet|safetensors|onnx|ya?ml|toml|ini|cfg|log|db|sqlite|lock|mp[34]|avi|mov"
    r"|mkv|webm|wav|url|lnk|bak|tmp|part|crdownload|md5|sha1|sha256)",
    re.IGNORECASE | re.DOTALL,
)

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")

File = tuple[str, int]  # path below the root, label


@dataclass(frozen=True)
class Listing:
    """The picture files of a data set, by their paths below `root`. `classes` are the labels' names.

    The last `val_images` of `train` are its own validation split. The test set is its `own_test`, or was split off
    here. `choices` are lines that say how the layout was understood, `remarks` what was found and passed over.
    """

    root: Path
    classes: list[str]
    train: list[File]
    test: list[File]
    val_images: int = 0
    own_test: bool = True
    choices: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass
class PassedOver:
    """What a listing leaves out: how many files of each reason, and the first name of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Count a file or folder."""
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def lines(self, root: Path) -> tuple[str, ...]:
        """One line, or none."""
        parts = (f"{count:,} {reason} ({self.first[reason]})" for reason, count in sorted(self.counts.items()))
        return (f"{root}: passed over: {', '.join(parts)}",) if self.counts else ()


def find(root: Path, test_fraction: float) -> Listing:
    """The pictures in a folder: in folders for training, validation and test, or in one folder of class folders.

    Without a test set, val/ is the test set; without both, `test_fraction` of each class is. Images of test/ without
    class folders are passed over. Raises KnownError, in a line for each problem, where the layout is another or classes
    are not in all parts.
    """
    root, entered = _entered(root)
    passed = PassedOver()
    splits = _splits(root)
    listing = _of_splits(root, splits, test_fraction, passed) if splits else _of_classes(root, test_fraction, passed)
    choices = (*entered, *listing.choices)
    return replace(listing, choices=choices, remarks=(*described(listing), *passed.lines(root)))


def described(listing: Listing) -> tuple[str, ...]:
    """One line: the classes, with the number of their pictures."""
    counts = Counter(label for _, label in [*listing.train, *listing.test])
    names = [f"{name} ({counts[label]:,})" for label, name in enumerate(listing.classes[:_SHOWN])]
    more = f" and {len(listing.classes) - _SHOWN:,} more" if len(listing.classes) > _SHOWN else ""
    files = len(listing.train) + len(listing.test)
    return (f"{listing.root}: {files:,} pictures of {len(listing.classes):,} classes: {', '.join(names)}{more}",)


def raise_for(what: str, found: Iterable[str], kind: str = "files", listed: Path | None = None) -> None:
    """Raise KnownError if any names were found. It shows the first few; the file `listed` gets all of them."""
    if line := problem_line(what, found, kind, listed):
        raise KnownError(line)


def problem_line(what: str, found: Iterable[str], kind: str = "files", listed: Path | None = None) -> str | None:
    """The line of raise_for(); None if no names were found."""
    names = list(map(printable, found))
    if not names:
        return None
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    if listed is not None and more:
        listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        more += f" ({listed})"
    return f"dataset.root: {len(names)} {kind} {what}: {'; '.join(names[:_SHOWN])}{more}"


def split_named(name: str) -> str | None:
    """train, val or test, if a name says so."""
    return next((split for split, names in _SPLITS.items() if name.strip().lower() in names), None)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Names in order: as numbers if all of them are numbers."""
    found = sorted(set(names))
    return sorted(found, key=lambda name: (float(name), name)) if all(map(_NUMBER.fullmatch, found)) else found


def split_off(listed: list[File], fraction: float) -> tuple[list[File], list[File]]:
    """Training and test files: `fraction` of each class, one at least, is the test set.

    A hash of a file's path decides, so the split is the same everywhere, whatever the seeds, and hardly changes when
    files are added. Raises KnownError if a class has less than two files.
    """
    test: set[str] = set()
    members: dict[int, list[str]] = {}
    for name, label in listed:
        members.setdefault(label, []).append(name)
    alone = (names[0] for names in members.values() if len(names) < 2)
    raise_for("are alone in their class, so that none is left for a test set", alone)
    for names in members.values():
        ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
        test.update(ordered[: min(max(round(fraction * len(names)), 1), len(names) - 1)])
    return [file for file in listed if file[0] not in test], [file for file in listed if file[0] in test]


def split_here(root: Path, train: list[File], test: list[File], fraction: float) -> str:
    """The line that says that a test set was split off."""
    return (
        f"{root} has no test set: {len(test):,} of its pictures (dataset.test_fraction={fraction:g} of each class, one "
        f"at least) are kept as one, and {len(train):,} are for training"
    )


def val_is_test(where: str) -> str:
    """The line that says that a validation split is the test set."""
    return f"{where} is the test set, because there is no other; validation images are taken from those for training"


def pictures_below(root: Path, below: str, passed: PassedOver) -> list[str]:
    """The paths below `root` of all files in the folder `below` that may be pictures, also in its folders; sorted."""
    found, folders = [], [below]
    while folders:
        inside = folders.pop()
        for entry in os.scandir(root / inside):
            name = f"{inside}/{entry.name}" if inside else entry.name
            if _is_junk(entry.name):
                passed.add(name, "hidden or of the system")
            elif _is_folder(entry):
                if entry.is_symlink() and _is_above(entry.path, root / inside):
                    passed.add(name, "links to a folder that it is in")
                else:
                    folders.append(name)
            elif other := _OTHER.fullmatch(entry.name):
                passed.add(name, f".{other[1].lower()}")
            else:
                found.append(name)
    return sorted(found)


def folders_in(folder: Path) -> list[str]:
    """The names of a folder's folders, sorted, without hidden ones and those of the system."""
    return sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and not _is_junk(entry.name))


def of_class_folders(root: Path, split: str, classes: list[str], passed: PassedOver) -> list[File]:
    """The files of class folders in the folder `split` below `root`. Raises KnownError for a class without files."""
    files = []
    for label, name in enumerate(classes):
        found = pictures_below(root, f"{split}/{name}" if split else name, passed)
        if not found:
            raise KnownError(f"dataset.root: {printable(str(root / split / name))} has no images")
        files += [(path, label) for path in found]
    return files


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link: it is reported as a file that cannot be read
        return False


def _is_above(link: str, folder: Path) -> bool:
    """Whether a link leads to a folder that it is in, so that following it would never end."""
    return f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(link)}/")


def _entered(root: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds the layout: `root`, or a folder that is alone in it; and a line for that."""
    asked = root
    while True:
        if not root.is_dir():
            raise KnownError(f"dataset.root: {root} {'is not a folder' if root.exists() else 'does not exist'}")
        inside = folders_in(root)
        if len(inside) != 1 or split_named(inside[0]) or not folders_in(root / inside[0]):
            return root, (f"the images are in {root}, the only folder in {asked}",) if root != asked else ()
        root = root / inside[0]


def _splits(root: Path) -> dict[str, str]:
    """The folders of `root` by what they are for; empty if its folders are classes."""
    inside = folders_in(root)
    named = [(split, name) for name in inside if (split := split_named(name))]
    alone = len(named) == 1 < len(inside) and not folders_in(root / named[0][1])
    if not named or alone:  # one folder called train or test, beside others and without folders, is a class too
        return {}
    splits = {split: name for split in _SPLITS for other, name in named if other == split}
    if len(splits) < len(named):
        times = Counter(split for split, _ in named)
        names = ", ".join(name for split, name in named if times[split] > 1)
        raise KnownError(f"dataset.root: {root} has several folders for one purpose ({names}): keep one of each")
    if "train" not in splits:
        raise KnownError(
            f"dataset.root: {root / 'train'} is not a folder, and there is {', '.join(splits.values())}; images should "
            f"be in {root}/{{train,test}}/<class>/, or dataset.root=<folder of class folders> splits one folder"
        )
    return splits


def _of_splits(root: Path, splits: Mapping[str, str], test_fraction: float, passed: PassedOver) -> Listing:
    """Folders for training, validation and test. Without the last two, a part of the first is the test set."""
    others = [name for name in folders_in(root) if name not in splits.values()]
    if splits.keys() == {"train"} and others:
        names = ", ".join(map(printable, others[:_SHOWN]))
        raise KnownError(
            f"dataset.root: {root / 'test'} is not a folder, and what {names} should be is not clear; "
            f"dataset.root={root / splits['train']} splits that folder into training and test images"
        )
    for name in others:
        passed.add(name, "folders that are no split")
    _pass_loose(root, "", passed)
    folders = {split: set(folders_in(root / name)) for split, name in splits.items()}
    choices: list[str] = []
    if "test" in splits and not (folders["test"] if "val" not in splits else folders["test"] & folders["train"]):
        choices.append(f"{root / splits['test']} is passed over: its images have no labels (no class folders)")
        del folders["test"]
    if len(folders["train"]) < 2:
        got = len(folders["train"])
        where = root / splits["train"]
        raise KnownError(f"dataset.root: {where} should have two or more class folders (got {got}){_table_hint(root)}")
    lines = [_unlike(root, folders, splits, other) for other in folders if other != "train"]
    if any(lines):
        raise KnownError("\n".join(filter(None, lines)))
    classes = sorted_classes(folders["train"])
    listed = {split: of_class_folders(root, splits[split], classes, passed) for split in folders}
    for split in folders:
        _pass_loose(root, splits[split], passed)
    if len(listed) == 1:
        train, test = split_off(listed["train"], test_fraction)
        choices.append(split_here(root, train, test, test_fraction))
        return Listing(root, classes, train, test, own_test=False, choices=tuple(choices))
    if "test" not in listed:
        choices.append(val_is_test(str(root / splits["val"])))
        return Listing(root, classes, listed["train"], listed["val"], choices=tuple(choices))
    val = listed.get("val", [])
    return Listing(root, classes, listed["train"] + val, listed["test"], len(val), choices=tuple(choices))


def _unlike(root: Path, folders: Mapping[str, set[str]], splits: Mapping[str, str], other: str) -> str | None:
    """A problem line, if a split has other classes than the training images."""
    if not folders[other]:
        return f"dataset.root: {root / splits[other]} has no class folders, so nobody knows what its images show"
    odd = sorted(folders["train"] ^ folders[other])
    return problem_line(f"of {root} are not in both {splits['train']} and {splits[other]}", odd, "classes")


def _pass_loose(root: Path, split: str, passed: PassedOver) -> None:
    """Count what lies beside class folders: files, and folders of the system."""
    for entry in os.scandir(root / split):
        if _is_junk(entry.name) or not _is_folder(entry):
            reason = "hidden or of the system" if _is_junk(entry.name) else "in no class folder"
            passed.add(f"{split}/{entry.name}".lstrip("/"), reason)


def _table_hint(root: Path) -> str:
    """A question, if there is a file that may hold the labels."""
    tables = sorted(entry.name for entry in os.scandir(root) if entry.name.lower().endswith((".csv", ".tsv")))
    return f"; or is it dataset.root={root / tables[0]}?" if tables else ""


def _of_classes(root: Path, test_fraction: float, passed: PassedOver) -> Listing:
    """One folder of class folders."""
    inside = folders_in(root)
    if len(inside) < 2:
        raise KnownError(
            f"dataset.root: {root} should have two or more class folders (got {len(inside)}){_table_hint(root)}"
        )
    inner = (f"{name}/{split}" for name in inside for split in folders_in(root / name) if split_named(split))
    raise_for(f"of {root} are splits in a folder of pictures: put them above the class folders", inner, "folders")
    found = {name: pictures_below(root, name, passed) for name in inside}
    for name, names in found.items():
        if not names:
            passed.add(name, "folders without images")
    classes = sorted_classes(name for name, names in found.items() if names)
    if len(classes) < 2:
        raise KnownError(f"dataset.root: {root} should have images in two or more class folders (got {len(classes)})")
    files = [(path, label) for label, name in enumerate(classes) for path in found[name]]
    _pass_loose(root, "", passed)
    train, test = split_off(files, test_fraction)
    choices = [split_here(root, train, test, test_fraction)]
    if odd := [name for name in classes if split_named(name)]:
        choices.insert(0, f"{root / odd[0]} is taken as a class, because the folders in {root} hold images directly")
    return Listing(root, classes, train, test, own_test=False, choices=tuple(choices))
