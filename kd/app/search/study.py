"""The Optuna study of a search: its name, and its preparation before Hydra's sweeper opens it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from kd.app.config import Config, plan, plan_alone
from kd.app.parallel import fixed_of, tell
from kd.app.parsing import as_typed, by_key, parse
from kd.app.search.processes import Locks
from kd.app.search.sampler import AGAIN, LOST, NO_BEST, WANTED, ordinal
from kd.app.search.space import as_overrides
from kd.core import files
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.reporting.console import print_plan
from kd.store import Store

ORDINAL = "runtime.trial"  # the parameter that tells a job its trial
_SEEDS = ("seed", "teacher.seed", "method.assistant.seed", "dataset.split_seed")
# Settings that other settings of a trial may not read: milestones without a step schedule, T without an assistant.
_SOMETIMES = re.compile(
    r"\+*(method\.assistant\..*|(.*\.)?(milestones|gamma|momentum|nesterov|weights|views)|init(\..*)?|freeze)="
)
_NEEDED = ("model.arch", "teacher.arch", "dataset.root")  # keys without a default, where they are read
_NETWORKS = {"method.assistants", "method.teachers"}  # names of networks that may be searched
_NO_RESULT = ("runtime.", "tracking", "hydra", "sweep", "dry_run")  # overrides that decide nothing of a trial's result
_PROCESS = "process"  # a trial's attribute: the process that runs it


def hand_over(config: DictConfig, trial: Trial) -> None:
    """Give the trial's job its ordinal as an override. The sweeper calls this for each trial."""
    trial.set_user_attr(_PROCESS, Locks.process)
    number = ordinal(trial.study, trial.number)
    trial.suggest_int(ORDINAL, number, number)


@dataclass(frozen=True)
class Search:
    """This process's search: the folder of its trials, their number (0 if it only joins), the study and the locks."""

    folder: Path
    expected: int
    study: Study
    locks: Locks

    def leave(self) -> set[str]:
        """Release the locks. Returns the folder names of trials that other processes are still running."""
        self.locks.leave()
        return {str(ordinal(self.study, trial.number)) for trial in _running(self.study, self.locks)}


def ready_study(config: DictConfig, config_name: str) -> Search:
    """Prepare the study that Hydra's sweeper opens next.

    `config` is the multirun's. The sweeper's name, storage and number of trials are set in it. A dry run prints what
    would be searched, and exits. Raises KnownError if a searched key does not exist or is the seed, if its values are
    none, or if another process leads the study.
    """
    base, space = _read(config, config_name)
    if base.why:
        raise KnownError(
            "why: does not go with a search; without -m it says where the values come from that are not searched"
        )
    sweeper = config.hydra.sweeper
    dataset = resolve(base.dataset, base.data_root, base.workers, base.image_size)
    if base.sweep.objective == "val_acc" and not dataset.validated:
        raise KnownError(
            "sweep.objective: val_acc needs a validation split, dataset.val_fraction above 0; without one the papers "
            "searched by sweep.objective=test_acc"
        )
    students = plan(base, dataset)
    name = study_name(base, students, space, OmegaConf.to_container(sweeper.sampler), fixed_of(config))
    given = by_key(as_typed(config.hydra.overrides.hydra))
    place = base.store_root / "search" / name
    folder = _folder(config, place, name, join=base.sweep.join)
    for key in {"hydra.sweeper.study_name", "hydra.sweep.subdir"} & {*given}:
        print(f"{key} has no effect: a search names its study by what is searched, and its folders by their trials")
    if base.dry_run:
        print(f"study {name} in {folder}: {sweeper.n_trials} trials in all, over")
        print("\n".join(f"  {parameter}: {values}" for parameter, values in space.items()), flush=True)
        alone = plan_alone(base, dataset, students)
        print_plan(base.where, students, Store(base.store_root), base.runtime.retrain, alone)
        sys.exit(0)
    folder.mkdir(parents=True, exist_ok=True)
    locks = Locks(place)
    locks.enter(name, base.sweep.join)
    files.write(place / "folder.txt", str(folder))
    storage = sweeper.storage or f"sqlite:///{folder / 'study.db'}"
    study = _open(name, storage, sweeper.direction)
    wanted = 0 if base.sweep.join else int(sweeper.n_trials)
    if wanted:
        study.set_user_attr(WANTED, wanted)
        tell(config, "hydra.sweeper.n_trials", _missing(study, locks, wanted))
    _draw_on(config, study)
    tell(config, "hydra.sweeper.study_name", name)
    tell(config, "hydra.sweeper.storage", storage)
    tell(config, "hydra.sweep.dir", str(folder))
    tell(config, "hydra.sweep.subdir", f"${{{ORDINAL}}}")
    return Search(folder, wanted, study, locks)


