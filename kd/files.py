"""Writing that a crash cannot halve: what is there is whole and on disk, or it is not there."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)@(?P<host>.+)\.(?P<kind>\w+)")
_FOREIGN = 3600  # seconds after which another host's temporary files are taken for abandoned


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends, and leaves nothing where it fails."""
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
    """The whole of a file, in place of what it was. Raises OSError, and leaves it as it was."""
    with replacing(path) as file:
        file.write(text.encode())


def publish(folder: Path, place: Path) -> None:
    """Give a folder of files its final name, once all of them are on disk. Raises OSError where one is there."""
    settle(folder)
    os.rename(folder, place)
    sync(place.parent)


def settle(folder: Path) -> None:
    """Force a folder of files to disk."""
    for path in (*sorted(folder.iterdir()), folder):
        sync(path)


def make(folder: Path) -> None:
    """Make a folder, and force it and those above it that are new into the disk's own."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in new:
        sync(place.parent)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(path: Path, kind: str = "new") -> Path:
    """A hidden name beside `path` that tells what it is for and whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.{kind}")


def temporaries(folder: Path, name: str = "*", kind: str = "*") -> list[Path]:
    """What lies in a folder under such names: that for `name`, by default all."""
    return sorted(path for path in folder.glob(f".{name}.*.{kind}") if _TEMPORARY.fullmatch(path.name))


def abandoned(path: Path) -> bool:
    """Whether a temporary file or folder is nobody's any more: its process is gone, or it is our own of before.

    Of processes of another host nobody knows here: their files are abandoned after an hour.
    """
    named = _TEMPORARY.fullmatch(path.name)
    assert named is not None
    if named["host"] != platform.node():
        with suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _FOREIGN
        return False
    pid = int(named["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's process
        return False
    return pid == os.getpid()
