"""A search as a study that goes on: Optuna through Hydra's sweeper, up to `n_trials` in all however often it stops.

The sweeper knows nothing of this. prepare() readies the study before the sweeper opens it, the sampler draws a trial
from its ordinal and the history alone, and hand_over() tells the job its ordinal, which its folder is named after. So
a search that was killed and started again ends with the trials of an unbroken one, at equal n_jobs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import optuna
from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.distributions import BaseDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from kd.config import Config, plan
from kd.datasets import resolve
from kd.parsing import parse
from kd.pipeline import Pruned
from kd.spec import KnownError
from kd.stage import Stage
from kd.store import Metrics, Store
from kd.tables import print_plan

ORDINAL = "runtime.trial"  # the parameter by which a job learns which trial it is
_PROCESS, _LOST = "process", "lost"  # a trial's attributes: who runs it; that its process was gone before it ended


class ByTrial(BaseSampler):
    """TPE, begun anew for each trial from (seed, ordinal): what it draws depends on no earlier draw of the process."""

    def __init__(self, seed: int, n_startup_trials: int) -> None:
        self._seed, self._n_startup_trials = seed, n_startup_trials
        self._number, self._tpe = -1, TPESampler()

    def _of(self, study: Study, trial: FrozenTrial) -> TPESampler:
        if trial.number != self._number:
            self._number = trial.number
            seed = hashlib.sha256(f"{self._seed} {ordinal(study, trial.number)}".encode()).digest()
            self._tpe = TPESampler(
                seed=int.from_bytes(seed[:4], "big"),
                n_startup_trials=self._n_startup_trials,
                warn_independent_sampling=False,
            )
        return self._tpe

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As TPE does."""
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE does."""
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE does."""
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)


def ordinal(study: Study, number: int) -> int:
    """Which trial of the search a trial of the study is: lost ones, which were begun again, do not count."""
    trials = study.get_trials(deepcopy=False)
    return number - len([trial for trial in trials if trial.number < number and trial.user_attrs.get(_LOST, False)])


def hand_over(config: DictConfig, trial: Trial) -> None:
    """Give the trial's job its ordinal, as one more override; the sweeper calls it for each trial."""
    trial.set_user_attr(_PROCESS, Locks.process)
    number = ordinal(trial.study, trial.number)
    trial.suggest_int(ORDINAL, number, number)


