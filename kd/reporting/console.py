"""What is printed: a run's results, the plan of a dry run, and progress while stages train."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from multiprocessing import parent_process
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from kd.core.settings import TrainSpec
from kd.core.stage import Given, Normalization, Source, Stage
from kd.reporting.baseline import baseline_lines
from kd.reporting.results import SELECTED, Outcome, ReplicatedResult, RunResult, whose_seeds
from kd.reporting.status import Advance, StatusFile, beside_table
from kd.store import Metrics, Store

_LINE_EVERY = 10.0  # seconds between two plain lines
_LONG = 600.0  # seconds; a stage expected to take longer is announced
_WARM, _MEASURED = 3, 33  # steps: the first few make kernels, the next ones measure the speed


def without_comment(words: Sequence[str]) -> list[str]:
    """Arguments up to a lone #. zsh hands a comment over as arguments where it is pasted."""
    return [*words][: [*words, "#"].index("#")]


def escape_unknown() -> None:
    """Escape what the encoding of the output lacks, as in an ASCII terminal, where print() would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console() -> Console:
    """The console for people. It is wide enough for a table even if the output goes to a file.

    Child processes print plain lines: several live bars in one terminal would overwrite each other. So do the jobs of a
    sweep whose table is in the terminal.
    """
    if beside_table():
        return Console(force_terminal=False)
    shown = Console()
    return shown if shown.is_terminal and parent_process() is None else Console(width=140, force_terminal=False)


def percent(value: float | None) -> str:
    """An accuracy with two decimals, or a dash if there is none."""
    return "–" if value is None else f"{value:.2f}"


def print_run(result: RunResult, loading: str) -> None:
    """Print one run as a table, and what loads its student in Python."""
    out, student = console(), result.chain[-1]
    out.print(headline(f"{result.method} on {result.dataset}, mode {result.mode}: {SELECTED[student.select]}"))
    table = narrow_table("role", "network", "parameters>", "stage", "val %>", "test %>", "epochs>", "s>", "")
    for outcome in result.chain:
        table.add_row(*_cells(outcome))
    if result.baseline:
        table.add_row("alone", *_cells(result.baseline.student)[1:])
    out.print(table)
    for outcome in result.chain[:-1]:
        if outcome.select != student.select:
            images = f", teacher.normalize is {outcome.normalize}" if outcome.normalize else ""
            out.print(f"{outcome.role} {outcome.model}: {SELECTED[outcome.select]}{images}", highlight=False)
    for line in (*_lessons(result.chain), *_evidence(result.chain)):
        out.print(line, highlight=False, markup=False)
    for line in result.alarms:
        out.print(f"alarm: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if isinstance(result, ReplicatedResult):
        for line in _replicate_lines(result):
            out.print(line, highlight=False)
    for line in baseline_lines(result) if result.baseline else ():
        out.print(line, highlight=False)
    out.print(f"the student: {loading}", highlight=False, markup=False, soft_wrap=True)


def _lessons(chain: Sequence[Outcome]) -> list[str]:
    """How networks learn that have several guides, or a loss of other authors than the two papers'."""
    models = {outcome.key: outcome.model for outcome in chain}
    lines = []
    for outcome in chain:
        several = len(outcome.guides) > 1
        above = f" from {' + '.join(models[key] for key in outcome.guides)}" if several else ""
        by = f" by {outcome.loss.described}" if outcome.loss and not outcome.loss.usual else ""
        if above or by:
            lines.append(f"{outcome.role} {outcome.model} learns{above}{by}")
    return lines


def _evidence(chain: Sequence[Outcome]) -> list[str]:
    """How the guides taught."""
    return [f"{each.role} {each.model}: {each.evidence}" for each in chain if each.evidence and str(each.evidence)]


