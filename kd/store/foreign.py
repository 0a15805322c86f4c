"""Weights from other projects: from their checkpoints, checked by name and shape. No code in a file is executed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kd.core.files import replacing
from kd.core.spec import KnownError, tilde
from kd.core.stage import Given
from kd.models import MODELS, LibraryEntry, build
from kd.models.libraries import LIBRARIES, library_name, published_weights
from kd.store.fit import (
    PARTS,
    Fit,
    class_count,
    classifier_of,
    find_fits,
    fresh_classifier,
    mismatches,
    with_classifier,
)
from kd.store.weights_file import State, WeightsFile, packed, some

if TYPE_CHECKING:
    from torch import nn


class _Wanted(NamedTuple):
    """The network that a file should hold."""

    model: str
    classes: int
    image_size: int

    def build(self) -> nn.Module:
        return build(self.model, num_classes=self.classes, image_size=self.image_size)


def fingerprint(path: Path, key: str = "teacher.checkpoint") -> str:
    """The sha256 of a file, in hex. Raises KnownError, which begins with `key`, if the file cannot be read."""
    return WeightsFile(path, key).fingerprint()


def _silent(line: str) -> None:
    """Tells nobody."""


def load_network(path: Path, given: Given, tell: Callable[[str], None] = _silent) -> nn.Module:
    """The network in a checkpoint, wherever its weights are in it: of other projects' trainings, or plain weights.

    `tell` gets a line for each choice among them. Raises KnownError if the file has no weights, needs to run code, or
    has changed since the run was planned. Raises it too if no weights fit `given.model`, with all names that are
    missing, unexpected or of another shape.
    """
    file = WeightsFile(path, "teacher.checkpoint")
    states = file.states(given.sha256)
    if given.entry is not None:
        if given.entry not in states:
            raise KnownError(f"teacher.key: {path} has no {given.entry} with tensors; it has {' and '.join(states)}")
        states = {given.entry: states[given.entry]}
    wanted = _Wanted(given.model, given.dataset.num_classes, given.input_size)
    network = wanted.build()
    fits = find_fits(states, network)
    if given.part is not None:
        fits = [fit for fit in fits if fit.kind == given.part]
        if not fits:
            held = _places(states) or "one network"
            raise KnownError(f"teacher.part: {path} has no {given.part} that fits; it holds {held}")
    if not fits:
        raise KnownError("\n".join(_explain(file, wanted, states, network)))
    fit = _chosen(file, fits)
    for line in _about(file, fit, fits):
        tell(line)
    return _filled(network, fit.state, file)


def initial_weights(
    path: Path,
    sha256: str,
    model: str,
    *,
    num_classes: int,
    image_size: int,
    key: str = "init",
    tell: Callable[[str], None] = _silent,
) -> tuple[nn.Module, str | None]:
    """A network that begins with a file's weights; and a line that says so if its classifier is new, or else None.

    The classifier is made anew, from torch's global generator, if the file's has another number of classes, or if the
    file has none. Everything else has to fit, as in load_network(). Raises KnownError, which begins with `key`.
    """
    file, wanted = WeightsFile(path, key), _Wanted(model, num_classes, image_size)
    states, network = file.states(sha256), wanted.build()
    fits = find_fits(states, network, renew=True)
    if not fits:
        raise KnownError("\n".join(_explain(file, wanted, states, network, renew=True)))
    fit, line = _chosen(file, fits), None
    for each in _about(file, fit, fits, initial=True):
        tell(each)
    state = with_classifier(fit.state, network)
    if state is not fit.state:
        classes = class_count(fit.state, network)
        had = f"its classifier of {classes:,} classes" if classes else "its file has no classifier; one"
        line = f"{model}: {had} is made anew for {num_classes:,}"
        state |= fresh_classifier(classifier_of(network))
    return _filled(network, state, file), line


def fetched(name: str, data_root: Path, key: str = "init") -> Path:
    """The file below `data_root` with the weights that a library publishes of its network; downloaded once.

    Raises KnownError, which begins with `key`, if there are none, or if they cannot be downloaded.
    """

    if not isinstance(MODELS[name], LibraryEntry):
        raise KnownError(f"{key}: {name} has no published weights: only networks of timm and torchvision have some")
    library = library_name(name)
    place = data_root / "pretrained" / f"{library.library}-{library.arch}.safetensors"
    if place.exists():
        return place
    if LIBRARIES[library.library].published(library):
        told = f"{library.library}/{library.arch}: its published weights are fetched, once, into {place.parent}"
        print(tilde(told), flush=True)
    try:
        state = published_weights(name).state_dict()
    except KnownError as error:
        raise KnownError(f"{key}: {error}; where you have the weights in a file, {key}=<file> takes them") from error
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as opened:
        opened.write(packed(state))
    return place


def _chosen(file: WeightsFile, fits: list[Fit]) -> Fit:
    """The weights to take: those of an average only if there are no others. Raises KnownError if several are left."""
    left = [fit for fit in fits if fit.kind != "ema"] or fits
    others = [fit for fit in left[1:] if not _equal(fit.state, left[0].state)]
    if not others:
        return left[0]
    kinds = [fit.kind for fit in left]
    parts = set(kinds) == set(PARTS)
    places = " and ".join(kinds if parts else map(str, left))
    if file.key != "teacher.checkpoint":
        raise file.error(f"holds {places}, and both fit; save one of them in a file of its own")
    if parts:
        raise KnownError(f"teacher.part: {file.path} holds {places}, and both fit; choose one of them")
    raise file.error(f"holds {places}, and all of them fit: teacher.key=<one of them> chooses")


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def _about(file: WeightsFile, fit: Fit, fits: list[Fit], *, initial: bool = False) -> Iterator[str]:
    """Lines about the choice of weights in a file. `initial` ones cannot be chosen by a setting."""
    name = file.path.name
    averaged = [str(other) for other in fits if other.kind == "ema" and other.place != fit.place]
    if averaged:
        other = "not" if initial else "teacher.part=ema takes"
        yield f"{name}: {fit} are the weights; {other} the averaged ones ({averaged[0]})"
    elif fit.kind == "ema":
        yield f"{name}: {fit} are the weights, averaged over steps"
    if fit.renamed:
        yield f"{name}: names of other code are read as ours: {', '.join(fit.renamed)}"
    if fit.passed_over and fit.kind not in PARTS:
        names = ", ".join(fit.passed_over[:3]) + (" …" if fit.passed_over[3:] else "")
        yield f"{name}: passed over beside the network: {len(fit.passed_over)} ({names})"


def _places(states: dict[str, State]) -> str:
    """The networks of mdistiller's files, or else the keys that lead to weights; "" if the file is the weights."""
    words = [place for place in states if place]
    parts = [part for part in PARTS if any(part in name.split(".") for state in states.values() for name in state)]
    return " and ".join(parts or words)


