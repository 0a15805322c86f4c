"""One job, from its configuration to its result; its failures, and its share of the machine."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from kd.app.config import Config, initial_files, plan, plan_alone
from kd.app.effects import remarks
from kd.app.parsing import as_typed, by_key, given_keys, parse, recorded
from kd.core.hardware import bind_threads, cpu_count, resolve_device
from kd.core.spec import KnownError, tilde
from kd.core.stage import Stage
from kd.datasets import LARGE, resolve
from kd.reporting import summary
from kd.reporting.console import print_plan, print_run
from kd.reporting.curves import draw_curves
from kd.reporting.results import (
    Pruned,
    RunResult,
    clear_marks,
    record_failed,
    record_pruned,
    write_result,
)
from kd.reporting.tracking import Tracker, group_of, track
from kd.store import Metrics, Store
from kd.training.checks import check_students
from kd.training.pipeline import Pipeline, run_students
from kd.training.ranks import team, world
from kd.training.workplace import RuntimeSpec, Workplace

T = TypeVar("T")
_TELLING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--why"}  # flags that train nothing
SEARCH = "kd.app.search.hand_over"  # hydra.sweeper.custom_search_space of kd's own searches


def run_job(folder: Path, work: Callable[[], T], dry: bool) -> T | None:
    """Do the work of one job. A failure with a known reason is printed without a traceback.

    The job writes error.json into its folder, except for the plan of a single run. A single run then exits with 2. In a
    multirun that would end the whole sweep. So the job returns None, and the sweep goes on. Other failures print their
    traceback too.
    """
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        clear_marks(folder, dry)
        return work()
    except Exception as error:
        reason = known_reason(error) if dry and not multirun else noted(folder, error)  # a plan leaves nothing
        if reason is None and not multirun:
            raise
        if reason is None:
            # Not raised to Hydra: it would start no more jobs, and not every exception can be pickled.
            traceback.print_exc()
        else:
            print(reason, file=sys.stderr, flush=True)
        if not multirun:
            sys.exit(2)
        return None


def noted(folder: Path, error: Exception) -> str | None:
    """Write into a job's folder why it failed. Returns the reason if it is a known one."""
    reason = known_reason(error)
    with suppress(OSError):  # on a full disk the summary lists the job as unfinished
        record_failed(folder, reason or tilde(f"{type(error).__name__}: {error}"))
    return reason


def interrupted(words: Sequence[str]) -> str:
    """What is said of a command line that Ctrl-C or SIGTERM ended. Who asked for a plan or for help resumes nothing."""
    given = by_key(words)
    plan = given.get("dry_run", "").lower() == "true" or given.get("why", "[]") not in ("[]", "null")
    told = "" if plan or _TELLING & given.keys() else ": start the same command again to continue"
    return f"interrupted{told}"


def _bind(cfg: DictConfig) -> None:
    """Bind torch's threads to processors before parse(), which imports torch for networks of a library.

    A plan of other networks needs no torch.
    """
    if is_dry(cfg) and not any(OmegaConf.select(cfg, f"{part}.arch") for part in ("model", "teacher")):
        return
    try:
        runtime = with_share(RuntimeSpec.model_validate(OmegaConf.to_container(cfg.runtime, resolve=True)))
        bind_threads(runtime.threads, resolve_device(runtime.device))
    except (ValidationError, KnownError, OmegaConfBaseException):
        pass  # parse() says what is wrong


def is_dry(cfg: DictConfig) -> bool:
    """Whether a configuration, perhaps an invalid one, asks for the plan, or for the reasons of values, alone."""
    asked = [OmegaConf.select(cfg, key, throw_on_resolution_failure=False) for key in ("dry_run", "why")]
    return asked[0] is True or bool(asked[1])


