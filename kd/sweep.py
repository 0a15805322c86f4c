"""What Hydra needs from us around a multirun: a search made ready before it, and a summary after it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from kd import summary
from kd.job import SEARCH
from kd.ranks import world
from kd.records import Job, jobs
from kd.spec import KnownError
from kd.tables import print_jobs
from kd.tracking import TrackingSpec, group_of, track_sweep

if TYPE_CHECKING:
    from kd.search import Search


class Multirun(Callback):
    """Hydra tells it that a multirun starts; summarize() asks it where, however that multirun ends."""

    folder: ClassVar[Path | None] = None
    began: ClassVar[float] = 0.0
    expected: ClassVar[int] = 0  # how many jobs it should come to, where that is known
    search: ClassVar[Search | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """See that the run's folder can be written: Hydra would say in a traceback that it cannot."""
        _check_folder("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ready a search of ours, and remember the multirun's folder. Of a callback's exceptions Hydra only warns."""
        if world().size > 1:
            _check_plugins(config)
        _check_slurm(config)
        Multirun.search, Multirun.began = None, time.time() - 1  # files' clocks are coarse
        if config.hydra.sweeper.get("custom_search_space") != SEARCH:
            Multirun.folder, Multirun.expected = Path(config.hydra.sweep.dir), _jobs_of_a_grid(config)
            _check_folder("hydra.sweep.dir", Multirun.folder)
            return
        logging.getLogger("alembic").setLevel(logging.WARNING)
        os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # of optuna 2, which needs sqlalchemy 1.4
        from kd.search import prepare

        try:
            Multirun.search = search = prepare(config, kwargs["config_name"])
            Multirun.folder, Multirun.expected = search.folder, search.expected
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
    """End a multirun under torchrun, whose jobs one process must lead in a known order; an exception only warns."""
    for part in ("sweeper", "launcher"):
        if not config.hydra[part]["_target_"].endswith(f".Basic{part.title()}"):
            choice = config.hydra.runtime.choices[f"hydra/{part}"]
            print(f"hydra/{part}: should be basic under torchrun (got {choice!r})", file=sys.stderr, flush=True)
            sys.exit(2)


def _check_slurm(config: DictConfig) -> None:
    """End a multirun that is told to use a cluster where there is none; submitit would say it in a traceback."""
    if config.hydra.launcher["_target_"].endswith(".SlurmLauncher") and shutil.which("srun") is None:
        print("hydra/launcher: there is no SLURM here (no srun); hydra/launcher=local rehearses it", file=sys.stderr)
        sys.exit(2)


def _jobs_of_a_grid(config: DictConfig) -> int:
    """How many jobs the basic sweeper makes of the command line; 0 for other sweepers, and for dry runs."""
    if not config.hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        return 0
    told = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*told, *config.hydra.overrides.task])
    given = {each.get_key_element(): each for each in overrides}
    if "dry_run" in given and given["dry_run"].value() is True:
        return 0
    return prod(len(list(each.sweep_string_iterator())) for each in given.values() if each.is_sweep_override())


def summarize() -> int:
    """Print the multirun that this process has run, if any. Returns how many of its jobs have failed or are missing."""
    if Multirun.folder is None:
        return 0
    # A search goes on: it is shown with its trials of before, but for those that others are at.
    elsewhere = Multirun.search.leave() if Multirun.search else set()
    found = jobs(Multirun.folder, 0 if Multirun.search else Multirun.began)
    done = [job for job in found if job.result or job.number not in elsewhere]
    missing = max(0, Multirun.expected - len(found))
    if done:
        print_jobs(done)
        try:
            _summarize(Multirun.folder, done, missing)
        except OSError as error:
            print(f"the summary cannot be written: {error}", file=sys.stderr)
    return sum(job.failed for job in done) + missing


def _summarize(folder: Path, done: Sequence[Job], missing: int) -> None:
    """The summary of a multirun, in its folder and where its runs are tracked."""
    newest = max(done, key=lambda job: (folder / job.number).stat().st_mtime)
    path = folder / newest.number / ".hydra" / "config.yaml"
    config = OmegaConf.load(path) if path.exists() else OmegaConf.create()
    for line in summary.write(folder, done, OmegaConf.select(config, "sweep.objective", default="val_acc"), missing):
        print(line)
    # Not where this process has run no job, nor where none came to anything: the settings of tracking may be wrong.
    news = path.exists() and path.stat().st_mtime >= Multirun.began
    if news and "tracking" in config and any(job.result for job in done):
        spec = TrackingSpec.model_validate(OmegaConf.to_container(config.tracking, resolve=True))
        figures = [path for path in [folder / "summary.png"] if path.exists()]
        track_sweep(spec, folder, spec.group or group_of(folder), summary.rows(done), figures)
