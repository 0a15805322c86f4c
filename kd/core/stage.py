"""A stage: one network that is trained once. Its key is a hash of everything that decides its weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, Field, SerializeAsAny, model_validator

from kd.core.settings import TrainSpec
from kd.core.spec import Frozen, Neutral, Unhashed, hashed

if TYPE_CHECKING:
    from torch import Tensor, nn

# The version of keys and weights. Raise it when a change moves keys, or changes weights under the same settings.
FORMAT = 1

Role = Literal["reference", "teacher", "assistant", "student"]
Part = Literal["student", "teacher", "ema"]
Reduction = Literal["batchmean", "mean"]  # the divisor of the summed KL: batch size, or batch size · classes
Augment = Literal["none", "crop_flip", "rotate_flip", "resized_crop_flip"]
# How a photograph of any shape becomes a square: its shorter side is resized and the centre cut out; it is distorted;
# or its longer side is resized and the rest is black.
Resize = Literal["short_side", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic"]
Background = Literal["white", "black"]
# What a loss can read of its guide, and of the network: logits, the classifier's input, the maps at the end of each
# stage, and these maps before their activation. The network's logits are always there.
Need = Literal["logits", "pooled", "stages", "pre"]
# The number of views of an image under each augmentation (kd/datasets/data.py).
# A random resized crop is drawn from its number, so it has as many as there are numbers.
VIEWS: dict[Augment, int] = {"none": 1, "crop_flip": 9 * 9 * 2, "rotate_flip": 41 * 2, "resized_crop_flip": 1 << 31}

Channels = tuple[float, float, float]
Deviation = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=10**15)]  # exact in every JSON reader


def _temperature(T: float) -> float:
    # A KL that falls as 1/T² is a sum whose terms cancel. Times T² its error in fp32 is below 1 % up to 100, also for
    # a net that is close to its guide, and above 10 % at 1000.
    if T > 100:
        raise ValueError("should be at most 100: above, T²·KL hardly changes with T, and fp32 rounds most of it away")
    return T


Temperature = Annotated[float, Field(gt=0), AfterValidator(_temperature)]

# The purposes of random numbers. Each purpose has its own stream.
INIT, ORDER, VIEW, DROPOUT, DIRECTION, LOSS = range(6)


def random_stream(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """The random generator for one purpose, in one epoch of one seed.

    Each epoch has its own generator, so it can be replayed alone. The numbers are hashed and not added, so seed 0's
    epoch 1 differs from seed 1's epoch 0.
    """
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, purpose)))


class DatasetSpec(Frozen):
    """The data of a stage: which images, their split, augmentation and normalisation. It has no path."""

    name: str
    content: str | None = None  # hash of the decoded images; null if the name alone identifies them
    num_classes: int = Field(ge=2)
    image_size: int = Field(ge=1)  # pixels; height and width are equal
    mean: Channels  # of pixels in [0, 1]
    std: Channels
    augment: Augment = "none"
    views: int | None = Field(None, ge=1)  # how many views each sample may have; null: all
    val_fraction: float = Field(0.1, ge=0, lt=1)
    split_seed: int = Field(0, ge=0)
    classes: Annotated[tuple[str, ...], Unhashed()] = ()  # the labels' names; empty: not recorded
    images: Annotated[tuple[int, int] | None, Unhashed()] = None  # for training (validation included) and for testing
    val_images: Annotated[int, Field(ge=0), Neutral(0)] = 0  # the last so many training images are a validation split
    resize: Annotated[Resize | None, Neutral(None)] = None  # photographs; null: images of one size, in memory
    background: Annotated[Background, Neutral("white")] = "white"  # of folders, behind what is transparent
    streamed: Annotated[bool, Neutral(False)] = False  # photographs that are decoded in every epoch
    # How many classes are so small that val_fraction rounds to none: one image of each validates all the same. It is
    # hashed, because under the keys of before these images were for training.
    rare: Annotated[int, Field(ge=0), Neutral(0)] = 0

    @property
    def view_count(self) -> int | None:
        """The numbers of a sample's views end below this; None if there is no limit."""
        return self.views if self.augment == "resized_crop_flip" else VIEWS[self.augment]

    @property
    def shown_views(self) -> int | None:
        """How many views of a sample are drawn, by dataset.views; None if there is no limit."""
        return None if self.view_count is None else min(self.views or self.view_count, self.view_count)

    @property
    def train_images(self) -> int | None:
        """About how many images train, without those that validate; None if their number is not known."""
        if self.images is None:
            return None
        return self.images[0] - self.val_images - round(self.val_fraction * self.images[0])

    @property
    def validated(self) -> bool:
        """Whether some training images are kept for validation."""
        return self.val_images > 0 or self.val_fraction > 0