def _draw_on(config: DictConfig, study: Study) -> None:
    """Let a sampler with a seed, other than by_trial, draw other trials than those that the study has already."""
    sampler, begun = config.hydra.sweeper.sampler, len(study.get_trials(deepcopy=False))
    seed = sampler.get("seed")
    if not begun or seed is None or sampler._target_.endswith(".ByTrial"):
        return
    new = int(hashlib.sha256(f"{seed} {begun}".encode()).hexdigest()[:8], 16) % 2**31
    print(f"hydra.sweeper.sampler.seed={new} in place of {seed}, which would draw the same trials again", flush=True)
    tell(config, "hydra.sweeper.sampler.seed", new)


def _read(config: DictConfig, config_name: str) -> tuple[Config, dict[str, str]]:
    """The configuration that all trials share, and the search space: the values of each parameter."""
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(loader).parse_overrides(as_typed(config.hydra.overrides.task))
    fixed = fixed_of(config)

    def compose(*more: str) -> DictConfig:
        words = [*as_typed(config.hydra.overrides.hydra), *fixed, *more]  # hydra.searchpath among them
        composed: DictConfig = loader.load_configuration(config_name, words, run_mode=RunMode.RUN)
        return composed

    swept = [each for each in overrides if each.is_sweep_override()]
    typed = [*(config.hydra.sweeper.params or {}).items(), *(str(each.input_line).split("=", 1) for each in swept)]
    given = {each.get_key_element().lstrip("+") for each in overrides if not each.is_sweep_override()}
    space = {_bare(name): str(values) for name, values in typed if _bare(name) not in given}
    if not space:
        named = ", ".join(_bare(name) for name, _ in typed)
        why = f"nothing is left to search, because each has one value: {named}" if named else "nothing is searched"
        raise KnownError(f"sweep: {why}; what to search is typed: 'method.T=interval(1,20)'")
    base = _base(compose, space, fixed)
    _check_seed(space, base)
    names = as_overrides(space, {_bare(name) for name, _ in typed if str(name).startswith("+")}, compose)
    _rename(config, overrides, names)
    return base, space


def _base(compose: Callable[..., DictConfig], space: Mapping[str, str], fixed: Sequence[str]) -> Config:
    """The configuration without what is searched. A searched key that no run is without has its first value."""
    parser = OverridesParser.create()
    needed = [parser.parse_override(f"{name}={space[name]}") for name in _NEEDED if name in space]
    first = [f"{each.key_or_group}={next(each.sweep_string_iterator())}" for each in needed if each.is_discrete_sweep()]
    composed = compose(*first)
    with open_dict(composed):
        del composed["hydra"]
    return parse(composed, fixed)


def _bare(name: Any) -> str:
    return str(name).lstrip("+")


def _rename(config: DictConfig, overrides: Sequence[Override], names: Mapping[str, str]) -> None:
    """Let the sweeper search parameters by these names, and no others."""
    params = (config.hydra.sweeper.params or {}).items()
    if params:
        kept = {names[_bare(name)]: values for name, values in params if _bare(name) in names}
        OmegaConf.update(config, "hydra.sweeper.params", kept, merge=False)
    config.hydra.overrides.task = [
        f"{names[_bare(each.get_key_element())]}={str(each.input_line).partition('=')[2]}"
        if each.is_sweep_override() and _bare(each.get_key_element()) in names
        else str(each.input_line)
        for each in overrides
    ]


def _open(name: str, storage: str, direction: str) -> Study:
    """The study of this name; a new one if there is none. Raises KnownError if its storage cannot be opened."""
    optuna.logging.set_verbosity(logging.WARNING)
    # The sweeper's log repeats what is printed here, and complains that a failed job returns None.
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.ERROR)
    try:
        return optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise KnownError(f"hydra.sweeper.storage: {storage} cannot be opened ({said})") from error


def _folder(config: DictConfig, place: Path, name: str, *, join: bool) -> Path:
    """The folder of the study's trials: the typed one, or that of its last start, or a new one where kd was started."""
    text = (place / "folder.txt").read_text(encoding="utf-8") if (place / "folder.txt").exists() else ""
    last = Path(text) if text and Path(text).is_absolute() and Path(text).is_dir() else None
    # The default has the time in it. Then the study's own folder is used, so that the same command goes on with it.
    default = "${now:" in str(config.hydra.sweep._get_node("dir")._value())
    if "hydra.sweep.dir" not in by_key(as_typed(config.hydra.overrides.hydra)) and default:
        return last or Path("multirun", name).absolute()
    typed = Path(config.hydra.sweep.dir).absolute()
    if join and last and typed != last:
        print(f"hydra.sweep.dir has no effect: sweep.join=true joins the search in {last}", flush=True)
        return last
    return typed


