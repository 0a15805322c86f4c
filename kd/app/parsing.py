"""From Hydra's configuration to a valid Config. All problems are reported at once, one line each."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError

from kd.app.config import Config, check_system, recipe_name, train_spec, trained_networks
from kd.app.experiments import CONF
from kd.app.networks import TeacherConfig
from kd.core.recipes import RECIPES, released
from kd.core.spec import KnownError, Registry, explain, nearest_keys, printable, tilde
from kd.core.stage import Role, split_problem
from kd.datasets import DATASETS, DatasetConfig
from kd.losses import LOSSES
from kd.methods import METHODS
from kd.methods.method import DISTILL, Ends, LossChoice, Method
from kd.models import MODELS
from kd.store.foreign import fingerprint

_SHOWN = 100  # characters that are shown of a wrong value
SECTIONS: dict[str, tuple[str, Registry[Any]]] = {  # sections of more than a name: their group and its table
    "loss": ("loss", LOSSES),
    "assistant_loss": ("loss@assistant_loss", LOSSES),
    "method": ("method", METHODS),
    "dataset": ("dataset", DATASETS),
}
_READERS = ("method", "loss", "assistant_loss")  # sections of which each option has keys of its own
_DIGITS = 12  # of a number: what a grid or a search adds up has rounding errors below
_TELLING = 3  # values of environment variables up to this length are not hidden: they occur in ordinary words


_NONE = object()  # what no key has


def parse(cfg: DictConfig, overrides: Iterable[str] = (), home: Path | None = None) -> Config:
    """The validated configuration; no value is changed. `overrides` are the command line's, for what to type instead.

    Paths are relative to `home`, by default to the working directory.
    Raises KnownError with all problems, one per line.
    """
    given = by_key(overrides)
    tree, problems = _resolved(cfg)
    tree = without_foreign(_changed(tree, plain))
    misnamed = dict(_misnamed(tree, given))
    problems += misnamed.values()
    unread = {*misnamed, *(str(name) for name in cfg if str(name) not in tree)}
    sections: dict[str, Any] = {}
    problems += [f"{name}: unknown key" for name in tree if name not in Config.model_fields]
    for name, kind in get_type_hints(Config, include_extras=True).items():
        if name not in Config.model_fields or name in unread:
            continue
        if name == "assistant_loss" and isinstance(option := tree.get(name), str):
            problems.append(f"assistant_loss: is chosen by loss@assistant_loss={option} (got {option!r})")
            continue
        try:
            value = tree.get(name)
            section = (
                _method(value) if name == "method" else TypeAdapter(kind).validate_python(value, context={"home": home})
            )
            problems += _truths(value, section, name)
            sections[name] = section
        except ValidationError as error:
            problems += explain(error, name)
        except KnownError as error:
            problems.append(str(error))
    rules = (_dataset, _losses, _teacher, _reference, _sweep, _training)
    problems += [problem for rule in rules for problem in _told(rule(sections))]
    if problems:
        told = (_with_runs(problem, given) for problem in _with_nearest(problems, tree))
        raise KnownError("\n".join(_discreet(told, cfg)))
    return Config(**sections)


def as_typed(kept: Any) -> list[str]:
    """Overrides that Hydra keeps, as they were typed. What they refer to may have no value here, or be a secret."""
    texts: Any = OmegaConf.to_container(kept)
    return [*map(str, texts)]


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """The keys of overrides, with the text of their values."""
    return {name.lstrip("+"): value for name, _, value in (override.partition("=") for override in overrides)}


def without_foreign(tree: dict[str, Any]) -> dict[str, Any]:
    """The sections without keys that were typed, or an experiment has, for other options: `method.T` with scratch."""
    kept = dict(tree)
    for section, name in (key.split(".", 1) for key in foreign(tree, _keys(tree))):
        kept[section] = {key: value for key, value in kept[section].items() if key != name}
    return kept


def given_keys(cfg: DictConfig, overrides: Iterable[str]) -> dict[str, str]:
    """The keys that are typed, and those that an experiment has for other options than the chosen ones."""
    given, tree = by_key(overrides), dict[str, Any](OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    brought = [key for key in foreign(tree, _keys(tree)) if not any(each.startswith(f"{key}.") for each in given)]
    return dict.fromkeys(brought, "") | given


def _keys(tree: Mapping[str, Any]) -> list[str]:
    sections = {name: tree[name] for name in _READERS if isinstance(tree.get(name), dict)}
    return [f"{section}.{name}" for section, content in sections.items() for name in content]


def foreign(tree: dict[str, Any], given: Iterable[str]) -> Iterator[str]:
    """The keys of `given` that other options of their section have, and the chosen one does not."""
    for key in given:
        section, *path = key.split(".")
        chosen = tree[section].get("name") if section in _READERS and isinstance(tree.get(section), dict) else None
        if path and isinstance(chosen, str) and chosen in (table := SECTIONS[section][1]):
            fields = {field.serialization_alias or name for name, field in table[chosen].model_fields.items()}
            if path[0] not in fields and option_has(key):
                yield key


@cache
def option_has(key: str) -> bool:
    """Whether an option of the key's section has this key, whichever is chosen."""
    section, _, rest = key.partition(".")
    if section not in SECTIONS or not rest:
        return False
    options = (CONF / SECTIONS[section][0].partition("@")[0]).glob("*.yaml")
    return any(OmegaConf.select(OmegaConf.load(path), rest, default=_NONE) is not _NONE for path in options)