def _replicate_lines(result: ReplicatedResult) -> tuple[str, str]:
    each = ", ".join(f"{replicate.test_acc:.2f}" for replicate in result.replicates)
    seeds = f"seeds {result.replicates[0].seed}–{result.replicates[-1].seed}"
    if whose_seeds(result.varied) != whose_seeds():
        above = f", each with its own {result.varied.removeprefix('the whole ').removeprefix('a ')}"
    else:
        above = " over one chain" if len(result.chain) > 1 else ""
    mean = f"mean {result.mean:.2f} ± {result.std:.2f} %, 95 % interval {interval(result.ci95)}"
    return f"{result.n} students{above}, {seeds}: test {each}", mean


def _cells(outcome: Outcome) -> list[str]:
    origin = "given" if outcome.loss is None else "reused" if outcome.reused else "trained"
    accuracies = [percent(outcome.val_acc), percent(outcome.test_acc)]
    cost = [str(outcome.epochs), f"{outcome.seconds:.0f}"]
    return [outcome.role, outcome.model, f"{outcome.params:,}", outcome.key, *accuracies, *cost, origin]


def count(number: int, thing: str = "job") -> str:
    """A number of things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number:,} {thing}s"


def interval(ci95: tuple[float, float]) -> str:
    """A 95 % interval in percent, cut to what an accuracy can be."""
    low, high = ci95
    return f"{max(low, 0):.2f} to {min(high, 100):.2f}"


def training(train: TrainSpec) -> str:
    """The training settings in a line, without the epochs."""
    milestones = f" at {list(train.milestones)} ×{train.gamma:g}" if train.schedule == "step" else ""
    extras = (f", warmup {train.warmup}" if train.warmup else "") + (", test_curve" if train.test_curve else "")
    extras += f", {train.ranks} ranks" if train.ranks > 1 else ""
    momentum = f" momentum {train.momentum:g}{' (Nesterov)' if train.nesterov else ''}" if train.momentum else ""
    return (
        f"{train.optimizer}{momentum}, lr {train.lr:g} {train.schedule}{milestones}, weight decay "
        f"{train.weight_decay:g}, batch {train.batch_size}, {train.precision}, {train.select}{extras}"
    )


def narrow_table(*headings: str) -> Table:
    """A table for 80 columns. A heading that ends in > is a column of numbers. Keys are not wrapped."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for heading in headings:
        name = heading.removesuffix(">")
        justify: Literal["right", "left"] = "right" if heading != name else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "stage")
    return table


def headline(text: str) -> Text:
    return Text(text, style="bold")


def test_of(result: RunResult) -> tuple[str, str]:
    """Test accuracy, with its standard deviation if there are several students, and the number of students."""
    if isinstance(result, ReplicatedResult):
        return f"{result.mean:.2f} ± {result.std:.2f}", str(result.n)
    return percent(result.chain[-1].test_acc), "1"


def print_plan(where: str, students: Sequence[Stage], store: Store, retrain: bool, alone: Sequence[Stage] = ()) -> None:
    """Print what a run would do, for dry_run: each stage, its key, and whether the store has it.

    `where` are data set and mode. The students `alone`, of baseline=true, come last.
    """
    out = console()
    out.print(headline(f"planned on {where}; finished stages are in {store.root}"))
    table = narrow_table("role", "network", "seed>", "loss", "epochs>", "stage", "")
    sources = {source.key: source for student in students for source in student.chain}
    beside = {student.key: student for student in alone if student.key not in sources}
    sources |= beside
    stages = {key: source for key, source in sources.items() if isinstance(source, Stage)}
    stored = {key for key in stages if not retrain and store.whole(key)}
    for key, source in sources.items():
        todo = "given" if key not in stages else "stored" if key in stored else "to train"
        role, *rest = _planned(source)
        table.add_row("alone" if key in beside else role, *rest, todo)
    out.print(table)
    for line in _plan_lines(list(sources.values())):
        out.print(line, highlight=False, markup=False)
    out.print(f"{len(stages) - len(stored)} of {len(stages)} stages to train", highlight=False)


