"""`why=method.T`: where a value of the configuration comes from, in a line for each key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd.app.config import Config, beginning, for_photos, recipe_name, train_spec
from kd.app.experiments import CONF
from kd.core.hardware import cpu_count, resolve_device
from kd.core.settings import TrainOverrides
from kd.core.spec import KnownError, nearest_keys, tilde
from kd.core.stage import Stage

_SECTIONS = {"student": "model.train", "teacher": "teacher.train"}  # whose training settings win over `train`
_SETTINGS = [*TrainOverrides.model_fields]


def reasons(
    cfg: DictConfig,
    config: Config,
    student: Stage,
    overrides: Sequence[str],
    primary: str | None = "config",
    of_hydra: Sequence[str] = (),
) -> Iterator[str]:
    """A line for each key that `why` names; a group's name stands for all its keys.

    `overrides` are the command line's, and `of_hydra` those of Hydra's own keys. `primary` is the configuration that
    Hydra begins with. Raises KnownError, with the nearest names, for a key that does not exist.
    """
    tree = dict(_leaves(OmegaConf.to_container(cfg)))
    origins = _Origins(overrides, primary, of_hydra)
    unknown = [asked for asked in config.why if not _below(tree, asked)]
    if unknown:
        raise KnownError(
            "\n".join(f"why: there is no key {asked}; {nearest_keys(asked, [*tree])}" for asked in unknown)
        )
    for name in dict.fromkeys(each for asked in config.why for each in _below(tree, asked)):
        section, _, setting = name.rpartition(".")
        if section == "train" and setting in _SETTINGS:
            yield from _training(setting, config, student, tree, origins)
        else:
            meant = "" if (found := _meant(name, config, student)) is None else f", here {found}"
            yield f"{name}={_shown(tree[name])}{meant}: {origins.of(name)}"


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by dotted name. Lists, and groups without keys, are values."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}".lstrip("."))
    else:
        yield name, tree


def _below(tree: Mapping[str, Any], name: str) -> list[str]:
    return [each for each in tree if each == name or each.startswith(f"{name}.")]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Origins:
    """Where the values of the composed configuration come from: the command line, or a file or table of an option."""

    def __init__(self, overrides: Sequence[str], primary: str | None, of_hydra: Sequence[str]) -> None:
        self._overrides, every = overrides, [*of_hydra, *overrides]
        loader: Any = GlobalHydra.instance().config_loader()
        self._defaults = loader.compute_defaults_list(primary, every, RunMode.RUN).defaults
        _, self._files = loader._parse_overrides_and_create_caching_repo(primary, every)  # with hydra.searchpath

    def of(self, name: str) -> str:
        """The last place that sets a key."""
        for override in reversed(self._overrides):
            key = override.partition("=")[0].lstrip("+")
            if "/" not in key and (name == key or ("." in key and name.startswith(f"{key}."))):
                return f"the command line ({override})"
        for default in reversed(self._defaults):
            package, path = default.package or "", str(default.config_path)
            inside = name[len(package) :].lstrip(".") if f"{name}.".startswith(f"{package}.") or not package else None
            if inside and (where := self._place(path, inside)) is not None:
                return where + self._choice(path)
        return "the default"

    def _place(self, path: str, name: str) -> str | None:
        """The file or table of an option, if it sets the key."""
        found = self._files.load_config(path)
        if found is None or name not in dict(_leaves(OmegaConf.to_container(found.config))):
            return None
        if found.path.startswith("file://"):
            file = Path(found.path.removeprefix("file://"), f"{path}.yaml")
            return str(file.relative_to(CONF.parent)) if file.is_relative_to(CONF) else tilde(str(file))
        return "conf/paper" if path.startswith("experiment/") else "the default" if path == "settings" else path

    def _choice(self, path: str) -> str:
        """The override of the command line that chose an option."""
        for override in self._overrides:
            key, _, value = override.partition("=")
            if path == f"{key.lstrip('+').partition('@')[0]}/{value}":
                return f", chosen by {override}"
        return ""


def _training(
    setting: str, config: Config, student: Stage, tree: Mapping[str, Any], origins: _Origins
) -> Iterator[str]:
    """A line for each stage of the chain: its own value of a training setting, and which place has set it."""
    for stage in dict.fromkeys(stage for stage in student.chain if isinstance(stage, Stage)):
        begun = beginning(config, stage.role, stage.model)
        value = getattr(train_spec(config, stage.role, stage.model, begun.task(stage.dataset)), setting)
        keys = [f"{section}.{setting}" for section in (_SECTIONS.get(stage.role), "train") if section]
        key = next((key for key in keys if tree.get(key) is not None), None)
        name = recipe_name(config.mode, config.train.recipe)
        recipe = for_photos(name, stage.dataset.image_size) or name
        where = f"recipe {recipe} of mode={config.mode}" if key is None else origins.of(key)
        auto = " (auto on this device)" if setting == "precision" and (key is None or tree[key] == "auto") else ""
        shown = list(value) if isinstance(value, tuple) else _shown(value)
        yield f"train.{setting} of {stage.role} {stage.model}={shown}{auto}: {where}"


def _meant(name: str, config: Config, student: Stage) -> str | None:
    """What `null` or `auto` means here; None for a key that says its value itself, or that a stage decides later."""
    here: dict[str, Any] = {
        "runtime.threads": config.runtime.threads_of(cpu_count()) or cpu_count(),
        "runtime.workers": config.workers,
        "runtime.store": config.store_root,
        "runtime.data": config.data_root,
        "dataset.image_size": student.dataset.image_size,
        "dataset.label": config.dataset.title,
        "dataset.augment": student.dataset.augment,
        "method.reference": config.model.name,
    }
    if name == "runtime.device" and config.runtime.device == "auto":
        return resolve_device("auto")
    section, _, key = name.rpartition(".")
    is_set = getattr(getattr(config, section, None), key, None) is not None
    return None if name not in here or is_set else str(here[name])