def plain(value: str | float) -> str | float:
    """A number by its shortest decimal at 12 significant digits: .1 + .2 is .3."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def keys_in(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """All keys of a configuration, dotted."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_in(value, f"{prefix}{name}.")


def _with_nearest(problems: Sequence[str], tree: Mapping[str, Any]) -> Iterator[str]:
    """The problems; of an unknown key, which a file may have, with the nearest keys."""
    unknown = {key for key, colon, _ in (problem.partition(": unknown key (") for problem in problems) if colon}
    known = [key for key in keys_in(tree) if not unknown & {key, key.rpartition(".")[0]}]
    for problem in problems:
        key = problem.partition(": unknown key (")[0]
        yield f"{problem}; {nearest_keys(key, known)}" if key in unknown else problem


def _with_runs(problem: str, given: Mapping[str, str]) -> str:
    """The problem; of a list for a key that takes one value, with the command that has a run for each."""
    key = problem.partition(":")[0]
    values = given.get(key, "").strip()
    several = re.search("entries|a list|a group", problem) or key == "tracking.tags"  # one value would be wrong, too
    if "(got [" not in problem or several or not re.fullmatch(r"\[.+\]", values):
        return problem
    return f"{problem}; a run for each: python run.py -m {shlex.quote(f'{key}={values[1:-1]}')}"


def _misnamed(tree: dict[str, Any], given: Collection[str]) -> Iterator[tuple[str, str]]:
    """The sections of which the name alone is set, to that of an option, with a line: the rest is not that option's."""
    for section, (group, table) in SECTIONS.items():
        content = tree.get(section)
        name = content.get("name") if isinstance(content, dict) else None
        if f"{section}.name" not in given or not isinstance(name, str):
            continue
        options = {*table.installed, *(path.stem for path in (CONF / group.partition("@")[0]).glob("*.yaml"))}
        ours = name in [*table] and name not in table.installed
        called = {name, getattr(table[name], "option", name)} if ours else {name}
        yield from ((section, f"{section}.name: is chosen by {group}={option}") for option in called & options)


def _told(problems: Iterator[str]) -> Iterator[str]:
    """The problems that a rule finds, with the one that ends it: an entry of a table that cannot be imported."""
    try:
        yield from problems
    except KnownError as error:
        yield str(error)