def perform(cfg: DictConfig, folder: Path) -> RunResult | Pruned | None:
    """One job: parse, look up the data, plan, load or train, and leave the result in `folder`.

    None if the job prints the plan, or the reasons of values, and trains nothing.
    """
    hydra = HydraConfig.get()
    _check_search(cfg)
    _bind(cfg)
    config = parse(cfg, typed(), home())
    runtime = with_share(config.runtime)
    dataset = resolve(config.dataset, config.data_root, config.workers, config.image_size)
    if dataset.image_size > LARGE:  # a plan measures steps, too
        bind_threads(runtime.threads, resolve_device(runtime.device))
    students = plan(config, dataset)
    multirun = hydra.mode == RunMode.MULTIRUN
    whole = hydra.sweep.dir if multirun else folder
    if config.why:
        from kd.app.provenance import reasons

        own = hydra.job.config_name, as_typed(hydra.overrides.hydra)
        for line in reasons(cfg, config, students[0], typed(), *own):
            say_once(line, whole)
        if not config.dry_run:
            return None
    alone = plan_alone(config, dataset, students)
    given = given_keys(cfg, typed()) | by_key(as_typed(hydra.overrides.hydra))
    for line in remarks(config, dataset, students[0], given, multirun=multirun):
        say_once(line, whole)
    if config.runtime.threads is None and runtime.processes not in (None, 1):
        print(f"runtime.processes={runtime.processes}: runtime.threads={runtime.threads} in each", flush=True)
    store = Store(config.store_root)
    if config.dry_run:
        _show_plan(config, students, alone, store)
        return None
    with track(config.tracking, folder, students, recorded(cfg, typed()), store, group(), alone) as tracker:
        pipeline = _pipeline(config, runtime, students, store, tracker)
        found = _trained(pipeline, config, students, alone)
        if isinstance(found, Pruned):
            print(found, flush=True)
            record_pruned(folder, found)
            return found
        write_result(found, folder)
        tracker.summarize(found.columns)
    draw_curves(folder, found)
    if multirun and not runtime.tables:
        print(tilde(summary.job_line(hydra.job.num, _swept(), found)), flush=True)
    else:
        print_run(found, store.loading(found.chain[-1].key))
        print(tilde(f"this run: {folder}"))
    return found


def _check_search(cfg: DictConfig) -> None:
    """Raise KnownError if the job's configuration asks for a search, and no search runs the job."""
    hydra = HydraConfig.get()
    if hydra.sweeper.get("custom_search_space") != SEARCH or OmegaConf.select(cfg, "runtime.trial") is not None:
        return
    if hydra.mode == RunMode.MULTIRUN:
        if is_dry(cfg):  # of the search itself
            return
        raise KnownError("sweep: a grid cannot have a search as one of its values; one command for each search")
    if "sweep" in by_key(typed()) and not OmegaConf.select(cfg, "why"):
        raise KnownError("sweep: a search needs -m: python run.py -m sweep=…")
    print("the search of this configuration is left out: without -m this is one run", flush=True)


def _show_plan(config: Config, students: Sequence[Stage], alone: Sequence[Stage], store: Store) -> None:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        print(f"job {hydra.job.num}: {' '.join(_swept())}", flush=True)
    place = Workplace(store, config.data_root, config.runtime, initial=initial_files(config))
    check_students(place, [*students, *alone], config.teacher.file, networks=False)
    print_plan(config.where, students, store, config.runtime.retrain, alone)


@cache
def say_once(line: str, folder: str | Path) -> None:
    """Print a line once for all jobs that this process does of a multirun. `folder` is the multirun's, or the run's."""
    print(line, flush=True)


def _swept() -> list[str]:
    """This job's overrides that differ within its multirun; all of them where Hydra keeps no record of the sweep's."""
    hydra = HydraConfig.get()
    path = Path(hydra.runtime.cwd, hydra.sweep.dir, "multirun.yaml")  # a job may work in its own folder
    shared = OmegaConf.select(OmegaConf.load(path), "hydra.overrides.task") if path.exists() else None
    same = {override.lower() for override in as_typed(shared or OmegaConf.create([]))}  # a job's true is True
    return [override for override in typed() if override.lower() not in same]


def _pipeline(
    config: Config, runtime: RuntimeSpec, students: Sequence[Stage], store: Store, tracker: Tracker
) -> Pipeline:
    return Pipeline(
        store=store,
        data_root=config.data_root,
        runtime=runtime,
        tracker=tracker,
        checkpoint=config.teacher.file,
        initial=initial_files(config),
        on_nan=config.train.on_nan,
        min_acc=config.teacher.min_acc,
        team=team(),
        prune=pruning(config, students),
    )


def _trained(
    pipeline: Pipeline, config: Config, students: Sequence[Stage], alone: Sequence[Stage]
) -> RunResult | Pruned:
    """The result of a job's students, or the end of a pruned trial."""
    labels = {"mode": config.mode, "method": config.method.name, "dataset": config.dataset.title}
    try:
        return run_students(pipeline, students, labels, alone)
    except Pruned as pruned:
        pipeline.tracker.summarize({"pruned_after_epoch": pruned.epoch})
        return pruned


