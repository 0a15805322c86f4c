"""Files that torchvision reads, downloads and checks; where that fails, one line that says what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.spec import KnownError


def fetch(make: Callable[..., Any], root: Path, files: str) -> tuple[Any, Any]:
    """torchvision's training and test set under `root`, downloaded first if they are not there.

    `files` names what to put there by hand. Raises KnownError where they are absent and cannot be downloaded.
    """
    try:
        return make(root, train=True), make(root, train=False)
    except RuntimeError:  # torchvision's word for files that are absent or of another checksum
        pass
    try:
        return make(root, train=True, download=True), make(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        name = make.__name__
        raise KnownError(
            f"{name} is not in {root} and could not be downloaded ({error}): put {files} there, or name the folder "
            "that has it by runtime.data=<path>"
        ) from error