class Normalization(Frozen):
    """How a network prepares its images: mean and standard deviation of pixels in [0, 1]; the size that it needs."""

    mean: Channels
    std: tuple[Deviation, Deviation, Deviation]
    size: Annotated[int | None, Field(ge=1), Neutral(None)] = None  # pixels; null: any size, as the images are
    interpolation: Annotated[Interpolation, Neutral("bilinear")] = "bilinear"  # of images of another size

    def __str__(self) -> str:
        mean, std = ("/".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}" + (f", {self.size} pixels" if self.size else "")


@dataclass(frozen=True)
class Outputs:
    """What a network makes of a batch, by name. It has only what the loss's `needs` name; the rest raises LookupError.

    `stage1` is the map after the last activation of stage 1, `stage1_pre` before it.
    """

    tensors: "Mapping[str, Tensor]"

    @property
    def logits(self) -> "Tensor":
        """[sample, class]."""
        return self._named("logits", "logits")

    @property
    def pooled(self) -> "Tensor":
        """Pooled features [sample, feature]: what the classifier takes."""
        return self._named("pooled", "pooled")

    @property
    def stages(self) -> "list[Tensor]":
        """The maps [sample, channel, height, width] at the end of each stage, in order."""
        self._named("stage1", "stages")
        return [tensor for name, tensor in self.tensors.items() if name.startswith("stage") and name[5:].isdecimal()]

    @property
    def pre(self) -> "list[Tensor]":
        """These maps before their last activation."""
        self._named("stage1_pre", "pre")
        return [tensor for name, tensor in self.tensors.items() if name.endswith("_pre")]

    def _named(self, name: str, need: str) -> "Tensor":
        if name not in self.tensors:
            raise LookupError(f"no {name} here: the loss's `needs` should have {need!r}")
        return self.tensors[name]


@dataclass(frozen=True)
class Batch:
    """A batch as the network in training and one guide see it: the same samples in the same views."""

    labels: "Tensor"  # [sample]
    samples: "Tensor"  # [sample]: their numbers in the data set
    net: Outputs
    guide: Outputs = Outputs({})
    epoch: int = 0  # from 0
    gather: "Callable[[Tensor], Tensor]" = lambda rows: rows  # the rows of all ranks; under torchrun each has its share


@dataclass(frozen=True)
class Learner:
    """A network for which a loss is built: the network in training, or its guide."""

    network: "nn.Module"
    outputs: Outputs  # of one image; only their shapes mean something
    head: "nn.Module | None" = None  # the last layer, whose input is `pooled`; None if the loss does not read `pooled`


@dataclass(frozen=True)
class LossContext:
    """What a loss is built for."""

    net: Learner
    guide: Learner  # for a loss without a guide: the network itself
    labels: "Tensor"  # of all samples [sample], with those of the validation split
    train: "Tensor"  # the training samples' numbers [sample]


