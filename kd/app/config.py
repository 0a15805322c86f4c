"""The configuration as typed objects, and plan(), which makes its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, InstanceOf, Strict, ValidationError

from kd.app.networks import Freeze, InitText, ModelConfig, NetworkConfig, TeacherConfig, initial_file, preprocessing
from kd.core.hardware import cpu_count, resolve_device, resolve_precision
from kd.core.recipes import GAMMA, RECIPES, USUAL, Released, Task, recipe, released
from kd.core.settings import OnNaN, TrainOverrides, TrainSpec
from kd.core.spec import Frozen, KnownError, Text, explain
from kd.core.stage import DatasetSpec, Given, LossSpec, Normalization, Role, Seed, Source, Stage
from kd.datasets import DATASETS, LARGE, DatasetConfig
from kd.losses import LOSSES, CrossEntropy
from kd.methods.method import AssistedMethod, Ends, Link, LossChoice, Method
from kd.methods.scratch import Scratch
from kd.models import MODELS, own_size
from kd.reporting.results import Objective
from kd.reporting.tracking import TrackingSpec
from kd.store import place
from kd.store.foreign import fingerprint
from kd.training.ranks import world
from kd.training.workplace import RuntimeSpec

Vary = Literal["student", "chain"]  # whose seeds differ between replicates: the student's alone, or all of the chain

_USUAL_SIZE = 224  # pixels of a photograph for networks without a size of their own
_Section = TypeVar("_Section", bound=Frozen)


class TrainConfig(TrainOverrides):
    """The `train` section: a recipe, and overrides for the whole chain."""

    recipe: str
    on_nan: OnNaN = "stop"


class SweepSpec(Frozen):
    """What a search maximises, and how."""

    objective: Objective = "val_acc"  # the mean over the job's students
    join: bool = False  # add trials to a study that another process leads
    prune: bool = False  # end a trial early if it is behind the others at the same epoch


def _listed(keys: Any) -> Any:
    """One key may stand without brackets."""
    return [keys] if isinstance(keys, str) else keys


class Config(Frozen):
    """The whole configuration of run.py, validated."""

    model: ModelConfig
    teacher: TeacherConfig
    dataset: DatasetConfig
    method: InstanceOf[Method]
    loss: LossChoice  # how the student learns from its guide
    assistant_loss: LossChoice
    init: dict[Text, InitText] = Field({})  # initial weights of the chain's other networks, by their names
    freeze: tuple[Text, ...] = ()  # those of which only the classifier is trained
    mode: Literal["paper", "reference"]
    train: TrainConfig
    tracking: TrackingSpec
    runtime: RuntimeSpec
    sweep: SweepSpec
    seed: Seed
    replicates: Annotated[int, Field(ge=1, le=1000)]  # limited, because all are planned at once
    vary: Vary  # what differs between them
    baseline: bool  # the same students alone, beside the run
    dry_run: Annotated[bool, Strict()]
    why: Annotated[tuple[Text, ...], BeforeValidator(_listed)] = ()  # keys of which a run says where they come from

    @property
    def where(self) -> str:
        """Data set and mode, as tables name them."""
        return f"{self.dataset.title}, mode {self.mode}"

    @property
    def store_root(self) -> Path:
        """The folder of finished stages."""
        return place(self.runtime.store, "store")

    @property
    def data_root(self) -> Path:
        """The folder of data sets."""
        return place(self.runtime.data, "data")

    @property
    def workers(self) -> int:
        """Threads that decode images."""
        return self.runtime.workers or cpu_count()

    @property
    def image_size(self) -> int:
        """The size of photographs where dataset.image_size is not set: the student's own."""
        return self.model.image_size or own_size(self.model.name) or _USUAL_SIZE

    @property
    def released(self) -> Released | None:
        """The released code that this run reproduces. It depends on the student's family; None in mode=paper."""
        return released(self.mode, self.train.recipe, MODELS[self.model.name].family)


def plan(config: Config, dataset: DatasetSpec) -> list[Stage]:
    """The student's stage for each replicate, at seeds seed, seed+1, …; with vary=chain the whole chain's seeds go on.

    Raises KnownError if the parts of a stage do not fit together, or if the teacher's checkpoint cannot be read.
    """
    if (code := config.released) is not None:
        seen = {"augment": code.augment, "mean": code.mean, "std": code.std}
        dataset = DatasetSpec(**{**dataset.model_dump(), **seen})
    given = None
    if config.teacher.file is not None:
        check_system(config, "teacher", config.teacher.name)
        given = _given_teacher(config.teacher, dataset, fingerprint(config.teacher.file))
    try:
        return [_student(_replicate(config, number), dataset, given) for number in range(config.replicates)]
    except ValidationError as error:
        raise KnownError("\n".join(explain(error))) from error


def seed_keys(vary: Vary, assisted: bool) -> list[str]:
    """The keys of the seeds that vary, of a chain with settings for assistants or without."""
    whole = ["teacher.seed", *(["method.assistant.seed"] if assisted else [])]
    return ["seed", *(whole if vary == "chain" else [])]