def _parts(states: dict[str, State]) -> dict[str, State]:
    """The networks that a file seems to hold, by part, for a message; a single one is "one network"."""
    state = _unwrapped(max(states.values(), key=len))
    parts = {part: {k: v for k, v in state.items() if k.startswith(f"{part}.")} for part in PARTS}
    found = {part: _unwrapped(_without(own, f"{part}.")) for part, own in parts.items() if own}
    return found or {"one network": state}


def _unwrapped(state: State) -> State:
    """The weights without the prefixes of DataParallel, torch.compile, Lightning and kd."""
    prefixes = ("module.", "_orig_mod.", "model.", "network.", "net.")
    while found := [prefix for prefix in prefixes if all(name.startswith(prefix) for name in state)]:
        state = _without(state, found[0])
    return state


def _without(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _filled(network: nn.Module, state: State, file: WeightsFile) -> nn.Module:
    """The network with these weights, which fit."""
    network.load_state_dict(state, strict=False)  # old files have no num_batches_tracked
    # The weights are in fp32 now; large float64 values have become infinite.
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise file.error(f"holds weights that are not finite in fp32: {some(broken)}")
    return network


def _explain(
    file: WeightsFile, wanted: _Wanted, states: dict[str, State], network: nn.Module, *, renew: bool = False
) -> Iterator[str]:
    """Why no part of a file fits. With `renew` another number of classes is no reason."""
    expected = network.state_dict()
    for part, state in _parts(states).items():
        whose = f"'s {part}" if part in PARTS else ""
        others = _recognize(state, wanted)
        hint = f"; it is a {others}" if others else ""
        yield (
            f"{file.key}: {file.path}{whose} is not a {wanted.model} of {wanted.classes} classes "
            f"for {wanted.image_size}×{wanted.image_size} images{hint}"
        )
        foreign = state.keys() - expected.keys() and expected.keys() - state.keys()
        if not others and foreign and (found := _library_of(state, file)):
            library, arch, classes = found
            key = "checkpoint" if classes == wanted.classes else "init"
            yield (
                f"  its names are those of {library}/{arch} of {classes} classes: teacher={library} "
                f"teacher.arch={arch} teacher.{key}={file.path} takes it"
            )
        usable = with_classifier(state, network)
        yield from (f"  {line}" for line in mismatches(usable if renew else state, expected))
        if not any(mismatches(usable, expected)):
            yield (
                f"  everything but the classifier fits: teacher.init={file.path} makes a new one for {wanted.classes} "
                "classes and trains it; with teacher.freeze=backbone it is trained alone, which is fast"
            )


def _library_of(state: State, file: WeightsFile) -> tuple[str, str, int] | None:
    """The library's network that has these names and shapes but for the classifier, and the classes of theirs.

    Only networks of the same size are built, or else the one with the longest name with which the file's name begins.
    """
    stem = re.sub(r"\W", "_", file.path.stem)
    for library in sorted(LIBRARIES.values(), key=lambda each: each.name != "torchvision"):
        if find_spec(library.name) is None:
            continue
        begun = sorted((name for name in library.names() if stem.startswith(name)), key=len)[-1:]
        for name in [*begun, *(each for each in library.names() if _is_sized(state, library.published_size(each)))]:
            try:
                network = _without_weights(f"{library.name}/{name}", 2, 224)
            except KnownError:  # it has more outputs than logits
                continue
            if not any(mismatches(with_classifier(state, network), network.state_dict())):
                return library.name, name, class_count(state, network)
    return None


def _is_sized(state: State, published: int | None) -> bool:
    """Whether the weights may be of a network with so many parameters when it has 1,000 classes."""
    if published is None:
        return False
    own = sum(tensor.numel() for name, tensor in state.items() if not re.search("running_|num_batches", name))
    layers = [tensor for tensor in state.values() if tensor.ndim == 2]
    if not layers:  # without its classifier
        return published > own and (published - own) % 1000 == 0
    classes, features = layers[-1].shape
    return published == own + (1000 - classes) * (features + 1)


def _recognize(state: State, wanted: _Wanted) -> str:
    """The network that the weights fit: the wanted one, or another of the table; "" if there is none."""

    def names(of: State) -> set[str]:
        return {name for name in of if not name.endswith("num_batches_tracked")}

    for name in dict.fromkeys([wanted.model, *MODELS]):
        try:
            own = _without_weights(name, 2, wanted.image_size)
        except KnownError:  # it needs larger images
            continue
        if names(own.state_dict()) == names(state) and (classes := class_count(state, own)):
            same = _without_weights(name, classes, wanted.image_size)
            if not any(mismatches(state, same.state_dict())):
                return f"{name} of {classes} classes"
    return ""


@cache
def _without_weights(model: str, classes: int, image_size: int) -> nn.Module:
    """A network that has names and shapes only. It is kept, since building all networks of the table takes seconds."""
    import torch

    with torch.device("meta"):
        return build(model, num_classes=classes, image_size=image_size)
