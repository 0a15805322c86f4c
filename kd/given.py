"""Somebody else's weights: found in the file of whatever code wrote them, checked by name and shape, never executed."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.datasets import DATASETS
from kd.models import MODELS, build
from kd.recipes import RELEASED
from kd.spec import KnownError
from kd.stage import Given, Normalization

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

# Under which key of its file a code keeps the weights: TAKD; Trained Teacher and Nasty Teacher; RepDistiller,
# mdistiller and torchdistill.
_HOLDERS = ("model_state_dict", "state_dict", "model")
_PARTS = ("student", "teacher")  # mdistiller's files hold both
_SHOWN = 20  # names a line


def fingerprint(path: Path) -> str:
    """The sha256 of a file, in hex. Raises KnownError where there is none to read."""
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise KnownError(f"teacher.checkpoint: cannot be read ({error})") from error


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def normalizations() -> dict[str, Normalization]:
    """The statistics that have a name: each data set's, and what the codes use that people have weights of."""
    known = {name: (e.facts.mean, e.facts.std) for name, e in DATASETS.items() if e.facts is not None}
    for code in RELEASED:
        own = code.system.lower().replace(" ", "_")
        known["tiny_imagenet" if code.data == "tiny_imagenet" else own] = code.mean, code.std
    known["torchdistill"] = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
    return {name: Normalization(mean=mean, std=std) for name, (mean, std) in known.items()}


def load_weights(path: Path, given: Given) -> State:
    """The network's weights in a file of TAKD, Trained Teacher, RepDistiller, mdistiller, torchdistill or a bare one.

    Raises KnownError for a file that is none, that would run code, or whose weights are not those of
    `given.model`: every name and shape that does not fit at once.
    """
    network = build(given.model, num_classes=given.dataset.num_classes, image_size=given.dataset.image_size)
    expected = network.state_dict()
    found = _networks(_read(path), path)
    if given.part is not None:
        if given.part not in found:
            raise KnownError(f"teacher.part: {path} has no {given.part}, but {_listed(found)}")
        found = {given.part: found[given.part]}
    fitting = {part: state for part, state in found.items() if not any(_mismatches(state, expected))}
    if len(fitting) > 1:
        raise KnownError(f"teacher.part: {path} holds {_listed(fitting)}, and both fit; say which one")
    if not fitting:
        raise KnownError("\n".join(_explain(path, given, found, expected)))
    (state,) = fitting.values()
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise KnownError(f"teacher.checkpoint: {path} holds weights that are not finite: {_some(broken)}")
    network.load_state_dict(state, strict=False)  # files of old have no num_batches_tracked
    return network.state_dict()


def _read(path: Path) -> Any:
    """What the file holds: tensors and plain data only. Nothing in it can make Python run anything."""
    import argparse

    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        argparse.Namespace,  # the options that RepDistiller and torchdistill save along
        (scalar, "numpy.core.multiarray.scalar"),  # accuracies, as numpy 1 …
        (scalar, "numpy._core.multiarray.scalar"),  # … and numpy 2 name them
        np.dtype,
        *{type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)},
    ]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch guesses about files that are none
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise KnownError(f"teacher.checkpoint: {path} cannot be read ({' '.join(str(error).split())})") from error
    except Exception as error:  # whatever a foreign file makes torch's reader stumble over
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks Python for {asked[1]}" if asked else "damaged, or in another format"
        raise KnownError(
            f"teacher.checkpoint: {path} cannot be loaded as weights and plain data alone ({reason})"
        ) from error


def _networks(loaded: Any, path: Path) -> dict[str, State]:
    """The networks in a file's content, by part; one that is there alone is called `network`."""
    tree = loaded if isinstance(loaded, dict) else {}
    held = [tree, *(tree[holder] for holder in _HOLDERS if holder in tree)]
    states = [candidate for candidate in held if _is_state(candidate)]
    if not states:
        keys = f", only {_some(list(map(str, tree)))}" if tree else ""
        raise KnownError(
            f"teacher.checkpoint: {path} holds no weights: neither tensors by name nor any of "
            f"{', '.join(_HOLDERS)}{keys}"
        )
    state = _without(states[0], "module.")
    parts = {part: {k: v for k, v in state.items() if k.startswith(f"{part}.")} for part in _PARTS}
    found = {part: _without(_without(own, f"{part}."), "module.") for part, own in parts.items() if own}
    return found or {"network": state}


def _is_state(candidate: Any) -> bool:
    from torch import Tensor

    if not isinstance(candidate, dict) or not candidate:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())


def _without(state: State, prefix: str) -> State:
    """Names without a prefix that all of them share, as DataParallel leaves it."""
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _mismatches(state: State, expected: State) -> Iterator[str]:
    """A line for each way in which the weights are not the expected ones."""
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            yield f"{len(names)} {what}: {_some(names)}"


def _explain(path: Path, given: Given, found: dict[str, State], expected: State) -> Iterator[str]:
    for part, state in found.items():
        whose = "" if part == "network" else f"'s {part}"
        others = _recognize(state, given.dataset.image_size)
        hint = f"; it is a {others}" if others else ""
        yield (
            f"teacher.checkpoint: {path}{whose} is no {given.model} of {given.dataset.num_classes} classes "
            f"for {given.dataset.image_size}×{given.dataset.image_size} images{hint}"
        )
        yield from (f"  {line}" for line in _mismatches(state, expected))


def _recognize(state: State, image_size: int) -> str:
    """The network of the table that the weights are of, if any."""
    import torch

    *_, last = state.values()
    classes = len(last) if last.dim() == 1 and len(last) > 1 else 0
    if not classes:
        return ""
    for name in MODELS:
        try:
            with torch.device("meta"):
                network = build(name, num_classes=classes, image_size=image_size)
        except KnownError:
            continue
        if not any(_mismatches(state, network.state_dict())):
            return f"{name} of {classes} classes"
    return ""


def _listed(found: dict[str, State]) -> str:
    return " and ".join(found)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
