"""result.json of a run; and the jobs of a multirun, read from their folders."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd.core import files
from kd.core.settings import Select
from kd.core.spec import Frozen, KnownError, tilde
from kd.core.stage import Normalization, Role
from kd.core.statistics import trim
from kd.losses import Loss

# Each of these files marks its folder as a job's.
_MARKS = (".hydra/config.yaml", "result.json", "error.json", "pruned.json")
_NO_JOBS = {".hydra", ".submitit", "wandb"}  # folders without jobs

UNFINISHED = "unfinished"  # the reason of a job that has not ended: it runs, or was stopped
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_USUAL = "the student's seed"
# Columns that every student's row has, after what was set for its job
_COLUMNS = (
    "dataset", "method", "mode", "seed", "chain", "val_acc", "test_acc", "difference to scratch", "student",
    "epoch chosen", "alarms", "failure",
)  # fmt: skip

Objective = Literal["val_acc", "test_acc"]

SELECTED: dict[Select | None, str] = {
    "best_val": "epoch chosen on validation accuracy",
    "last": "last epoch",
    "best_test": "EPOCH CHOSEN ON THE TEST SET, as the papers did",
    "best_test_batches": "EPOCH CHOSEN ON THE TEST SET, by the mean of its batches' accuracies, as Trained Teacher did",
    None: "given weights",
}


class Evidence(Frozen):
    """How a guide taught, in the last epoch; null where it was not measured."""

    guide_share: float | None = None  # of the loss's gradient with respect to what the loss reads, 0 to 1
    guide_acc: float | None = None  # of the guide (the worst of several) on the training views, in percent
    train_acc: float | None = None  # of its student on the same views, in train mode

    def __str__(self) -> str:
        share = None if self.guide_share is None else f"{100 * self.guide_share:.0f} % of the gradient is the guide's"
        views = None if self.guide_acc is None else f"on the training views the guide has {self.guide_acc:.2f} %"
        own = None if views is None or self.train_acc is None else f" and its student {self.train_acc:.2f} %"
        return "; ".join(text for text in (share, f"{views}{own or ''}" if views else None) if text)


class Outcome(Frozen):
    """One stage of a run, trained or loaded; accuracies in percent. Training facts of given weights are null."""

    role: Role
    model: str
    key: str
    seed: int | None
    loss: Loss | None
    guides: tuple[str, ...] = ()  # their keys
    params: int
    val_acc: float | None
    test_acc: float
    epochs: int
    seconds: float  # of its training, in this run or an earlier one
    select: Select | None  # how its epoch was chosen
    normalize: Normalization | None = None  # of given weights
    reused: bool
    evidence: Evidence | None = None  # of a stage with a guide
    alarms: tuple[str, ...] = ()  # what looked wrong, in the run that trained it


class Replicate(Frozen):
    """One of several students that differ only in their seed; accuracies in percent."""

    seed: int
    key: str
    val_acc: float | None
    test_acc: float
    alarms: tuple[str, ...] = ()  # of its whole chain

    @classmethod
    def of(cls, chain: Sequence[Outcome]) -> Replicate:
        """The last of a chain."""
        own = chain[-1].model_dump(include={"seed", "key", "val_acc", "test_acc"})
        return cls(**own, alarms=tuple(text for outcome in chain for text in outcome.alarms))


class Baseline(Frozen):
    """The same students alone, as by method=scratch, beside those of a run; accuracies in percent."""

    student: Outcome  # that of the first seed
    replicates: tuple[Replicate, ...]  # all students, by seed
    test_acc: float  # their mean
    difference: float  # the run's mean less theirs, in points of test accuracy
    std: float | None = None  # of the paired differences; from here to p null for one seed
    ci95: tuple[float, float] | None = None
    p: float | None = None  # of a paired t-test; null, too, if all differences are equal
    seeds_needed: int | None = None  # to find this difference with a power of 80 %; null if that cannot be told
    seconds: float  # of the training of these students, now or earlier
    taught_seconds: float  # of the training of the run's students and their chain

    @property
    def columns(self) -> dict[str, Any]:
        """Columns for a table of runs."""
        low, high = self.ci95 or (None, None)
        named = self.model_dump(exclude={"student", "replicates", "ci95"})
        return {f"baseline/{name}": value for name, value in {**named, "ci95_low": low, "ci95_high": high}.items()}


class RunResult(Frozen):
    """result.json of a run, for scripts."""

    chain: tuple[Outcome, ...]  # in the order of training; the student is that of the first seed
    objective: float | None  # mean validation accuracy of the students; null without a validation split
    mode: str
    method: str
    dataset: str  # its name in tables
    classes: tuple[str, ...] = ()  # the labels' names; empty: the data set has none
    baseline: Baseline | None = None  # of baseline=true

    @property
    def columns(self) -> dict[str, Any]:
        """Columns for a table of runs, besides the stages' accuracies; `test_acc` is the student's."""
        common = self.model_dump(include={"objective", "mode", "method", "dataset"})
        beside = self.baseline.columns if self.baseline else {}
        return {**common, "test_acc": self.chain[-1].test_acc, **beside}

    @property
    def networks(self) -> str:
        """The networks of the chain, in the order of training: "resnet20 → resnet8", "resnet20 + vgg8 → resnet8"."""
        first, *others = self.chain
        joined = (f" {'→' if each.loss and each.loss.guided else '+'} {each.model}" for each in others)
        return first.model + "".join(joined)

    @property
    def students(self) -> tuple[Replicate, ...]:
        """The student, as a tuple of one."""
        return (Replicate.of(self.chain),)

    @property
    def alarms(self) -> list[str]:
        """What looked wrong, each line once: in the chain, and in those of the other seeds."""
        own = [*dict.fromkeys(Replicate.of(self.chain).alarms)]
        return own + [f"seed {each.seed}: {text}" for each in self.students for text in each.alarms if text not in own]

    def value(self, objective: Objective) -> float | None:
        """What a search maximises: the students' mean accuracy on validation, or on test as in the papers."""
        return self.objective if objective == "val_acc" else self.chain[-1].test_acc


