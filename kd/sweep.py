"""What Hydra needs from us around a job and a multirun: failures kept apart, and a summary at the end."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd import summary
from kd.config import Config
from kd.hardware import cpu_count, resolve_device
from kd.pipeline import Pruned
from kd.ranks import world
from kd.spec import KnownError, tilde
from kd.stage import RuntimeSpec, Stage
from kd.store import Metrics
from kd.tables import JOB_MARKS, Job, job_folders, job_order, print_jobs, read_result
from kd.tracking import TrackingSpec, group_of, track_sweep

if TYPE_CHECKING:
    from kd.search import Locks

SEARCH = "kd.search.hand_over"  # hydra.sweeper.custom_search_space of the searches that are ours


class Multirun(Callback):
    """Hydra tells it that a multirun starts; summarize() asks it where, however that multirun ends."""

    folder: ClassVar[Path | None] = None
    began: ClassVar[float] = 0.0  # a search goes on, and is shown with its trials of before
    locks: ClassVar[Locks | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ready a search of ours, and remember the multirun's folder. Of a callback's exceptions Hydra only warns."""
        if world().size > 1:
            _check_plugins(config)
        if config.hydra.sweeper.get("custom_search_space") == SEARCH:
            os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # of optuna 2, which needs sqlalchemy 1.4
            from kd.search import prepare

            try:
                Multirun.folder, Multirun.locks = prepare(config, kwargs["config_name"])
            except (KnownError, OSError) as error:
                print(error, file=sys.stderr, flush=True)
                sys.exit(2)
            except Exception:
                traceback.print_exc()
                sys.exit(1)
        else:
            Multirun.folder, Multirun.began = Path(config.hydra.sweep.dir), time.time() - 1  # files' clocks are coarse


def _check_plugins(config: DictConfig) -> None:
    """End a multirun under torchrun, whose jobs one process must lead in a known order; an exception only warns."""
    for part in ("sweeper", "launcher"):
        if not config.hydra[part]["_target_"].endswith(f".Basic{part.title()}"):
            choice = config.hydra.runtime.choices[f"hydra/{part}"]
            print(f"hydra/{part}: should be basic under torchrun (got {choice!r})", file=sys.stderr, flush=True)
            sys.exit(2)


def job(folder: Path, work: Callable[[], float | None], dry: bool) -> float | None:
    """Do the work of one job. A failure with a known reason is printed without a traceback.

    A single run then exits with 2. In a multirun, where an exit would end the whole sweep, the job leaves
    error.json in its folder and returns None, and the sweep goes on; other failures leave their traceback too.
    A `dry` job leaves an earlier result.json where it is.
    """
    for mark in ("error.json", "pruned.json"):
        (folder / mark).unlink(missing_ok=True)
    if not dry:
        (folder / "result.json").unlink(missing_ok=True)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if not (multirun or dry) and HydraConfig.get().sweeper.get("custom_search_space") == SEARCH:
            raise KnownError("sweep: a search is a multirun: python run.py -m sweep=…")
        return work()
    except (KnownError, OSError) as error:  # a full disk or a missing right names its file itself
        reason = tilde(str(error))
        print(reason, file=sys.stderr, flush=True)
        if not multirun:
            sys.exit(2)
        _record(folder, reason)
        return None
    except Exception as error:
        if not multirun:
            raise
        # Not handed to Hydra either: it would begin no further batch of jobs, and not every exception can be pickled.
        traceback.print_exc()
        _record(folder, f"{type(error).__name__}: {error}")
        return None


def group() -> str | None:
    """The name that W&B knows this job's multirun by; None for a single run."""
    hydra = HydraConfig.get()
    return group_of(Path(hydra.sweep.dir)) if hydra.mode == RunMode.MULTIRUN else None


