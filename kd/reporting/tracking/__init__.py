"""Records of a run while it goes: always a local metrics.jsonl, and a page at W&B or TensorBoard if asked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationInfo, field_validator

from kd.core.spec import Frozen, Text
from kd.core.stage import Source, Stage, joined
from kd.reporting.status import StatusFile
from kd.store import Metrics, Store, alarms_in

_LONGEST_NAME, _LONGEST_TAG = 128, 64  # characters that W&B takes
LONGEST = {"run_name": _LONGEST_NAME, "run_group": _LONGEST_NAME, "run_job_type": 64}  # by wandb's names
_ODD = "/\\#?%:"  # characters that W&B takes in no name of a project
BASELINE = "baseline"  # what records call the students alone that baseline=true adds


class TrackingSpec(Frozen):
    """The `tracking` section of the configuration."""

    name: Literal["wandb", "tensorboard", "none"]
    project: Text | None = None  # null, here and below: what WANDB_ variables say, or else the default of W&B's page
    entity: Text | None = None
    group: Text | None = None  # null: the multirun's name; none for a single run
    tags: tuple[Text, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"

    @field_validator("mode", mode="before")
    @classmethod
    def _not_disabled(cls, value: Any) -> Any:
        if value == "disabled":  # a mode of W&B
            raise ValueError("tracking=none turns it off")
        return value

    @field_validator("project", "entity", "group", "tags")
    @classmethod
    def _taken_by_wandb(cls, value: str | tuple[str, ...] | None, told: ValidationInfo) -> str | tuple[str, ...] | None:
        """W&B refuses other names, partly at its server only, when a run is sent."""
        if told.data.get("name") != "wandb":
            return value
        longest = _LONGEST_TAG if told.field_name == "tags" else _LONGEST_NAME
        for text in (value,) if isinstance(value, str) else value or ():
            if not text.strip() or len(text) > longest:
                raise ValueError(f"should have 1 to {longest} characters for W&B")
            if told.field_name in ("project", "entity") and (odd := sorted({*text} & {*_ODD})):
                raise ValueError(f"should be without {' '.join(odd)} for W&B, which takes none of {' '.join(_ODD)}")
        return value


@dataclass(frozen=True)
class Opening:
    """What a page needs to know of its run when it opens."""

    name: str
    job_type: str
    multirun: str | None  # the name of the multirun that the run belongs to
    folder: Path  # where the page may write
    config: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()  # names of the stages, each with epochs of its own
    keep: Path | None = None  # the folder that keeps the run's id, as long as the run may go on later
    summary: bool = False  # whether the run shows a multirun as a whole


class Page:
    """A page that shows a run. This class shows nothing."""

    def log(self, axis: str, step: int, metrics: Metrics) -> None:
        """Log an epoch of the stage named `axis`; `step` counts the epochs of all stages of the run."""

    def add_axis(self, axis: str) -> None:
        """Expect epochs of a name that `Opening.axes` does not have."""

    def summarize(self, values: dict[str, Any]) -> None:
        """Record results of the run. Later values replace earlier ones with the same name."""

    def show(self, table: Sequence[Mapping[str, Any]], figures: Sequence[Path]) -> None:
        """Show a table, given by rows, and figures (PNG) by their file names."""

    def close(self, failed: bool) -> None:
        """End the page."""


def run_name(students: Sequence[Stage]) -> str:
    """A run's chain, student first, the hyperparameters of its losses, and its seeds.

    `resnet8 ← resnet20 ← resnet110 · T5 λ0.5 · s31`; w is the weight of a trained teacher's divergence.
    """
    student = students[0]
    networks = joined(student.chain, student_first=True)
    teachers = [source for source in student.chain if isinstance(source, Stage) and source.role == "teacher"]
    settings = [student.loss.label, *(teacher.loss.label for teacher in teachers)]
    seeds = f"s{student.seed}" + (f"–{students[-1].seed}" if len(students) > 1 else "")
    return " · ".join(part for part in (networks, " ".join(filter(None, settings)), seeds) if part)


def shortened(what: str, text: str, longest: int) -> str:
    """A text that we made up, cut to its `longest` characters. A line says so."""
    if len(text) <= longest:
        return text
    cut = text[: longest - 1] + "…"
    print(f"tracking: {what} is longer than {longest} characters, and is cut: {cut}", flush=True)
    return cut


def group_of(folder: Path) -> str:
    """A multirun's name: its folder's, with the date if the parent folder is a date."""
    parent, name = folder.absolute().parts[-2:]
    return f"{parent} {name}" if re.fullmatch(r"\d{4}-\d\d-\d\d", parent) else name


def axes(sources: Sequence[Source], alone: Sequence[Stage] = ()) -> dict[str, str]:
    """A unique name for each stage of a run, by key: its role, with network, seed or key only if needed.

    The role of the students `alone` of a baseline is `baseline` here, if the run itself does not have their stage.
    """
    unique = {source.key: source for source in (*alone, *sources)}
    own = {source.key for source in sources}
    names = {key: _candidates(source, source.role if key in own else BASELINE) for key, source in unique.items()}
    taken = Counter(name for candidates in names.values() for name in candidates)
    return {key: next(name for name in candidates if taken[name] == 1) for key, candidates in names.items()}


def _candidates(source: Source, role: str) -> list[str]:
    seed = [f"{role}-s{source.seed}"] if isinstance(source, Stage) else []
    return [role, f"{role}-{source.model}", *seed, f"{role}-{source.key}"]


class Tracker:
    """Records the epochs of each trained stage, and the results of the stages and the run."""

    def __init__(self, folder: Path, sources: Sequence[Source], page: Page, alone: Sequence[Stage] = ()) -> None:
        self._file, self._page = folder / "metrics.jsonl", page
        self.status = StatusFile(folder)
        self._axes = axes(sources, alone)
        self._alone = {student.key for student in alone} - {source.key for source in sources}
        self._curves = dict[str, str]()  # the names of the curves of stages that were trained again, by key
        self._alarms: dict[str, tuple[str, ...]] = {}  # so far, by key
        self._before: dict[str, int] = {}  # number of epochs of all earlier stages, by key
        epochs = 0
        for source in {source.key: source for source in (*sources, *alone)}.values():
            self._before[source.key] = epochs
            epochs += source.train.epochs if isinstance(source, Stage) else 0
        self._file.write_text("", encoding="utf-8")

    def log(self, stage: Stage, metrics: Metrics) -> None:
        """Record an epoch of a stage. A page has the numbers as curves, and the alarms in its summary."""
        with self._file.open("a", encoding="utf-8") as file:
            role = BASELINE if stage.key in self._alone else stage.role
            file.write(json.dumps({"role": role, "model": stage.model, "key": stage.key, **metrics}) + "\n")
        step = self._before[stage.key] + int(metrics["epoch"] or 0)
        axis = self._curves.get(stage.key, self._axes[stage.key])
        self._page.log(axis, step, {name: value for name, value in metrics.items() if name != "alarms"})
        if new := alarms_in([metrics]):
            self._alarms[stage.key] = (*self._alarms.get(stage.key, ()), *new)
            self.finished(stage, {"alarms": "; ".join(self._alarms[stage.key])})

    def begin_again(self, stage: Stage) -> None:
        """Forget the epochs of a stage that is trained again. A page has new curves for it, and takes no step twice."""
        rows = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if json.loads(row)["key"] != stage.key]
        self._file.write_text("".join(kept), encoding="utf-8")
        if self._alarms.pop(stage.key, None):
            self.finished(stage, {"alarms": ""})
        self._curves[stage.key] = f"{self._axes[stage.key]}-again"
        self._page.add_axis(self._curves[stage.key])
        order = [*self._before]
        for key in order[order.index(stage.key) :]:
            self._before[key] += len(rows) - len(kept)

    def summarize(self, values: dict[str, Any]) -> None:
        """Record results of the run."""
        self._page.summarize(values)

    def finished(self, source: Source, values: dict[str, Any]) -> None:
        """Record results of a stage, trained now or earlier."""
        self.summarize({f"{self._axes[source.key]}/{name}": value for name, value in values.items()})


class Untracked(Tracker):
    """Of a process that trains for another one, which keeps the records. It writes only how far the training is."""

    def __init__(self, status: StatusFile) -> None:
        self.status = status

    def log(self, stage: Stage, metrics: Metrics) -> None: ...

    def begin_again(self, stage: Stage) -> None: ...

    def summarize(self, values: dict[str, Any]) -> None: ...

    def finished(self, source: Source, values: dict[str, Any]) -> None: ...


@contextmanager
def track(
    spec: TrackingSpec,
    folder: Path,
    students: Sequence[Stage],
    config: dict[str, Any],
    store: Store,
    multirun: str | None = None,
    alone: Sequence[Stage] = (),
) -> Iterator[Tracker]:
    """A tracker for one run, of a `multirun` or of none. An error that leaves the block marks the run as failed.

    While a student is unfinished, the store keeps its run's id, and the next run that trains it goes on under that id.
    So it is with the students `alone` of a baseline, which are trained after the others.
    """
    sources = [source for student in students for source in student.chain]
    names, every = axes(sources, alone), (*sources, *alone)
    stages = {names[s.key]: {"key": s.key, **{k: v for k, v in s.dump().items() if k != "guide"}} for s in every}
    last = next((student for student in (*alone[::-1], *students[::-1]) if not store.whole(student.key)), None)
    opening = Opening(
        name=run_name(students),
        job_type=str(config["method"]["name"]),
        multirun=multirun,
        folder=folder,
        config={**config, "stages": stages},
        axes=tuple(names.values()),
        keep=store.partial(last.key) if last else None,
    )
    with _opened(spec, opening) as page:
        tracker = Tracker(folder, sources, page, alone)
        try:
            yield tracker
        finally:
            tracker.status.close()


def track_sweep(
    spec: TrackingSpec, folder: Path, multirun: str, table: Sequence[Mapping[str, Any]], figures: Sequence[Path]
) -> None:
    """Record a multirun as a whole: its table and figures (PNG). A failure is printed in one line, never raised."""
    name = f"summary of {spec.group or multirun}"
    try:
        with _opened(spec, Opening(name, "summary", multirun, folder, keep=folder / "wandb", summary=True)) as page:
            page.show(table, figures)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].removeprefix("tracking: ")
        print(f"tracking: the multirun's summary is not recorded: {reason}", flush=True)


@contextmanager
def _opened(spec: TrackingSpec, opening: Opening) -> Iterator[Page]:
    page = _open(spec, opening)
    try:
        yield page
    except BaseException:
        page.close(failed=True)
        raise
    page.close(failed=False)


def _open(spec: TrackingSpec, opening: Opening) -> Page:
    match spec.name:
        case "wandb":
            from kd.reporting.tracking.wandb import WandbPage

            return WandbPage(spec, opening)
        case "tensorboard":
            from kd.reporting.tracking.tensorboard import TensorBoardPage

            return TensorBoardPage(opening)
        case "none":
            return Page()
