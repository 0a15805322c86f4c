"""The folder of an export. It is complete or absent."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kd.core import files
from kd.core.spec import KnownError

# The files of an export, besides labels.txt where classes have names. A folder with other files is never replaced.
_EXPORTS = {"README.md", "model.onnx"}, {"README.md", "model.json", "model.safetensors"}


def check(folder: Path, force: bool) -> None:
    """Raise KnownError if the folder exists and may not be replaced."""
    if not os.path.lexists(folder):
        return
    try:
        found = set(os.listdir(folder))
    except OSError as error:
        raise KnownError(f"--out: {folder} exists and cannot be replaced ({error.strerror}); use another") from error
    if found and found - {"labels.txt"} not in _EXPORTS:
        raise KnownError(f"--out: {folder} exists and is not an export, so it is not replaced; use another")
    if found and not force:
        raise KnownError(f"--out: {folder} exists already; --force replaces it")


def publish_export(folder: Path, contents: Mapping[str, bytes], force: bool) -> None:
    """Publish the files of an export. Raises KnownError as check() does, and if they cannot be written."""
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
            if old.exists() and not target.exists():  # failed between the two renames
                os.rename(old, target)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
