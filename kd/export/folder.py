"""Where an export lies: a folder of its own, there whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kd import files
from kd.spec import KnownError

# What an export consists of; a folder that holds anything else is never replaced.
_EXPORTS = {"README.md", "model.onnx"}, {"README.md", "model.json", "model.safetensors"}


def check(folder: Path, force: bool) -> None:
    """Raise KnownError where an export may not be put: something is there that may not be replaced."""
    if not os.path.lexists(folder):
        return
    try:
        found = set(os.listdir(folder))
    except OSError as error:
        raise KnownError(f"--out: {folder} is there and cannot be replaced ({error.strerror}); name another") from error
    if found and found not in _EXPORTS:
        raise KnownError(f"--out: {folder} holds more or less than an export, and stays; name another")
    if found and not force:
        raise KnownError(f"--out: {folder} is there already; --force replaces it")


def write(folder: Path, contents: Mapping[str, bytes], force: bool) -> None:
    """Publish the files of an export. Raises KnownError as check() does, and where they cannot be written."""
    check(folder, force)
    target = Path(os.path.realpath(folder))
    new, old = files.temporary(target), files.temporary(target, "old")
    try:
        for left in files.temporaries(target.parent, glob.escape(target.name)):
            if files.abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        os.makedirs(new)
        for name, content in contents.items():
            with open(new / name, "wb") as file:
                file.write(content)
        if target.exists():
            os.rename(target, old)
        files.publish(new, target)
    except OSError as error:
        raise KnownError(f"--out: cannot write to {folder}: {error}") from error
    finally:
        with suppress(OSError):
            if old.exists() and not target.exists():  # it failed between the renames
                os.rename(old, target)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
