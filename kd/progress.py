"""What a person sees while stages train: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import parent_process
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from kd.stage import Stage
from kd.store import Metrics

_LINE_EVERY = 10.0  # seconds between two plain lines
_LONG = 600.0  # seconds; a stage expected to take longer is announced
_WARM, _MEASURED = 3, 33  # steps: the first few compile kernels, the next ones tell the speed


def console() -> Console:
    """Where people read; wide enough for a table even when the output goes to a file.

    Processes that share a terminal write lines: their live bars would draw over each other.
    """
    shown = Console()
    return shown if shown.is_terminal and parent_process() is None else Console(width=140, force_terminal=False)


class Watch(Protocol):
    """Whoever wants to know how far a training is."""

    def resumed(self, history: list[Metrics], images: int) -> None:
        """So many epochs were done before, and so many images of the next one."""

    def guided(self, images: int) -> None:
        """So many more images have been seen by the guide."""

    def stepped(self, images: int) -> None:
        """One optimiser step more, of so many images."""

    def epoch_ended(self, metrics: Metrics) -> None:
        """An epoch is over."""


class StageProgress:
    """Follows one stage's training, shows it, and hands each epoch's row to `log`."""

    def __init__(self, stage: Stage, samples: int, log: Callable[[Stage, Metrics], None]) -> None:
        self._log = log
        self._stage, self._samples, self._epochs = stage, samples, stage.train.epochs
        self._name = f"{stage.role} {stage.model} s{stage.seed}"
        self._console = console()
        self._began = self._phase_began = self._last_line = time.monotonic()
        self._epoch, self._done, self._before, self._guide_done = 0, 0, 0, 0
        self._status = ""
        self._steps, self._guide_seconds = 0, 0.0
        self._measured_from: tuple[float, int] | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30 if self._console.width > 110 else 10),
            TextColumn("{task.fields[status]}"),
        )
        self._bar = Progress(*columns, console=self._console, refresh_per_second=4, transient=True)
        self._task = self._bar.add_task(self._name, total=self._epochs * samples, status="")

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def resumed(self, history: list[Metrics], images: int) -> None:
        """So many epochs were done before, and images of the next one; their rows are part of this run's record too."""
        for row in history:
            self._log(self._stage, row)
        self._epoch = len(history)
        self._done = self._before = self._epoch * self._samples + images

    def guided(self, images: int) -> None:
        """So many more images have been seen by the guide."""
        self._guide_done += images
        self._show(f"logits of the guide: {100 * self._guide_done // self._samples} %")
        self._guide_seconds = time.monotonic() - self._phase_began

    def stepped(self, images: int) -> None:
        """One optimiser step more, of so many images."""
        self._done += images
        self._steps += 1
        if self._steps == _WARM:
            self._measured_from = time.monotonic(), self._done
        # All within the first epoch, so that no validation and no second pass of the guide is among it.
        elif self._measured_from and (self._steps == _MEASURED or self._done - self._before >= self._samples):
            began, done = self._measured_from
            self._announce((self._done - done) / max(time.monotonic() - began, 1e-6))
            self._measured_from = None
        self._show()

    def epoch_ended(self, metrics: Metrics) -> None:
        """An epoch is over."""
        self._log(self._stage, metrics)
        self._epoch += 1
        self._guide_done, self._phase_began = 0, time.monotonic()
        shown = [f"loss {metrics['loss']:.4f}"]
        for name in ("val", "test"):
            if (accuracy := metrics.get(f"{name}_acc")) is not None:
                shown.append(f"{name} {accuracy:.2f} %")
        self._status = "  ".join(shown)
        self._show()
        self._line()

    def _announce(self, speed: float) -> None:
        epochs = self._epochs - self._epoch
        expected = epochs * (self._guide_seconds + self._samples / speed)
        if expected > _LONG:
            guide = f" and the guide {self._samples / self._guide_seconds:,.0f}" if self._guide_seconds else ""
            self._console.print(
                f"{self._name}: {epochs} epochs of {self._samples:,} images; its first steps train {speed:,.0f} "
                f"images/s{guide}, so it will take about {duration(expected)}",
                highlight=False,
            )

    def _text(self) -> str:
        epoch = min(self._epoch + 1, self._epochs)
        if self._done == self._before:
            return f"epoch {epoch}/{self._epochs}"
        speed, left = self._pace()
        parts = (f"epoch {epoch}/{self._epochs}", self._status, f"{speed:,.0f} images/s", f"{duration(left)} left")
        return "  ".join(part for part in parts if part)

    def _pace(self) -> tuple[float, float]:
        """Images a second so far, the guide's share counted, and the seconds left at that pace."""
        done = self._done - self._before
        speed = max(done, 1) / max(time.monotonic() - self._began, 1e-6)
        return speed, (self._epochs * self._samples - self._done) / speed

    def _show(self, doing: str = "") -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, status=f"{self._text()}  {doing}")

    def _line(self) -> None:
        last = self._epoch == self._epochs
        due = time.monotonic() - self._last_line > _LINE_EVERY and not self._console.is_terminal
        if last or due:
            self._last_line = time.monotonic()
            speed, left = self._pace()
            text = f"epoch {self._epoch}/{self._epochs}  {self._status}  {speed:,.0f} images/s"
            line = f"{self._name}  {text}" + ("" if last else f"  {duration(left)} left")
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Unwatched:
    """A training that nobody looks at."""

    def resumed(self, history: list[Metrics], images: int) -> None:
        """Epochs done before."""

    def guided(self, images: int) -> None:
        """Images seen by the guide."""

    def stepped(self, images: int) -> None:
        """Images trained on."""

    def epoch_ended(self, metrics: Metrics) -> None:
        """An epoch's row."""


def duration(seconds: float) -> str:
    """In the unit that a person would choose."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
