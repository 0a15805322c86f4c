"""The networks of timm and torchvision: their names, how they are made, and how they prepare their images."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from kd.core.spec import KnownError
from kd.core.stage import Normalization
from kd.models.spelling import LibraryName

if TYPE_CHECKING:
    from torch import nn


class StageEnd(NamedTuple):
    """A module whose output is a map of `side`×`side` pixels: [sample, channel, height, width], or channels last."""

    path: str
    side: int
    channels_last: bool


class Library(ABC):
    """A library that brings networks."""

    name: ClassVar[str]
    reserved: ClassVar[frozenset[str]]  # options that this project sets, or that read files

    def check(self, name: LibraryName) -> LibraryName:
        """The name as it is written here. Raises ValueError if the library or the network is not there."""
        if find_spec(self.name) is None:
            raise ValueError(f"{name} needs the package {self.name}: pip install {self.name}")
        if taken := sorted(self.reserved & name.options.keys()):
            published = {*taken} & {"pretrained", "weights", "checkpoint_path"}
            hint = "; published weights, or a file of weights: model.init, teacher.init" if published else ""
            raise ValueError(f"{name}: {', '.join(taken)} cannot be an option of a network here{hint}")
        return self._named(name)

    def unknown(self, name: LibraryName) -> ValueError:
        """The error for a network that the library does not have, with the nearest names."""
        names = self.names()
        near = get_close_matches(name.arch, names, n=3)
        hint = f"did you mean {' or '.join(f'{self.name}/{each}' for each in near)}? " if near else ""
        return ValueError(f"{hint}{self.name} has {len(names):,} networks, and no {name.arch!r}")

    @abstractmethod
    def names(self) -> list[str]:
        """The networks that classify images."""

    @abstractmethod
    def make(self, name: LibraryName, num_classes: int, in_channels: int) -> nn.Module:
        """A freshly initialised network."""

    @abstractmethod
    def preprocessing(self, name: LibraryName) -> Normalization:
        """How the network's published weights see images; `size` only where the network takes no other."""

    @abstractmethod
    def own_size(self, name: LibraryName) -> int:
        """The size of the images on which the published weights were trained, in pixels."""

    @abstractmethod
    def stage_ends(self, name: LibraryName, network: nn.Module) -> list[StageEnd]:
        """The modules that end the network's stages, first to last. The network has no memory."""

    def classifiers(self, network: nn.Module) -> tuple[str, ...]:
        """The paths of the layers that give the logits; empty if the library does not say."""
        return ()

    def published_size(self, arch: str) -> int | None:
        """The number of a network's parameters with 1,000 classes; None if the library does not say."""
        return None

    @abstractmethod
    def pretrained(self, name: LibraryName) -> nn.Module:
        """The network with its published weights, which are downloaded. May raise any exception."""

    @abstractmethod
    def published(self, name: LibraryName) -> bool:
        """Whether the library publishes weights of the network."""

    def _named(self, name: LibraryName) -> LibraryName:
        if name.arch not in self.names():
            raise self.unknown(name)
        return name


