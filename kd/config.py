"""The configuration as typed objects, and plan(): the stages that it asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, ValidationError

from kd.datasets import specify
from kd.datasets.base import DatasetConfig, Facts
from kd.given import fingerprint, normalizations
from kd.hardware import cpu_count, resolve_device, resolve_precision
from kd.methods.base import Method
from kd.models import MODELS, NetworkName
from kd.problems import explain
from kd.ranks import world
from kd.recipes import GAMMA, Released, recipe, released
from kd.spec import Frozen, KnownError, PathText
from kd.stage import (
    DatasetSpec,
    Given,
    Normalization,
    OnNaN,
    Part,
    Planner,
    Role,
    RuntimeSpec,
    Seed,
    Stage,
    SweepSpec,
    TrainOverrides,
    TrainSpec,
)
from kd.store import place
from kd.tracking import TrackingSpec

# Stands for images that nobody has looked at yet, where planning asks nothing of them.
ANY_IMAGES = Facts(2, 1, (0, 0, 0), (1, 1, 1))


class ModelConfig(Frozen):
    """The `model` section: the student's network, and what is special about its training."""

    name: NetworkName
    train: TrainOverrides


def _named(value: Any) -> Any:
    known = normalizations()
    if isinstance(value, str) and value not in known:
        raise ValueError(f"should be one of {', '.join(known)}, or {{mean: [r, g, b], std: [r, g, b]}}")
    return known[value] if isinstance(value, str) else value


class TeacherConfig(Frozen):
    """The `teacher` section; the seed is the reference's too."""

    name: NetworkName
    seed: Seed
    train: TrainOverrides
    checkpoint: PathText | None = None  # somebody's weights: no teacher is trained
    part: Part | None = None  # which network, in a file of two
    normalize: Annotated[Normalization | None, BeforeValidator(_named)] = None  # null: the data set's
    min_acc: float | None = Field(None, ge=0, le=100)  # % on the test set that anything is trained on it for

    @property
    def file(self) -> Path | None:
        """The checkpoint's path."""
        return None if self.checkpoint is None else Path(os.path.expanduser(self.checkpoint))


class TrainConfig(TrainOverrides):
    """The `train` section: a recipe, and overrides for the whole chain."""

    recipe: str
    on_nan: OnNaN = "stop"


class Config(Frozen):
    """Everything that run.py is told, valid."""

    model: ModelConfig
    teacher: TeacherConfig
    dataset: DatasetConfig
    method: InstanceOf[Method]
    mode: Literal["paper", "reference"]
    train: TrainConfig
    tracking: TrackingSpec
    runtime: RuntimeSpec
    sweep: SweepSpec
    seed: Seed
    replicates: Annotated[int, Field(ge=1, le=1000)]  # planned all at once
    dry_run: bool

    @property
    def store_root(self) -> Path:
        """Where finished stages lie."""
        return place(self.runtime.store, "store")

    @property
    def data_root(self) -> Path:
        """Where data sets lie."""
        return place(self.runtime.data, "data")

    @property
    def workers(self) -> int:
        """Threads that decode images."""
        return self.runtime.workers or cpu_count()

    @property
    def released(self) -> Released | None:
        """The released code that this run reproduces, told by the student's family; None in mode=paper."""
        return released(self.mode, self.train.recipe, MODELS[self.model.name].family)


