"""A multirun: what is checked before its jobs start, and the summary at its end."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from kd.app.jobs import SEARCH, is_dry
from kd.app.overrides import exact, is_range, length_of
from kd.app.parallel import choose_number, fixed_of, jobs_of, searched_of
from kd.app.parsing import SECTIONS, as_typed, option_has
from kd.core import files
from kd.core.spec import KnownError, tilde
from kd.reporting import summary
from kd.reporting.board import Sweep
from kd.reporting.console import console
from kd.reporting.results import Job, find_jobs, student_rows
from kd.reporting.status import record_process
from kd.reporting.tracking import TrackingSpec, group_of, track_sweep
from kd.training.ranks import world

if TYPE_CHECKING:
    from kd.app.search import Search
    from kd.reporting.live import LiveTable


class Multirun(Callback):
    """Hydra's callback at the start of a multirun. It keeps the folder for summarize(), however the multirun ends."""

    folder: ClassVar[Path | None] = None
    began: ClassVar[float] = 0.0
    expected: ClassVar[int] = 0  # the number of jobs; 0 if it is unknown
    start: ClassVar[Sequence[str]] = ()  # words of its command besides the overrides of its jobs
    search: ClassVar[Search | None] = None
    table: ClassVar[LiveTable | None] = None

    @classmethod
    def begin(cls, folder: Path, expected: int, search: Search | None = None, *, dry: bool = False) -> None:
        """Keep what summarize() needs."""
        cls.folder, cls.expected, cls.search = folder, expected, search
        cls.began = time.time() - 1  # file times are coarse
        if not dry:
            record_process(folder)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check that the run's folder can be written. Without this, Hydra shows a traceback."""
        _check_folder("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepare a search, and keep the multirun's folder. Errors exit here: Hydra only warns about exceptions."""
        try:
            if world().size > 1:
                _check_plugins(config)
            _check_slurm(config)
            _check_direction(config)
            _check_numbers(config)
            Multirun.start = start_of(config)
            searches = config.hydra.sweeper.get("custom_search_space") == SEARCH
            (_begin_search if searches else _begin_grid)(config, kwargs["config_name"])
            _show_table(config)
        except (KnownError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
            sys.exit(2)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def start_of(config: DictConfig) -> list[str]:
    """Words of a command besides the overrides of jobs: the primary configuration and the folders of options.

    A grid's file of one's own is among them, because it may fix keys. A search's is not: a single run refuses searches.
    """
    searches = "custom_search_space" in config.hydra.sweeper
    primary = OmegaConf.select(config, "hydra.job.config_name")
    choice = None if searches else OmegaConf.select(config, "hydra.runtime.choices.sweep")
    sources = OmegaConf.select(config, "hydra.runtime.config_sources") or ()
    folders = [each.path for each in sources if each.provider == "command-line"]
    return [
        *(f"--config-dir={folder}" for folder in folders),
        *([] if primary in (None, "config") else [f"--config-name={primary}"]),
        *(each for each in as_typed(config.hydra.overrides.hydra) if each.startswith("hydra.searchpath=")),
        *([] if choice is None else [f"sweep={choice}"]),
    ]


def _begin_grid(config: DictConfig, config_name: str) -> None:
    folder = Path(config.hydra.sweep.dir)
    _check_folder("hydra.sweep.dir", folder)
    _read_grid(config)
    jobs = jobs_of(config)
    Multirun.begin(folder, len(jobs), dry=is_dry(config))
    batch = config.hydra.sweeper.get("max_batch_size") or len(jobs)
    limit = (batch, "hydra.sweeper.max_batch_size") if batch < len(jobs) else (len(jobs), "jobs")
    choose_number(config, config_name, jobs, limit)


def _read_grid(config: DictConfig) -> None:
    """Read a grid that stands in a file as a typed one: options of different keys, and ranges by decimal arithmetic."""
    params = config.hydra.sweeper.get("params") or {}

    def forced(word: str) -> str:
        key = word.partition("=")[0]
        section = key.partition(".")[0]
        swept = section in SECTIONS and ({SECTIONS[section][0], "experiment"} & {*params})
        return f"++{word}" if swept and option_has(key) else word

    if params:
        read = _exact if config.hydra.sweeper._target_.endswith(".BasicSweeper") else str
        named = {forced(str(name)): read(f"{name}={values}").partition("=")[2] for name, values in params.items()}
        OmegaConf.update(config, "hydra.sweeper.params", named, merge=False)
        config.hydra.overrides.task = [*map(forced, as_typed(config.hydra.overrides.task))]


def _exact(word: str) -> str:
    """An override; if its value is a range, with the range's values by decimal arithmetic. Raises KnownError."""
    if "range(" not in word:
        return word
    try:
        override = OverridesParser.create().parse_override(word.strip())
    except HydraException as error:
        raise KnownError(f"hydra.sweeper.params: {word} cannot be read") from error
    if is_range(override) and not length_of(override.value()):  # type: ignore[arg-type]
        raise KnownError(f"hydra.sweeper.params: there is no value in {word}")
    return exact(override) if is_range(override) else word


def _begin_search(config: DictConfig, config_name: str) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # optuna 2 needs sqlalchemy 1.4, which warns
    from kd.app.search import ready_study

    search = ready_study(config, config_name)
    Multirun.begin(search.folder, search.expected, search)
    files.write(search.folder / "multirun.yaml", OmegaConf.to_yaml(config))  # as Hydra's own sweeper does
    limit = int(config.hydra.sweeper.n_jobs), "hydra.sweeper.n_jobs"
    choose_number(config, config_name, searched_of(config), limit)


def _show_table(config: DictConfig) -> None:
    """Show the live table of the multirun's jobs, or say how they can be watched where their lines mix."""
    from kd.reporting.live import LiveTable, has_terminal

    if Multirun.folder is None or is_dry(config):
        return
    asked, possible = OmegaConf.select(config, "runtime.live"), has_terminal() and world().size == 1
    if asked is not False and possible:
        sweep = sweep_of(config, Multirun.folder, Multirun.expected)
        Multirun.table = LiveTable(sweep, since=0 if Multirun.search else Multirun.began)
        Multirun.table.start()
        return
    if not possible and "runtime.live=true" in as_typed(config.hydra.overrides.task):
        why = "no terminal" if world().size == 1 else "of several processes"
        print(f"runtime.live=true has no effect: the output is {why}", flush=True)
    if not config.hydra.launcher["_target_"].endswith(".BasicLauncher"):
        print(tilde(f"to watch it: python -m kd.sweep watch {Multirun.folder}"), flush=True)


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
    typed_keys = {each.lstrip("+").partition("=")[0] for each in as_typed(config.hydra.overrides.hydra)}
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


def _check_numbers(config: DictConfig) -> None:
    """Raise KnownError for a number of jobs or trials that sweeper or launcher would divide by, or never reach."""
    for key in ("sweeper.n_trials", "sweeper.n_jobs", "sweeper.max_batch_size", "launcher.n_jobs"):
        number = OmegaConf.select(config.hydra, key)
        if isinstance(number, int) and number < 1 and not (key.startswith("launcher") and number < 0):
            raise KnownError(f"hydra.{key}: should be at least 1 (got {number})")


def _check_slurm(config: DictConfig) -> None:
    """Exit if the SLURM launcher is used without SLURM. Without this, submitit shows a traceback."""
    if config.hydra.launcher["_target_"].endswith(".SlurmLauncher") and shutil.which("srun") is None:
        print("hydra/launcher: there is no SLURM here (no srun); try hydra/launcher=local", file=sys.stderr)
        sys.exit(2)


def sweep_of(config: DictConfig, folder: Path, expected: int) -> Sweep:
    """What the multirun's configuration tells of its jobs."""
    return Sweep(folder, expected, fixed_of(config))


def summarize() -> int:
    """Print the summary of this process's multirun, if there was one. Returns how many jobs failed or are missing."""
    if Multirun.table is not None:
        Multirun.table.stop()
        Multirun.table = None
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
    objective, out = OmegaConf.select(config, "sweep.objective", default="val_acc"), console()
    for line in summary.write_summary(folder, done, objective, missing, Multirun.start):
        whole = line.startswith("again:") or not out.is_terminal  # a command that is broken cannot be copied
        out.print(line, highlight=False, markup=False, soft_wrap=whole)
    out.print(tilde(f"this sweep: {folder}"), highlight=False, markup=False, soft_wrap=True)
    # Only if this process ran a job, and a job succeeded: otherwise the tracking settings may be wrong.
    news = path.exists() and path.stat().st_mtime >= Multirun.began
    if news and "tracking" in config and any(job.result for job in done):
        spec = TrackingSpec.model_validate(OmegaConf.to_container(config.tracking, resolve=True))
        figures = [path for path in [folder / "summary.png"] if path.exists()]
        track_sweep(spec, folder, group_of(folder), student_rows(done), figures)