def known_reason(error: Exception) -> str | None:
    """The message of a failure with a known reason; None if it needs a traceback."""
    if isinstance(error, (KnownError, OSError)):  # an OSError names its file
        return tilde(str(error))
    said = str(error).splitlines()[0] if str(error) else ""
    if "more than 1 value per channel" in said:  # of a loss's own layers; networks are checked before
        return f"a BatchNorm cannot learn from one value ({said}); use a larger train.batch_size"
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", said):
        return f"out of memory ({said[:120]}); use a smaller train.batch_size, or fewer jobs at the same time"
    return None


def why_ended(error: Exception) -> str | None:
    """Why a run or a multirun ended, where Hydra or its launcher raised the error; None if it needs a traceback."""
    if isinstance(error, HydraException):
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        return "\n".join(filter(None, [str(error), str(cause or "")]))
    again = "the same command trains what is missing"
    match type(error).__name__:  # of packages that need not be installed
        case "TerminatedWorkerError" | "BrokenProcessPool":
            return f"a worker was killed, perhaps for its memory: {again}; hydra.launcher.n_jobs=1 needs less"
        case "UncompletedJobError" | "FailedJobError":
            return f"a job ended without a result, and its output is in .submitit/ of the sweep's folder: {again}"
    return known_reason(error)


def typed() -> list[str]:
    """This job's overrides, as they were typed: their interpolations may have no value."""
    return as_typed(HydraConfig.get().overrides.task)


def home() -> Path | None:
    """The folder where the command was given, where the job works in another; otherwise None."""
    hydra = HydraConfig.get()
    return Path(hydra.runtime.cwd) if hydra.job.chdir else None


def group() -> str | None:
    """The W&B group of this job's multirun; None for a single run."""
    hydra = HydraConfig.get()
    return group_of(Path(hydra.sweep.dir)) if hydra.mode == RunMode.MULTIRUN else None


def with_share(runtime: RuntimeSpec) -> RuntimeSpec:
    """The runtime of this job. If the launcher runs several jobs at once, it gets a part of the processors and one GPU.

    Values that the user set stay.
    """
    hydra = HydraConfig.get()
    if world().size > 1 and (runtime.processes or 1) > 1:
        raise KnownError(f"runtime.processes: should be 1 or null under torchrun (got {runtime.processes})")
    if hydra.mode != RunMode.MULTIRUN or hydra.runtime.choices["hydra/launcher"] == "basic":
        return RuntimeSpec(**{**runtime.model_dump(), "threads": runtime.threads_of(cpu_count())})
    share = processors_of_a_job(hydra.launcher, cpu_count())
    own = {
        "device": resolve_device(runtime.device, hydra.job.num),
        "threads": runtime.threads_of(share) or share,
        "processes": runtime.processes or 1,
    }
    return RuntimeSpec(**{**runtime.model_dump(), **own})


def processors_of_a_job(launcher: DictConfig, processors: int) -> int:
    """The number of processors of each job, by its launcher's settings; `processors` is the machine's number.

    joblib's jobs share the machine's processors. submitit's and Ray's jobs request a number, by default one.
    """
    if "n_jobs" in launcher:
        jobs = int(launcher.n_jobs)
        jobs = jobs if jobs > 0 else processors + 1 + jobs  # as joblib counts
        return max(processors // max(jobs, 1), 1)
    asked = OmegaConf.select(launcher, "cpus_per_task") or OmegaConf.select(launcher, "ray.remote.num_cpus")
    return max(int(asked or 1), 1)


def pruning(config: Config, students: Sequence[Stage]) -> Callable[[Metrics], None] | None:
    """The function that ends the training of a pruned trial; None if the job is not pruned.

    Raises KnownError if sweep.prune is typed and the job is not a trial of a search.
    """
    if not config.sweep.prune or (config.runtime.trial is None and "sweep.prune" not in by_key(typed())):
        return None
    if config.runtime.trial is None:
        raise KnownError("sweep.prune: works only in a search: python run.py -m sweep=tpe sweep.prune=true")
    from kd.app.search import halving

    return halving(config.runtime.trial, students[0].train.epochs)
