"""Files that torchvision reads, downloads and checks; where that fails, one line that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd.spec import KnownError


def fetch(make: Callable[..., Any], root: Path, files: str) -> tuple[Any, Any]:
    """torchvision's training and test set under `root`, downloaded first if they are not there.

    `files` names what to put there by hand. Raises KnownError where they are absent and cannot be downloaded.
    """
    try:
        return make(root, train=True), make(root, train=False)
    except Exception:  # torchvision's words for files that are absent, of another checksum, or garbage: any
        pass
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{make.__name__}.lock"):  # of two processes the second finds the first one's files
            return make(root, train=True, download=True), make(root, train=False, download=True)
    except Exception as error:
        name, said = make.__name__, " ".join(str(error).split())
        raise KnownError(
            f"{name} is not in {root}, or damaged, and could not be downloaded ({said}): put {files} there, or name "
            "the folder that has it by runtime.data=<path>"
        ) from error
