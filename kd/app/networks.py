"""The networks of a configuration: which they are, the weights that they begin with, and what of them is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from kd.core.recipes import RELEASED
from kd.core.settings import TrainOverrides
from kd.core.spec import FileName, Frozen, PathText, Text, located
from kd.core.stage import DatasetSpec, Normalization, Part, Seed
from kd.datasets import DATASETS
from kd.models import NetworkName, preprocessing_of
from kd.models.libraries import LIBRARIES
from kd.models.spelling import LibraryName
from kd.store.foreign import fetched

Freeze = Literal["backbone"]
_SIZE = Field(None, ge=8, le=4096)
_PUBLISHED = "pretrained"  # initial weights that a library publishes


def _initial(text: str, told: ValidationInfo) -> str:
    return text if text == _PUBLISHED else located(text, told)


InitText = Annotated[FileName, AfterValidator(_initial)]  # a file of weights, or `pretrained`


class NetworkConfig(Frozen):
    """A network: of our table, or `name=timm` or `torchvision` with its `arch`."""

    section: ClassVar[str]  # of the configuration, as in model.arch

    name: NetworkName
    train: TrainOverrides
    init: InitText | None = None  # null: drawn by the seed
    freeze: Freeze | None = None  # backbone: only the classifier is trained
    image_size: int | None = _SIZE  # the network resizes its images to this; null: its own size if it takes no other

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, tree: Any) -> Any:
        """A library's network has one name: `{name: timm, arch: resnet18, args: {drop_rate: 0.1}}`."""
        if not isinstance(tree, dict):
            return tree
        rest = {key: value for key, value in tree.items() if key not in ("arch", "args")}
        name, arch, args = tree.get("name"), tree.get("arch"), tree.get("args") or {}
        if isinstance(name, str) and name in LIBRARIES:
            if not isinstance(arch, str):
                raise ValueError(f"{name} needs {cls.section}.arch=<network>, e.g. {cls.section}.arch=resnet18")
            return {**rest, "name": str(LibraryName(name, arch, args))}
        if arch is not None or args:
            raise ValueError(f"arch and args are for {' and '.join(LIBRARIES)} (got {name})")
        return rest


class ModelConfig(NetworkConfig):
    """The `model` section: the student's network, and overrides of its training settings."""

    section = "model"


def normalizations() -> dict[str, Normalization]:
    """The normalisations that have a name: each data set's own, and those of published weights."""
    known = {name: (e.facts.mean, e.facts.std) for name, e in DATASETS.usable().items() if e.facts is not None}
    known |= {code.normalization: (code.mean, code.std) for code in RELEASED}
    known["torchdistill"] = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
    known["kuangliu"] = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the deviations are means over images
    known["imagenet"] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return {name: Normalization(mean=mean, std=std) for name, (mean, std) in known.items()}


def _named(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    known = normalizations()
    if value not in known:
        raise ValueError(f"should be one of {', '.join(known)}, or {{mean: [r, g, b], std: [r, g, b]}}")
    return known[value]


class TeacherConfig(NetworkConfig):
    """The `teacher` section. The seed is also the reference's."""

    section = "teacher"

    seed: Seed
    checkpoint: PathText | None = None  # a file of trained weights: then no teacher is trained
    part: Part | None = None  # which network, if the file holds several
    key: Text | None = None  # the keys that lead to its weights in the file, if several fit: ema.model
    normalize: Annotated[Normalization | None, BeforeValidator(_named)] = None  # null: the network's own, or the data's
    min_acc: float | None = Field(None, ge=0, le=100)  # a teacher with a lower test accuracy is refused

    @property
    def file(self) -> Path | None:
        """The checkpoint's path."""
        return None if self.checkpoint is None else Path(os.path.expanduser(self.checkpoint))


def preprocessing(network: str, image_size: int | None, dataset: DatasetSpec) -> Normalization | None:
    """How a network prepares its images; None for the data set's mean and std at the data set's size."""
    own = preprocessing_of(network)
    if image_size is None:
        return own
    own = own or Normalization(mean=dataset.mean, std=dataset.std)
    return Normalization(**{**own.model_dump(), "size": image_size})


def initial_file(init: str, network: str, data_root: Path, key: str) -> Path:
    """The file of initial weights; those that a library publishes are downloaded once. Raises KnownError."""
    if init == _PUBLISHED:
        return fetched(network, data_root, key)
    return Path(os.path.expanduser(init))
