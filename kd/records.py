"""What a job leaves in its folder, and how the jobs of a multirun are found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd.pipeline import Pruned, ReplicatedResult, RunResult
from kd.spec import KnownError, tilde

_MARKS = (".hydra/config.yaml", "result.json", "error.json", "pruned.json")


class Job(NamedTuple):
    """One job of a multirun: its number, overrides, and its result or why there is none."""

    number: str
    overrides: list[str]
    result: RunResult | None
    reason: str
    pruned: bool = False  # ended early by its search

    @property
    def failed(self) -> bool:
        """Whether it has neither a result nor a reason to have none."""
        return self.result is None and not self.pruned


def clear(folder: Path, dry: bool) -> None:
    """Forget how an earlier job ended here; a `dry` one leaves its result."""
    for mark in ("error.json", "pruned.json") if dry else ("error.json", "pruned.json", "result.json"):
        (folder / mark).unlink(missing_ok=True)


def record_failed(folder: Path, reason: str) -> None:
    """Leave error.json."""
    (folder / "error.json").write_text(json.dumps({"error": reason.splitlines()}, indent=2))


def record_pruned(folder: Path, pruned: Pruned) -> None:
    """Leave pruned.json."""
    told = {"epoch": pruned.epoch, "val_acc": pruned.value, "said": str(pruned)}
    (folder / "pruned.json").write_text(json.dumps(told))


def read_result(path: Path) -> RunResult:
    """A run's result.json. Raises KnownError where there is none."""
    try:
        tree = json.loads(path.read_text())
        return (ReplicatedResult if "replicates" in tree else RunResult).model_validate(tree)
    except (OSError, ValueError, TypeError) as error:  # ValueError is pydantic's and json's too
        raise KnownError(f"{path} is no result of a run ({str(error).splitlines()[0]})") from error


def job_folders(folder: Path) -> list[Path]:
    """The folders of a multirun's jobs, however deep, 2 before 10; a store among them has results of its own."""
    places = {place.parents[mark.count("/")] for mark in _MARKS for place in folder.rglob(mark)}
    found = [place for place in places if not (place / "stage.json").exists()]
    return sorted(found, key=lambda place: (len(str(place)), str(place)))


def jobs(folder: Path, since: float = 0.0) -> list[Job]:
    """The jobs of a multirun's folder that started after `since`, in order; jobs of a dry run have nothing to tell."""
    return [_look(folder, place) for place in job_folders(folder) if _changed(place) >= since and _counts(place)]


def _look(folder: Path, place: Path) -> Job:
    told = [tilde(str(override)) for override in _saved(place, "overrides") or ()]
    number = str(place.relative_to(folder))
    if (place / "result.json").exists():
        try:
            return Job(number, told, read_result(place / "result.json"), "")
        except KnownError as error:
            return Job(number, told, None, str(error))
    if (place / "pruned.json").exists():
        return Job(number, told, None, _reason(place / "pruned.json"), pruned=True)
    if (place / "error.json").exists():
        return Job(number, told, None, _reason(place / "error.json"))
    return Job(number, told, None, "unfinished")


def _saved(place: Path, name: str) -> Any:
    """What Hydra saved of a job; None where it is not there whole."""
    try:
        return OmegaConf.load(place / ".hydra" / f"{name}.yaml")
    except (OSError, YAMLError, OmegaConfBaseException):
        return None


def _reason(path: Path) -> str:
    """What record_failed() or record_pruned() left; its job may have been killed meanwhile."""
    try:
        told = json.loads(path.read_text())
        return str(told["said"]) if "said" in told else "; ".join(told["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} cannot be read"


def _changed(place: Path) -> float:
    return max((place / mark).stat().st_mtime for mark in _MARKS if (place / mark).exists())


def _counts(place: Path) -> bool:
    """Whether the job has something to tell: a dry run has not, unless it failed."""
    saved = _saved(place, "config")
    dry = isinstance(saved, DictConfig) and OmegaConf.select(saved, "dry_run", throw_on_resolution_failure=False)
    return not dry or (place / "error.json").exists()