class ReplicatedResult(RunResult):
    """result.json of a run with several students; mean, std and ci95 are of their test accuracies."""

    replicates: tuple[Replicate, ...]
    mean: float
    std: float
    n: int
    ci95: tuple[float, float]
    varied: str = _USUAL  # what differs between them

    @property
    def columns(self) -> dict[str, Any]:
        """As above, with a column for each student's test accuracy; `test_acc` is their mean."""
        each = {f"test_acc/s{replicate.seed}": replicate.test_acc for replicate in self.replicates}
        low, high = self.ci95
        spread = {"std": self.std, "n": self.n, "ci95_low": low, "ci95_high": high, "varied": self.varied}
        named = {f"test_acc/{name}": value for name, value in spread.items()}
        return {**super().columns, "test_acc": self.mean, **each, **named}

    @property
    def students(self) -> tuple[Replicate, ...]:
        """All students, by seed."""
        return self.replicates

    def value(self, objective: Objective) -> float | None:
        """As for one student, the mean over all."""
        return self.objective if objective == "val_acc" else self.mean


def what_varied(chains: Sequence[Sequence[str]]) -> str:
    """What differs between the chains [student, stage] of an interval, in words, by the keys of their stages."""
    if len(chains) < 2:
        return "nothing: one seed" if chains else "nothing: no result"
    own = [len(set(keys)) == len(chains) for keys in zip(*chains, strict=True)]
    if all(own) and len({key for keys in chains for key in keys}) == len(own) * len(chains):
        return "the whole chain" if len(own) > 1 else f"{_USUAL}, with nothing above it"
    return f"{_USUAL}, over one chain" if own[-1] and not any(own[:-1]) else "a part of the chain"


