"""From Hydra's tree to a valid Config, once, before anything else: every problem at once, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from kd.config import ANY_IMAGES, Config, TeacherConfig, plan, train_spec, trained_networks
from kd.datasets import DATASETS, specify
from kd.datasets.base import DatasetConfig
from kd.methods import METHODS
from kd.methods.base import Method
from kd.models import MODELS
from kd.problems import explain
from kd.recipes import RECIPES, released
from kd.spec import KnownError
from kd.stage import Role


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
    rules = (_dataset, _teacher, _reference, _sweep, _training)
    problems += [problem for rule in rules for problem in rule(sections)]
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


def _teacher(sections: dict[str, Any]) -> Iterator[str]:
    teacher: TeacherConfig | None = sections.get("teacher")
    if teacher is None:
        return
    if teacher.checkpoint is None:
        for key in ("part", "normalize"):
            if getattr(teacher, key) is not None:
                yield f"teacher.{key}: says how to read teacher.checkpoint=<file>, which is not set"
        return
    for key in teacher.train.model_dump(exclude_none=True):
        yield f"teacher.train.{key}: a teacher from teacher.checkpoint is not trained"
    if "method" in sections and sections["method"].name == "trained_teacher":
        yield "teacher.checkpoint: method=trained_teacher trains its teacher; method=kd distils from a finished one"


def _reference(sections: dict[str, Any]) -> Iterator[str]:
    """What contradicts the released code that mode=reference stands for."""
    if sections.get("mode") != "reference":
        if "dataset" in sections and sections["dataset"].augment is None:
            yield "dataset.augment: null is for mode=reference, which has its own"
        return
    fixed: dict[str, Any] = {"val_fraction": 0, "augment": None, "views": None}
    for key, value in fixed.items():
        if "dataset" in sections and getattr(sections["dataset"], key) != value:
            shown = "null" if value is None else value
            yield f"dataset.{key}: should be {shown} in mode=reference, which has the released code's"
    if {"method", "train", "model"} <= sections.keys():
        code = released("reference", sections["train"].recipe, MODELS[sections["model"].name].family)
        if code is not None and sections["method"].name not in code.methods:
            yield (
                f"method.name: mode=reference runs {code.system}'s code for {sections['model'].name}, which has "
                f"{', '.join(code.methods)}"
            )


def _sweep(sections: dict[str, Any]) -> Iterator[str]:
    if "sweep" not in sections or not sections["sweep"].prune:
        return
    if sections["sweep"].objective != "val_acc" or ("dataset" in sections and not sections["dataset"].val_fraction):
        yield "sweep.prune: compares validation accuracies, and so needs a validation split and sweep.objective=val_acc"
    if sections.get("replicates", 1) > 1:
        yield f"sweep.prune: ends the training of one student (got replicates={sections['replicates']})"


def _training(sections: dict[str, Any]) -> Iterator[str]:
    """Recipes and settings that do not fit together, of every stage where the method is known, else of the two ends."""
    if not {"mode", "train", "model", "teacher", "runtime"} <= sections.keys():
        return
    if sections["train"].recipe not in RECIPES[sections["mode"]]:
        known = ", ".join(RECIPES[sections["mode"]])
        yield f"train.recipe: should be one of {known} in mode={sections['mode']} (got {sections['train'].recipe!r})"
        return
    config = Config.model_construct(**sections)
    whole = sections.keys() == Config.model_fields.keys()
    ends: list[tuple[Role, str]] = [("teacher", sections["teacher"].name), ("student", sections["model"].name)]
    problems = []
    for role, model in trained_networks(config) if whole else ends:
        try:
            train_spec(config, role, model)
        except KnownError as error:
            problems.append(str(error))
    yield from problems
    if whole and not problems:
        try:
            plan(config, specify(config.dataset, ANY_IMAGES))
        except KnownError as error:
            yield str(error)