def _plan_lines(sources: Sequence[Source]) -> list[str]:
    """Lines about given networks, the training settings, and the data."""
    given = [source for source in sources if isinstance(source, Given)]
    unread = "given; teacher.normalize is"
    lines = [f"{source.role} {source.model}: {unread} {source.normalize}" for source in given]
    several = [source for source in sources if isinstance(source, Stage) and len(source.guides) > 1]
    lines += dict.fromkeys(_several_guides(stage) for stage in several)
    trainings: dict[str, dict[str, None]] = {}
    for source in sources:
        if isinstance(source, Stage):
            trainings.setdefault(training(source.train), {})[f"{source.role} {source.model}"] = None
    lines += [f"{', '.join(networks)}: {settings}" for settings, networks in trainings.items()]
    data = sources[0].dataset
    images = f"images: augment {data.augment}, {Normalization(mean=data.mean, std=data.std)}"
    own = f"{data.val_images:,} of them" if data.val_images else f"{100 * data.val_fraction:g} % of them"
    split = f"{own} are for validation" if data.validated else "all of them train"
    return [*lines, f"{images}; {split}"]


def _several_guides(stage: Stage) -> str:
    """The guides of a stage, and their weights if these are not equal."""
    guides = " and ".join(f"{guide.role} {guide.model}" for guide in stage.guides)
    weights = " and ".join(f"{weight:.3g}" for weight in stage.weights)
    return f"{stage.role} {stage.model} learns from {guides}" + (f", with weights {weights}" if weights else "")


def _planned(source: Source) -> tuple[str, ...]:
    if not isinstance(source, Stage):
        return source.role, source.model, "", "", "", source.key
    loss = source.loss.described
    return source.role, source.model, str(source.seed), loss, str(source.train.epochs), source.key


def duration(seconds: float) -> str:
    """A duration in hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def in_bytes(count: float) -> str:
    """A size with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class Watch:
    """Callbacks of a training. In this class they do nothing."""

    def resumed(self, history: list[Metrics], images: int) -> None:
        """The training is resumed after these epochs, and after this many images of the next one."""

    def guided(self, images: int) -> None:
        """The guide has computed this many more images."""

    def stepped(self, images: int) -> None:
        """An optimiser step on this many images is done."""

    def epoch_ended(self, metrics: Metrics) -> None:
        """An epoch has ended."""