def study_name(
    base: Config, students: Sequence[Stage], space: Mapping[str, str], sampler: Any, fixed: Sequence[str]
) -> str:
    """A readable prefix, and a hash of search space, sampler, objective, pruning and the keys of the students.

    `fixed` are the overrides of all trials. They are hashed, too, where a trial may read what the students of the base
    do not: if options are searched, if a value is an interpolation, and otherwise those that only some values read. The
    number of trials, the number of parallel jobs, the launcher and the tracking are not in it.
    """
    identity = {
        "space": dict(space),
        # The sampler's module had another name when the first studies were named; theirs stay what they are.
        "sampler": json.loads(json.dumps(sampler).replace("kd.app.search.", "kd.search.")),
        "objective": base.sweep.objective,
        "prune": base.sweep.prune,
        "students": [student.key for student in students],
    }
    told = [each for each in fixed if not each.lstrip("+").startswith(_NO_RESULT)]
    if any("." not in name and name != "seed" for name in space) or any("${" in each for each in told):
        identity["fixed"] = sorted(told)
    elif sometimes := [each for each in told if _SOMETIMES.match(each) and _switched(each, space)]:
        identity["fixed"] = sorted(sometimes)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    chain = "-".join(source.model for source in students[0].chain)
    return f"{base.method.name}-{chain}-{base.dataset.name}-{digest}"


def _switched(override: str, space: Mapping[str, str]) -> bool:
    """Whether the search decides if a trial reads an override."""
    name = override.lstrip("+").partition("=")[0]
    if name.startswith("method.assistant."):
        return "method.assistants" in space
    if name == "freeze" or name.partition(".")[0] == "init":
        return bool(_NETWORKS & space.keys())
    reader = {"milestones": "schedule", "gamma": "schedule", "weights": "teachers", "views": "augment"}
    return any(key.endswith(f".{reader.get(name.rpartition('.')[2], 'optimizer')}") for key in space)


def _check_seed(space: Mapping[str, str], base: Config) -> None:
    seeds = [name for name in space if name in _SEEDS]
    if seeds and base.sweep.objective != "test_acc":
        raise KnownError(
            f"{seeds[0]}: cannot be searched, because the luckiest seed would win; with replicates=3 each trial trains "
            "three students, and the search maximises their mean"
        )


def _running(study: Study, locks: Locks) -> list[FrozenTrial]:
    """The trials that a living process is running."""
    trials = study.get_trials(deepcopy=False)
    states = [trial for trial in trials if trial.state == TrialState.RUNNING]
    return [trial for trial in states if locks.alive(trial.user_attrs.get(_PROCESS))]


def _try_again(study: Study, trial: FrozenTrial) -> None:
    """Queue the parameters of a trial, with its ordinal: enqueue_trial() of optuna 2 takes no attributes."""
    params = {name: value for name, value in trial.params.items() if name != ORDINAL}
    attrs = {AGAIN: ordinal(study, trial.number)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of create_trial and add_trial in optuna 2
        study.add_trial(create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": params}, user_attrs=attrs))


def _missing(study: Study, locks: Locks, n_trials: int) -> int:
    """The number of missing trials. Trials of processes that have ended are queued again with their parameters.

    Raises KnownError if no trial is missing and all have failed.
    """
    running = _running(study, locks)
    alive = {trial.number for trial in running}
    done = failed = 0
    for trial in study.get_trials():
        if trial.state == TrialState.RUNNING and trial.number not in alive:
            study._storage.set_trial_user_attr(trial._trial_id, LOST, AGAIN)
            study.tell(trial.number, state=TrialState.FAIL)
            _try_again(study, trial)
        elif trial.state.is_finished() and not trial.user_attrs.get(LOST, False):
            done += 1
            failed += trial.state == TrialState.FAIL
    missing = max(0, n_trials - done - len(running))
    more = "a larger hydra.sweeper.n_trials adds more"
    if failed and failed == done and not (missing or running):
        raise KnownError(f"study {study.study_name}: {NO_BEST}; {more}")
    among = f", {failed} of them failed" if failed else ""
    beside = f", {len(running)} running elsewhere" if running else ""
    hint = f"; {more}" if failed and not missing else ""
    print(f"study {study.study_name}: {done} trials done{among}{beside}, {missing} to go{hint}", flush=True)
    return missing