def share(runtime: RuntimeSpec) -> RuntimeSpec:
    """The runtime of this job, where a launcher runs several side by side: its processors, and its turn at the GPUs.

    What the user chose stays.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or hydra.runtime.choices["hydra/launcher"] == "basic":
        return runtime
    device = resolve_device(runtime.device, hydra.job.num)
    threads = runtime.threads or processors_of_a_job(hydra.launcher, cpu_count())
    return RuntimeSpec(**{**runtime.model_dump(), "device": device, "threads": threads})


def processors_of_a_job(launcher: DictConfig, processors: int) -> int:
    """How many processors each job has by the settings of its launcher, on a machine that has so many.

    joblib's jobs share them; submitit's and Ray's ask for their own, and have one where they ask for none.
    """
    if "n_jobs" in launcher:
        jobs = int(launcher.n_jobs)
        jobs = jobs if jobs > 0 else processors + 1 + jobs  # as joblib counts
        return max(processors // max(jobs, 1), 1)
    asked = OmegaConf.select(launcher, "cpus_per_task") or OmegaConf.select(launcher, "ray.remote.num_cpus")
    return max(int(asked or 1), 1)


def _record(folder: Path, reason: str) -> None:
    (folder / "error.json").write_text(json.dumps({"error": reason.splitlines()}, indent=2))


def pruning(config: Config, students: Sequence[Stage]) -> Callable[[Metrics], None] | None:
    """What ends the job's training early, where it is a trial of a search that prunes.

    Raises KnownError where it is told to prune and is no trial.
    """
    if not config.sweep.prune:
        return None
    if config.runtime.trial is None:
        raise KnownError("sweep.prune: compares the trials of a search, which this is not (-m sweep=tpe)")
    from kd.search import halving

    return halving(config.runtime.trial, students[0].train.epochs)


def record_pruned(folder: Path, pruned: Pruned) -> float:
    """Leave pruned.json; the value of a pruned job is what it had reached."""
    print(pruned, flush=True)
    (folder / "pruned.json").write_text(
        json.dumps({"epoch": pruned.epoch, "val_acc": pruned.value, "said": str(pruned)})
    )
    return pruned.value


def jobs(folder: Path, since: float = 0.0) -> list[Job]:
    """The jobs of a multirun's folder that started after `since`, in order; jobs of a dry run have nothing to tell."""
    found = [_look(folder, place) for place in job_folders(folder) if _changed(place) >= since and _counts(place)]
    return sorted(found, key=lambda job: job_order(job.number))


def _look(folder: Path, place: Path) -> Job:
    reason, result = "unfinished", None
    if (place / "result.json").exists():
        reason, result = "", read_result(place / "result.json")
    elif (place / "error.json").exists():
        reason = "; ".join(json.loads((place / "error.json").read_text())["error"])
    pruned = (place / "pruned.json").exists()
    if pruned:
        reason = json.loads((place / "pruned.json").read_text())["said"]
    overrides = place / ".hydra" / "overrides.yaml"
    told = [tilde(str(override)) for override in OmegaConf.load(overrides)] if overrides.exists() else []
    return Job(str(place.relative_to(folder)), told, result, reason, pruned)


def _changed(place: Path) -> float:
    return max((place / mark).stat().st_mtime for mark in JOB_MARKS if (place / mark).exists())


def _counts(place: Path) -> bool:
    """Whether the job has something to tell: a dry run has not, unless it failed."""
    config = place / ".hydra" / "config.yaml"
    saved = OmegaConf.load(config) if config.exists() else OmegaConf.create()
    dry = bool(OmegaConf.select(saved, "dry_run", throw_on_resolution_failure=False))
    return not dry or (place / "error.json").exists()


def summarize() -> int:
    """Print the multirun that this process has run, if any. Returns how many of its jobs failed or are unfinished."""
    if Multirun.folder is None:
        return 0
    if Multirun.locks is not None:
        Multirun.locks.leave()
    done = jobs(Multirun.folder, Multirun.began)
    if done:
        print_jobs(done)
        _summarize(Multirun.folder, done)
    return sum(job.failed for job in done)


def _summarize(folder: Path, done: Sequence[Job]) -> None:
    """The summary of a multirun, in its folder and where its runs are tracked."""
    path = folder / done[0].number / ".hydra" / "config.yaml"
    config = OmegaConf.load(path) if path.exists() else OmegaConf.create()
    for line in summary.write(folder, done, OmegaConf.select(config, "sweep.objective", default="val_acc")):
        print(line)
    # Where no job came to anything, the settings of tracking may be what was wrong.
    if "tracking" in config and any(job.result for job in done):
        spec = TrackingSpec.model_validate(OmegaConf.to_container(config.tracking, resolve=True))
        figures = [path for path in [folder / "summary.png"] if path.exists()]
        track_sweep(spec, folder, spec.group or group_of(folder), summary.rows(done), figures)
