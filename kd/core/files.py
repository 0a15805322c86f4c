"""Files: atomic writes, temporary names, and locks between processes."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from kd.core.spec import KnownError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)@(?P<host>.+)\.(?P<kind>\w+)")
_WINDOWS = os.name == "nt"
_FOREIGN = 3600  # seconds after which temporary files of another host count as abandoned


ROOT = Path(__file__).resolve().parents[2]  # the repository, with conf/, store/ and data/


@cache
def commit() -> str | None:
    """The commit of the checkout, with `+` if files were changed; None if the code is not in its own checkout."""
    if not (ROOT / ".git").exists():  # otherwise git finds any repository around an installed package
        return None
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write, which replaces `path` when the block ends. If the block fails, `path` is unchanged."""
    partial = temporary(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    sync(path.parent)


def write(path: Path, text: str) -> None:
    """Replace the content of a file. On OSError the old content stays."""
    with replacing(path) as file:
        file.write(text.encode())


def publish(folder: Path, place: Path) -> None:
    """Force a folder of files to disk, then give it its final name. Raises OSError if that folder exists already."""
    settle(folder)
    os.rename(folder, place)
    sync(place.parent)


def settle(folder: Path) -> None:
    """Force a folder of files to disk."""
    for path in (*sorted(folder.iterdir()), folder):
        sync(path)


def make(folder: Path) -> None:
    """Make a folder with its parents, and force the new folders' entries to disk."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in new:
        sync(place.parent)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk. Windows and some file systems cannot do that with a folder."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows forces what may be written
    except PermissionError:
        if folder and os.access(path, os.R_OK):  # Windows opens no folder
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno == errno.EINVAL):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def temporary(path: Path, kind: str = "new") -> Path:
    """A hidden name beside `path`. It holds the process id and host of its owner, and what the file is for (`kind`)."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.{kind}")


def temporaries(folder: Path, name: str = "*", kind: str = "*") -> list[Path]:
    """The temporary files and folders in a folder: those for `name`, by default all."""
    return sorted(path for path in folder.glob(f".{name}.*.{kind}") if _TEMPORARY.fullmatch(path.name))


def abandoned(path: Path) -> bool:
    """Whether a temporary file or folder has no owner: its process has ended, or this process left it earlier.

    Processes of another host, or on Windows, cannot be checked. Their files count as abandoned after an hour.
    """
    named = _TEMPORARY.fullmatch(path.name)
    assert named is not None
    if named["host"] != platform.node() or _WINDOWS:  # where os.kill(pid, 0) would be Ctrl-C
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _FOREIGN
        return False
    pid = int(named["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # the process lives, and belongs to another user
        return False
    return pid == os.getpid()


@contextmanager
def hold_lock(path: Path, waiting: str | None) -> Iterator[bool]:
    """Hold the lock on a file. If another process has it, print `waiting` and the name of that process, and wait.

    If `waiting` is None, the block is entered at once. It gets True if it holds the lock. Raises OSError if the file
    cannot be written, and KnownError if its file system has no locks.
    """
    os.makedirs(path.parent, exist_ok=True)
    # Without flock, filelock would make a lock file, which stays when its process is killed: refused instead.
    lock, note = FileLock(path, fallback_to_soft=False), path.with_suffix(".holder")
    if not _acquire(lock, path, waiting):
        yield False
        return
    try:
        since = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        with suppress(OSError):  # removing files from a full disk must still work
            note.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}), encoding="utf-8")
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
            print(f"{waiting} {lock_holder(path)}: waiting for it", flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise KnownError(
            f"{path.parent} is on a file system without locks ({os.strerror(error.errno)}), so two processes could "
            "train one stage: mount it with locks (docs/reliability.md), or choose another by runtime.store or KD_STORE"
        ) from error
    return waiting is not None


def _at_once(lock: BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def lock_holder(path: Path) -> str:
    """The process that holds a lock, read from the note beside it."""
    try:
        who = json.loads(path.with_suffix(".holder").read_text(encoding="utf-8"))
        return f"another process (pid {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # no note yet, or no longer
        return "another process"


def size_of(path: Path) -> int:
    """Bytes on the disk, of a file or of all files below a folder; sparse files count the blocks that they use.

    Windows does not say the blocks: there it is the length.
    """
    below = [path.lstat() for path in ([path, *path.rglob("*")] if path.is_dir() else [path])]
    return sum(each.st_blocks * 512 if hasattr(each, "st_blocks") else each.st_size for each in below)
