"""What the store need not keep: leftovers that nobody works on, and stages that somebody wants gone."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from kd import files
from kd.spec import KnownError
from kd.store import locks, sums
from kd.store.stages import Store

DAY = 86400
_GONE = "of a process that is gone"


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs, why, and its size in bytes."""

    path: Path
    reason: str
    size: int


def dependents(store: Store, key: str) -> list[str]:
    """The finished stages that were trained on this one, directly or not; those farthest from it come first."""
    distance = {}
    for other in store:
        with suppress(sums.DamageError):  # then it is not finished
            chain = [source.key for source in store.source(other).chain[::-1]]
            if key in chain[1:]:
                distance[other] = chain.index(key)
    return sorted(distance, key=lambda other: -distance[other])


def remove(store: Store, key: str, with_dependents: bool) -> list[str]:
    """Remove a finished stage, and those that depend on it; returns their keys.

    Raises KnownError, with nothing removed, where stages depend on it and should stay, or one is being trained.
    """
    if not store.has(key):
        raise KnownError(f"no finished stage {key} in {store.root}")
    needing = dependents(store, key)
    if needing and not with_dependents:
        raise KnownError(
            f"stage {key} is what {len(needing)} finished stages depend on: {', '.join(needing)}; "
            "--with-dependents removes them too"
        )
    doomed = [*needing, key]
    with store.writing():
        busy = [other for other in doomed if not _free(store.lock_file(other))]
        if busy:
            raise KnownError("\n".join(f"stage {b} is held by {locks.holder(store.lock_file(b))}" for b in busy))
        for other in doomed:
            with locks.hold(store.lock_file(other), f"stage {other} is held by"):
                for path in store.outputs.glob(f"{other}-*"):
                    _discard(path)
                _discard(store.root / other)
    return doomed


def collect(store: Store, days: float, dry: bool) -> Iterator[Leftover]:
    """Remove what nothing needs, or only tell of it; `days` is the age of what might still be wanted.

    Never a finished stage, never what a process works on: its stage's lock is held. Raises KnownError where something
    cannot be removed.
    """
    with store.writing():
        before = _lock_files(store)
        for folder in (store.root / "partial", store.banks, store.outputs, store.damaged):
            yield from (_take(path, _GONE, dry) for path in files.temporaries(folder) if files.abandoned(path))
        yield from _of_stages(store, days, dry)
        yield from _of_banks(store, dry)
        yield from _of_gone(store, store.outputs, "logits of a stage that is not in the store", dry)
        for path in _entries(store.damaged):
            if _set_aside(path) < time.time() - days * DAY:
                yield _take(path, f"damaged, set aside more than {days:g} days ago", dry)
        for path in _lock_files(store):
            yield from (each for each in _of_lock(path, dry) if path in before)  # of others the user need not know


def _of_stages(store: Store, days: float, dry: bool) -> Iterator[Leftover]:
    partials = {path.name for path in _entries(store.root / "partial")}
    hidden = {path.name.split(".")[1] for path in files.temporaries(store.root)}
    for key in sorted(partials | hidden):
        with _claim(store.lock_file(key), dry) as free:
            if not free:
                continue
            for path in [*files.temporaries(store.root, key), *files.temporaries(store.partial(key))]:
                wanted = path.suffix == ".old" and not store.has(key) and sums.problem(path, key) is None
                if files.abandoned(path) and not wanted:  # else the next run brings it back
                    yield _take(path, _GONE, dry)
            if key in partials and store.whole(key):
                yield _take(store.partial(key), "checkpoint of a finished stage", dry)
            elif key in partials and _touched(store.partial(key)) < time.time() - days * DAY:
                yield _take(store.partial(key), f"checkpoint, not touched for {days:g} days", dry)


def _of_banks(store: Store, dry: bool) -> Iterator[Leftover]:
    """Only while nothing is trained: whoever holds a lock may be reading logits of a guide that was removed since."""
    if not all(map(_free, _lock_files(store))):
        return
    yield from _of_gone(store, store.banks, "logits of a guide that is not in the store", dry)


def _of_gone(store: Store, folder: Path, reason: str, dry: bool) -> Iterator[Leftover]:
    """What is named by the key of a stage that is not there."""
    for path in _entries(folder):
        key = path.name.partition("-")[0]
        if re.fullmatch("[0-9a-f]{16}", key) and not store.has(key):
            yield _take(path, reason, dry)


def _lock_files(store: Store) -> list[Path]:
    """Those that are there, or have left a note."""
    return sorted({path.with_suffix(".lock") for path in _entries(store.root / ".locks")})


def _of_lock(path: Path, dry: bool) -> Iterator[Leftover]:
    with _claim(path, dry) as free:
        if free and path.exists():  # of a killed holder there may be the note alone, which goes when the lock is freed
            yield _take(path, "a lock that nobody holds", dry)  # whoever waits for it notices, and makes another


def _claim(path: Path, dry: bool) -> AbstractContextManager[bool]:
    """The lock, if it is free; a dry run makes none."""
    return nullcontext(True) if dry and not path.exists() else locks.hold(path, None)


def _free(path: Path) -> bool:
    with _claim(path, dry=True) as free:
        return free


def _take(path: Path, reason: str, dry: bool) -> Leftover:
    leftover = Leftover(path, reason, size(path))
    if not dry:
        _discard(path)
    return leftover


def _discard(path: Path) -> None:
    """A folder under another name first, so that no half of it is taken for anything."""
    if not path.is_dir():
        os.unlink(path)
        return
    gone = path if path.name.startswith(".") else files.temporary(path)
    if gone != path:
        os.rename(path, gone)
    shutil.rmtree(gone)
    files.sync(path.parent)


def size(path: Path) -> int:
    """Bytes on the disk, of a file or of all files below a folder; sparse ones count what they hold."""
    below = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(each.lstat().st_blocks * 512 for each in below)


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _touched(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _set_aside(path: Path) -> float:
    """When, by its name; a foreign name is as old as its folder."""
    try:
        moved = datetime.strptime(path.name.partition("-")[2], "%Y%m%dT%H%M%S.%fZ")
    except ValueError:
        return path.lstat().st_mtime
    return moved.replace(tzinfo=timezone.utc).timestamp()