class StageProgress(Watch):
    """Shows the progress of one stage's training. Each epoch's metrics go to `log`, and how far it is to `status`."""

    def __init__(
        self, stage: Stage, samples: int, log: Callable[[Stage, Metrics], None], status: StatusFile | None = None
    ) -> None:
        self._log, self._file = log, status
        self._val: float | None = None
        self._stage, self._samples, self._epochs = stage, samples, stage.train.epochs
        self._name = f"{stage.role} {stage.model} s{stage.seed}"
        self._console = console()
        self._began = self._phase_began = self._last_line = time.monotonic()
        self._epoch, self._done, self._before, self._guide_done = 0, 0, 0, 0
        self._reached: list[str] = []  # loss and accuracies of the last epoch
        self._steps, self._first_epoch = 0, 0
        self._guide_seconds, self._guide_before = 0.0, 0.0  # in this epoch and in those before it
        self._measured_from: tuple[float, int] | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=(width := 30 if self._console.width > 110 else 10)),
            TextColumn("{task.fields[status]}"),
        )
        self._beside = len(self._name) + width + 2  # columns of the terminal that the text lacks
        self._bar = Progress(*columns, console=self._console, refresh_per_second=4, transient=True)
        self._task = self._bar.add_task(self._name, total=self._epochs * samples, status="")

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def resumed(self, history: list[Metrics], images: int) -> None:
        for row in history:  # earlier epochs belong to this run's metrics too
            self._log(self._stage, row)
        self._epoch = self._first_epoch = len(history)
        self._done = self._before = self._epoch * self._samples + images

    def guided(self, images: int) -> None:
        self._guide_done += images
        self._show(f"logits of the guide: {100 * self._guide_done // self._samples} %")
        self._guide_seconds = time.monotonic() - self._phase_began

    def stepped(self, images: int) -> None:
        self._done += images
        self._steps += 1
        if self._steps == _WARM:
            self._measured_from = time.monotonic(), self._done
        # Measured in the first epoch, without validation and without a second pass of the guide.
        elif self._measured_from and (self._steps == _MEASURED or self._done - self._before >= self._samples):
            began, done = self._measured_from
            self._announce((self._done - done) / max(time.monotonic() - began, 1e-6))
            self._measured_from = None
        self._show()
        if self._file is not None:
            self._file.report(self._advance)

    def epoch_ended(self, metrics: Metrics) -> None:
        self._log(self._stage, metrics)
        self._epoch += 1
        self._guide_before += self._guide_seconds
        self._guide_done, self._guide_seconds, self._phase_began = 0, 0.0, time.monotonic()
        self._val = metrics.get("val_acc")
        shown = [f"loss {metrics['loss']:.4f}"]
        for name in ("val", "test"):
            if (accuracy := metrics.get(f"{name}_acc")) is not None:
                shown.append(f"{name} {accuracy:.2f} %")
        self._reached = shown
        self._show()
        self._line()

    def _announce(self, speed: float) -> None:
        epochs = self._epochs - self._epoch
        expected = epochs * self._samples / speed + self._guide_seconds + self._guide_left()
        if expected > _LONG:
            guide = f" and the guide {self._samples / self._guide_seconds:,.0f}" if self._guide_seconds else ""
            self._console.print(
                f"{self._name}: {epochs} epochs of {self._samples:,} images; its first steps train {speed:,.0f} "
                f"images/s{guide}, so it will take about {duration(expected)}",
                highlight=False,
            )

    def _text(self, doing: str) -> str:
        """What is beside the bar. In a narrow terminal it is without the loss, then without more."""
        parts = [f"epoch {min(self._epoch + 1, self._epochs)}/{self._epochs}"]
        if self._done != self._before:
            speed, left = self._pace()
            parts += [*self._reached, f"{speed:,.0f} images/s", f"{duration(left)} left"]
        parts += [doing] if doing else []
        while len("  ".join(parts)) > self._console.width - self._beside and len(parts) > 2:
            least = (part for part in parts[1:] if part.startswith(("loss", "test")) or part.endswith("/s"))
            parts.remove(next(least, parts[1]))
        return "  ".join(parts)

    def _advance(self) -> Advance:
        epoch, (speed, left) = min(self._epoch + 1, self._epochs), self._pace()
        return Advance(stage=self._name, epoch=epoch, epochs=self._epochs, val_acc=self._val, speed=speed, left=left)

    def _pace(self) -> tuple[float, float]:
        """Images per second so far, including the guide's time, and the seconds left."""
        done, elapsed = max(self._done - self._before, 1), max(time.monotonic() - self._began, 1e-6)
        own = max(elapsed - self._guide_before - self._guide_seconds, 1e-6)
        left = (self._epochs * self._samples - self._done) * own / done + self._guide_left()
        return done / elapsed, left

    def _guide_left(self) -> float:
        """Seconds of the guide's passes in the epochs after this one. A view that the guide has seen costs nothing."""
        begun = min(self._epoch + 1, self._epochs)
        seen = self._new_views(self._first_epoch, begun)
        passed = self._guide_before + self._guide_seconds
        return passed * self._new_views(begun, self._epochs) / seen if seen else 0.0

    def _new_views(self, first: int, last: int) -> float:
        """Views of a sample that are new in epochs [first, last). An expectation, because views are drawn at random."""
        views = self._stage.dataset.shown_views
        if views is None:
            return last - first
        drawn_before = 1 - 1 / views
        return views * (drawn_before**first - drawn_before**last)

    def _show(self, doing: str = "") -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, status=self._text(doing))

    def _line(self) -> None:
        last = self._epoch == self._epochs
        due = time.monotonic() - self._last_line > _LINE_EVERY and not self._console.is_terminal
        if last or (due and not beside_table()):
            self._last_line = time.monotonic()
            speed, left = self._pace()
            text = "  ".join((f"epoch {self._epoch}/{self._epochs}", *self._reached, f"{speed:,.0f} images/s"))
            line = f"{self._name}  {text}" + ("" if last else f"  {duration(left)} left")
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Unwatched(Watch):
    """A training without display."""
