"""Where an export lies: a folder of its own, there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from kd import files
from kd.spec import KnownError

# All that an export may consist of; nothing else is ever replaced.
_OURS = {"README.md", "model.onnx", "model.json", "model.safetensors"}


def check(folder: Path, force: bool) -> None:
    """Raise KnownError where an export may not be put: something is there that may not be replaced."""
    if not os.path.lexists(folder):
        return
    try:
        foreign = sorted(set(os.listdir(folder)) - _OURS)
    except OSError as error:
        raise KnownError(f"--out: {folder} is there and cannot be replaced ({error.strerror}); name another") from error
    if foreign:
        raise KnownError(f"--out: {folder} holds {foreign[0]}, which is of no export, and stays; name another")
    if not force:
        raise KnownError(f"--out: {folder} is there already; --force replaces it")


def write(folder: Path, contents: Mapping[str, bytes], force: bool) -> None:
    """Publish the files of an export. Raises KnownError as check() does, and where they cannot be written."""
    check(folder, force)
    target = Path(os.path.realpath(folder))
    new, old = files.temporary(target), files.temporary(target, "old")
    try:
        os.makedirs(new)
        for name, content in contents.items():
            (new / name).write_bytes(content)
        if target.exists():
            os.rename(target, old)
        files.publish(new, target)
    except OSError as error:
        raise KnownError(f"--out: cannot write to {folder}: {error}") from error
    finally:
        if old.exists() and not target.exists():  # it failed between the renames
            os.rename(old, target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