def whose_seeds(varied: str = _USUAL) -> str:
    """What varied, after "3 seeds": "of the student", "of the whole chain"."""
    return f"of {varied}" if varied.endswith("chain") and not varied.startswith(_USUAL) else "of the student"


def test_set_choices(result: RunResult) -> list[str]:
    """How epochs were chosen by the test set; empty if none was."""
    selects = dict.fromkeys(outcome.select for outcome in result.chain)
    return [SELECTED[select] for select in selects if select in ("best_test", "best_test_batches")]


class Pruned(Exception):  # noqa: N818, it is not an error
    """A search ended the training of a student early; `value` is its validation accuracy in percent."""

    def __init__(self, epoch: int, epochs: int, value: float) -> None:
        super().__init__(f"pruned after epoch {epoch} of {epochs}, at {value:.2f} % on validation")
        self.epoch, self.value = epoch, value


def write_result(result: RunResult, folder: Path) -> None:
    """Write result.json atomically."""
    files.write(folder / "result.json", result.model_dump_json(indent=2, by_alias=True))


def read_result(path: Path) -> RunResult:
    """A run's result.json. Raises KnownError if it is missing or damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return (ReplicatedResult if "replicates" in tree else RunResult).model_validate(tree)
    except (OSError, ValueError, TypeError) as error:  # ValueError is pydantic's and json's too
        raise KnownError(f"{path} is not the result of a run ({str(error).splitlines()[0]})") from error


class Job(NamedTuple):
    """One job of a multirun: its number, its overrides, and its result or the reason why it has none."""

    number: str
    overrides: list[str]
    result: RunResult | None
    reason: str
    pruned: bool = False  # ended early by its search

    @property
    def failed(self) -> bool:
        """Whether it has no result and was not pruned."""
        return self.result is None and not self.pruned


# Jobs that were read, by their folders, with the times of their files; None for dry runs
Known = dict[Path, tuple[tuple[float, ...], Job | None]]


def clear_marks(folder: Path, dry: bool) -> None:
    """Remove the files that an earlier job wrote here at its end. A `dry` run keeps its result."""
    for mark in ("error.json", "pruned.json") if dry else ("error.json", "pruned.json", "result.json"):
        (folder / mark).unlink(missing_ok=True)


def record_failed(folder: Path, reason: str) -> None:
    """Write error.json."""
    (folder / "error.json").write_text(json.dumps({"error": reason.splitlines()}, indent=2), encoding="utf-8")


def record_pruned(folder: Path, pruned: Pruned) -> None:
    """Write pruned.json."""
    tree = {"epoch": pruned.epoch, "val_acc": pruned.value, "said": str(pruned)}
    (folder / "pruned.json").write_text(json.dumps(tree), encoding="utf-8")


def job_folders(folder: Path) -> list[Path]:
    """The folders of a multirun's jobs, at any depth, 2 before 10."""
    jobs = []
    for name, folders, files_of_it in os.walk(folder):
        if "stage.json" in files_of_it:  # a store may be inside
            folders.clear()
        elif not {*_MARKS}.isdisjoint(files_of_it) or (".hydra" in folders and (Path(name) / _MARKS[0]).exists()):
            jobs.append(Path(name))
        folders[:] = [each for each in folders if each not in _NO_JOBS]
    return sorted(jobs, key=lambda place: (len(str(place)), str(place)))


def find_jobs(folder: Path, since: float = 0.0, known: Known | None = None) -> list[Job]:
    """The jobs in a multirun's folder that started after `since`, in order. Dry runs count only if they failed.

    Who looks again and again keeps a dictionary `known`: a job whose files have not changed is then not read again.
    """
    known = {} if known is None else known
    found = []
    for place in job_folders(folder):
        times = _times(place)
        if place not in known or known[place][0] != times:
            known[place] = times, None if _is_dry(place) else _read_job(place, str(place.relative_to(folder)))
        job = known[place][1]
        found += [job] if job is not None and max(times) >= since else []
    return found


