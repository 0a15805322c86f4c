"""Weights from other projects: from their checkpoints, checked by name and shape. No code in a file is executed."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kd.core.files import replacing
from kd.core.spec import KnownError
from kd.core.stage import Given
from kd.models import MODELS, LibraryEntry, build
from kd.models.libraries import library_name, published_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

State = dict[str, "Tensor"]

# The key of the weights in a checkpoint: of TAKD; of Trained Teacher and Nasty Teacher; of RepDistiller, mdistiller and
# torchdistill.
_HOLDERS = ("model_state_dict", "state_dict", "model")
_PARTS = ("student", "teacher")  # mdistiller's files hold both
_SHOWN = 20  # names in a line


class _Wanted(NamedTuple):
    """The network that a file should hold."""

    model: str
    classes: int
    image_size: int

    def build(self) -> nn.Module:
        return build(self.model, num_classes=self.classes, image_size=self.image_size)


class _File(NamedTuple):
    """A file of weights, and the key that names it in messages."""

    path: Path
    key: str

    def error(self, text: str) -> KnownError:
        return KnownError(f"{self.key}: {self.path} {text}")


def fingerprint(path: Path, key: str = "teacher.checkpoint") -> str:
    """The sha256 of a file, in hex. Raises KnownError, which begins with `key`, if the file cannot be read."""
    file = _File(path, key)
    try:
        status = path.stat()
        if not (path.is_file() or path.is_dir()):  # reading a pipe or a device might never end
            raise file.error("cannot be read (it is not a file)")
        return _digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise file.error(f"cannot be read ({error.strerror})") from error


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
    file = _File(path, "teacher.checkpoint")
    found = _contents(file, given.sha256)
    wanted = _Wanted(given.model, given.dataset.num_classes, given.input_size)
    network = wanted.build()
    if given.part is not None:
        if given.part not in found:
            raise KnownError(f"teacher.part: {path} has no {given.part}.*; it holds {' and '.join(found)}")
        found = {given.part: found[given.part]}
    fitting = _fitting(found, network)
    if len(fitting) > 1:
        raise KnownError(f"teacher.part: {path} holds {' and '.join(fitting)}, and both fit; choose one of them")
    if not fitting:
        raise KnownError("\n".join(_explain(file, wanted, found, network)))
    return _filled(network, found[fitting[0]], file)


def initial_weights(
    path: Path, sha256: str, model: str, *, num_classes: int, image_size: int, key: str = "init"
) -> tuple[nn.Module, str | None]:
    """A network that begins with a file's weights; and a line that says so if its classifier is new, or else None.

    The classifier is made anew, from torch's global generator, if the file's has another number of classes, or if the
    file has none. Everything else has to fit, as in load_network(). Raises KnownError, which begins with `key`.
    """
    file, wanted = _File(path, key), _Wanted(model, num_classes, image_size)
    found = _contents(file, sha256)
    network = wanted.build()
    usable = {part: _with_classifier(state, network) for part, state in found.items()}
    fitting = _fitting(usable, network)
    if len(fitting) > 1:
        raise file.error(f"holds {' and '.join(fitting)}, and both fit; save one of them in a file of its own")
    if not fitting:
        raise KnownError("\n".join(_explain(file, wanted, found, network, renew=True)))
    (part,) = fitting
    line = None
    if usable[part] is not found[part]:
        classes = _classes(found[part], network)
        had = f"its classifier of {classes:,} classes" if classes else "its file has no classifier; one"
        line = f"{model}: {had} is made anew for {num_classes:,}"
        usable[part] |= _fresh(_classifier(network))
    return _filled(network, usable[part], file), line


def fetched(name: str, data_root: Path, key: str = "init") -> Path:
    """The file below `data_root` with the weights that a library publishes of its network; downloaded once.

    Raises KnownError, which begins with `key`, if there are none, or if they cannot be downloaded.
    """
    from safetensors.torch import save

    if not isinstance(MODELS[name], LibraryEntry):
        raise KnownError(f"{key}: {name} has no published weights: only networks of timm and torchvision have some")
    library = library_name(name)
    place = data_root / "pretrained" / f"{library.library}-{library.arch}.safetensors"
    if place.exists():
        return place
    try:
        state = published_weights(name).state_dict()
    except KnownError as error:
        raise KnownError(f"{key}: {error}; where you have the weights in a file, {key}=<file> takes them") from error
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as opened:
        opened.write(save({each: tensor.detach().clone().contiguous() for each, tensor in state.items()}))
    return place


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


def _contents(file: _File, sha256: str) -> dict[str, State]:
    """The networks in a file that has this hash, by part."""
    if fingerprint(*file) != sha256:
        raise file.error("has changed since this run began")
    return _networks(_read(file), file)


def _read(file: _File) -> Any:
    """The content of the file: tensors and plain data only. Nothing in it is executed."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = file.path
    try:
        if _is_safetensors(path):
            return load_file(path)
        _refuse_bombs(file)
        with torch.serialization.safe_globals(allowed_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses about files of another kind
            return torch.load(path, map_location="cpu", weights_only=True)
    except KnownError:
        raise
    except (OSError, SafetensorError) as error:
        raise file.error(f"cannot be read ({' '.join(str(error).split())})") from error
    except Exception as error:  # damaged files raise many types of exceptions in torch
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = "it holds something else, or is damaged"
        if asked:
            reason = f"it needs the Python object {asked[1]}; save it by torch.save(network.state_dict(), …) instead"
        raise file.error(f"cannot be loaded as weights and plain data alone ({reason})") from error


def _refuse_bombs(file: _File) -> None:
    """Raise KnownError for a zip whose content is larger than the file: torch.save never compresses."""
    with file.path.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":  # torch recognises a zip by these bytes
            return
    try:
        with zipfile.ZipFile(file.path) as packed:
            held = sum(member.file_size for member in packed.infolist())
    except zipfile.BadZipFile as error:  # torch may read it all the same: it searches farther
        raise file.error(f"cannot be loaded as weights and plain data alone (it is damaged: {error})") from error
    if held > file.path.stat().st_size:
        raise file.error(f"claims {held:,} bytes of content, more than its own size")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its name or its first bytes: the header's length in eight, then JSON."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".safetensors" or file.read(9)[8:] == b"{"


def _networks(loaded: Any, file: _File) -> dict[str, State]:
    """The networks in a file's content, by part; a single one is called "one network"."""
    tree = loaded if isinstance(loaded, dict) else {}
    held = [tree, *(tree[holder] for holder in _HOLDERS if holder in tree)]
    states = [candidate for candidate in held if _is_state(candidate)]
    if not states:
        keys = f"; its keys are {_some(list(map(str, tree)))}" if tree else ""
        raise file.error(
            f"holds no weights: neither the file nor its {', '.join(_HOLDERS)} is a dictionary of tensors{keys}"
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


def _fitting(found: dict[str, State], network: nn.Module) -> list[str]:
    """The parts whose weights fit a network."""
    expected = network.state_dict()
    return [part for part, state in found.items() if not any(_mismatches(state, expected))]


def _with_classifier(state: State, network: nn.Module) -> State:
    """The weights with the network's own classifier, if theirs has another number of classes or is not there."""
    own = _classifier(network)
    if not own.keys() & state.keys():
        return {**state, **own}
    other = own.keys() <= state.keys() and all(
        state[name].shape[1:] == tensor.shape[1:] and state[name].dim() and len(state[name]) != len(tensor)
        for name, tensor in own.items()
    )
    return {**state, **own} if other else state


def _classes(state: State, network: nn.Module) -> int:
    """The number of classes of the weights' classifier; 0 if there is none."""
    return next((len(state[name]) for name in _classifier(network) if name in state), 0)


def _classifier(network: nn.Module) -> State:
    """The weights of the layers that give the logits, by their names in the network."""
    from kd.models.taps import last_layers

    layers = {path: network.get_submodule(path).state_dict() for path in last_layers(network)}
    return {f"{path}.{name}": tensor for path, own in layers.items() for name, tensor in own.items()}


def _fresh(classifier: State) -> State:
    """The weights with which a new classifier begins: small, so that the first steps do not disturb trained weights.

    The networks' own initialisations are for training from scratch. That of EfficientNets is so large for a few classes
    that a probe still showed it after 100 epochs.
    """
    import torch

    return {
        name: torch.zeros_like(tensor) if tensor.ndim == 1 else torch.randn_like(tensor) * 0.01
        for name, tensor in classifier.items()
    }


def _filled(network: nn.Module, state: State, file: _File) -> nn.Module:
    """The network with these weights, which fit."""
    network.load_state_dict(state, strict=False)  # old files have no num_batches_tracked
    # The weights are in fp32 now; large float64 values have become infinite.
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise file.error(f"holds weights that are not finite in fp32: {_some(broken)}")
    return network


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


def _explain(
    file: _File, wanted: _Wanted, found: dict[str, State], network: nn.Module, *, renew: bool = False
) -> Iterator[str]:
    """Why no part of a file fits. With `renew` another number of classes is no reason."""
    expected = network.state_dict()
    for part, state in found.items():
        whose = f"'s {part}" if part in _PARTS else ""
        others = _recognize(state, wanted)
        hint = f"; it is a {others}" if others else ""
        yield (
            f"{file.key}: {file.path}{whose} is not a {wanted.model} of {wanted.classes} classes "
            f"for {wanted.image_size}×{wanted.image_size} images{hint}"
        )
        usable = _with_classifier(state, network)
        yield from (f"  {line}" for line in _mismatches(usable if renew else state, expected))
        if not any(_mismatches(usable, expected)):
            yield (
                f"  everything but the classifier fits: teacher.init={file.path} makes a new one for {wanted.classes} "
                "classes and trains it; with teacher.freeze=backbone it is trained alone, which is fast"
            )


def _recognize(state: State, wanted: _Wanted) -> str:
    """The network that the weights fit: the wanted one, or another of the table; "" if there is none."""
    import torch

    def names(of: State) -> set[str]:
        return {name for name in of if not name.endswith("num_batches_tracked")}

    for name in dict.fromkeys([wanted.model, *MODELS]):
        try:
            with torch.device("meta"):
                own = build(name, num_classes=2, image_size=wanted.image_size)
        except KnownError:  # it needs larger images
            continue
        if names(own.state_dict()) == names(state) and (classes := _classes(state, own)):
            with torch.device("meta"):
                same = build(name, num_classes=classes, image_size=wanted.image_size)
            if not any(_mismatches(state, same.state_dict())):
                return f"{name} of {classes} classes"
    return ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:100] for name in names[:_SHOWN]) + more