def train_spec(config: Config, role: Role, model: str) -> TrainSpec:
    """A network's training: its family's recipe, then `train`, then what the role overrides.

    Raises KnownError where there is no recipe or its parts do not fit together.
    """
    family, code = MODELS[model].family, config.released
    _check_system(config, role, model)
    if code is not None and code.teacher_by_student and role == "teacher":
        family = MODELS[config.model.name].family
    known = {**recipe(config.mode, config.train.recipe, family), "ranks": 1}
    ranks = world().size
    given: dict[str, Any] = {"ranks": ranks}
    own: dict[str, TrainOverrides] = {"student": config.model.train, "teacher": config.teacher.train}
    for overrides in (config.train, own.get(role, TrainOverrides())):
        given |= overrides.model_dump(exclude_none=True, exclude={"recipe", "on_nan"})
    if given["ranks"] != ranks:
        asked, here = given["ranks"], "1 rank" if ranks == 1 else f"{ranks} ranks"
        raise KnownError(f"{role} {model}: train.ranks={asked} is for torchrun --nproc_per_node={asked} (got {here})")
    changed = {key for key in given.keys() - code.free if given[key] != known[key]} if code else set()
    if changed:
        kept = [f"train.{key}={known[key]} (got {given[key]})" for key in sorted(changed)]
        raise KnownError(f"{role} {model}: mode=reference keeps the released code's {', '.join(kept)}")
    settings = known | given
    if settings["optimizer"] != known["optimizer"] and "lr" not in given:
        raise KnownError(
            f"{role} {model}: train.optimizer={settings['optimizer']} needs a train.lr of its own "
            f"(the recipe's {known['lr']:g} is for {known['optimizer']})"
        )
    # What the optimiser or the schedule does not read is no difference, and must not make one in the key.
    if settings["optimizer"] == "adam":
        settings |= {"momentum": 0.0, "nesterov": False}
    if settings["schedule"] != "step":
        settings |= {"milestones": (), "gamma": GAMMA}
    settings["precision"] = resolve_precision(settings["precision"], resolve_device(config.runtime.device))
    try:
        return TrainSpec(**settings)
    except ValidationError as error:
        raise KnownError("\n".join(f"{role} {model}: {problem}" for problem in explain(error))) from error


def _check_system(config: Config, role: Role, model: str) -> None:
    code = config.released
    if code is not None and MODELS[model].family not in code.families:
        raise KnownError(
            f"{role} {model}: mode=reference runs one system's code, and {code.system}'s ({config.model.name}) "
            "has no such network; mode=paper mixes freely"
        )


def plan(config: Config, dataset: DatasetSpec) -> list[Stage]:
    """The student's stage for each replicate, at seeds seed, seed+1, …; all stand on one chain."""
    if (code := config.released) is not None:
        seen = {"augment": code.augment, "mean": code.mean, "std": code.std}
        dataset = DatasetSpec(**{**dataset.model_dump(), **seen})
    given = None
    if config.teacher.file is not None:
        _check_system(config, "teacher", config.teacher.name)
        given = _given_teacher(config.teacher, dataset, fingerprint(config.teacher.file))
    seeds = range(config.seed, config.seed + config.replicates)
    planners = [_planner(config, dataset, seed, partial(train_spec, config), given) for seed in seeds]
    try:
        return [config.method.plan(planner) for planner in planners]
    except ValidationError as error:
        raise KnownError("\n".join(explain(error))) from error


def trained_networks(config: Config) -> list[tuple[Role, str]]:
    """The networks that a run trains, by role, oldest first; asks nothing of files, data or recipes."""
    found: list[tuple[Role, str]] = []

    def note(role: Role, model: str) -> TrainSpec:
        found.append((role, model))
        return TrainSpec(**{**recipe("paper", "cifar10", MODELS[model].family), "precision": "fp32", "select": "last"})

    dataset = specify(config.dataset, ANY_IMAGES)
    given = None if config.teacher.file is None else _given_teacher(config.teacher, dataset, sha256="")
    config.method.plan(_planner(config, dataset, config.seed, note, given))
    return found


def _planner(
    config: Config, dataset: DatasetSpec, seed: int, train: Callable[[Role, str], TrainSpec], given: Given | None
) -> Planner:
    return Planner(
        dataset=dataset,
        train=train,
        student_model=config.model.name,
        teacher_model=config.teacher.name,
        seed=seed,
        teacher_seed=config.teacher.seed,
        given_teacher=given,
        reduction=config.released.reduction if config.released else "batchmean",
    )


def _given_teacher(teacher: TeacherConfig, dataset: DatasetSpec, sha256: str) -> Given:
    return Given(
        role="teacher",
        model=teacher.name,
        sha256=sha256,
        part=teacher.part,
        normalize=teacher.normalize or Normalization(mean=dataset.mean, std=dataset.std),
        dataset=dataset,
    )