def _replicate(config: Config, number: int) -> Config:
    """The configuration of one student: the seeds that vary are raised by its number."""
    for key in seed_keys(config.vary, isinstance(config.method, AssistedMethod)):
        config = _raised(config, key, number)
    return config


def _raised(section: _Section, key: str, by: int) -> _Section:
    """The section with the number at a key, such as method.assistant.seed, raised."""
    name, _, rest = key.partition(".")
    value = getattr(section, name)
    return section.model_copy(update={name: _raised(value, rest, by) if rest else value + by})


def plan_alone(config: Config, dataset: DatasetSpec, students: Sequence[Stage]) -> list[Stage]:
    """The same students alone, as method=scratch plans them. None without baseline=true, or if no network teaches them.

    Raises KnownError as plan() does.
    """
    if not config.baseline or not students[0].guides:
        return []
    return plan(config.model_copy(update={"method": Scratch(name="scratch")}), dataset)


def _student(config: Config, dataset: DatasetSpec, given: Given | None) -> Stage:
    """The last stage of the method's chain."""
    links, made = chain(config), list[Source]()
    for i, link in enumerate(links):
        above = links[max(i - 1, 0) : i] if link.guides is None else link.guides
        # By identity: two assistants of a chain may be equal.
        guides = [made[j] for guide in above for j in range(i) if links[j] is guide] if link.loss.guided else []
        if given is not None and link.replaceable:
            made.append(given)
            continue
        begun = beginning(config, link.role, link.model)
        train = train_spec(config, link.role, link.model, begun.task(dataset))
        made.append(
            Stage(
                role=link.role,
                model=link.model,
                loss=smoothed(link.loss, train),
                dataset=dataset,
                train=TrainSpec(**{**train.model_dump(), "label_smoothing": 0}),  # it is the loss's now
                seed=link.seed,
                guide=guides[-1] if guides else None,
                others=tuple(guides[:-1]),
                weights=_shares(link.weights) if len(guides) > 1 else (),
                preprocessing=preprocessing(link.model, begun.image_size, dataset),
                init=None if begun.file is None else fingerprint(begun.file, begun.key),
                freeze=begun.freeze,
            )
        )
    assert isinstance(made[-1], Stage)  # a method's chain ends in its student
    return made[-1]


@dataclass(frozen=True)
class Beginning:
    """How a network of the chain begins: a file of initial weights, what is frozen, and the size of its images."""

    file: Path | None
    freeze: Freeze | None
    image_size: int | None
    key: str  # of the configuration, that names the file

    def task(self, dataset: DatasetSpec) -> Task:
        """What the network's recipe may depend on."""
        images = dataset.train_images or USUAL.images
        return Task(images, dataset.image_size, self.file is not None, self.freeze is not None)


def beginning(config: Config, role: Role, model: str) -> Beginning:
    """How a network begins: by its own section if it is an end of the chain, otherwise by `init` and `freeze`.

    Raises KnownError for published weights that cannot be downloaded.
    """
    ends: dict[str, NetworkConfig] = {"student": config.model, "teacher": config.teacher}
    own = ends.get(role)
    if own is None or own.name != model:
        init, freeze, size, key = config.init.get(model), model in config.freeze, None, f"init.{model}"
        kept: Freeze | None = "backbone" if freeze else None
    else:
        init, kept, size, key = own.init, own.freeze, own.image_size, f"{'model' if role == 'student' else role}.init"
    file = None if init is None else initial_file(init, model, config.data_root, key)
    return Beginning(file, kept, size, key)


def initial_files(config: Config) -> dict[str, Path]:
    """The files of initial weights of the chain's networks, by their sha256."""
    begun = [beginning(config, role, model) for role, model in trained_networks(config)]
    return {fingerprint(each.file, each.key): each.file for each in begun if each.file is not None}


def smoothed(loss: LossSpec, train: TrainSpec) -> LossSpec:
    """The loss of a network that learns from labels alone, with the recipe's label smoothing."""
    if not train.label_smoothing or loss != CrossEntropy():
        return loss
    return LOSSES["label_smoothing"].model_validate({"smoothing": train.label_smoothing})


def _shares(weights: tuple[float, ...]) -> tuple[float, ...]:
    """The weights divided by their sum. Equal weights are none, so that both spellings have one key."""
    return () if len(set(weights)) <= 1 else tuple(weight / sum(weights) for weight in weights)


def chain(config: Config) -> list[Link]:
    """The networks that the method declares, in the order of training."""
    ends = Ends(
        student=config.model.name,
        teacher=config.teacher.name,
        seed=config.seed,
        teacher_seed=config.teacher.seed,
        loss=config.loss,
        assistant_loss=config.assistant_loss,
        reduction=config.released.reduction if config.released else "batchmean",
    )
    return config.method.chain(ends)


def trained_networks(config: Config) -> list[tuple[Role, str]]:
    """Role and name of the networks that a run trains, in order. It needs no files, data or recipes."""
    given = config.teacher.file is not None
    return [(link.role, link.model) for link in chain(config) if not (given and link.replaceable)]


