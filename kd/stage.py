"""The unit of the project: a stage, one network trained once, addressed by all that decides its weights."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from kd.losses import CrossEntropy, Distill, Loss, Reduction
from kd.spec import Frozen, PathText

# The version of keys and weights: a change that moves either under unchanged settings raises it.
FORMAT = 1

Part = Literal["student", "teacher"]
Role = Literal["reference", "teacher", "assistant", "student"]
Precision = Literal["fp32", "bf16", "fp16", "fp64"]
Channels = tuple[float, float, float]
Seed = Annotated[int, Field(ge=0, le=10**15)]  # a whole number in every JSON
Deviation = Annotated[float, Field(gt=0)]
Augment = Literal["none", "crop_flip", "rotate_flip"]


def _fraction(milestone: float) -> float:
    if not 0 < milestone < 1:
        raise ValueError("should be a fraction of the epochs, between 0 and 1: 80 of 160 is 0.5")
    return milestone


# The settings of a training, each with its range; TrainSpec has all of them, TrainOverrides any.
# Upper bounds are where a slip of the keyboard begins, and arithmetic in 64 bits still holds.
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
BatchSize = Annotated[int, Field(ge=1, le=10_000_000)]
Optimizer = Literal["sgd", "adam"]
LearningRate = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
WeightDecay = Annotated[float, Field(ge=0)]
Schedule = Literal["constant", "step", "cosine"]
Milestones = tuple[Annotated[float, AfterValidator(_fraction)], ...]
Gamma = Annotated[float, Field(gt=0, le=1)]
Warmup = Annotated[int, Field(ge=0)]
Ranks = Annotated[int, Field(ge=1)]
OnNaN = Literal["stop", "retry_fp32"]  # a loss or weights that are not finite: no part of the experiment
Select = Literal["best_val", "last", "best_test", "best_test_batches"]


class DatasetSpec(Frozen):
    """Images as a stage sees them: which, how split, how augmented, how normalised. No path is part of it."""

    name: str
    content: str | None = None  # the hash of decoded images; the other data sets' names say it
    num_classes: int = Field(ge=2)
    image_size: int = Field(ge=1)  # pixels, height and width alike
    mean: Channels  # of pixels in [0, 1]
    std: Channels
    augment: Augment = "none"
    views: int | None = Field(None, ge=1)  # each sample keeps to this many of its views; null is all
    val_fraction: float = Field(0.1, ge=0, lt=1)
    split_seed: int = Field(0, ge=0)


class Normalization(Frozen):
    """The mean and standard deviation of pixels in [0, 1] that a network was trained under."""

    mean: Channels
    std: tuple[Deviation, Deviation, Deviation]

    def __str__(self) -> str:
        mean, std = ("/".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"


class TrainSpec(Frozen):
    """A training with everything resolved: recipe, overrides and `auto` are gone."""

    epochs: Epochs
    batch_size: BatchSize
    optimizer: Optimizer
    lr: LearningRate
    momentum: Momentum
    nesterov: bool
    weight_decay: WeightDecay
    schedule: Schedule
    milestones: Milestones  # fractions of the epochs, for `step`
    gamma: Gamma  # what each milestone multiplies the learning rate by
    warmup: Warmup  # epochs of linear increase at the start
    precision: Precision
    select: Select  # which epoch's weights are kept
    test_curve: bool  # record test accuracy every epoch, without selecting by it
    ranks: Ranks = 1  # processes that share a batch, each with BatchNorm of its own

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSpec":
        problems = []
        if self.nesterov and self.momentum == 0:
            problems.append("train.nesterov=true needs train.momentum above 0")
        if self.schedule == "step" and not self.milestones:
            problems.append("train.schedule=step needs train.milestones, e.g. [0.5,0.75]")
        if list(self.milestones) != sorted(set(self.milestones)):
            problems.append(f"train.milestones should increase (got {list(self.milestones)})")
        if self.warmup >= self.epochs and self.warmup:
            problems.append(f"train.warmup should be below train.epochs (got {self.warmup} of {self.epochs})")
        if self.batch_size < self.ranks:
            least = f"{self.ranks} ranks share each batch, so it should be at least {self.ranks}"
            problems.append(f"train.batch_size: {least} (got {self.batch_size})")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TrainOverrides(Frozen):
    """What the configuration says about a training; null leaves it to the recipe."""

    epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    optimizer: Optimizer | None = None
    lr: LearningRate | None = None
    momentum: Momentum | None = None
    nesterov: bool | None = None
    weight_decay: WeightDecay | None = None
    schedule: Schedule | None = None
    milestones: Milestones | None = None
    gamma: Gamma | None = None
    warmup: Warmup | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] | None = None
    select: Select | None = None
    test_curve: bool | None = None
    ranks: Ranks | None = None  # null: as many as torchrun starts


class Stage(Frozen):
    """One network trained once, by a loss that may look at the logits of a guide: another stage's network."""

    role: Role
    model: str
    loss: Loss
    dataset: DatasetSpec
    train: TrainSpec
    seed: int = Field(ge=0)
    guide: "Source | None" = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Stage":
        who = f"{self.role} {self.model}"
        if self.train.select == "best_val" and self.dataset.val_fraction == 0:
            raise ValueError(f"{who}: train.select=best_val needs dataset.val_fraction above 0; or choose last")
        if (self.guide is None) != isinstance(self.loss, CrossEntropy):
            raise ValueError(f"{who}: {self.loss.name} {'reads no' if self.guide else 'needs a'} guide")
        return self

    @cached_property
    def key(self) -> str:
        """16 hex digits that two stages share if and only if their specs agree, but for roles.

        A role decides nothing: trained_teacher's reference is scratch's student when all else agrees.
        """
        return _key({**self.dump(), "guide": self.guide.key if self.guide else None})

    def in_fp32(self) -> "Stage":
        """The same stage, computed in fp32."""
        fields = {name: getattr(self, name) for name in Stage.model_fields}
        return Stage(**{**fields, "train": TrainSpec(**{**self.train.model_dump(), "precision": "fp32"})})

    @property
    def chain(self) -> "list[Source]":
        """This stage and what it stands on, oldest first."""
        return [*(self.guide.chain if self.guide else []), self]

    @property
    def normalize(self) -> Normalization:
        """The statistics that the network sees its images by."""
        return Normalization(mean=self.dataset.mean, std=self.dataset.std)


