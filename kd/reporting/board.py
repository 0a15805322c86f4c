"""The table of a sweep while it goes: what each job does, from the small status files that jobs write."""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, Group
from rich.markup import escape
from rich.text import Text

from kd.reporting.console import count, duration, narrow_table, percent, test_of
from kd.reporting.results import UNFINISHED, Job, Known, find_jobs
from kd.reporting.status import Status, read_process, read_status
from kd.reporting.summary import called, difference

IDLE = "not training"  # a job that has begun: it loads, waits for another's stage, or was killed before it trained
_SILENT = 600.0  # seconds without news after which a job of another machine may have ended


class Line(NamedTuple):
    """A job of a sweep: its setting, and what it does, has or lacks."""

    job: Job
    status: Status | None
    gone: str  # why a job with a status does not run; "" if it runs

    @property
    def runs(self) -> bool:
        """Whether it is being trained."""
        return self.job.result is None and self.status is not None and not self.gone

    @property
    def failed(self) -> bool:
        """Whether it ended without a result, and was not pruned: it failed, or was killed."""
        return bool(self.gone) or (self.job.failed and self.job.reason != IDLE)

    @property
    def problem(self) -> str:
        """Why it has no result and does not run, in words; "" if it has or does."""
        return (
            ""
            if self.job.result or self.runs or (self.job.reason == IDLE and not self.gone)
            else self.gone or self.job.reason
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """Stage, epoch, validation, images a second, time left; of an ended job, its test accuracy and alarms."""
        if self.job.result is not None:
            test, students = test_of(self.job.result)
            alarms = len(self.job.result.alarms)
            told = [f"test {test}{_of(students)}", *([count(alarms, "alarm")] if alarms else [])]
            return "done", "", percent(self.job.result.objective), "", ", ".join(told)
        if self.status is None or self.gone:
            word = "stopped" if self.gone else IDLE if self.job.reason == IDLE else "failed"
            return "pruned" if self.job.pruned else word, "", "", "", ""
        now = self.status
        speed, left = ("" if value is None else value for value in (now.speed, now.left))
        return (
            now.stage,
            f"{now.epoch}/{now.epochs}",
            percent(now.val_acc),
            f"{speed:,.0f}" if speed != "" else "",
            duration(float(left)) if left != "" else "",
        )


def _of(students: str) -> str:
    return "" if students == "1" else f" (n={students})"


class Overview:
    """The jobs of a sweep that have begun after `since`, for somebody who looks again and again."""

    def __init__(self, folder: Path, since: float = 0.0) -> None:
        self._folder, self._since, self._known = folder, since, Known()

    def lines(self) -> list[Line]:
        """What each job does now."""
        return [_line(self._folder, job) for job in find_jobs(self._folder, self._since, self._known)]


def _line(folder: Path, job: Job) -> Line:
    if job.result is not None or job.reason != UNFINISHED:
        return Line(job, None, "")
    status = read_status(folder / job.number)
    return Line(job._replace(reason=IDLE), status, "" if status is None else _gone(status))


def _gone(status: Status) -> str:
    """Why a job with a status does not run; "" if it runs, as far as one can see."""
    if status.has_ended:
        return f"killed in epoch {status.epoch}/{status.epochs} of {status.stage}"
    if status.host == platform.node():
        return ""
    silent = time.time() - status.at
    return f"no news for {duration(silent)}, from {status.host}" if silent > _SILENT else ""


def has_ended(folder: Path, lines: Sequence[Line]) -> bool:
    """Whether a sweep is over: it is summarised at its end, after its last job."""
    summary = folder / "summary.md"
    if not summary.exists() or any(line.runs for line in lines):
        return False
    configs = [folder / line.job.number / ".hydra" / "config.yaml" for line in lines]
    began = [path.stat().st_mtime for path in configs if path.exists()]  # hydra.output_subdir=null: there are none
    return not began or summary.stat().st_mtime >= max(began)


def was_killed(folder: Path, lines: Sequence[Line]) -> bool:
    """Whether the sweep's own process has ended before its end, and no job runs."""
    process = read_process(folder)
    return process is not None and process.has_ended and not any(line.runs for line in lines)


def headline_of(folder: Path, lines: Sequence[Line], expected: int) -> str:
    """How many jobs are done, run and failed."""
    done = sum(line.job.result is not None for line in lines)
    failed = sum(line.failed for line in lines)
    whole = f"{done} of {max(expected, len(lines))} jobs done" if expected else f"{count(done)} done"
    parts = [whole, f"{sum(line.runs for line in lines)} running", *([f"{failed} failed"] if failed else [])]
    return f"{folder}: {', '.join(parts)}"


class Sweep(NamedTuple):
    """What is known of a sweep before its jobs begin."""

    folder: Path
    expected: int = 0  # the number of its jobs; 0 if it is unknown
    fixed: Sequence[str] = ()  # the overrides that it does not vary


def screen(sweep: Sweep, lines: Sequence[Line], out: Console, room: int) -> Group:
    """Headline and table in at most `room` lines of the terminal: without the first ended jobs, if need be."""
    head = Text(headline_of(sweep.folder, lines, sweep.expected), style="bold")
    shared = shared_by(lines, sweep.fixed)
    ranked = sorted(range(len(lines)), key=lambda place: (_rank(lines[place]), -place))

    def of(number: int) -> Group:
        left = f"and {count(len(lines) - number, 'more job')}: python -m kd.sweep watch --once {sweep.folder}"
        more = [Text(left, style="dim")] if number < len(lines) else []
        return Group(head, board([lines[place] for place in sorted(ranked[:number])], shared), *more)

    def is_too_high(number: int) -> bool:
        return len(out.render_lines(of(number), pad=False)) > room

    most = min(len(lines), max(room, 1))  # a job has a line at least
    if not is_too_high(most):
        return of(most)
    return of(max(1, bisect_left(range(1, most), True, key=is_too_high)))


def _rank(line: Line) -> int:
    """Which jobs are left out last: those that run, then those that wait, then those that failed."""
    return 0 if line.runs else 3 if line.job.result else 2 if line.problem else 1


def board(lines: Sequence[Line], shared: set[str]) -> Group:
    """The table of a sweep without what all jobs have in common, and a line for each job that has failed or stopped."""
    table = narrow_table("job", "setting", "stage", "epoch>", "val %>", "images/s>", "left, or result")
    table.padding = (0, 1, 0, 0)
    for line in lines:
        style = "bold" if line.runs else "red" if line.problem else "dim"
        setting = escape(difference(line.job.overrides, shared))
        table.add_row(escape(line.job.number), setting, *map(escape, line.cells), style=style)
    problems = [plain_line(line, shared) for line in lines if line.problem]
    return Group(table, *(Text(each, style="red", overflow="fold") for each in problems))


def shared_by(lines: Sequence[Line], fixed: Sequence[str] = ()) -> set[str]:
    """The overrides that all jobs have. `fixed` are those that the sweep does not vary, as far as they are known."""
    own = [set(line.job.overrides) for line in lines]
    same = {override.lower() for override in fixed}  # a job's true is True
    known = {override for each in own for override in each if override.lower() in same}
    return known | (set.intersection(*own) if len(own) > 1 else set())


def plain_line(line: Line, shared: set[str]) -> str:
    """A job in one line, for an output that is no terminal."""
    stage, epoch, val, speed, left = line.cells
    told = [line.problem or stage, *([f"epoch {epoch}"] if epoch else []), *([f"val {val} %"] if val else [])]
    told += [f"{speed} images/s"] if speed else []
    told += [f"{left} left" if line.runs else left] if left else []
    return f"{called(line.job, shared)}: {'  '.join(told)}"