class LossSpec(Frozen, ABC):
    """The loss of a stage. Its fields are hyperparameters and are hashed; `name` is its entry in kd.losses.LOSSES."""

    name: str
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})  # empty: the loss needs no guide
    option: ClassVar[str] = ""  # its option of `loss`; empty: called like the loss
    growth: ClassVar[str] = ""  # the field that says in how many epochs its weight grows; 0: it does not
    usual: ClassVar[bool] = False  # a loss of the two papers: tables and names of runs do without its name
    smaller_guide: ClassVar[bool] = False  # whether its guide is to be smaller than the network, and has little weight

    @abstractmethod
    def build(self, context: LossContext) -> "Callable[[Batch], dict[str, Tensor]]":
        """The function that is called with each batch. It returns `loss` and its parts: scalars, which are logged.

        If it is an nn.Module, its parameters are trained with the network, and the checkpoints have its state. At the
        end of the stage it is discarded. It is initialised from torch's global generator, which has the stage's seed.
        """

    @property
    def guided(self) -> bool:
        """Whether the loss needs a guide."""
        return bool(self.needs)

    @property
    def label_weight(self) -> float:
        """The weight in the loss of the part `ce`, the labels' cross-entropy: the field `ce`, or 1 without it.

        A guided loss that weights its `ce` otherwise overrides this. The guide's share of the gradient depends on it.
        """
        return float(getattr(self, "ce", 1.0))

    def ramp(self, epoch: int) -> float:
        """The factor of the guide's term in an epoch, from 0: min((epoch + 1)/n, 1), with n the field `growth`."""
        epochs = getattr(self, self.growth) if self.growth else 0
        return min((epoch + 1) / epochs, 1.0) if epochs else 1.0

    @property
    def live(self) -> bool:
        """Whether the guide has to run at every step: maps are too large to be cached."""
        return bool(self.needs & {"stages", "pre"})

    @property
    def settings(self) -> str:
        """The hyperparameters as on the command line, "T=4 lambda=0.5"; "" for a loss without numbers."""
        fields = {name: value for name, value in self.dump().items() if name != "name"}
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in fields.items()}
        return " ".join(f"{name}={str(value).lower()}" for name, value in shown.items())

    @property
    def described(self) -> str:
        """The loss by its option, and its hyperparameters: "dkd T=4 alpha=1 beta=8"."""
        return f"{self.option or self.name} {self.settings}".strip()

    @property
    def shown(self) -> str:
        """The same in tables, where the usual losses have no name."""
        return self.settings if self.usual else self.described

    @property
    def label(self) -> str:
        """The same in short, for names of runs and for figures: "T4 λ0.5"."""
        return self.shown.replace("=", "")


class Formula(LossSpec):
    """A loss without parameters of its own: a function of the batch."""

    @abstractmethod
    def __call__(self, batch: Batch) -> "dict[str, Tensor]":
        """The loss and its parts."""

    def build(self, context: LossContext) -> "Callable[[Batch], dict[str, Tensor]]":
        return self


