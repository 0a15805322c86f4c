"""Weights from other projects: from their checkpoints, checked by name and shape. No code in a file is executed."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.core.spec import KnownError
from kd.core.stage import Given
from kd.models import MODELS, build

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

# The key of the weights in a checkpoint: of TAKD; of Trained Teacher and Nasty Teacher; of RepDistiller, mdistiller and
# torchdistill.
_HOLDERS = ("model_state_dict", "state_dict", "model")
_PARTS = ("student", "teacher")  # mdistiller's files hold both
_SHOWN = 20  # names in a line


def fingerprint(path: Path) -> str:
    """The sha256 of a file, in hex. Raises KnownError if the file cannot be read."""
    try:
        status = path.stat()
        if not (path.is_file() or path.is_dir()):  # reading a pipe or a device might never end
            raise KnownError(f"teacher.checkpoint: {path} cannot be read (it is not a file)")
        return _digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise KnownError(f"teacher.checkpoint: {path} cannot be read ({error.strerror})") from error


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_network(path: Path, given: Given) -> nn.Module:
    """The network in a checkpoint of TAKD, Trained Teacher, RepDistiller, mdistiller, torchdistill or of plain weights.

    Raises KnownError if the file has no weights, needs to run code, or has changed since the run was planned. Raises it
    too if the weights do not fit `given.model`, with all names that are missing, unexpected or of another shape.
    """
    if fingerprint(path) != given.sha256:
        raise KnownError(f"teacher.checkpoint: {path} has changed since this run began")
    network = build(given.model, num_classes=given.dataset.num_classes, image_size=given.dataset.image_size)
    expected = network.state_dict()
    found = _networks(_read(path), path)
    if given.part is not None:
        if given.part not in found:
            raise KnownError(f"teacher.part: {path} has no {given.part}.*; it holds {' and '.join(found)}")
        found = {given.part: found[given.part]}
    fitting = {part: state for part, state in found.items() if not any(_mismatches(state, expected))}
    if len(fitting) > 1:
        raise KnownError(f"teacher.part: {path} holds {' and '.join(fitting)}, and both fit; choose one of them")
    if not fitting:
        raise KnownError("\n".join(_explain(path, given, found, expected)))
    (state,) = fitting.values()
    network.load_state_dict(state, strict=False)  # old files have no num_batches_tracked
    # The weights are in fp32 now; large float64 values have become infinite.
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise KnownError(f"teacher.checkpoint: {path} holds weights that are not finite in fp32: {_some(broken)}")
    return network


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


def _read(path: Path) -> Any:
    """The content of the file: tensors and plain data only. Nothing in it is executed."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if _is_safetensors(path):
            return load_file(path)
        _refuse_bombs(path)
        with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about files of another kind
            return torch.load(path, map_location="cpu", weights_only=True)
    except KnownError:
        raise
    except (OSError, SafetensorError) as error:
        raise KnownError(f"teacher.checkpoint: {path} cannot be read ({' '.join(str(error).split())})") from error
    except Exception as error:  # damaged files raise many types of exceptions in torch
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = "it holds something else, or is damaged"
        if asked:
            reason = f"it needs the Python object {asked[1]}; save it by torch.save(network.state_dict(), …) instead"
        raise KnownError(
            f"teacher.checkpoint: {path} cannot be loaded as weights and plain data alone ({reason})"
        ) from error


def _refuse_bombs(path: Path) -> None:
    """Raise KnownError for a zip whose content is larger than the file: torch.save never compresses."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch recognises a zip by these bytes
            return
    try:
        with zipfile.ZipFile(path) as packed:
            held = sum(member.file_size for member in packed.infolist())
    except zipfile.BadZipFile as error:  # torch may read it all the same: it searches farther
        raise KnownError(
            f"teacher.checkpoint: {path} cannot be loaded as weights and plain data alone (it is damaged: {error})"
        ) from error
    if held > path.stat().st_size:
        raise KnownError(f"teacher.checkpoint: {path} claims {held:,} bytes of content, more than its own size")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its name or its first bytes: the header's length in eight, then JSON."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"


def _networks(loaded: Any, path: Path) -> dict[str, State]:
    """The networks in a file's content, by part; a single one is called "one network"."""
    tree = loaded if isinstance(loaded, dict) else {}
    held = [tree, *(tree[holder] for holder in _HOLDERS if holder in tree)]
    states = [candidate for candidate in held if _is_state(candidate)]
    if not states:
        keys = f"; its keys are {_some(list(map(str, tree)))}" if tree else ""
        raise KnownError(
            f"teacher.checkpoint: {path} holds no weights: neither the file nor its {', '.join(_HOLDERS)} is a "
            f"dictionary of tensors{keys}"
        )
    state = _unwrapped(states[0])
    parts = {part: {k: v for k, v in state.items() if k.startswith(f"{part}.")} for part in _PARTS}
    found = {part: _unwrapped(_without(own, f"{part}.")) for part, own in parts.items() if own}
    return found or {"one network": state}


def _is_state(candidate: Any) -> bool:
    from torch import Tensor

    if not isinstance(candidate, dict) or not candidate:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())


def _unwrapped(state: State) -> State:
    """The weights by the network's own names, without the prefixes of DataParallel, torch.compile, Lightning and kd."""
    prefixes = ("module.", "_orig_mod.", "model.", "network.")
    while found := [prefix for prefix in prefixes if all(name.startswith(prefix) for name in state)]:
        state = _without(state, found[0])
    return state


def _without(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _mismatches(state: State, expected: State) -> Iterator[str]:
    """A line for each kind of difference from the expected weights."""
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    kinds = [
        f"{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})".replace("torch.", "")
        for name, tensor in state.items()
        if name in expected and not _copies_to(tensor, expected[name])
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another kind": kinds}
    for what, names in problems.items():
        if names:
            yield f"{len(names)} {what}: {_some(names)}"


def _copies_to(tensor: Tensor, place: Tensor) -> bool:
    """Whether the values can be copied: dense, real, with data, and not integers where floats are expected."""
    import torch

    plain = tensor.layout == torch.strided and not tensor.is_quantized and not (tensor.is_meta and not place.is_meta)
    return plain and tensor.is_floating_point() >= place.is_floating_point() and not tensor.is_complex()


def _explain(path: Path, given: Given, found: dict[str, State], expected: State) -> Iterator[str]:
    for part, state in found.items():
        whose = f"'s {part}" if part in _PARTS else ""
        others = _recognize(state, given.dataset.image_size)
        hint = f"; it is a {others}" if others else ""
        yield (
            f"teacher.checkpoint: {path}{whose} is not a {given.model} of {given.dataset.num_classes} classes "
            f"for {given.dataset.image_size}×{given.dataset.image_size} images{hint}"
        )
        yield from (f"  {line}" for line in _mismatches(state, expected))


def _recognize(state: State, image_size: int) -> str:
    """The network of MODELS that the weights fit; "" if there is none."""
    import torch

    def names(of: State) -> set[str]:
        return {name for name in of if not name.endswith("num_batches_tracked")}

    def blank(name: str, classes: int) -> State:
        with torch.device("meta"):
            return build(name, num_classes=classes, image_size=image_size).state_dict()

    for name in MODELS:
        try:
            own = blank(name, 2)
        except KnownError:  # it needs larger images
            continue
        *_, last = own
        if names(own) == names(state) and state[last].dim():
            classes = len(state[last])
            if not any(_mismatches(state, blank(name, classes))):
                return f"{name} of {classes} classes"
    return ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:100] for name in names[:_SHOWN]) + more
