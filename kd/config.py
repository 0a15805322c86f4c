"""The configuration as typed objects: parse() once, before anything else; then plan() the stages it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, InstanceOf, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from kd.datasets import DATASETS, specify
from kd.datasets.base import DatasetConfig, Facts
from kd.hardware import cpu_count, resolve_device, resolve_precision
from kd.methods import METHODS
from kd.methods.base import Method
from kd.models import MODELS, NetworkName
from kd.recipes import GAMMA, RECIPES, recipe
from kd.spec import Frozen, KnownError
from kd.stage import DatasetSpec, Planner, Role, RuntimeSpec, Stage, TrainOverrides, TrainSpec
from kd.store import place
from kd.tracking import TrackingSpec


class ModelConfig(Frozen):
    """The `model` section: the student's network, and what is special about its training."""

    name: NetworkName
    train: TrainOverrides


class TeacherConfig(Frozen):
    """The `teacher` section; the seed is the reference's too."""

    name: NetworkName
    seed: int = Field(ge=0)
    train: TrainOverrides


class TrainConfig(TrainOverrides):
    """The `train` section: a recipe, and overrides for the whole chain."""

    recipe: str


class Config(Frozen):
    """Everything that run.py is told, valid."""

    model: ModelConfig
    teacher: TeacherConfig
    dataset: DatasetConfig
    method: InstanceOf[Method]
    mode: Literal["paper"]
    train: TrainConfig
    tracking: TrackingSpec
    runtime: RuntimeSpec
    seed: Annotated[int, Field(ge=0)]
    replicates: Annotated[int, Field(ge=1)]
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


def parse(cfg: DictConfig) -> Config:
    """The configuration, checked; nothing in it is changed.

    Raises KnownError with every problem found, one a line.
    """
    tree = plain(cfg)
    sections: dict[str, Any] = {}
    problems = [f"{name}: unknown key" for name in tree.keys() - Config.model_fields.keys()]
    for name, kind in get_type_hints(Config, include_extras=True).items():
        if name not in Config.model_fields:
            continue
        try:
            check = _method if name == "method" else TypeAdapter(kind).validate_python
            sections[name] = check(tree.get(name))
        except ValidationError as error:
            problems += explain(error, name)
        except KnownError as error:
            problems.append(str(error))
    problems += [problem for rule in (_dataset, _training) for problem in rule(sections)]
    if problems:
        raise KnownError("\n".join(dict.fromkeys(problems)))
    return Config(**sections)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as dictionaries with every interpolation resolved."""
    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise KnownError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return dict(tree)


def train_spec(config: Config, role: Role, model: str) -> TrainSpec:
    """A network's training: its family's recipe, then `train`, then what the role overrides.

    Raises KnownError where there is no recipe or its parts do not fit together.
    """
    known = recipe(config.mode, config.train.recipe, MODELS[model].family)
    given: dict[str, Any] = {}
    own: dict[str, TrainOverrides] = {"student": config.model.train, "teacher": config.teacher.train}
    for overrides in (config.train, own.get(role, TrainOverrides())):
        given |= overrides.model_dump(exclude_none=True, exclude={"recipe"})
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


def plan(config: Config, dataset: DatasetSpec) -> list[Stage]:
    """The student's stage for each replicate, at seeds seed, seed+1, …; all stand on one chain."""
    students = []
    for seed in range(config.seed, config.seed + config.replicates):
        planner = Planner(
            dataset=dataset,
            train=lambda role, model: train_spec(config, role, model),
            student_model=config.model.name,
            teacher_model=config.teacher.name,
            seed=seed,
            teacher_seed=config.teacher.seed,
        )
        try:
            students.append(config.method.plan(planner))
        except ValidationError as error:
            raise KnownError("\n".join(explain(error))) from error
    return students


def _method(tree: Any) -> Method:
    name = tree.get("name") if isinstance(tree, dict) else tree
    if name not in METHODS:
        raise KnownError(f"method.name: should be one of {', '.join(METHODS)} (got {name!r})")
    return METHODS[name].model_validate(tree)


def _dataset(sections: dict[str, Any]) -> Iterator[str]:
    if "dataset" in sections:
        dataset: DatasetConfig = sections["dataset"]
        if dataset.name not in DATASETS:
            yield f"dataset.name: should be one of {', '.join(DATASETS)} (got {dataset.name!r})"
        elif (entry := DATASETS[dataset.name]).facts is None and entry.home is None and dataset.root is None:
            yield f"dataset.root: dataset={dataset.name} needs the path of its images, root/{{train,test}}/<class>/"
        elif entry.facts is not None and dataset.root is not None:
            readers = " and ".join(f"dataset={name}" for name in DATASETS if DATASETS[name].facts is None)
            yield f"dataset.root: is read by {readers} alone (got {dataset.root!r} with dataset={dataset.name})"


def _training(sections: dict[str, Any]) -> Iterator[str]:
    """Recipes and settings that do not fit together, of every stage where the method is known, else of the two ends."""
    if not {"mode", "train", "model", "teacher", "runtime"} <= sections.keys():
        return
    if sections["train"].recipe not in RECIPES[sections["mode"]]:
        known = ", ".join(RECIPES[sections["mode"]])
        yield f"train.recipe: should be one of {known} (got {sections['train'].recipe!r})"
        return
    if sections.keys() == Config.model_fields.keys():
        try:  # planning asks nothing of the data but its place
            config = Config(**sections)
            plan(config, specify(config.dataset, Facts(2, 1, (0, 0, 0), (1, 1, 1))))
            return
        except KnownError as error:
            yield str(error)
    partial = Config.model_construct(**sections)
    ends: list[tuple[Role, str]] = [("teacher", sections["teacher"].name), ("student", sections["model"].name)]
    for role, model in ends:
        try:
            train_spec(partial, role, model)
        except KnownError as error:
            yield str(error)


_MESSAGES = {
    "greater_than": "should be above {gt:g}",
    "greater_than_equal": "should be at least {ge:g}",
    "less_than": "should be below {lt:g}",
    "less_than_equal": "should be at most {le:g}",
    "literal_error": "should be {expected}",
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "too_short": "should have at least {min_length} entries",
    "finite_number": "should be a finite number",
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "tuple": "a list",
    "model": "a group of keys",
}


def explain(error: ValidationError, section: str = "") -> list[str]:
    """pydantic's verdict, a line a problem: the key as the command line has it, what would be right, what was given."""
    found = error.errors()
    places = [details["loc"] for details in found]

    def is_consequence(place: tuple[int | str, ...]) -> bool:  # a list is too short where its entries are wrong
        return any(other != place and other[: len(place)] == place for other in places)

    return [_line(details, section) for details in found if not is_consequence(details["loc"])]


def _line(details: ErrorDetails, section: str) -> str:
    key = section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"])
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        text = str(context["error"])
    elif kind in _MESSAGES:
        text = _MESSAGES[kind].format(**context)
    else:
        expected = _TYPES.get(kind.split("_")[0])
        text = f"should be {expected}" if expected else details["msg"]
    given = details["input"]
    shown = "" if isinstance(given, (dict, Frozen)) or kind == "missing" else f" (got {given!r})"
    return f"{key.lstrip('.')}: {text}{shown}" if key else text
