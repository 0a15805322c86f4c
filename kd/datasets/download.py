"""Data sets that torchvision reads, downloads and checks. If that fails, one line says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd.core.spec import KnownError


def fetch(make: Callable[..., Any], root: Path, files: str) -> tuple[Any, Any]:
    """torchvision's training and test set under `root`; they are downloaded if they are missing.

    `files` names what a person can put there. Raises KnownError if the download fails.
    """
    try:
        return make(root, train=True), make(root, train=False)
    except Exception:  # missing and damaged files raise many types of exceptions in torchvision
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{make.__name__}.lock"):  # a second process waits, and finds the files
            return make(root, train=True, download=True), make(root, train=False, download=True)
    except Exception as error:
        name, said = make.__name__, " ".join(str(error).split())
        raise KnownError(
            f"{name} is missing or damaged in {root}, and could not be downloaded ({said}): put {files} there, or set "
            "runtime.data=<path> to the folder that has it"
        ) from error