def recorded(cfg: DictConfig, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A valid configuration for records, resolved. Environment variables stay as typed, so that secrets are hidden."""

    def raw(value: str | float) -> str | float:
        return value.replace("${", r"\${") if isinstance(value, str) and "oc.env" in value else value

    def shown(value: str | float) -> str | float:
        return tilde(value) if isinstance(value, str) else plain(value)

    escaped = OmegaConf.create(_changed(OmegaConf.to_container(cfg), raw))
    return without_foreign(_changed(OmegaConf.to_container(escaped, resolve=True), shown))


def _changed(node: Any, change: Callable[[str | float], str | float]) -> Any:
    """A tree with every text and every number that is not whole changed."""
    if isinstance(node, dict):
        return {key: _changed(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_changed(value, change) for value in node]
    return change(node) if isinstance(node, (str, float)) else node


def _resolved(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """The sections with all interpolations resolved, and a line for each that fails. Its section is left out."""
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
            why = "the key, variable or resolver does not exist, or the reference is circular"
            yield f"{key}: has no value: {why} (got {typed[part]!r})"
        else:
            if isinstance(value, (DictConfig, ListConfig)) and not OmegaConf.is_interpolation(node, part):
                yield from _unresolved(value, key)


def _discreet(problems: Iterable[str], cfg: DictConfig) -> Iterator[str]:
    """The problems as lines that can be shown: no values of the environment, no control characters, no long lines."""
    values: dict[str, str] = {}
    for name in re.findall(r"oc\.env:\s*(\w+)", str(OmegaConf.to_container(cfg))):
        if len(value := os.environ.get(name, "")) > _TELLING:
            values |= {value: name, repr(value)[1:-1]: name}
    for line in "\n".join(dict.fromkeys(problems)).splitlines():
        for value, name in values.items():
            line = line.replace(value, f"${{oc.env:{name}}}")
        yield printable(re.sub(rf"\(got (.{{{_SHOWN}}}).+\)$", r"(got \1 …)", line))


def _truths(given: Any, taken: Any, key: str) -> Iterator[str]:
    """A line for each true or false that stands for a number; pydantic accepts them as 1 and 0."""
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
            yield (
                f"dataset.root: dataset={dataset.name} needs the path of its images: a folder with a folder for each "
                "class, perhaps in train/ and val/ or test/, or a CSV file"
            )
        elif entry.facts is not None and dataset.root is not None:
            readers = " and ".join(f"dataset={name}" for name, e in DATASETS.usable().items() if e.facts is None)
            yield f"dataset.root: is only for {readers} (got {dataset.root!r} with dataset={dataset.name})"


_OWNERS = {"loss": "method", "assistant_loss": "method.assistant"}  # whose T and λ a loss takes


def _losses(sections: dict[str, Any]) -> Iterator[str]:
    for key in sections.keys() & {"loss", "assistant_loss"}:
        choice: LossChoice = sections[key]
        try:
            LOSSES.known(choice.name)
            spec = choice.spec(**{"T": 1, "lambda": 1, "reduction": "batchmean"})  # the method's are checked there
        except ValidationError as error:
            yield from explain(error, key)
            del sections[key]
        except ValueError as error:
            yield f"{key}.name: {error} (got {choice.name!r})"
            del sections[key]
        else:
            yield from _truths(choice.fields, spec, key)
            for name in filter(choice.reads, choice.fields):
                owner = "mode" if name == "reduction" else f"{_OWNERS[key]}.{name}"
                yield f"{key}.{name}: is set by {owner} (got {choice.fields[name]})"


def _teacher(sections: dict[str, Any]) -> Iterator[str]:
    teacher: TeacherConfig | None = sections.get("teacher")
    if teacher is None:
        return
    if teacher.file is None:
        for key in ("part", "key", "normalize"):
            if getattr(teacher, key) is not None:
                yield f"teacher.{key}: needs teacher.checkpoint=<file>, which is not set"
        return
    for key in teacher.train.model_dump(exclude_none=True):
        yield f"teacher.train.{key}: a teacher from teacher.checkpoint is not trained"
    for key in ("init", "freeze"):
        if getattr(teacher, key) is not None:
            yield f"teacher.{key}: a teacher from teacher.checkpoint is not trained; leave one of both out"
    if {"method", "model"} <= sections.keys():
        method, ends = sections["method"], Ends(sections["model"].name, teacher.name, seed=0, teacher_seed=0)
        teachers = [link for link in method.chain(ends) if link.role == "teacher"]
        if teachers and not any(link.replaceable for link in teachers):
            yield f"teacher.checkpoint: {method.no_use_of_checkpoint(ends)}"
    try:
        fingerprint(teacher.file)
    except KnownError as error:
        yield str(error)


def _reference(sections: dict[str, Any]) -> Iterator[str]:
    """Settings that contradict the released code of mode=reference."""
    if sections.get("mode") != "reference":
        if "dataset" in sections and sections["dataset"].augment is None:
            yield "dataset.augment: null is only for mode=reference, which has the released code's augmentation"
        return
    fixed: dict[str, Any] = {"val_fraction": 0, "augment": None, "views": None}
    for key, value in fixed.items():
        if "dataset" in sections and getattr(sections["dataset"], key) != value:
            shown = "null" if value is None else value
            yield f"dataset.{key}: should be {shown} in mode=reference, which follows the released code"
    begun = [(part, key) for part in ("model", "teacher") for key in ("init", "freeze", "image_size")]
    for part, key in begun:
        if part in sections and getattr(sections[part], key) is not None:
            yield f"{part}.{key}: should be null in mode=reference, which follows the released code"
    for key in sections.keys() & {"loss", "assistant_loss"}:
        if (choice := sections[key]).spec(T=1, **{"lambda": 1}) != DISTILL.spec(T=1, **{"lambda": 1}):
            yield f"{key}: should be {DISTILL.option} with its own values in mode=reference (got {choice.option!r})"
    if {"method", "train", "model"} <= sections.keys():
        code = released("reference", sections["train"].recipe, MODELS[sections["model"].name].family)
        if code is not None and sections["method"].name not in code.methods:
            yield (
                f"method.name: mode=reference follows {code.system}'s code for {sections['model'].name}, which has "
                f"only {', '.join(code.methods)}"
            )


def _sweep(sections: dict[str, Any]) -> Iterator[str]:
    if "sweep" not in sections or not sections["sweep"].prune:
        return
    if sections["sweep"].objective != "val_acc" or ("dataset" in sections and not sections["dataset"].val_fraction):
        yield "sweep.prune: compares validation accuracies: it needs a validation split and sweep.objective=val_acc"
    if sections.get("replicates", 1) > 1:
        yield f"sweep.prune: works with one student per trial (got replicates={sections['replicates']})"
    if sections.get("baseline"):
        yield "sweep.prune: works with one student per trial (got baseline=true)"


def _training(sections: dict[str, Any]) -> Iterator[str]:
    """Missing recipes, and settings that do not fit together. Without a method, only both ends are checked."""
    if not {"mode", "train", "model", "teacher", "runtime"} <= sections.keys():
        return
    if recipe_name(sections["mode"], sections["train"].recipe) not in RECIPES[sections["mode"]]:
        known = ", ".join(RECIPES[sections["mode"]])
        asked = f"should be one of {known} in mode={sections['mode']} (got {sections['train'].recipe!r})"
        yield f"train.recipe: {asked}; dataset=<name> selects its own recipe, train=<name> another"
        return
    config = Config.model_construct(**sections)
    ends: list[tuple[Role, str]] = [("teacher", sections["teacher"].name), ("student", sections["model"].name)]
    whole = sections.keys() == Config.model_fields.keys()
    for role, model in trained_networks(config) if whole else ends:
        try:
            train = train_spec(config, role, model)
        except KnownError as error:
            yield str(error)
        else:
            entry = DATASETS.get(config.dataset.name) if whole else None
            # Whether photographs have a validation split of their own is known when they are read.
            if entry and entry.facts and (problem := split_problem(train, config.dataset.val_fraction > 0)):
                yield f"{role} {model}: {problem}"
    if whole and config.teacher.file is not None and config.released is not None:
        try:
            check_system(config, "teacher", config.teacher.name)
        except KnownError as error:
            yield str(error)