class Stage(Frozen):
    """One network that is trained once. Its loss may read what guides say: the networks of other stages."""

    role: Role
    model: str
    loss: SerializeAsAny[LossSpec]
    dataset: DatasetSpec
    train: TrainSpec
    seed: int = Field(ge=0)
    guide: "Source | None" = None
    others: Annotated["tuple[Source, ...]", Neutral(())] = ()  # further guides, of earlier stages
    weights: Annotated[tuple[float, ...], Neutral(())] = ()  # of `guides`; they sum to 1; empty: equal
    preprocessing: Annotated[Normalization | None, Neutral(None)] = None  # the network's own; null: the data set's
    init: Annotated[str | None, Neutral(None)] = None  # sha256 of the file of initial weights; null: drawn by the seed
    freeze: Annotated[Literal["backbone"] | None, Neutral(None)] = None  # what keeps its initial weights

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        who = f"{self.role} {self.model}"
        if self.weights and len(self.weights) != len(self.guides):
            raise ValueError(f"{who}: {len(self.guides)} guides need as many weights (got {len(self.weights)})")
        if problem := split_problem(self.train, self.dataset.validated):
            raise ValueError(f"{who}: {problem}")
        if (self.guide is not None) != self.loss.guided:
            raise ValueError(f"{who}: {self.loss.name} {'reads no' if self.guide else 'needs a'} guide")
        if self.freeze and self.loss.needs - {"logits"}:
            raise ValueError(
                f"{who}: freeze={self.freeze} needs a loss on logits (loss={self.loss.name} reads features)"
            )
        if self.freeze and not self.init:
            raise ValueError(f"{who}: freeze={self.freeze} needs initial weights: init=<file> or init=pretrained")
        return self

    @cached_property
    def key(self) -> str:
        """16 hex digits. Two stages have the same key if and only if their specs are equal apart from the roles.

        A role does not change the weights: trained_teacher's reference can be the same stage as scratch's student.
        """
        identity = {**self.identity(), "guide": self.guide.key if self.guide else None}
        return _key({**identity, **({"others": [other.key for other in self.others]} if self.others else {})})

    @cached_property
    def backbone(self) -> str:
        """16 hex digits: a hash of all that decides what a frozen backbone makes of an image."""
        names = {"model", "init", "preprocessing", "dataset"}
        return hashed({"backbone": True, **{k: v for k, v in self.identity().items() if k in names}})

    def in_fp32(self) -> "Stage":
        """The same stage, computed in fp32."""
        fields = {name: getattr(self, name) for name in Stage.model_fields}
        return Stage(**{**fields, "train": TrainSpec(**{**self.train.model_dump(), "precision": "fp32"})})

    @property
    def guides(self) -> "list[Source]":
        """All guides, in the order of training."""
        return [*self.others, *([self.guide] if self.guide else [])]

    @property
    def chain(self) -> "list[Source]":
        """The chains of the guides, then this stage: the order of training."""
        above = [source for guide in self.guides for source in guide.chain]
        return [*{source.key: source for source in above}.values(), self]

    @property
    def input_size(self) -> int:
        """The size of the images that the network computes on, in pixels."""
        return self.normalize.size or self.dataset.image_size

    @property
    def normalize(self) -> Normalization:
        """The normalisation of the network's images."""
        return self.preprocessing or Normalization(mean=self.dataset.mean, std=self.dataset.std)


class Given(Frozen):
    """A trained network from another project, used as a guide. The hash of its file identifies the weights."""

    role: Role
    model: str
    sha256: str
    part: Part | None = None  # which network, if the file holds several
    entry: Annotated[str | None, Neutral(None)] = None  # the keys that lead to its weights in the file: ema.model
    normalize: Normalization  # as in its own training
    dataset: DatasetSpec  # the data on which it is evaluated and used as a guide

    @cached_property
    def key(self) -> str:
        """16 hex digits: a hash of the weights' file, the normalisation and the data. The path is not part of it."""
        return _key({"given": True, **self.identity()})

    @property
    def input_size(self) -> int:
        """The size of the images that the network computes on, in pixels."""
        return self.normalize.size or self.dataset.image_size

    @property
    def chain(self) -> "list[Source]":
        """This network alone: it has no guide."""
        return [self]


Source = Stage | Given  # a network of a chain: trained here, or given


def joined(chain: Sequence[Source], *, student_first: bool = False) -> str:
    """The networks of a chain in the order of training: "resnet20 → resnet8"; "resnet20 + vgg8 → resnet8" if both teach
    the student. With `student_first` from the student on: "resnet8 ← resnet20".
    """
    guided = [isinstance(source, Stage) and bool(source.guides) for source in chain]
    marks, names = [" → " if each else " + " for each in guided[1:]], [source.model for source in chain]
    if student_first:
        marks, names = [mark.replace("→", "←") for mark in marks[::-1]], names[::-1]
    return names[0] + "".join(mark + name for mark, name in zip(marks, names[1:], strict=True))


def split_problem(train: TrainSpec, validated: bool) -> str | None:
    """The problem, if an epoch is to be chosen on an empty validation split; otherwise None."""
    if train.select == "best_val" and not validated:
        return "train.select=best_val needs dataset.val_fraction above 0; or use train.select=last"
    return None


def _key(identity: dict[str, Any]) -> str:
    decides = {"format": FORMAT, **identity}
    del decides["role"]
    return hashed(decides)
