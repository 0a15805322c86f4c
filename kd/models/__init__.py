"""The networks: a table of plain data, and build(), which imports torch only when one is made."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import AfterValidator

if TYPE_CHECKING:
    from torch import nn


class Entry(NamedTuple):
    """A network: the dotted path of its class, the family that its recipe goes by, and its depth."""

    path: str
    family: str
    depth: int


MODELS: dict[str, Entry] = {
    **{f"plane{d}": Entry("kd.models.plane.Plane", "plane", d) for d in (2, 4, 6, 8, 10)},
    **{
        f"resnet{d}": Entry("kd.models.cifar_resnet.CifarResNet", "cifar_resnet", d)
        for d in (8, 14, 20, 26, 32, 44, 56, 110)
    },
}


def _known(name: str) -> str:
    if name not in MODELS:
        near = get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{hint}there are {', '.join(MODELS)}")
    return name


NetworkName = Annotated[str, AfterValidator(_known)]


def build(name: str, *, num_classes: int, image_size: int = 32, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network of the table, from torch's global generator.

    It takes images [batch, in_channels, image_size, image_size], normalised, and gives logits
    [batch, num_classes]. Raises KnownError where the network cannot take such images.
    """
    entry = MODELS[name]
    module, _, cls = entry.path.rpartition(".")
    network: nn.Module = getattr(import_module(module), cls)(entry.depth, num_classes, image_size, in_channels)
    return network
