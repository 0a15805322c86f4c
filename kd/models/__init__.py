"""The networks: a table of plain data, and build(), which imports torch only when one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator

from kd.core.spec import Registry, load_attribute

if TYPE_CHECKING:
    from torch import nn


class ModelEntry(NamedTuple):
    """A network: the dotted path of its class, the family that its recipe goes by, and its depth as its name has it.

    Where the name has none, the depth counts the layers with weights, shortcuts aside. A network may bring a recipe of
    its own: settings of `train` that differ from its family's on each data set, or, where its family has no recipe,
    from those of the family `resnet`.
    """

    path: str
    family: str
    depth: int
    recipe: Mapping[str, Any] | None = None  # in mode=paper


_OWN: dict[str, ModelEntry] = {
    **{f"plane{d}": ModelEntry("kd.models.plane.Plane", "plane", d) for d in (2, 4, 6, 8, 10)},
    **{
        f"resnet{d}": ModelEntry("kd.models.cifar_resnet.CifarResNet", "cifar_resnet", d)
        for d in (8, 14, 20, 26, 32, 44, 56, 110)
    },
    "net": ModelEntry("kd.models.net.Net", "net", 5),
    "mlp": ModelEntry("kd.models.mlp.MLP", "mlp", 3),
    **{f"resnet{d}": ModelEntry("kd.models.resnet.ResNet", "resnet", d) for d in (18, 34, 50, 101, 152)},
    **{f"preresnet{d}": ModelEntry("kd.models.preresnet.PreResNet", "preresnet", d) for d in (20, 32, 44, 56, 110)},
    "resnext29_8x64d": ModelEntry("kd.models.resnext.ResNeXt", "resnext", 29),
    **{f"densenet{d}": ModelEntry("kd.models.densenet.DenseNet", "densenet", d) for d in (121, 161, 169, 201)},
    "mobilenetv2": ModelEntry("kd.models.mobilenetv2.MobileNetV2", "mobilenetv2", 54),
    "shufflenetv2": ModelEntry("kd.models.shufflenetv2.ShuffleNetV2", "shufflenetv2", 51),
    **{f"resnet{d}x4": ModelEntry("kd.models.cifar_resnet.CifarResNetX4", "cifar_resnet_x4", d) for d in (8, 32)},
    **{f"wrn_{d}_1": ModelEntry("kd.models.wrn.WideResNet", "wrn", d) for d in (16, 40)},
    **{f"wrn_{d}_2": ModelEntry("kd.models.wrn.WideResNet2", "wrn", d) for d in (16, 40)},
    **{f"vgg{d}": ModelEntry("kd.models.vgg.VGG", "vgg", d) for d in (8, 11, 13, 16, 19)},
    "mobilenetv2_half": ModelEntry("kd.models.mobilenetv2_half.MobileNetV2Half", "mobilenetv2_half", 54),
    "shufflenetv1": ModelEntry("kd.models.shufflenetv1.ShuffleNetV1", "shufflenetv1", 50),
    "shufflenetv2_rd": ModelEntry("kd.models.shufflenetv2_rd.ShuffleNetV2RD", "shufflenetv2_rd", 51),
}


MODELS: Registry[ModelEntry] = Registry("kd.models", _OWN, ModelEntry)
NetworkName = Annotated[str, AfterValidator(MODELS.known)]


def build(name: str, *, num_classes: int, image_size: int = 32, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network of the table, from torch's global generator.

    It takes images [batch, in_channels, image_size, image_size], normalised, and gives logits
    [batch, num_classes]. Raises KnownError where the network cannot take such images.
    """
    entry = MODELS[name]
    network: nn.Module = load_attribute(entry.path)(entry.depth, num_classes, image_size, in_channels)
    return network
