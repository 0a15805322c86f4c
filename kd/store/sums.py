"""The checksums of a stage's files, as `sha256sum -c SHA256SUMS` checks them too."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from kd.spec import KnownError

NAME = "SHA256SUMS"
FILES = ("stage.json", "model.safetensors", "metrics.jsonl", "result.json")

_LINE = re.compile(r"([0-9a-f]{64})  (\S+)\n")
_DAMAGE = (errno.EIO, errno.EISDIR, errno.ENOTDIR)  # others, as EACCES or EMFILE, say nothing about the data


class DamageError(KnownError):
    """Files of a stage are not what was written."""


def digest(content: bytes) -> str:
    """The sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def describe(contents: Mapping[str, bytes]) -> bytes:
    """SHA256SUMS for files of these contents."""
    return "".join(f"{digest(content)}  {name}\n" for name, content in contents.items()).encode()


def read(folder: Path, name: str) -> bytes:
    """A file of a stage. Raises DamageError where it is not what was written, OSError where it may not be read."""
    lines = _bytes(folder / NAME).decode(errors="replace").splitlines(keepends=True)
    sums = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    if sorted(sums) != sorted(FILES) or len(lines) != len(FILES):
        raise DamageError(f"{NAME} is not what was written")
    content = _bytes(folder / name)
    if digest(content) != sums[name]:
        raise DamageError(f"{name} is not what was written")
    return content


def problem(folder: Path, key: str) -> str | None:
    """What is wrong with the files of a stage, if anything. Raises OSError where they may not be read."""
    try:
        contents = {name: read(folder, name) for name in FILES}
        found = json.loads(contents["stage.json"])["key"]
    except DamageError as damage:
        return str(damage)
    except (ValueError, KeyError, TypeError):
        return "stage.json describes no stage"
    return None if found == key else f"it is a copy of {found}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamageError(f"it has no {path.name}") from error
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamageError(f"{path.name} cannot be read: {error.strerror}") from error
