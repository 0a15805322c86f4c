"""One job as Hydra starts it: its failures kept to itself, its share of the machine, and its trial's pruning."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd import records
from kd.config import Config
from kd.hardware import cpu_count, resolve_device
from kd.spec import KnownError, tilde
from kd.stage import RuntimeSpec, Stage
from kd.store import Metrics
from kd.tracking import group_of

SEARCH = "kd.search.hand_over"  # hydra.sweeper.custom_search_space of the searches that are ours


def job(folder: Path, work: Callable[[], float | None], dry: bool) -> float | None:
    """Do the work of one job. A failure with a known reason is printed without a traceback.

    A single run then exits with 2. In a multirun, where an exit would end the whole sweep, the job leaves
    error.json in its folder and returns None, and the sweep goes on; other failures leave their traceback too.
    """
    records.clear(folder, dry)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if not (multirun or dry) and HydraConfig.get().sweeper.get("custom_search_space") == SEARCH:
            raise KnownError("sweep: a search is a multirun: python run.py -m sweep=…")
        return work()
    except Exception as error:
        reason = known_reason(error)
        if reason is None and not multirun:
            raise
        if reason is None:
            # Not handed to Hydra: it would begin no further batch of jobs, and not every exception can be pickled.
            traceback.print_exc()
        else:
            print(reason, file=sys.stderr, flush=True)
        if not multirun:
            sys.exit(2)
        with suppress(OSError):  # on a full disk the summary finds the job unfinished
            records.record_failed(folder, reason or f"{type(error).__name__}: {error}")
        return None


def known_reason(error: Exception) -> str | None:
    """What a person needs to know of a failure; None where it takes a traceback."""
    if isinstance(error, (KnownError, OSError)):  # a full disk or a missing right names its file itself
        return tilde(str(error))
    said = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", said):
        return f"out of memory ({said[:120]}); a smaller train.batch_size or fewer jobs side by side need less"
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
