"""The networks: a table of plain data, and build(), which imports torch only when one is made."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import AfterValidator

if TYPE_CHECKING:
    from torch import nn


class Entry(NamedTuple):
    """A network: the dotted path of its class, the family that its recipe goes by, and its depth as its name has it.

    Where the name has none, the depth counts the layers with weights, shortcuts aside.
    """

    path: str
    family: str
    depth: int


MODELS: dict[str, Entry] = {
    **{f"plane{d}": Entry("kd.models.plane.Plane", "plane", d) for d in (2, 4, 6, 8, 10)},
    **{
        f"resnet{d}": Entry("kd.models.cifar_resnet.CifarResNet", "cifar_resnet", d)
        for d in (8, 14, 20, 26, 32, 44, 56, 110)
    },
    "net": Entry("kd.models.net.Net", "net", 5),
    "mlp": Entry("kd.models.mlp.MLP", "mlp", 3),
    **{f"resnet{d}": Entry("kd.models.resnet.ResNet", "resnet", d) for d in (18, 34, 50, 101, 152)},
    **{f"preresnet{d}": Entry("kd.models.preresnet.PreResNet", "preresnet", d) for d in (20, 32, 44, 56, 110)},
    "resnext29_8x64d": Entry("kd.models.resnext.ResNeXt", "resnext", 29),
    **{f"densenet{d}": Entry("kd.models.densenet.DenseNet", "densenet", d) for d in (121, 161, 169, 201)},
    "mobilenetv2": Entry("kd.models.mobilenetv2.MobileNetV2", "mobilenetv2", 54),
    "shufflenetv2": Entry("kd.models.shufflenetv2.ShuffleNetV2", "shufflenetv2", 51),
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
