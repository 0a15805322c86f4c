"""What a format of export is: a network's files, and what computes from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from kd.spec import KnownError
from kd.stage import Source

if TYPE_CHECKING:
    from kd.models.normalized import Normalized

Images = NDArray[np.float32]  # [batch, 3, height, width] in [0, 1]
Logits = NDArray[np.float32] | NDArray[np.float64]  # [batch, class]
Run = Callable[[Images], Logits]

FORMATS = {
    "onnx": "kd.export.onnx.Onnx",
    "safetensors": "kd.export.safetensors.Safetensors",
}


class Format(ABC):
    """A kind of file for a network, its normalisation inside."""

    weights: ClassVar[str]  # the file that holds them
    runtime: str  # what computes from it, with its version
    usage: ClassVar[str]  # Python from `images` to `logits`, in the folder of the export

    @abstractmethod
    def pack(self, network: Normalized, source: Source) -> dict[str, bytes]:
        """The files of a network by name. The network is left as it is."""

    @abstractmethod
    def unpack(self, packed: dict[str, bytes], threads: int) -> Run:
        """What computes logits from such files and from nothing else, on so many threads of the CPU."""


def open_format(name: str) -> Format:
    """A format of the table. Raises KnownError where a package that it needs is not installed."""
    module, _, cls = FORMATS[name].rpartition(".")
    try:
        found: Format = getattr(import_module(module), cls)()
    except ImportError as error:
        raise KnownError(
            f"--format {name} needs a package that is not there ({error}): pip install '.[export]'"
        ) from error
    return found
