"""Jobs and multiruns under Hydra: a job's failures and share of the machine, a multirun's start and summary."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.app.config import Config, initial_files, plan, plan_alone
from kd.app.effects import remarks
from kd.app.parsing import by_key, parse, recorded
from kd.core.hardware import bind_threads, cpu_count, resolve_device
from kd.core.spec import KnownError, tilde
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.reporting import summary
from kd.reporting.console import print_plan, print_run
from kd.reporting.curves import draw_curves
from kd.reporting.results import (
    Job,
    Pruned,
    RunResult,
    clear_marks,
    find_jobs,
    record_failed,
    record_pruned,
    student_rows,
    write_result,
)
from kd.reporting.tracking import Tracker, TrackingSpec, group_of, track, track_sweep
from kd.store import Metrics, Store
from kd.training.checks import check_students
from kd.training.pipeline import Pipeline, run_students
from kd.training.ranks import team, world
from kd.training.workplace import RuntimeSpec, Workplace

if TYPE_CHECKING:
    from kd.app.search import Search


T = TypeVar("T")
SEARCH = "kd.app.search.hand_over"  # hydra.sweeper.custom_search_space of kd's own searches


def run_job(folder: Path, work: Callable[[], T], dry: bool) -> T | None:
    """Do the work of one job. A failure with a known reason is printed without a traceback.

    A single run then exits with 2. In a multirun that would end the whole sweep. So the job writes error.json into its
    folder and returns None, and the sweep goes on. Other failures print their traceback too.
    """
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        clear_marks(folder, dry)
        return work()
    except Exception as error:
        reason = known_reason(error)
        if reason is None and not multirun:
            raise
        if reason is None:
            # Not raised to Hydra: it would start no more jobs, and not every exception can be pickled.
            traceback.print_exc()
        else:
            print(reason, file=sys.stderr, flush=True)
        if not multirun:
            sys.exit(2)
        with suppress(OSError):  # on a full disk the summary lists the job as unfinished
            record_failed(folder, reason or f"{type(error).__name__}: {error}")
        return None


def is_dry(cfg: DictConfig) -> bool:
    """Whether a configuration, perhaps an invalid one, asks for the plan, or for the reasons of values, alone."""
    asked = [OmegaConf.select(cfg, key, throw_on_resolution_failure=False) for key in ("dry_run", "why")]
    return asked[0] is True or bool(asked[1])


def perform(cfg: DictConfig, folder: Path) -> RunResult | Pruned | None:
    """One job: parse, look up the data, plan, load or train, and leave the result in `folder`.

    None if the job prints the plan, or the reasons of values, and trains nothing.
    """
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.RUN and hydra.sweeper.get("custom_search_space") == SEARCH and not is_dry(cfg):
        raise KnownError("sweep: a search needs -m: python run.py -m sweep=…")
    config = parse(cfg, typed(), home())
    runtime = with_share(config.runtime)
    if not is_dry(cfg):
        bind_threads(runtime.threads, resolve_device(runtime.device))
    dataset = resolve(config.dataset, config.data_root, config.workers, config.image_size)
    students = plan(config, dataset)
    if config.why:
        from kd.app.provenance import reasons

        print("\n".join(reasons(cfg, config, students[0], typed())), flush=True)
        if not config.dry_run:
            return None
    alone = plan_alone(config, dataset, students)
    for line in remarks(config, dataset, students[0], by_key(typed())):
        print(line, flush=True)
    if config.runtime.threads is None and runtime.processes not in (None, 1):
        print(f"runtime.processes={runtime.processes}: runtime.threads={runtime.threads} in each", flush=True)
    store = Store(config.store_root)
    if config.dry_run:
        place = Workplace(store, config.data_root, config.runtime, initial=initial_files(config))
        check_students(place, [*students, *alone], config.teacher.file, networks=False)
        print_plan(config.mode, students, store, config.runtime.retrain, alone)
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
    if hydra.mode == RunMode.MULTIRUN and not runtime.tables:
        print(summary.job_line(hydra.job.num, _swept(), found), flush=True)
    else:
        print_run(found)
        print(tilde(f"this run: {folder}"))
    return found


def _swept() -> list[str]:
    """This job's overrides that differ within its multirun; all of them where Hydra keeps no record of the sweep's."""
    path = Path(HydraConfig.get().sweep.dir) / "multirun.yaml"
    shared = OmegaConf.select(OmegaConf.load(path), "hydra.overrides.task") if path.exists() else ()
    return [override for override in typed() if override not in (shared or ())]


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
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    return list(overrides)


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

    Raises KnownError if sweep.prune is set and the job is not a trial of a search.
    """
    if not config.sweep.prune:
        return None
    if config.runtime.trial is None:
        raise KnownError("sweep.prune: works only in a search: python run.py -m sweep=tpe sweep.prune=true")
    from kd.app.search import halving

    return halving(config.runtime.trial, students[0].train.epochs)


