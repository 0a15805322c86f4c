"""From Hydra's tree to a valid Config, once, before anything else: every problem at once, a line each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError

from kd.config import ANY_IMAGES, Config, TeacherConfig, plan, train_spec, trained_networks
from kd.datasets import DATASETS, specify
from kd.datasets.base import DatasetConfig
from kd.methods import METHODS
from kd.methods.base import Method
from kd.models import MODELS
from kd.problems import explain
from kd.recipes import RECIPES, released
from kd.spec import KnownError, printable, tilde
from kd.stage import Role

_SHOWN = 100  # characters of a wrong value
_TELLING = 3  # an environment variable's value so short tells nothing, and may be part of any word


def parse(cfg: DictConfig) -> Config:
    """The configuration, checked; nothing in it is changed.

    Raises KnownError with every problem found, one a line.
    """
    tree, problems = _resolved(cfg)
    unread = {str(name) for name in cfg if str(name) not in tree}
    sections: dict[str, Any] = {}
    problems += [f"{name}: unknown key" for name in tree if name not in Config.model_fields]
    for name, kind in get_type_hints(Config, include_extras=True).items():
        if name not in Config.model_fields or name in unread:
            continue
        try:
            section = _method(tree.get(name)) if name == "method" else TypeAdapter(kind).validate_python(tree.get(name))
            problems += _truths(tree.get(name), section, name)
            sections[name] = section
        except ValidationError as error:
            problems += explain(error, name)
        except KnownError as error:
            problems.append(str(error))
    rules = (_dataset, _teacher, _reference, _sweep, _training)
    problems += [problem for rule in rules for problem in rule(sections)]
    if problems:
        raise KnownError("\n".join(_discreet(problems, cfg)))
    return Config(**sections)


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """A valid configuration as others may read it, resolved; what is from the environment stays as it was typed."""

    def typed(text: str) -> str:
        return text.replace("${", r"\${") if "oc.env" in text else text

    escaped = OmegaConf.create(_texts(OmegaConf.to_container(cfg), typed))
    tree: dict[str, Any] = _texts(OmegaConf.to_container(escaped, resolve=True), tilde)
    return tree


def _texts(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, dict):
        return {key: _texts(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_texts(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def _resolved(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """The sections with every interpolation resolved, and a line for each that cannot be, whose section is left out."""
    tree = {}
    for name in cfg:
        try:
            section = cfg[name]
            is_tree = isinstance(section, (DictConfig, ListConfig))
            plain = OmegaConf.to_container(section, resolve=True, throw_on_missing=True) if is_tree else section
            tree[str(name)] = plain
        except OmegaConfBaseException:
            pass
    return tree, [] if len(tree) == len(cfg) else list(_unresolved(cfg))


def _unresolved(node: Any, path: str = "") -> Iterator[str]:
    typed: Any = OmegaConf.to_container(node)
    for part in typed if isinstance(typed, dict) else range(len(typed)):
        key = f"{path}[{part}]" if isinstance(part, int) else f"{path}.{part}".lstrip(".")
        try:
            value = node[part]
        except MissingMandatoryValue:
            yield f"{key}: is missing"
        except OmegaConfBaseException:
            why = "there is no such key, variable or resolver, or it is a circle"
            yield f"{key}: leads to no value: {why} (got {typed[part]!r})"
        else:
            if isinstance(value, (DictConfig, ListConfig)) and not OmegaConf.is_interpolation(node, part):
                yield from _unresolved(value, key)


def _discreet(problems: list[str], cfg: DictConfig) -> Iterator[str]:
    """The problems in lines that can be shown: no values of the environment, no control characters, none endless."""
    values: dict[str, str] = {}
    for name in re.findall(r"oc\.env:\s*(\w+)", str(OmegaConf.to_container(cfg))):
        if len(value := os.environ.get(name, "")) > _TELLING:
            values |= {value: name, repr(value)[1:-1]: name}
    for line in "\n".join(dict.fromkeys(problems)).splitlines():
        for value, name in values.items():
            line = line.replace(value, f"${{oc.env:{name}}}")
        yield printable(re.sub(rf"\(got (.{{{_SHOWN}}}).+\)$", r"(got \1 …)", line))


def _truths(given: Any, taken: Any, key: str) -> Iterator[str]:
    """Where true or false stands for a number; pydantic takes them for 1 and 0."""
    if isinstance(given, dict) and isinstance(taken, BaseModel):
        for name, field in type(taken).model_fields.items():
            alias = field.serialization_alias or name
            yield from _truths(given.get(alias), getattr(taken, name), f"{key}.{alias}")
    elif isinstance(given, list) and isinstance(taken, tuple):
        for index, (one, other) in enumerate(zip(given, taken, strict=True)):
            yield from _truths(one, other, f"{key}[{index}]")
    elif isinstance(given, bool) and not isinstance(taken, bool):
        yield f"{key}: should be a number (got {str(given).lower()})"


def _method(tree: Any) -> Method:
    name = tree.get("name") if isinstance(tree, dict) else tree
    if not isinstance(name, str) or name not in METHODS:
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
        asked = f"should be one of {known} in mode={sections['mode']} (got {sections['train'].recipe!r})"
        yield f"train.recipe: {asked}; dataset=… picks its own, train=… another"
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
