"""What Hydra needs from us around a job and a multirun: failures kept apart, and a summary at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd.ranks import world
from kd.spec import KnownError
from kd.tables import JOB_MARKS, Job, job_folders, job_order, print_jobs, read_result


class Multirun(Callback):
    """Hydra tells it that a multirun starts; summarize() asks it where, however that multirun ends."""

    folder: ClassVar[Path | None] = None
    began: ClassVar[float] = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the multirun's folder."""
        if world().size > 1:
            _check_plugins(config)
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
    error.json in its folder and returns None, and the sweep goes on. Of other failures Hydra shows the traceback.
    A `dry` job leaves an earlier result.json where it is.
    """
    (folder / "error.json").unlink(missing_ok=True)
    if not dry:
        (folder / "result.json").unlink(missing_ok=True)
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        return work()
    except (KnownError, OSError) as error:  # a full disk or a missing right names its file itself
        print(error, file=sys.stderr, flush=True)
        if not multirun:
            sys.exit(2)
        _record(folder, str(error))
        return None
    except Exception as error:
        if multirun:
            _record(folder, f"{type(error).__name__}: {error}")
        raise


def _record(folder: Path, reason: str) -> None:
    (folder / "error.json").write_text(json.dumps({"error": reason.splitlines()}, indent=2))


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
    overrides = place / ".hydra" / "overrides.yaml"
    told = [str(override) for override in OmegaConf.load(overrides)] if overrides.exists() else []
    return Job(str(place.relative_to(folder)), told, result, reason)


def _changed(place: Path) -> float:
    return max((place / mark).stat().st_mtime for mark in JOB_MARKS if (place / mark).exists())


def _counts(place: Path) -> bool:
    """Whether the job has something to tell: a dry run has not, unless it failed."""
    config = place / ".hydra" / "config.yaml"
    dry = config.exists() and bool(OmegaConf.select(OmegaConf.load(config), "dry_run"))
    return not dry or (place / "error.json").exists()


def summarize() -> int:
    """Print the multirun that this process has run, if any. Returns how many of its jobs failed or are unfinished."""
    if Multirun.folder is None:
        return 0
    done = jobs(Multirun.folder, Multirun.began)
    if done:
        print_jobs(done)
    return sum(job.result is None for job in done)
