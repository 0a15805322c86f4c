"""The tracker of a run, and the record of a multirun."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd.stage import Source, Stage
from kd.store import Metrics, Store
from kd.tracking.base import Opening, Page, TrackingSpec
from kd.tracking.names import axes, run_name
from kd.tracking.tensorboard import TensorBoardPage
from kd.tracking.wandb import WandbPage


class Tracker:
    """Takes each epoch of each stage that is trained, and what stages and run come to."""

    def __init__(self, folder: Path, sources: Sequence[Source], page: Page) -> None:
        self._file, self._page = folder / "metrics.jsonl", page
        self._axes = axes(sources)
        self._before: dict[str, int] = {}  # epochs of the stages before, by key
        epochs = 0
        for source in {source.key: source for source in sources}.values():
            self._before[source.key] = epochs
            epochs += source.train.epochs if isinstance(source, Stage) else 0
        self._file.write_text("")

    def log(self, stage: Stage, metrics: Metrics) -> None:
        """One epoch of a stage."""
        with self._file.open("a") as file:
            file.write(json.dumps({"role": stage.role, "key": stage.key, **metrics}) + "\n")
        step = self._before[stage.key] + int(metrics["epoch"] or 0)
        self._page.log(self._axes[stage.key], step, metrics)

    def summarize(self, values: dict[str, Any]) -> None:
        """What the run comes to."""
        self._page.summarize(values)

    def finished(self, source: Source, values: dict[str, Any]) -> None:
        """What one stage came to, trained now or before."""
        self.summarize({f"{self._axes[source.key]}/{name}": value for name, value in values.items()})


@contextmanager
def track(
    spec: TrackingSpec,
    folder: Path,
    students: Sequence[Stage],
    config: dict[str, Any],
    store: Store,
    multirun: str | None = None,
) -> Iterator[Tracker]:
    """A tracker for one run, which belongs to a `multirun` or to none. An error that leaves the block fails the run.

    While a student is unfinished, the store keeps where its run is recorded, and the next run of it goes on there.
    """
    sources = [source for student in students for source in student.chain]
    names = axes(sources)
    stages = {names[s.key]: {"key": s.key, **{k: v for k, v in s.dump().items() if k != "guide"}} for s in sources}
    last = next((student for student in reversed(students) if not store.whole(student.key)), None)
    opening = Opening(
        name=run_name(students),
        job_type=str(config["method"]["name"]),
        group=spec.group or multirun,
        folder=folder,
        config={**config, "stages": stages},
        axes=tuple(names.values()),
        keep=store.partial(last.key) if last else None,
    )
    with _opened(spec, opening) as page:
        yield Tracker(folder, sources, page)


def track_sweep(
    spec: TrackingSpec, folder: Path, group: str, table: Sequence[Mapping[str, Any]], figures: Sequence[Path]
) -> None:
    """Record a multirun as a whole: a row a job, and figures (PNG). What goes wrong is one line, never an error."""
    try:
        with _opened(spec, Opening(f"summary of {group}", "summary", group, folder, keep=folder / "wandb")) as page:
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
            return WandbPage(spec, opening)
        case "tensorboard":
            return TensorBoardPage(opening)
        case "none":
            return Page()
