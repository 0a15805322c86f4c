"""Which of a file's weights fit a network: under a prefix, by names of other code, with another classifier."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from kd.store.weights_file import State, some

if TYPE_CHECKING:
    from torch import Tensor, nn

# Where a checkpoint has its weights: of TAKD; of Trained Teacher and Nasty Teacher; of RepDistiller, mdistiller and
# torchdistill. They come first if several dictionaries fit.
_HOLDERS = ("model_state_dict", "state_dict", "model")
PARTS = ("student", "teacher")  # mdistiller's files hold both
_EMA = re.compile(r"(^|[._])ema($|[._])", re.IGNORECASE)
# What tools leave beside a network's weights: thop's counts, the step of torch's AveragedModel.
_COUNTS = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$")
# Names of the same layers in other code: torchvision's and timm's residual networks, and those after kuangliu's.
_RENAMINGS: tuple[dict[str, str], ...] = (
    {},
    {"downsample": "shortcut", "fc": "linear"},
    {"shortcut": "downsample", "linear": "fc"},
)


class Fit(NamedTuple):
    """Weights in a file that fit a network, under the network's own names."""

    place: str  # the keys that lead to them, and the prefix of their names
    state: State
    passed_over: tuple[str, ...]  # names beside them
    renamed: tuple[str, ...]  # "fc → linear"

    @property
    def kind(self) -> str:
        """`student`, `teacher` or `ema` by its place; "" for any other."""
        words = self.place.split(".")
        return next((part for part in PARTS if part in words), "ema" if _EMA.search(self.place) else "")

    def __str__(self) -> str:
        return self.place or "its weights"


def find_fits(states: dict[str, State], network: nn.Module, *, renew: bool = False) -> list[Fit]:
    """All weights among the dictionaries that fit a network. With `renew` the classifier may be another."""
    expected, found = network.state_dict(), list[Fit]()
    for place, state in states.items():
        for renaming in _RENAMINGS:
            fits = list(_fits_under(place, state, renaming, expected, network if renew else None))
            found += fits
            if fits:
                break
    return sorted(found, key=lambda fit: (fit.kind == "ema", fit.place.split(".")[0] not in _HOLDERS))


def _fits_under(
    place: str, state: State, renaming: dict[str, str], expected: State, renewed: nn.Module | None
) -> Iterator[Fit]:
    """The weights of a dictionary that fit after a renaming: one for each prefix before the network's names."""
    own_names = {name: ".".join(renaming.get(word, word) for word in name.split(".")) for name in state}
    used = [f"{a} → {b}" for a, b in renaming.items() if any(a in name.split(".") for name in own_names)]
    if renaming and not used:
        return
    first = next(iter(expected))
    ends = [name for name in own_names.values() if name == first or name.endswith(f".{first}")]
    for prefix in sorted((name.removesuffix(first) for name in ends), key=len, reverse=True):
        counts = [name for name, own in own_names.items() if _COUNTS.search(own)]
        inside = {
            own.removeprefix(prefix): state[name]
            for name, own in own_names.items()
            if own.startswith(prefix) and name not in counts
        }
        usable = inside if renewed is None else with_classifier(inside, renewed)
        if not any(mismatches(usable, expected)):
            beside = tuple(name for name, own in own_names.items() if not own.startswith(prefix) or name in counts)
            yield Fit(".".join(filter(None, (place, prefix.rstrip(".")))), inside, beside, tuple(used))


def with_classifier(state: State, network: nn.Module) -> State:
    """The weights with the network's own classifier, if theirs has another number of classes or is not there."""
    own = classifier_of(network)
    if not own.keys() & state.keys():
        return {**state, **own}
    other = own.keys() <= state.keys() and all(
        state[name].shape[1:] == tensor.shape[1:] and state[name].dim() and len(state[name]) != len(tensor)
        for name, tensor in own.items()
    )
    return {**state, **own} if other else state


def class_count(state: State, network: nn.Module) -> int:
    """The number of classes of the weights' classifier; 0 if there is none."""
    return next((len(state[name]) for name in classifier_of(network) if name in state), 0)


def classifier_of(network: nn.Module) -> State:
    """The weights of the layers that give the logits, by their names in the network."""
    from kd.models.taps import last_layers

    layers = {path: network.get_submodule(path).state_dict() for path in last_layers(network)}
    return {f"{path}.{name}": tensor for path, own in layers.items() for name, tensor in own.items()}


def fresh_classifier(classifier: State) -> State:
    """The weights with which a new classifier begins: small, so that the first steps do not disturb trained weights.

    The networks' own initialisations are for training from scratch. That of EfficientNets is so large for a few classes
    that a probe still showed it after 100 epochs.
    """
    import torch

    return {
        name: torch.zeros_like(tensor) if tensor.ndim == 1 else torch.randn_like(tensor) * 0.01
        for name, tensor in classifier.items()
    }


def mismatches(state: State, expected: State) -> Iterator[str]:
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
            yield f"{len(names)} {what}: {some(names)}"


def _copies_to(tensor: Tensor, place: Tensor) -> bool:
    """Whether the values can be copied: dense, real, with data, and not integers where floats are expected."""
    import torch

    plain = tensor.layout == torch.strided and not tensor.is_quantized and not (tensor.is_meta and not place.is_meta)
    return plain and tensor.is_floating_point() >= place.is_floating_point() and not tensor.is_complex()
