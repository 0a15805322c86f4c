"""The networks: a table of plain data, and those of timm and torchvision by name; build() makes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator

from kd.core.spec import KnownError, Registry, load_attribute
from kd.core.stage import Normalization
from kd.models.libraries import LIBRARIES, depth_of, has_depthwise, library_name, library_network

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

    def __call__(self, num_classes: int, image_size: int = 32, in_channels: int = 3) -> nn.Module:
        """A freshly initialised network, as build() gives it."""
        network: nn.Module = load_attribute(self.path)(self.depth, num_classes, image_size, in_channels)
        return network

    def preprocessing(self) -> Normalization | None:
        """How the network prepares its images; None for the data set's mean and std."""
        return None

    def own_size(self) -> int | None:
        """The size of the images that it is made for, in pixels; None for any."""
        return None

    def slow_in_bf16(self) -> bool:
        """Whether bf16 makes its training slower on a CPU; False where this was not measured."""
        return False


class LibraryEntry(ModelEntry):
    """A network of timm or torchvision. Its path is its name."""

    def __call__(self, num_classes: int, image_size: int = 32, in_channels: int = 3) -> nn.Module:
        return library_network(self.path, num_classes, image_size, in_channels)

    def preprocessing(self) -> Normalization:
        name = library_name(self.path)
        return LIBRARIES[name.library].preprocessing(name)

    def own_size(self) -> int:
        name = library_name(self.path)
        return LIBRARIES[name.library].own_size(name)

    def slow_in_bf16(self) -> bool:
        return has_depthwise(self.path)  # mobilenetv3_small_050: 57 images/s in fp32, 38 in bf16 (bench/README.md)


class Networks(Registry[ModelEntry]):
    """The table, and by `timm/<arch>` and `torchvision/<arch>` each network of a library.

    Keyword arguments of a library's network follow as `?key=value&key=value`. Iteration is over the table alone.
    """

    def __getitem__(self, name: str) -> ModelEntry:
        if "/" not in name:
            return super().__getitem__(name)
        try:
            found = library_name(name)
        except ValueError as error:
            raise KnownError(str(error)) from error
        return LibraryEntry(str(found), found.library, depth_of(found.arch), recipe={})

    def canonical(self, name: str) -> str:
        """The one spelling of a name. Raises ValueError with the nearest names where it stands for nothing."""
        return str(library_name(name)) if "/" in name else self.known(name)


_OWN: dict[str, ModelEntry] = {
    **{f"plane{d}": ModelEntry("kd.models.plane.Plane", "plane", d) for d in (2, 4, 6, 8, 10)},
    **{
        f"resnet{d}": ModelEntry("kd.models.cifar_resnet.CifarResNet", "cifar_resnet", d)
        for d in (8, 14, 20, 26, 32, 44, 56, 110)
    },
    "net": ModelEntry("kd.models.net.Net", "net", 5),
    "mlp": ModelEntry("kd.models.mlp.MLP", "mlp", 3),
    **{f"resnet{d}": ModelEntry("kd.models.resnet.ResNet", "resnet", d) for d in (18, 34, 50, 101, 152)},
    **{
        f"resnet{d}_imagenet": ModelEntry("kd.models.imagenet_resnet.ImageNetResNet", "resnet", d)
        for d in (14, 18, 20, 34, 50)
    },
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


MODELS = Networks("kd.models", _OWN, ModelEntry)
NetworkName = Annotated[str, AfterValidator(MODELS.canonical)]


def build(name: str, *, num_classes: int, image_size: int = 32, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network, from torch's global generator.

    It takes images [batch, in_channels, image_size, image_size], normalised, and gives logits
    [batch, num_classes]. A network that takes one size only gets it, whatever `image_size` is: Normalized resizes.
    Raises KnownError where the network cannot take such images.
    """
    return MODELS[name](num_classes, image_size, in_channels)


def canonical(name: str) -> str:
    """The one spelling of a network's name, with sorted options. Raises ValueError for a name of nothing."""
    return MODELS.canonical(name)


def preprocessing_of(name: str) -> Normalization | None:
    """How a network of a library prepares its images; None for others, which have the data set's mean and std."""
    return MODELS[name].preprocessing()


def own_size(name: str) -> int | None:
    """The size of the images on which a library trained its network, in pixels; None for other networks."""
    return MODELS[name].own_size()
