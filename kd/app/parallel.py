"""Jobs of a sweep side by side: which there are, and how many at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd.app.config import plan
from kd.app.parsing import by_key, parse
from kd.core.hardware import cpu_count, gpu_count
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.store import Store
from kd.training.workplace import RuntimeSpec

_GPUS = "as many as GPUs"
# How the overrides begin that change what a job needs; others, like seeds and temperatures, do not.
_MATTER = (
    "model",
    "teacher",
    "reference",
    "dataset",
    "experiment",
    "mode",
    "method=",
    "method.assistant",
    "train",
    "runtime",
)


def jobs_of(config: DictConfig) -> list[list[str]]:
    """The overrides of each job that the basic sweeper makes of the command line; none of others and of dry runs."""
    if not config.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        return []
    told = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
    hydra = GlobalHydra.instance()  # absent where a sweep is watched; only glob() needs it
    parser = OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)
    overrides = parser.parse_overrides([*told, *config.hydra.overrides.task])
    given = {each.get_key_element(): each for each in overrides}
    if ("dry_run" in given and given["dry_run"].value() is True) or "why" in given:
        return []
    return [list(job) for job in BasicSweeper.split_arguments([*given.values()], None)[0]]


def fixed_of(config: DictConfig) -> list[str]:
    """The overrides that all jobs of a multirun share."""
    overrides = OverridesParser.create().parse_overrides([*config.hydra.overrides.task])
    return [str(each.input_line) for each in overrides if not each.is_sweep_override()]


def choose_number(config: DictConfig, config_name: str, jobs: Sequence[Sequence[str]], name: str = "jobs") -> None:
    """Set how many jobs joblib does at a time, by the processors or GPUs, the jobs and the memory. A line says it.

    A number that the user gives stays, as do those of other launchers. `jobs` has the overrides of each job, and `name`
    is what limits their number.
    """
    key, launcher = "hydra.launcher.n_jobs", config.hydra.launcher
    if launcher.get("n_jobs") != -1 or key in by_key(config.hydra.overrides.hydra) or not jobs:
        return
    plans = [*_plans(config_name, jobs)]
    most, why = of_machine([runtime for runtime, _ in plans])
    limits = {f"as many as {name}": len(jobs), why: most}
    if min(limits.values()) > 1 and why != _GPUS and (stages := [stage for _, each in plans for stage in each]):
        from kd.training.forecast import room_for

        if (room := room_for(stages)) is not None:
            limits["more do not fit into the memory"] = max(1, room)
    why = min(limits, key=limits.__getitem__)
    tell(config, key, limits[why])
    print(f"{key}={limits[why]}: {why}", flush=True)


def of_machine(runtimes: Sequence[RuntimeSpec]) -> tuple[int, str]:
    """How many jobs the machine can do at a time, and why."""
    devices = {runtime.device for runtime in runtimes} or {"auto"}
    if "cpu" not in devices and (gpus := gpu_count() if "auto" in devices else len(devices)):
        return gpus, _GPUS
    threads = max((runtime.threads or 1 for runtime in runtimes), default=1)
    why = "as many as processors" if threads == 1 else f"each has {threads} of {cpu_count()} processors"
    return max(1, cpu_count() // threads), why


def _plans(config_name: str, jobs: Sequence[Sequence[str]]) -> Iterator[tuple[RuntimeSpec, list[Stage]]]:
    """The runtime of each job, and what it will train. Of jobs that need the same, one is looked at.

    A job that cannot be planned says why when it runs.
    """
    seen = set[tuple[str, ...]]()
    for job in jobs:
        needs = tuple(sorted(each for each in job if each.lstrip("+").startswith(_MATTER)))
        if needs in seen:
            continue
        seen.add(needs)
        try:
            composed = GlobalHydra.instance().config_loader().load_configuration(config_name, [*job], RunMode.RUN)
            with open_dict(composed):
                del composed["hydra"]
            config = parse(composed, job)
            store = Store(config.store_root)
            students = plan(config, resolve(config.dataset, config.data_root, config.workers, config.image_size))
        except (KnownError, HydraException, OmegaConfBaseException, OSError):
            continue
        stages = {each.key: each for student in students for each in student.chain if isinstance(each, Stage)}
        yield config.runtime, [stage for key, stage in stages.items() if not store.has(key)]


def tell(config: DictConfig, key: str, value: str | int) -> None:
    """Set a key of Hydra, and as an override for the jobs, because Hydra composes their configuration again."""
    quoted = json.dumps(value, ensure_ascii=False) if isinstance(value, str) and "${" not in value else value
    config.hydra.overrides.hydra.append(f"{key}={quoted}")
    OmegaConf.update(config, key, value)