def _read_job(place: Path, number: str) -> Job:
    # The command line adds ++ where other jobs of the sweep do not have the key. What an override refers to may have no
    # value here, or be a secret, so nothing is resolved.
    kept: Any = OmegaConf.to_container(_load_yaml(place, "overrides") or OmegaConf.create([]))
    overrides = [tilde(str(override)).removeprefix("++") for override in kept]
    if (place / "result.json").exists():
        try:
            return Job(number, overrides, read_result(place / "result.json"), "")
        except KnownError as error:
            return Job(number, overrides, None, str(error))
    for name in ("pruned.json", "error.json"):
        if (place / name).exists():
            return Job(number, overrides, None, _reason(place / name), pruned=name == "pruned.json")
    return Job(number, overrides, None, UNFINISHED)


def _load_yaml(place: Path, name: str) -> Any:
    """A file that Hydra saved of a job; None if it is missing or damaged."""
    try:
        return OmegaConf.load(place / ".hydra" / f"{name}.yaml")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):  # ValueError: not UTF-8
        return None


def _reason(path: Path) -> str:
    """The text that record_failed() or record_pruned() wrote. A job that was killed may leave a damaged file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return str(tree["said"]) if "said" in tree else "; ".join(tree["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} cannot be read"


def _times(place: Path) -> tuple[float, ...]:
    """When each file of a job that is read was written; 0 for those that it lacks."""
    return tuple(_time(place / name) for name in (*_MARKS, ".hydra/overrides.yaml"))


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_dry(place: Path) -> bool:
    """Whether the job was a dry run that did not fail, or asked `why`: it has no result to show."""
    config = _load_yaml(place, "config")
    asked = isinstance(config, DictConfig) and any(
        OmegaConf.select(config, key, throw_on_resolution_failure=False) for key in ("dry_run", "why")
    )
    return asked and not (place / "error.json").exists()


def student_rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """A row of plain values for each student of the jobs, for tables; all rows have the same names, in one order.

    What was set for a job comes first, each override under its name, numbers as numbers. A job without a result has one
    row, with the reason.
    """
    rows = [row for job in jobs for row in _rows_of(job)]
    names = dict.fromkeys(name for row in rows for name in row)
    told = [name for name in names if name not in _COLUMNS]
    return [{name: row.get(name) for name in ("job", *told, *_COLUMNS)} for row in rows]


def _goes_on(job: Job) -> str:
    """What trains the rest of an unfinished job, if nothing trains it now."""
    if any(override.startswith("runtime.trial=") for override in job.overrides):
        return "the command of its search goes on with it"
    return f"{shlex.join(('python', 'run.py', *job.overrides))} goes on with it"


def _rows_of(job: Job) -> Iterator[dict[str, Any]]:
    typed = {name.lstrip("+"): _value(text) for name, _, text in (each.partition("=") for each in job.overrides)}
    common = {"job": job.number, **typed}
    if job.result is None:
        yield {**common, "failure": job.reason if job.reason != UNFINISHED else f"{UNFINISHED}: {_goes_on(job)}"}
        return
    run = job.result
    chosen = " and ".join(test_set_choices(run)) or "without the test set"
    named = {"dataset": run.dataset, "method": run.method, "mode": run.mode, "chain": run.networks}
    alone = {each.seed: each.test_acc for each in run.baseline.replicates} if run.baseline else {}
    for student in run.students:
        more = trim(student.test_acc - alone[student.seed]) if student.seed in alone else None
        own = {"difference to scratch": more, "student": student.key, "epoch chosen": chosen, "failure": None}
        own["alarms"] = len(student.alarms)
        yield {**common, **named, **student.model_dump(exclude={"key"}), **own}


def _value(text: str) -> str | int | float:
    """What was set, as a number if it is written like one: 007 and 2024_01 are texts."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(number := float(text)):
        return text
    return int(text) if text.lstrip("+-").isdigit() else number
