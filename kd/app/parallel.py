"""Jobs of a sweep side by side: which there are, and how many at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd.app.config import plan
from kd.app.parsing import as_typed, by_key, parse
from kd.core.hardware import cpu_count, gpu_count
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.training.workplace import RuntimeSpec

_GPUS = "as many as GPUs"
# How overrides begin that do not change how much memory a job needs. Others may.
_SAME_MEMORY = (
    *("seed=", "teacher.seed=", "method.assistant.seed=", "method.T=", "method.lambda=", "method.teacher.", "loss."),
    *("train.lr=", "train.epochs=", "train.weight_decay=", "replicates=", "baseline=", "vary=", "tracking"),
)


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each job that the basic sweeper makes of the command line; none of others and of dry runs.

    None either of a sweep over glob() that is watched from another process: only Hydra knows its values.
    """
    if not config.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        return []
    given = _parsed(config)
    if ("dry_run" in given and given["dry_run"].value() is True) or "why" in given:
        return []
    try:
        return _combined(given.values())
    except HydraException:
        return []


def searched_of(config: DictConfig) -> list[list[str]]:
    """The overrides of jobs that a search may try, with each choice of what changes how much memory they need."""
    choices = [
        each
        for each in _parsed(config).values()
        if not each.is_sweep_override() or not (each.is_interval_sweep() or _same_memory(str(each.input_line)))
    ]
    return _combined(choices)


def fixed_of(config: DictConfig) -> list[str]:
    """The overrides that all jobs of a multirun share."""
    return [str(each.input_line) for each in _parsed(config).values() if not each.is_sweep_override()]


def _parsed(config: DictConfig) -> dict[str, Override]:
    """The overrides of a multirun, by their keys; those of the command line take the place of the sweeper's."""
    params: Any = OmegaConf.to_container(OmegaConf.create(config.hydra.sweeper.get("params") or {}))
    told = [f"{name}={values}" for name, values in params.items()]
    hydra = GlobalHydra.instance()  # absent where a sweep is watched; only glob() needs it
    parser = OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)
    overrides = parser.parse_overrides([*told, *as_typed(config.hydra.overrides.task)])
    return {each.get_key_element().lstrip("+"): each for each in overrides}


def _combined(overrides: Iterable[Override]) -> list[list[str]]:
    return [list(job) for job in BasicSweeper.split_arguments([*overrides], None)[0]]


def choose_number(config: DictConfig, config_name: str, jobs: Sequence[Sequence[str]], limit: tuple[int, str]) -> None:
    """Set how many jobs joblib does at a time, by the machine, the memory and their number. A line says it.

    A number that the user gives stays, as do those of other launchers. `jobs` has the overrides of each job. `limit` is
    how many there are at a time, and what says so.
    """
    key, launcher = "hydra.launcher.n_jobs", config.hydra.launcher
    if launcher.get("n_jobs") != -1 or key in by_key(as_typed(config.hydra.overrides.hydra)) or not jobs:
        return
    plans = [*_plans(config, config_name, jobs)]
    processes = max((runtime.processes or 1 for runtime, _ in plans), default=1)
    limits = {f"as many as {limit[1]}": limit[0], **_of_machine([runtime for runtime, _ in plans])}
    if _GPUS not in limits and min(limits.values()) > 1 and (stages := [each for _, own in plans for each in own]):
        from kd.training.forecast import room_for

        if (room := room_for(stages)) is not None:
            why = "more do not fit into the memory" if room >= processes else "the memory is short even for one"
            limits[why] = max(1, room // processes)
    why = min(limits, key=limits.__getitem__)
    tell(config, key, limits[why])
    print(f"{key}={limits[why]}: {why}", flush=True)


def _of_machine(runtimes: Sequence[RuntimeSpec]) -> dict[str, int]:
    """How many jobs the machine can do at a time, and why: a job a GPU, or a job for as many processors as it uses."""
    devices = {runtime.device for runtime in runtimes} or {"auto"}
    limits = dict[str, int]()
    if "auto" in devices and (gpus := gpu_count()):
        limits[_GPUS] = gpus
    elif named := {device.removesuffix(":0") for device in devices - {"auto", "cpu"}}:
        limits[_GPUS] = len(named)
    each = max(((runtime.threads or 1) * (runtime.processes or 1) for runtime in runtimes), default=1)
    if each > 1 or not limits:
        why = "as many as processors" if each == 1 else f"each has {each} of {cpu_count()} processors"
        limits[why] = max(1, cpu_count() // each)
    return limits


def _plans(
    config: DictConfig, config_name: str, jobs: Sequence[Sequence[str]]
) -> Iterator[tuple[RuntimeSpec, list[Stage]]]:
    """The runtime of each job, and its stages. Of jobs that need the same memory, one is looked at.

    A stage that is stored counts as well: whether it is may change until its job begins. A job that cannot be planned
    says why when it runs.
    """
    loader, seen = GlobalHydra.instance().config_loader(), set[tuple[str, ...]]()
    for job in jobs:
        needs = tuple(sorted(each for each in job if not _same_memory(each)))
        if needs in seen:
            continue
        seen.add(needs)
        try:
            told = [*as_typed(config.hydra.overrides.hydra), *job]
            composed = loader.load_configuration(config_name, told, RunMode.RUN)
            with open_dict(composed):
                del composed["hydra"]
            own = parse(composed, job)
            students = plan(own, resolve(own.dataset, own.data_root, own.workers, own.image_size))
        except (KnownError, HydraException, OmegaConfBaseException, OSError):
            continue
        stages = {each.key: each for student in students for each in student.chain if isinstance(each, Stage)}
        yield own.runtime, [*stages.values()]


def _same_memory(override: str) -> bool:
    return override.lstrip("+").startswith(_SAME_MEMORY)


def tell(config: DictConfig, key: str, value: str | int) -> None:
    """Set a key of Hydra, and as an override for the jobs, because Hydra composes their configuration again."""
    quoted = json.dumps(value, ensure_ascii=False) if isinstance(value, str) and "${" not in value else value
    config.hydra.overrides.hydra.append(f"{key}={quoted}")
    OmegaConf.update(config, key, value)