def train_spec(config: Config, role: Role, model: str, task: Task = USUAL) -> TrainSpec:
    """The training settings of a network: its recipe, overridden by `train`, then by the role's own section.

    Raises KnownError if there is no recipe, or if settings do not fit together.
    """
    who = f"{role} {model}"
    check_system(config, role, model)
    name = recipe_name(config.mode, config.train.recipe)
    name = for_photos(name, task.image_size) or name
    family, own = _family(config, role, model), MODELS[model].recipe
    given = _overrides(config, role)
    task = replace(task, epochs=given.get("epochs"))
    known = {**recipe(config.mode, name, family, model, own, task), "ranks": 1}
    if given["ranks"] != world().size:
        asked, here = given["ranks"], "1 rank" if world().size == 1 else f"{world().size} ranks"
        raise KnownError(f"{who}: train.ranks={asked} needs torchrun --nproc_per_node={asked} (got {here})")
    if code := config.released:
        changed = sorted(key for key in given.keys() - code.free if given[key] != known[key])
        if kept := [f"train.{key}={known[key]} (got {given[key]})" for key in changed]:
            raise KnownError(f"{who}: mode=reference needs the released code's {', '.join(kept)}")
    if given.get("optimizer", known["optimizer"]) != known["optimizer"] and "lr" not in given:
        raise KnownError(
            f"{who}: train.optimizer={given['optimizer']} needs a train.lr of its own "
            f"(the recipe's {known['lr']:g} is for {known['optimizer']})"
        )
    settings = _without_idle(known | given)
    device = resolve_device(config.runtime.device)
    if settings["precision"] == "auto" and device == "cpu" and MODELS[model].slow_in_bf16():
        settings["precision"] = "fp32"
    settings["precision"] = resolve_precision(settings["precision"], device)
    try:
        return TrainSpec(**settings)
    except ValidationError as error:
        raise KnownError("\n".join(f"{who}: {problem}" for problem in explain(error))) from error


def for_photos(name: str, image_size: int) -> str | None:
    """The recipe that takes the place of a folder's recipe where its images are photographs; None if none does."""
    return "photos" if name == "folder" and image_size > LARGE else None


def recipe_name(mode: str, name: str) -> str:
    """The recipe of `train=<name>`. In mode=paper, a data set without its own recipe names the one that it uses."""
    without = mode == "paper" and name not in RECIPES[mode] and name in DATASETS
    return DATASETS[name].recipe if without else name


def _family(config: Config, role: Role, model: str) -> str:
    """The family whose recipe trains a network: its own. Some released code trains the teacher by the student's."""
    by_student = config.released is not None and config.released.teacher_by_student and role == "teacher"
    return MODELS[config.model.name if by_student else model].family


def _overrides(config: Config, role: Role) -> dict[str, Any]:
    """The configuration's training settings for a role: `train`, overridden by the role's own section."""
    own: dict[str, TrainOverrides] = {"student": config.model.train, "teacher": config.teacher.train}
    given: dict[str, Any] = {"ranks": world().size}
    for overrides in (config.train, own.get(role, TrainOverrides())):
        given |= overrides.model_dump(exclude_none=True, exclude={"recipe", "on_nan"})
    return given


def _without_idle(settings: dict[str, Any]) -> dict[str, Any]:
    """Reset settings that the optimiser or the schedule does not read, so that they do not change the key."""
    usual = {"momentum": 0.0, "nesterov": False, "milestones": (), "gamma": GAMMA}
    return settings | {name: usual[name] for name in idle(settings)}


def idle(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that the optimiser or the schedule does not read, with what does not read them."""
    found = dict[str, str]()
    if settings["optimizer"] in ("adam", "adamw"):
        found |= dict.fromkeys(("momentum", "nesterov"), f"train.optimizer={settings['optimizer']}")
    if settings["schedule"] != "step":
        found |= dict.fromkeys(("milestones", "gamma"), f"train.schedule={settings['schedule']}")
    return found


def check_system(config: Config, role: Role, model: str) -> None:
    """Raise KnownError for a network that the released code of mode=reference does not have."""
    code = config.released
    if code is not None and MODELS[model].family not in code.families:
        raise KnownError(
            f"{role} {model}: {code.system}'s released code, which has the student {config.model.name}, does not have "
            "this network; mode=paper allows any pair"
        )


def _given_teacher(teacher: TeacherConfig, dataset: DatasetSpec, sha256: str) -> Given:
    known = preprocessing(teacher.name, teacher.image_size, dataset)
    own, chosen = known or Normalization(mean=dataset.mean, std=dataset.std), teacher.normalize
    sizes = {"size": own.size, "interpolation": own.interpolation}  # teacher.normalize names a mean and a deviation
    return Given(
        role="teacher",
        model=teacher.name,
        sha256=sha256,
        part=teacher.part,
        entry=teacher.key,
        normalize=own if chosen is None else chosen.model_copy(update={} if chosen.size else sizes),
        dataset=dataset,
    )