class Locks:
    """What this process holds while it searches: a lock of its own, and the study's unless it only joins."""

    process: ClassVar[str] = ""  # the name of this one

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[FileLock] = []
        folder.mkdir(parents=True, exist_ok=True)

    def enter(self, study: str, join: bool) -> None:
        """Hold them until the process ends. Raises KnownError, saying who, where another process sweeps the study."""
        owner = self._folder / "owner.json"
        if not join:
            lock = FileLock(self._folder / "owner.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                who = json.loads(owner.read_text()) if owner.exists() else {}
                named = f"process {who['pid']} on {who['host']}, since {who['since']}" if who else "another process"
                raise KnownError(
                    f"the study {study} is being searched by {named}; sweep.join=true adds trials beside it"
                ) from error
            self._held.append(lock)
            since = datetime.now().isoformat(" ", "seconds")
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        Locks.process = uuid.uuid4().hex
        own = FileLock(self._folder / f"{Locks.process}.lock")
        own.acquire()
        self._held.append(own)

    def leave(self) -> None:
        """Hold nothing any more."""
        for lock in self._held:
            lock.release()
        (self._folder / f"{Locks.process}.lock").unlink(missing_ok=True)

    def alive(self, process: str | None) -> bool:
        """Whether the process is still searching; its lock goes with it, however it ends."""
        path = self._folder / f"{process}.lock"
        if process is None or not path.exists():
            return False
        try:
            FileLock(path).acquire(timeout=0).lock.release()
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        return False


def prepare(config: DictConfig, config_name: str) -> tuple[Path, Locks]:
    """Ready the study that Hydra's sweeper is about to open. Returns the folder of its trials, and what is locked.

    `config` is Hydra's of the multirun, whose sweeper learns the study's name, place and number of missing trials. A
    dry run is told what would be searched, and ends. Raises KnownError for a search that cannot be: of settings that
    do not exist, of seeds, or of a study that another process is at.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(loader).parse_overrides(list(config.hydra.overrides.task))
    fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
    composed = loader.load_configuration(config_name, fixed, run_mode=RunMode.RUN)
    with open_dict(composed):
        del composed["hydra"]
    base, sweeper = parse(composed), config.hydra.sweeper
    swept = dict(str(each.input_line).split("=", 1) for each in overrides if each.is_sweep_override())
    given = {each.get_key_element() for each in overrides if not each.is_sweep_override()}
    space = {**{str(name): str(values) for name, values in (sweeper.params or {}).items()}, **swept}
    space = {parameter: values for parameter, values in space.items() if parameter not in given}
    _check(space, composed, base)
    students = plan(base, resolve(base.dataset, base.data_root, base.workers))
    name = study_name(base, students, space, OmegaConf.to_container(sweeper.sampler))
    told = any(str(each).startswith("hydra.sweep.dir=") for each in config.hydra.overrides.hydra)
    place = base.store_root / "search" / name
    folder = Path(config.hydra.sweep.dir).absolute() if told else _folder(place, name)
    if base.dry_run:
        print(f"study {name} in {folder}: {sweeper.n_trials} trials in all, over")
        print("\n".join(f"  {parameter}: {values}" for parameter, values in space.items()), flush=True)
        print_plan(base.mode, students, Store(base.store_root), base.runtime.retrain)
        sys.exit(0)
    folder.mkdir(parents=True, exist_ok=True)
    locks = Locks(place)
    locks.enter(name, base.sweep.join)
    (place / "folder.txt").write_text(str(folder))
    storage = sweeper.storage or f"sqlite:///{folder / 'study.db'}"
    optuna.logging.set_verbosity(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        study = optuna.create_study(study_name=name, storage=storage, direction=sweeper.direction, load_if_exists=True)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise KnownError(f"hydra.sweeper.storage: {storage} cannot be opened ({said})") from error
    if not base.sweep.join:
        _tell(config, "hydra.sweeper.n_trials", _missing(study, locks, sweeper.n_trials))
    _tell(config, "hydra.sweeper.study_name", name)
    _tell(config, "hydra.sweeper.storage", storage)
    _tell(config, "hydra.sweep.dir", str(folder))
    _tell(config, "hydra.sweep.subdir", f"${{{ORDINAL}}}")
    return folder, locks


def _folder(place: Path, name: str) -> Path:
    """Where the study's trials are, whatever the working directory; at first below the present one."""
    told = place / "folder.txt"
    known = Path(told.read_text()) if told.exists() else None
    return known if known is not None and known.is_dir() else Path("multirun", name).absolute()


def study_name(base: Config, students: Sequence[Stage], space: Mapping[str, str], sampler: Any) -> str:
    """A prefix for people, and a hash of what makes it this search: space, sampler, objective and all fixed keys.

    The number of trials, of parallel jobs, the launcher and the tracking are not in it.
    """
    identity = {
        "space": dict(space),
        "sampler": sampler,
        "objective": base.sweep.objective,
        "prune": base.sweep.prune,
        "students": [student.key for student in students],
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    chain = "-".join(source.model for source in students[0].chain)
    return f"{base.method.name}-{chain}-{base.dataset.name}-{digest}"


def _check(space: Mapping[str, str], composed: DictConfig, base: Config) -> None:
    missing = [name for name in space if "." in name and OmegaConf.select(composed, name, default=base) is base]
    if missing:
        raise KnownError(
            "\n".join(f"{name}: cannot be searched, method={base.method.name} has none" for name in missing)
        )
    if "seed" in space and base.sweep.objective != "test_acc":
        raise KnownError(
            "seed: a search would take the luckiest one for the best setting; replicates=3 has each trial train three "
            "students and maximises their mean"
        )


def halving(trial: int, epochs: int) -> Callable[[Metrics], None]:
    """Takes a student's epochs, and raises Pruned where successive halving ends the job's trial.

    From an eighth of the epochs on, doubling, only the better half of the trials that came so far goes on.
    """
    sweeper = HydraConfig.get().sweeper
    pruner = SuccessiveHalvingPruner(min_resource=max(1, round(epochs / 8)), reduction_factor=2)
    study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage, pruner=pruner)
    running = [each for each in study.get_trials(deepcopy=False) if each.state == TrialState.RUNNING]
    (own,) = [each for each in running if each.params.get(ORDINAL) == trial and not each.user_attrs.get(_LOST)]
    reported = Trial(study, own._trial_id)

    def report(metrics: Metrics) -> None:
        epoch, value = int(metrics["epoch"] or 0), float(metrics["val_acc"] or 0)
        reported.report(value, epoch)
        if epoch < epochs and reported.should_prune():
            raise Pruned(epoch, epochs, value)

    return report


def _missing(study: Study, locks: Locks, n_trials: int) -> int:
    """How many trials are to go; those of processes that are gone are begun again with their parameters."""
    done = running = 0
    for trial in study.get_trials():
        if trial.state == TrialState.RUNNING and locks.alive(trial.user_attrs.get(_PROCESS)):
            running += 1
        elif trial.state == TrialState.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, _LOST, True)
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial({name: value for name, value in trial.params.items() if name != ORDINAL})
        elif trial.state.is_finished() and not trial.user_attrs.get(_LOST, False):
            done += 1
    missing = max(0, n_trials - done - running)
    beside = f", {running} running elsewhere" if running else ""
    print(f"study {study.study_name}: {done} trials done{beside}, {missing} to go", flush=True)
    return missing


def _tell(config: DictConfig, key: str, value: str | int) -> None:
    """Set it for the sweeper, and for the jobs, whose configuration Hydra composes anew from the overrides."""
    quoted = json.dumps(value, ensure_ascii=False) if isinstance(value, str) and "${" not in value else value
    config.hydra.overrides.hydra.append(f"{key}={quoted}")
    OmegaConf.update(config, key, value)
