"""Cleaning the store: remove leftovers that no process uses, and finished stages on request."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from kd.core import files
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.store.stages import DamageError, Store, damage_in

DAY = 86400
_GONE = "left by a process that has ended"


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing needs, the reason, and its size in bytes."""

    path: Path
    reason: str
    size: int


def dependents(store: Store, key: str) -> list[str]:
    """The finished stages that have this one in their chain. Those farthest from it come first."""
    distance = {}
    for other in store:
        try:
            chain = [source.key for source in store.source(other).chain[::-1]]
        except DamageError:  # a damaged stage does not count as finished
            continue
        except KnownError as error:  # of a package that is not installed, say
            print(f"{error}; so what it depends on is unknown", file=sys.stderr)
            continue
        if key in chain[1:]:
            distance[other] = chain.index(key)
    return sorted(distance, key=lambda other: -distance[other])


def remove(store: Store, key: str, with_dependents: bool) -> list[str]:
    """Remove a finished stage, and with `with_dependents` those that depend on it. Returns the removed keys.

    Raises KnownError, and removes nothing, if other stages depend on it and should stay, or if one of them is locked.
    """
    if not store.has(key):
        raise KnownError(f"no finished stage {key} in {store.root}")
    needing = dependents(store, key)
    if needing and not with_dependents:
        raise KnownError(
            f"{len(needing)} finished stages depend on stage {key}: {', '.join(needing)}; "
            "--with-dependents removes them too"
        )
    doomed = [*needing, key]
    with store.writing(), ExitStack() as locks:
        held = {other: locks.enter_context(files.hold_lock(store.lock_file(other), None)) for other in doomed}
        if busy := [other for other in doomed if not held[other]]:
            raise KnownError("\n".join(f"stage {b} is locked by {files.lock_holder(store.lock_file(b))}" for b in busy))
        for other in doomed:
            for path in (*store.outputs.glob(f"{other}-*"), store.partial(other), store.root / other):
                if os.path.lexists(path):
                    _discard(path)
    return doomed


def collect(store: Store, days: float, dry: bool, *, banks: float | None = None) -> Iterator[Leftover]:
    """Remove what nothing needs, or with `dry` only list it. Unfinished and damaged stages go after `days`.

    Caches of guides that were not written for `banks` days go, too (0: all), unless a stage is being trained.
    Finished stages stay, and so do files of a stage that is locked by a running process. Raises KnownError if something
    cannot be removed.
    """
    with store.writing():
        before = _lock_files(store)
        for folder in (store.root / "partial", store.banks, store.outputs, store.damaged):
            yield from (_take(path, _GONE, dry) for path in files.temporaries(folder) if files.abandoned(path))
        yield from _of_stages(store, days, dry)
        yield from _of_banks(store, dry, banks)
        yield from _of_gone(store, store.outputs, "logits of a stage that is not in the store", dry)
        for path in _entries(store.damaged):
            if _set_aside(path) < time.time() - days * DAY:
                yield _take(path, f"damaged, set aside more than {days:g} days ago", dry)
        for path in _lock_files(store):
            yield from (each for each in _of_lock(path, dry) if path in before)  # others were made by this call


def _of_stages(store: Store, days: float, dry: bool) -> Iterator[Leftover]:
    partials = {path.name for path in _entries(store.root / "partial")}
    hidden = {path.name.split(".")[1] for path in files.temporaries(store.root)}
    for key in sorted(partials | hidden):
        with _claim(store.lock_file(key), dry) as free:
            if not free:
                continue
            for path in [*files.temporaries(store.root, key), *files.temporaries(store.partial(key))]:
                wanted = path.suffix == ".old" and not store.has(key) and damage_in(path, key) is None
                if files.abandoned(path) and not wanted:  # the next run restores what is wanted
                    yield _take(path, _GONE, dry)
            if not store.partial(key).is_dir():  # there was none, or its training has ended meanwhile
                continue
            if store.whole(key):
                yield _take(store.partial(key), "checkpoint of a finished stage", dry)
            elif _touched(store.partial(key)) < time.time() - days * DAY:
                yield _take(store.partial(key), f"checkpoint, not touched for {days:g} days", dry)


def _of_banks(store: Store, dry: bool, days: float | None) -> Iterator[Leftover]:
    """Only if no stage is locked: a training that runs may read the logits of a guide that was removed meanwhile."""
    if not all(map(_free, _lock_files(store))):
        return
    if days is not None:
        old = [path for path in _entries(store.banks) if _touched(path) <= time.time() - days * DAY]
        yield from (_take(path, "a guide's cache (--banks)", dry) for path in old)
    yield from _of_gone(store, store.banks, "outputs of a guide that is not in the store", dry, _backbones(store))


def _backbones(store: Store) -> set[str]:
    """What identifies the frozen backbones of the probes in the store."""
    found = set()
    for key in store:
        with suppress(KnownError):  # damaged, or of a package that is not installed
            source = store.source(key)
            if isinstance(source, Stage) and source.freeze:
                found.add(source.backbone)
    return found


def _of_gone(store: Store, folder: Path, reason: str, dry: bool, others: Collection[str] = ()) -> Iterator[Leftover]:
    """Files and folders that are named after a stage that is not in the store, and after none of the `others`."""
    for path in _entries(folder):
        key = path.name.partition("-")[0]
        if re.fullmatch("[0-9a-f]{16}", key) and not store.has(key) and key not in others:
            yield _take(path, reason, dry)


def _lock_files(store: Store) -> list[Path]:
    """All lock files, also those that left only their note."""
    return sorted({path.with_suffix(".lock") for path in _entries(store.root / ".locks")})


def _of_lock(path: Path, dry: bool) -> Iterator[Leftover]:
    with _claim(path, dry) as free:
        if free and path.exists():  # a killed holder may leave only its note, which is removed with the lock's release
            yield _take(path, "a lock that nobody holds", dry)  # a process that waits for it notices, and makes another


def _claim(path: Path, dry: bool) -> AbstractContextManager[bool]:
    """Take the lock if it is free. A dry run makes no lock file."""
    return nullcontext(True) if dry and not path.exists() else files.hold_lock(path, None)


def _free(path: Path) -> bool:
    with _claim(path, dry=True) as free:
        return free


def _take(path: Path, reason: str, dry: bool) -> Leftover:
    leftover = Leftover(path, reason, files.size_of(path))
    if not dry:
        _discard(path)
    return leftover


def _discard(path: Path) -> None:
    """Remove a file or folder. A folder is renamed first, so that nothing reads a half-removed one."""
    if not path.is_dir():
        os.unlink(path)
        return
    gone = path if path.name.startswith(".") else files.temporary(path)
    if gone != path:
        os.rename(path, gone)
    shutil.rmtree(gone)
    files.sync(path.parent)


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _touched(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _set_aside(path: Path) -> float:
    """When a damaged stage was moved aside, by its name; for other names, the time of the folder."""
    try:
        moved = datetime.strptime(path.name.partition("-")[2], "%Y%m%dT%H%M%S.%fZ")
    except ValueError:
        return path.lstat().st_mtime
    return moved.replace(tzinfo=timezone.utc).timestamp()
