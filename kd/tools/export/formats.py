"""The formats of an export: how a network is written to files, and how logits are computed from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from kd.core.spec import KnownError
from kd.core.stage import Source

if TYPE_CHECKING:
    from kd.models.normalization import Normalized
    from kd.tools.export.contract import Contract

Pixels = NDArray[np.float32]  # [batch, 3, height, width] in [0, 1]
Logits = NDArray[np.float32] | NDArray[np.float64]  # [batch, class]
Run = Callable[[Pixels], Logits]

FORMATS = {
    "onnx": "kd.tools.export.onnx.Onnx",
    "safetensors": "kd.tools.export.safetensors.Safetensors",
}


class Format(ABC):
    """A file format for a network with its normalisation inside."""

    weights: ClassVar[str]  # the file with the weights
    files: ClassVar[tuple[str, ...]]  # all that pack() writes
    runtime: str  # the library that computes from it, with its version
    usage: ClassVar[str]  # Python from `images` to `logits`, in the folder of the export

    @abstractmethod
    def pack(self, network: Normalized, source: Source) -> dict[str, bytes]:
        """The files of a network, by name. The network is not changed. Raises KnownError if it cannot be written."""

    @abstractmethod
    def contract(self, packed: dict[str, bytes]) -> Contract:
        """The contract in these files. Raises ValueError if there is none, and other exceptions for damaged files."""

    @abstractmethod
    def unpack(self, packed: dict[str, bytes]) -> Run:
        """A function that computes logits from these files alone, on the CPU with torch's number of threads."""


def open_format(name: str) -> Format:
    """A format of FORMATS. Raises KnownError if a package that it needs is not installed."""
    module, _, cls = FORMATS[name].rpartition(".")
    try:
        found: Format = getattr(import_module(module), cls)()
    except ImportError as error:
        raise KnownError(
            f"--format {name} needs a package that is not installed ({error}): pip install -e '.[export]'"
        ) from error
    return found


def run_of(network: Normalized) -> Run:
    """A function that computes a network's logits, in its own precision."""
    import torch

    def run(images: Pixels) -> Logits:
        with torch.inference_mode():
            logits: Logits = network(torch.from_numpy(images)).numpy()
        return logits

    return run
