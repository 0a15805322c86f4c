"""Locks of the store: the kernel's, so that none survives its holder, with a note beside each that says who that is."""

from __future__ import annotations

import errno
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from kd.spec import KnownError


@contextmanager
def hold(path: Path, waiting: str | None) -> Iterator[bool]:
    """Hold the lock on a file; where another process has it, print `waiting`, with who that is, and wait.

    With `waiting` None the block is entered at once, and is told whether it has the lock. Raises OSError where the
    file cannot be written, and KnownError where its file system has no locks.
    """
    os.makedirs(path.parent, exist_ok=True)
    lock, note = FileLock(path), path.with_suffix(".holder")
    if not _acquire(lock, path, waiting):
        yield False
        return
    try:
        since = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        with suppress(OSError):  # a full disk is no reason not to make room in it
            note.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}))
        yield True
    finally:
        try:
            with suppress(OSError):
                os.unlink(note)
        finally:
            lock.release()


def _acquire(lock: BaseFileLock, path: Path, waiting: str | None) -> bool:
    try:
        if _at_once(lock):
            return True
        if waiting is not None:
            print(f"{waiting} {holder(path)}: waiting for it", flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise KnownError(
            f"{path.parent} is on a file system without locks ({os.strerror(error.errno)}), where two processes could "
            "train one stage: mount it with them (docs/reliability.md), or name another by runtime.store or KD_STORE"
        ) from error
    return waiting is not None


def _at_once(lock: BaseFileLock) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what is refused below
            lock.acquire(timeout=0)
    except Timeout:
        acquired = False
    else:
        acquired = True
    if isinstance(lock, SoftFileLock):  # what filelock becomes without flock: a file, which survives a killed holder
        lock.release()
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return acquired


def holder(path: Path) -> str:
    """Who holds a lock, by the note beside it."""
    try:
        who = json.loads(path.with_suffix(".holder").read_text())
        return f"another process (pid {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun or ended
        return "another process"