class Timm(Library):
    """PyTorch Image Models."""

    name = "timm"
    reserved = frozenset(
        {"num_classes", "in_chans", "model_name", "features_only"}
        | {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    )

    def names(self) -> list[str]:
        import timm

        return timm.list_models()

    def make(self, name: LibraryName, num_classes: int, in_channels: int) -> nn.Module:
        import timm

        return timm.create_model(name.arch, num_classes=num_classes, in_chans=in_channels, **name.options)

    def preprocessing(self, name: LibraryName) -> Normalization:
        config = self._config(name)
        return Normalization(
            mean=config.mean,
            std=config.std,
            size=self.own_size(name) if config.fixed_input_size else None,
            interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
        )

    def own_size(self, name: LibraryName) -> int:
        return _side(name.options.get("img_size") or self._config(name).input_size[1:])

    def stage_ends(self, name: LibraryName, network: nn.Module) -> list[StageEnd]:
        ends = [each["module"] for each in getattr(network, "feature_info", None) or []]
        known = [path for path, _ in network.named_modules()]
        found = _map_ends(network, [path for path in ends if path in known], self.own_size(name))
        return _from_a_quarter(self.own_size(name), found)

    def classifiers(self, network: nn.Module) -> tuple[str, ...]:
        declared: Any = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
        paths = (declared,) if isinstance(declared, str) else tuple(declared)
        known = [path for path, _ in network.named_modules()]
        return paths if all(path in known for path in paths) else ()

    def pretrained(self, name: LibraryName) -> nn.Module:
        import timm
        from huggingface_hub import constants

        if self._config(name).hf_hub_id and not constants.HF_HUB_OFFLINE:
            # Otherwise each of its files is tried six times, which takes a minute.
            _reach(constants.ENDPOINT, "HF_HUB_OFFLINE=1 takes them from its cache alone")
        return timm.create_model(name.arch, pretrained=True)

    def published(self, name: LibraryName) -> bool:
        return bool(self._config(name).has_weights)

    def _config(self, name: LibraryName) -> Any:
        import timm

        return timm.get_pretrained_cfg(name.arch)

    def _named(self, name: LibraryName) -> LibraryName:
        """A network may have several published weights, `resnet18.a1_in1k`: the default's tag is left out."""
        import timm

        arch, _, tag = name.arch.partition(".")
        super()._named(name._replace(arch=arch))
        if not tag:
            return name
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*")]
        if tag not in tags:
            raise ValueError(f"timm has no {name.arch}: weights of {arch} are called {', '.join(tags) or 'nothing'}")
        return name._replace(arch=arch) if self._config(name._replace(arch=arch)).tag == tag else name


class Torchvision(Library):
    """torchvision's networks for classification."""

    name = "torchvision"
    reserved = frozenset(
        {"num_classes", "progress", "name", "weights", "weights_backbone", "pretrained", "pretrained_backbone"}
    )

    def names(self) -> list[str]:
        import torchvision.models

        return list(torchvision.models.list_models(module=torchvision.models))

    def make(self, name: LibraryName, num_classes: int, in_channels: int) -> nn.Module:
        import torchvision.models

        if in_channels != 3:
            raise ValueError(f"networks of torchvision take images of 3 channels (got {in_channels})")
        # vit_h_14 is made for 224 pixels unless it is told the 518 of its published weights.
        own = {"image_size": self.own_size(name)} if name.arch.startswith("vit_") else {}
        options = {"num_classes": num_classes, **own, **name.options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of another initialisation in some later version
            network: nn.Module = torchvision.models.get_model(name.arch, **options)
        return network

    def preprocessing(self, name: LibraryName) -> Normalization:
        shown, size = self._weights(name).transforms(), self.own_size(name)
        fixed = self._weights(name).meta["min_size"][0] == shown.crop_size[0]  # as its documentation has it
        bilinear = shown.interpolation.value == "bilinear"
        return Normalization(
            mean=tuple(shown.mean),
            std=tuple(shown.std),
            size=size if fixed else None,
            interpolation="bilinear" if bilinear else "bicubic",
        )

    def published_size(self, arch: str) -> int | None:
        return int(self._weights(LibraryName.parse(f"{self.name}/{arch}")).meta["num_params"])

    def own_size(self, name: LibraryName) -> int:
        asked = name.options.get("image_size") or name.options.get("input_size")
        return _side(asked or self._weights(name).transforms().crop_size)

    def stage_ends(self, name: LibraryName, network: nn.Module) -> list[StageEnd]:
        """The last module before each change of the maps' size, of the network's parts and the parts of these."""
        from torch import nn

        from kd.models.taps import last_layers

        (classifier,) = last_layers(network)
        parts = []
        for path, part in network.named_children():
            inner = [f"{path}.{each}" for each, _ in part.named_children()]
            if path != classifier.partition(".")[0]:
                parts += inner if isinstance(part, (nn.Sequential, nn.ModuleList)) else [path]
        lasts = {each.side: each for each in _map_ends(network, parts, self.own_size(name))}
        ends = _from_a_quarter(self.own_size(name), [*lasts.values()])
        return ends if len(ends) > 1 else []  # a transformer's one map is that of its patches

    def pretrained(self, name: LibraryName) -> nn.Module:
        import torch.hub
        import torchvision.models

        url = self._weights(name).url
        if not (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
            _reach(url)  # torch waits for an answer without an end
        network: nn.Module = torchvision.models.get_model(name.arch, weights="DEFAULT", progress=False)
        return network

    def published(self, name: LibraryName) -> bool:
        return True

    def _weights(self, name: LibraryName) -> Any:
        import torchvision.models

        return torchvision.models.get_model_weights(name.arch).DEFAULT


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _map_ends(network: nn.Module, paths: list[str], size: int) -> list[StageEnd]:
    """The modules that give square maps for one image [1, 3, size, size], in the order of their calls."""
    import torch

    found: dict[str, tuple[int, ...]] = {}

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if (
            isinstance(output, torch.Tensor)
            and output.dim() == 4
            and output.shape[2] in (output.shape[1], output.shape[3])
        ):
            found[path] = tuple(output.shape)

    hooks = [network.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    with torch.device("meta"), torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    # Where there are as many channels as rows, the network's other maps tell where the channels are.
    last = any(one == two != three for _, one, two, three in found.values())
    return [StageEnd(path, two, one == two and (two != three or last)) for path, (_, one, two, three) in found.items()]


def _from_a_quarter(size: int, ends: list[StageEnd]) -> list[StageEnd]:
    """Those with maps of at most a quarter of the image's height, and more than one pixel: larger is the stem."""
    return [each for each in ends if 1 < each.side <= -(-size // 4)]


def _reach(address: str, hint: str = "") -> None:
    """Raise OSError, with the hint, if nothing answers at an address within ten seconds."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen  # here, because a dry run needs none of it: it loads ssl

    try:
        urlopen(Request(address, method="HEAD"), timeout=10).close()
    except HTTPError:  # it answers
        return
    except OSError as error:
        raise OSError(f"{address} does not answer: {getattr(error, 'reason', error)}; {hint}".strip(" ;")) from error


LIBRARIES: Mapping[str, Library] = {library.name: library for library in (Timm(), Torchvision())}


@cache
def library_name(text: str) -> LibraryName:
    """The parts of the name of a library's network. Raises ValueError if it is written wrongly or is not there."""
    name = LibraryName.parse(text)
    if name.library not in LIBRARIES:
        raise ValueError(f"there is no library {name.library!r}: {' and '.join(LIBRARIES)} bring networks")
    return LIBRARIES[name.library].check(name)


def depth_of(arch: str) -> int:
    """The depth that a name begins with, as in resnet50 and vgg16_bn; 0 where it has none."""
    found = re.match(r"[a-z]+(?<!v)([1-9]\d+)", arch)
    return int(found[1]) if found else 0


def library_network(text: str, num_classes: int, image_size: int, in_channels: int) -> nn.Module:
    """A freshly initialised network of a library.

    Raises KnownError if it does not take its options, or images of this size, or gives anything but logits.
    """
    import torch

    name = library_name(text)
    size = LIBRARIES[name.library].preprocessing(name).size or image_size
    _check(text, num_classes, size, in_channels)
    if torch.get_default_device().type == "meta":
        network = _blank(text, num_classes, in_channels)
    else:
        network = _made(text, partial(LIBRARIES[name.library].make, name, num_classes, in_channels))
    vars(network)["library_name"] = text  # not assigned: the type of nn.Module allows tensors and modules only
    return network


@cache
def stage_ends(text: str) -> tuple[StageEnd, ...]:
    """The modules at the ends of a network's stages, first to last; empty if it has no maps."""
    name = library_name(text)
    return tuple(LIBRARIES[name.library].stage_ends(name, _blank(text, 2, 3)))


@cache
def has_depthwise(text: str) -> bool:
    """Whether a network has convolutions of each channel alone."""
    from torch.nn import Conv2d

    convolutions = [each for each in _blank(text, 2, 3).modules() if isinstance(each, Conv2d)]
    return any(each.groups == each.in_channels > 1 for each in convolutions)


def classifiers(text: str, network: nn.Module) -> tuple[str, ...]:
    """The paths of the layers that give a network's logits, as its library has them; empty if it does not say."""
    return LIBRARIES[library_name(text).library].classifiers(network)


def published_weights(text: str) -> nn.Module:
    """A library's network with the weights that it publishes, which are downloaded.

    Raises KnownError if there are none, or if they cannot be had.
    """
    name = library_name(text)
    library, arch = LIBRARIES[name.library], f"{name.library}/{name.arch}"
    if not library.published(name):
        raise KnownError(f"{name.library} publishes no weights of {name.arch}")
    return _made(f"the weights of {arch} cannot be fetched", partial(library.pretrained, name))


@cache
def _check(text: str, num_classes: int, size: int, in_channels: int) -> None:
    """Run the network once without memory, in training and not."""
    import torch

    network = _blank(text, num_classes, in_channels)
    with torch.device("meta"), torch.no_grad():
        images = torch.zeros(2, in_channels, size, size)
        what, hint = f"{text}: {size}×{size} images", "" if size % 32 == 0 else "try a size that is a multiple of 32"
        found = [_made(what, partial(network.train(mode), images), hint) for mode in (False, True)]
    for given in found:
        if not isinstance(given, torch.Tensor) or given.shape != (2, num_classes):
            raise KnownError(
                f"{text} gives {type(given).__name__} and not only logits [image, class]: an option such as "
                f"{text}{'&' if '?' in text else '?'}aux_logits=false may help"
            )


def _blank(text: str, num_classes: int, in_channels: int) -> nn.Module:
    """The network without memory. torch's random numbers go on as if it had not been made."""
    import torch

    name = library_name(text)
    make = partial(LIBRARIES[name.library].make, name, num_classes, in_channels)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except Exception:  # some read sizes from tensors: torchvision's RegNets, and more in older versions of timm
            with torch.device("cpu"):
                return _made(text, make).to("meta")


T = TypeVar("T")


def _made(what: str, make: Callable[[], T], hint: str = "") -> T:
    """What make() returns. Whatever a library raises becomes one line, with a hint at its end."""
    try:
        return make()
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise KnownError("; ".join(filter(None, [f"{what}: {said}", hint]))) from error
