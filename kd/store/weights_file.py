"""Files of weights from other projects: what they are, and the dictionaries of tensors in them. Nothing is executed."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kd.core.spec import KnownError

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

_DEEP = 3  # dictionaries inside each other
_SHOWN = 20  # names in a line
_SAVE = "save network.state_dict() by torch.save, and give that file"

# The first bytes of files that people take for weights: what they are, and what helps.
_OTHERS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: git lfs pull brings it"),
    (b"<!doctype html", "is a web page, not the file behind it: download it again by the page's download link"),
    (b"<html", "is a web page, not the file behind it: download it again by the page's download link"),
    (b"\x89HDF", f"is an HDF5 file, as Keras writes it: load it there, and {_SAVE}"),
    (b"\x93NUMPY", f"is an array of numpy, without names: build the network in Python, and {_SAVE}"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"7z\xbc\xaf", "is an archive of 7-Zip: unpack it first"),
    (b"\x89PNG", "is a picture"),
    (b"\xff\xd8\xff", "is a picture"),
)


def packed(state: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file. Tensors are copied, since two names may share one, which the file may not."""
    from safetensors.torch import save

    return save({name: tensor.detach().clone().contiguous() for name, tensor in state.items()})


class WeightsFile(NamedTuple):
    """A file of weights, and the key that names it in messages."""

    path: Path
    key: str

    def error(self, text: str) -> KnownError:
        return KnownError(f"{self.key}: {self.path} {text}")

    def fingerprint(self) -> str:
        """The sha256 of the file, in hex. Raises KnownError if it cannot be read."""
        try:
            status = self.path.stat()
            if not (self.path.is_file() or self.path.is_dir()):  # reading a pipe or a device might never end
                raise self.error("cannot be read (it is not a file)")
            return _digest(self.path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror})") from error

    def states(self, sha256: str) -> dict[str, State]:
        """The dictionaries of tensors in the file, by the keys that lead to them: `state_dict`, `ema.model`.

        The file itself is "". Raises KnownError if there are none, or if the file has not this hash.
        """
        if self.fingerprint() != sha256:
            raise self.error("has changed since this run began")
        content = self._read()
        found = dict(_states(content, ()))
        if not found:
            keys = f"; its keys are {some(list(map(str, content)))}" if isinstance(content, dict) and content else ""
            raise self.error(f"holds no weights: there is no dictionary of tensors in it{keys}")
        return found

    def _read(self) -> Any:
        """The content of the file: tensors and plain data only."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            if _is_safetensors(self.path):
                return load_file(self.path)
            if (other := _other(self.path)) is not None:
                raise self.error(other)
            with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's guesses about files of another kind
                return torch.load(self.path, map_location="cpu", weights_only=True)
        except KnownError:
            raise
        except (OSError, SafetensorError) as error:
            raise self.error(f"cannot be read ({' '.join(str(error).split())})") from error
        except Exception as error:  # damaged files raise many types of exceptions in torch
            asked = re.search(r"GLOBAL (\S+)", str(error))
            reason = "it holds something else, or is damaged"
            if asked:
                reason = (
                    f"it needs the Python object {asked[1]}; save it by torch.save(network.state_dict(), …) instead"
                )
            raise self.error(f"cannot be loaded as weights and plain data alone ({reason})") from error


def allowed_globals() -> list[Any]:
    """The only classes that a file may use besides tensors and plain data: argparse.Namespace and numpy's numbers."""
    import argparse

    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    kinds = np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"
    return [
        argparse.Namespace,  # options in checkpoints of RepDistiller and torchdistill
        (scalar, "numpy.core.multiarray.scalar"),  # accuracies, by numpy 1's name
        (scalar, "numpy._core.multiarray.scalar"),  # and by numpy 2's
        np.dtype,
        *{type(np.dtype(kind)) for kind in kinds},
    ]


def some(names: list[str]) -> str:
    """The first names in a line."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:100] for name in names[:_SHOWN]) + more


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _states(tree: Any, place: tuple[str, ...]) -> Iterator[tuple[str, State]]:
    """The dictionaries of tensors in plain data. Values that are no tensors are passed over."""
    from torch import Tensor

    if not isinstance(tree, dict):
        return
    named = {name: value for name, value in tree.items() if isinstance(name, str)}
    if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
        yield ".".join(place), tensors
    if len(place) < _DEEP:
        for name, value in named.items():
            yield from _states(value, (*place, name))


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its name or its first bytes: the header's length in eight, then JSON."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"


def _other(path: Path) -> str | None:
    """What a file is that torch.load() cannot read, and what helps; None for all other files."""
    with path.open("rb") as file:
        first = file.read(512)
    if not first:
        return "is empty"
    for begins, what in _OTHERS:
        if first.lstrip()[: len(begins)].lower() == begins.lower():
            return what
    if first[257:262] == b"ustar":
        return "is a tar archive: unpack it, and give the file of weights that is in it"
    if path.suffix.lower() == ".onnx":
        return f"is an ONNX file, whose weights have other names: from the network in Python, {_SAVE}"
    if first.lstrip()[:1] == b"{" and b"weight_map" in first + path.read_bytes()[:4096]:
        return "is the index of weights in several files: join them into one"
    if first.lstrip()[:1] == b"{":
        return "is JSON, which holds no tensors: give the file of weights itself"
    # torch recognises a zip by these bytes.
    return _other_zip(path) if first[:4] == b"PK\x03\x04" else None


def _other_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as packed:
            members = packed.infolist()
    except zipfile.BadZipFile as error:  # torch may read it all the same: it searches farther
        return f"cannot be loaded as weights and plain data alone (it is cut short or damaged, copy it again: {error})"
    names = [member.filename for member in members]
    if any(name.endswith("constants.pkl") for name in names):
        return f"is a TorchScript archive, which holds code: load it by torch.jit.load, and {_SAVE}"
    if not any(name.endswith("data.pkl") for name in names):
        return f"is a zip archive of other files ({some(names[:3])}): unpack it, and give the file of weights"
    held = sum(member.file_size for member in members)
    if held > path.stat().st_size:  # torch.save never compresses
        return f"claims {held:,} bytes of content, more than its own size"
    return None