class Multirun(Callback):
    """Hydra's callback at the start of a multirun. It keeps the folder for summarize(), however the multirun ends."""

    folder: ClassVar[Path | None] = None
    began: ClassVar[float] = 0.0
    expected: ClassVar[int] = 0  # the number of jobs; 0 if it is unknown
    search: ClassVar[Search | None] = None

    @classmethod
    def begin(cls, folder: Path, expected: int, search: Search | None = None) -> None:
        """Keep what summarize() needs."""
        cls.folder, cls.expected, cls.search = folder, expected, search
        cls.began = time.time() - 1  # file times are coarse

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check that the run's folder can be written. Without this, Hydra shows a traceback."""
        _check_folder("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepare a search, and keep the multirun's folder. Errors exit here: Hydra only warns about exceptions."""
        if world().size > 1:
            _check_plugins(config)
        _check_slurm(config)
        _check_direction(config)
        if config.hydra.sweeper.get("custom_search_space") != SEARCH:
            folder = Path(config.hydra.sweep.dir)
            _check_folder("hydra.sweep.dir", folder)
            Multirun.begin(folder, jobs_of_a_grid(config))
            if not config.hydra.launcher["_target_"].endswith(
                ".BasicLauncher"
            ):  # the jobs' lines mix, or are elsewhere
                print(tilde(f"to watch it: python -m kd.sweep watch {folder}"), flush=True)
            return
        logging.getLogger("alembic").setLevel(logging.WARNING)
        os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # optuna 2 needs sqlalchemy 1.4, which warns
        from kd.app.search import ready_study

        try:
            search = ready_study(config, kwargs["config_name"])
            Multirun.begin(search.folder, search.expected, search)
        except (KnownError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
            sys.exit(2)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def _check_folder(key: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        print(f"{key}: {folder} cannot be written ({error.strerror})", file=sys.stderr)
        sys.exit(2)


def _check_plugins(config: DictConfig) -> None:
    """Under torchrun, exit unless sweeper and launcher are basic: one process must run the jobs, in a known order."""
    for part in ("sweeper", "launcher"):
        if not config.hydra[part]["_target_"].endswith(f".Basic{part.title()}"):
            choice = config.hydra.runtime.choices[f"hydra/{part}"]
            print(f"hydra/{part}: should be basic under torchrun (got {choice!r})", file=sys.stderr, flush=True)
            sys.exit(2)


_MAXIMISES = {  # how sweepers that search are told to maximise; all of them minimise by themselves
    "direction": "maximize",  # Optuna
    "optim.maximize": True,  # Nevergrad
    "ax_config.experiment.minimize": False,  # Ax
}


def _check_direction(config: DictConfig) -> None:
    """Let a search maximise, because jobs return accuracies. Exit if the command line says the opposite."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.hydra)  # may refer to a job's number
    typed_keys = {str(each).lstrip("+").partition("=")[0] for each in overrides}
    for name, wanted in _MAXIMISES.items():
        given, key = OmegaConf.select(config.hydra.sweeper, name), f"hydra.sweeper.{name}"
        if given is None or getattr(given, "name", given) == wanted:
            continue
        told = f"{key}={str(wanted).lower()}"
        if key in typed_keys:
            print(f"{key}: a search maximises accuracy; {told} or nothing", file=sys.stderr, flush=True)
            sys.exit(2)
        print(f"{told}: jobs return accuracies; sweep=tpe is a search that can be continued", flush=True)
        OmegaConf.update(config, key, wanted)


def _check_slurm(config: DictConfig) -> None:
    """Exit if the SLURM launcher is used without SLURM. Without this, submitit shows a traceback."""
    if config.hydra.launcher["_target_"].endswith(".SlurmLauncher") and shutil.which("srun") is None:
        print("hydra/launcher: there is no SLURM here (no srun); try hydra/launcher=local", file=sys.stderr)
        sys.exit(2)


def jobs_of_a_grid(config: DictConfig) -> int:
    """The number of jobs that the basic sweeper makes of the command line; 0 for other sweepers and dry runs."""
    if not config.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        return 0
    told = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*told, *config.hydra.overrides.task])
    given = {each.get_key_element(): each for each in overrides}
    if ("dry_run" in given and given["dry_run"].value() is True) or "why" in given:
        return 0
    return prod(len(list(each.sweep_string_iterator())) for each in given.values() if each.is_sweep_override())


def summarize() -> int:
    """Print the summary of this process's multirun, if there was one. Returns how many jobs failed or are missing."""
    if Multirun.folder is None:
        return 0
    # A search shows its earlier trials too, without those that other processes are running.
    elsewhere = Multirun.search.leave() if Multirun.search else set()
    found = find_jobs(Multirun.folder, 0 if Multirun.search else Multirun.began)
    done = [job for job in found if job.result or job.number not in elsewhere]
    missing = max(0, Multirun.expected - len(found))
    if done:
        summary.print_jobs(done)
        try:
            _summarize(Multirun.folder, done, missing)
        except OSError as error:
            print(f"the summary cannot be written: {error}", file=sys.stderr)
    return sum(job.failed for job in done) + missing


def _summarize(folder: Path, done: Sequence[Job], missing: int) -> None:
    """Write the summary of a multirun into its folder and into the tracking."""
    newest = max(done, key=lambda job: (folder / job.number).stat().st_mtime)
    path = folder / newest.number / ".hydra" / "config.yaml"
    config = OmegaConf.load(path) if path.exists() else OmegaConf.create()
    for line in summary.write_summary(
        folder, done, OmegaConf.select(config, "sweep.objective", default="val_acc"), missing
    ):
        print(line)
    # Only if this process ran a job, and a job succeeded: otherwise the tracking settings may be wrong.
    news = path.exists() and path.stat().st_mtime >= Multirun.began
    if news and "tracking" in config and any(job.result for job in done):
        spec = TrackingSpec.model_validate(OmegaConf.to_container(config.tracking, resolve=True))
        figures = [path for path in [folder / "summary.png"] if path.exists()]
        track_sweep(spec, folder, group_of(folder), student_rows(done), figures)