class Given(Frozen):
    """Somebody else's finished network as a guide, its weights named by the hash of the file that holds them."""

    role: Role
    model: str
    sha256: str
    part: Part | None = None  # which one, in a file of several
    normalize: Normalization  # what it was trained under
    dataset: DatasetSpec  # what it is evaluated on, and guides on

    @cached_property
    def key(self) -> str:
        """16 hex digits that name the weights and how they are seen; the file's path decides nothing."""
        return _key({"given": True, **self.dump()})

    @property
    def chain(self) -> "list[Source]":
        """It stands on nothing."""
        return [self]


Source = Stage | Given  # what a network of a chain comes from


def _key(identity: dict[str, Any]) -> str:
    decides = {"format": FORMAT, **identity}
    del decides["role"]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("should be auto, cpu, cuda or cuda:<number>")
    return name


Objective = Literal["val_acc", "test_acc"]


class SweepSpec(Frozen):
    """What a search maximises, and how."""

    objective: Objective = "val_acc"  # the mean over the job's students
    join: bool = False  # add trials to a study that another process sweeps
    prune: bool = False  # end trials early that are behind others at the same epoch


class RuntimeSpec(Frozen):
    """Where and how fast a stage is trained: no part of the experiment, and so in no key."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    threads: int | None = Field(None, ge=1, le=1024)  # null: every processor this process may use
    workers: int | None = Field(None, ge=1, le=1024)  # threads that decode a folder of images; null as above
    store: PathText | None = None  # null: store/ in the repository; a path is taken from the working directory
    data: PathText | None = None  # null: data/ in the repository
    checkpoint_every: int = Field(10, ge=1)  # epochs between two checkpoints of an unfinished stage
    compile: bool | Literal["auto"] = "auto"  # of the training step; auto: where it pays back over the stage
    bank: bool = True  # keep the guides' logits on disk, for later epochs and runs
    retrain: bool = False
    trial: int | None = Field(None, ge=0)  # which of a search's trials this job is; the search tells it


@dataclass(frozen=True)
class Planner:
    """What a method needs to plan its chain; it fills in what all stages share.

    `train` gives a role's network its resolved settings; `reduction` is the KL's of every distilled stage.
    """

    dataset: DatasetSpec
    train: Callable[[Role, str], TrainSpec]
    student_model: str
    teacher_model: str
    seed: int
    teacher_seed: int
    given_teacher: Given | None = None
    reduction: Reduction = "batchmean"

    def distill(self, T: float, lam: float) -> Distill:
        """The loss of a distilled stage."""
        return Distill(T=T, lam=lam, reduction=self.reduction)

    def stage(self, role: Role, model: str, loss: Loss, seed: int, guide: Source | None = None) -> Stage:
        """A stage of any role."""
        train = self.train(role, model)
        return Stage(role=role, model=model, loss=loss, dataset=self.dataset, train=train, seed=seed, guide=guide)

    def reference(self, model: str) -> Stage:
        """The small network that a teacher looks at while it learns to teach."""
        return self.stage("reference", model, CrossEntropy(), self.teacher_seed)

    def teacher(self) -> Source:
        """The configured teacher: somebody's weights where they are given, else trained by cross-entropy."""
        return self.given_teacher or self.trained_teacher(CrossEntropy())

    def trained_teacher(self, loss: Loss, guide: Source | None = None) -> Stage:
        """The configured teacher, trained here."""
        return self.stage("teacher", self.teacher_model, loss, self.teacher_seed, guide)

    def student(self, loss: Loss, guide: Source | None = None) -> Stage:
        """The configured student, at the run's seed."""
        return self.stage("student", self.student_model, loss, self.seed, guide)
