"""The summary of a multirun: summary.csv, .md and .png, its best setting, and the differences between settings."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.markup import escape

from kd.core.statistics import spread, told
from kd.reporting.console import console, count, headline, interval, narrow_table, percent, test_of
from kd.reporting.results import (
    Job,
    ReplicatedResult,
    RunResult,
    student_rows,
    test_set_choices,
    what_varied,
    whose_seeds,
)
from kd.reporting.summary_figure import draw_summary

# Overrides that may differ between jobs and do not change results.
_NO_SETTING = re.compile(r"runtime\.|tracking[.=]|hydra|sweep|dry_run|seed=")
_NO_SETTING_BUT_DATA = re.compile(rf"(?!runtime\.data=)({_NO_SETTING.pattern})")
_SEED = "seed="
_LONG = re.compile(r"-?\d*\.\d{6,}|-?\d\.\d{4,}e[+-]?\d+")  # as a search draws them
_MACHINE = ("tracking", "runtime.store", "runtime.data", "runtime.device", "runtime.threads", "runtime.compile")
# Overrides for how a student is taught. A student and its baseline may differ only in these.
_TEACHING = ("method", "teacher", "loss", "experiment")
_LINES = 10  # of alarms, and of differences, in the terminal; summary.md has all
_PAIRED = "difference to {} in test accuracy, paired by the student's seed, 95 % interval:"


def print_jobs(jobs: Sequence[Job]) -> None:
    """Print the jobs of a multirun: a table with the overrides that differ and the results, then the failures."""
    out = console()
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    common = " ".join(override for override in jobs[0].overrides if override in shared)
    modes = sorted({job.result.mode for job in jobs if job.result})
    mode = f", mode {' and '.join(modes)}" if modes else ""
    out.print(headline(f"{count(len(jobs))}{mode}{', all with ' if common else ''}{common}"))
    table = narrow_table("job", "", "val %>", "test %>", "n>")
    marks: dict[str, list[str]] = {}
    for job in jobs:
        if job.result is not None:
            own = escape(difference(job.overrides, shared))
            table.add_row(escape(job.number), own, percent(job.result.objective), *test_of(job.result))
            for mark in test_set_choices(job.result):
                marks.setdefault(mark, []).append(job.number)
    if table.row_count:
        out.print(table)
    for mark, numbers in marks.items():
        out.print(f"jobs {', '.join(numbers)}: {mark}", highlight=False)
    for line in _first(alarm_lines(jobs), "more alarm"):
        out.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for job in sorted(jobs, key=lambda job: job.failed):
        if job.result is None:
            line = f"{called(job, shared)}: {job.reason}"
            out.print(line, style="red" if job.failed else "dim", highlight=False, markup=False, soft_wrap=True)


def _first(lines: Sequence[str], more: str) -> list[str]:
    """The lines that the terminal shows."""
    left = len(lines) - _LINES
    return [*lines[:_LINES], *([f"and {count(left, more)}, in summary.md"] if left > 0 else [])]


def alarm_lines(jobs: Sequence[Job]) -> list[str]:
    """A line for each thing that looked wrong, with the jobs in which it did."""
    numbers: dict[str, list[str]] = {}
    for job in jobs:
        for text in job.result.alarms if job.result else ():
            numbers.setdefault(text, []).append(job.number)
    return [f"alarm in job{'s' if len(each) > 1 else ''} {', '.join(each)}: {text}" for text, each in numbers.items()]


def job_line(number: int, swept: Sequence[str], result: RunResult) -> str:
    """The result of one job of a multirun, with the overrides that were swept."""
    setting = difference(swept, ()) or result.networks
    test, n = test_of(result)
    parts = [f"validation {percent(result.objective)} %"] if result.objective is not None else []
    parts += [f"test {test} %{f', {n} students' if n != '1' else ''}"]
    parts += [f"{result.baseline.difference:+.2f} to the student alone"] if result.baseline else []
    parts += [count(len(result.alarms), "alarm")] if result.alarms else []
    return f"job {number}: {setting}: {', '.join(parts)}"


def difference(overrides: Sequence[str], shared: Collection[str]) -> str:
    """The overrides that not all jobs have."""
    return " ".join(filter(None, (short(override) for override in overrides if override not in shared)))


def called(job: Job, shared: Collection[str]) -> str:
    """A job by its number, and by the overrides that not all jobs have."""
    own = difference(job.overrides, shared)
    return f"job {job.number} ({own})" if own else f"job {job.number}"


def short(override: str) -> str:
    """An override for tables, with long fractions to four digits; "" for overrides that a search adds by itself."""
    name, _, value = override.partition("=")
    if name in ("runtime.trial", "sweep.join"):
        return ""
    return f"{name}={float(value):.4g}" if _LONG.fullmatch(value) else override


@dataclass(frozen=True)
class Setting:
    """The finished jobs that differ only in their student's seed; accuracies in percent."""

    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]

    @cached_property
    def results(self) -> list[RunResult]:
        """The jobs' results."""
        return [job.result for job in self.jobs if job.result]

    @property
    def students(self) -> set[tuple[int, str]]:
        """Seed and key of each student."""
        return {(student.seed, student.key) for result in self.results for student in result.students}

    @cached_property
    def test(self) -> list[float]:
        """The test accuracy of each student. A student that two jobs have counts once."""
        students = [student for result in self.results for student in result.students]
        return list({student.key: student.test_acc for student in students}.values())

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The test accuracy of each student, by its seed."""
        return {student.seed: student.test_acc for result in self.results for student in result.students}

    @property
    def whose(self) -> str:
        """Whose seeds its interval is over, where it is not the student's alone: "of the whole chain"."""
        several = (result.varied for result in self.results if isinstance(result, ReplicatedResult))
        chains = [[outcome.key for outcome in result.chain] for result in self.results]
        known = whose_seeds(next(several, what_varied(chains)))
        return "" if known == whose_seeds() else known

    @property
    def alone(self) -> dict[int, float]:
        """The test accuracy of each student of the jobs' own baselines, by its seed."""
        baselines = [result.baseline for result in self.results if result.baseline]
        return {student.seed: student.test_acc for baseline in baselines for student in baseline.replicates}

    @property
    def val(self) -> float | None:
        """Their mean validation accuracy; None without a validation split."""
        known = {student.key: student.val_acc for result in self.results for student in result.students}
        values = [value for value in known.values() if value is not None]
        return sum(values) / len(values) if values else None

    @property
    def mean(self) -> float:
        """Their mean test accuracy."""
        return sum(self.test) / len(self.test)

    @property
    def task(self) -> tuple[str, str, str]:
        """What settings have in common that can be compared: the mode, the data set, and the student's network."""
        result = self.results[0]
        return result.mode, result.dataset, result.chain[-1].model

    @property
    def traits(self) -> tuple[Any, ...]:
        """What a setting and its baseline have in common: all that decides the students, without seeds and teaching."""
        student = self.results[0].chain[-1]
        overrides = frozenset(each for each in self.overrides if not each.startswith(_TEACHING))
        return *self.task, student.epochs, student.select, overrides

    def score(self, objective: str) -> float:
        """The number by which settings are compared: mean accuracy on validation, or on test, in percent."""
        return self.mean if objective == "test_acc" else self.val or 0.0

    def label(self, shared: Collection[str]) -> str:
        """The overrides that not all settings have; the method if there are none."""
        return difference(self.overrides, shared) or f"method={self.results[0].method}"

    def cells(self, shared: Collection[str]) -> list[str]:
        """A row of the Markdown table."""
        cells = [self.label(shared), _chain(self.results[0]), percent(self.val)]
        if len(self.test) == 1:
            return [*cells, percent(self.mean), "1", ""]
        known = spread(self.test)
        return [*cells, f"{known.mean:.2f} ± {known.std:.2f}", str(known.n), interval(known.ci95)]


def _chain(result: RunResult) -> str:
    """The networks of a run and the settings of their losses: "resnet20 → resnet8 (T=4 lambda=0.5)"."""
    text = ""
    for outcome in result.chain:
        settings = f" ({outcome.loss.shown})" if outcome.loss and outcome.loss.shown else ""
        mark = " → " if outcome.loss and outcome.loss.guided else " + "
        text += f"{mark if text else ''}{outcome.model}{settings}"
    return text


def settings(jobs: Sequence[Job]) -> list[Setting]:
    """Finished jobs grouped by their overrides without the seed, in the order of the jobs."""
    found = _grouped(jobs, _NO_SETTING)
    # The same images may be in two places. Two students of one seed are not the same: these images are others.
    alike = all(len({key for seed, key in each.students}) == len({seed for seed, _ in each.students}) for each in found)
    return found if alike else _grouped(jobs, _NO_SETTING_BUT_DATA)


def _grouped(jobs: Sequence[Job], without: re.Pattern[str]) -> list[Setting]:
    groups: dict[tuple[str, ...], list[Job]] = {}
    known: dict[tuple[str, ...], set[str]] = {}
    for job in jobs:
        if job.result is not None:
            overrides = tuple(each for each in job.overrides if not without.match(each))
            keys = {student.key for student in job.result.students}
            # A search may draw a setting twice. The same students count once.
            if not keys <= known.setdefault(overrides, set()):
                groups.setdefault(overrides, []).append(job)
                known[overrides] |= keys
    return [Setting(overrides, tuple(group)) for overrides, group in groups.items()]


def _shared(pool: Sequence[Setting]) -> list[str]:
    """The overrides that all settings have."""
    return [each for each in pool[0].overrides if all(each in setting.overrides for setting in pool)] if pool else []


def best_of(pool: Sequence[Setting], objective: str) -> Setting | None:
    """The setting with the highest mean validation accuracy, or test accuracy if that is the `objective`.

    Among equals it is the first by name, so that the order of a grid does not matter. None if a setting has no
    validation split: then only the test set could choose.
    """
    if not pool or (objective == "val_acc" and any(setting.val is None for setting in pool)):
        return None
    return min(pool, key=lambda setting: (-setting.score(objective), setting.overrides))


def command(setting: Setting, start: Sequence[str] = ()) -> str:
    """The command that trains the setting's students again, or loads them from the store.

    `start` are words of the sweep's command besides the overrides of its jobs.
    """
    overrides = [*start, *setting.overrides]
    shared = set.intersection(*(set(job.overrides) for job in setting.jobs))
    machine = [each for each in setting.jobs[0].overrides if each in shared and each.startswith(_MACHINE)]
    overrides += [each for each in machine if each not in overrides]
    mode = setting.results[0].mode
    if mode != "paper" and not any(each.startswith("mode=") for each in overrides):
        overrides.append(f"mode={mode}")
    seeds = [each for job in setting.jobs for each in job.overrides if each.startswith(_SEED)]
    if len(seeds) > 1:
        overrides = ["-m", *overrides, _SEED + ",".join(each.removeprefix(_SEED) for each in seeds)]
    else:
        overrides += seeds
    return " ".join(["python", "run.py", *map(shlex.quote, overrides)])


def differences(pool: Sequence[Setting]) -> tuple[str, list[str]]:
    """The differences in test accuracy between students of equal seeds: what they are to, and one line per setting.

    They are to the same students of method=scratch. A setting without such a baseline, of its own (baseline=true) or in
    the multirun, has no line. If none has a baseline, they are to the first setting.
    """
    if lines := _to_scratch(pool):
        return "method=scratch", lines
    return (pool[0].label(_shared(pool)), _to_first(pool)) if pool else ("", [])


def _to_first(pool: Sequence[Setting]) -> list[str]:
    """The differences to the first setting, for students of the same network and data. One seed alone tells nothing.

    A search has none: its first setting is drawn at random.
    """
    shared, first, lines = _shared(pool), pool[0], []
    if any(each.startswith("runtime.trial=") for each in first.jobs[0].overrides):
        return []
    for setting in pool[1:]:
        seeds = [seed for seed in setting.by_seed if seed in first.by_seed]
        if setting.task == first.task and len(seeds) > 1:
            values, others = ([each.by_seed[seed] for seed in seeds] for each in (setting, first))
            lines.append(f"{setting.label(shared)}: {told(values, others, setting.whose)}")
    return lines


def _to_scratch(pool: Sequence[Setting]) -> list[str]:
    """The differences to the students of method=scratch."""
    shared, lines = _shared(pool), []
    scratch = {setting.traits: setting for setting in reversed(pool) if setting.results[0].method == "scratch"}
    for setting in pool:
        if setting.results[0].method != "scratch":
            found = scratch.get(setting.traits)
            alone = {**(found.by_seed if found else {}), **setting.alone}
            seeds = [seed for seed in setting.by_seed if seed in alone]
            values, others = ([each[seed] for seed in seeds] for each in (setting.by_seed, alone))
            if seeds:
                lines.append(f"{setting.label(shared)}: {told(values, others, setting.whose)}")
    return lines


def write_summary(
    folder: Path, jobs: Sequence[Job], objective: str, missing: int = 0, start: Sequence[str] = ()
) -> list[str]:
    """Write the summary into the multirun's folder. Returns lines to print: differences, and the best setting.

    `objective` is val_acc, or test_acc if the search maximised it. `missing` jobs left no folder.
    `start` is for `command`.
    """
    # With hydra.output_subdir=null the overrides of a job are unknown.
    pool = settings(jobs) if len(jobs) == 1 or all(job.overrides for job in jobs) else []
    # By test_acc the best is a single job, as in the papers. By val_acc the seeds are pooled.
    alone = [Setting(setting.overrides, (job,)) for setting in pool for job in setting.jobs]
    best = best_of(alone if objective == "test_acc" else pool, objective)
    again = "" if best is None else command(best, start)
    (other, added), lines = differences(pool), _best_lines(pool, best, objective, again)
    head = _PAIRED.format(other)
    if missing:
        lines.append(f"{missing} of {count(len(jobs) + missing)} left no folder: killed, or never started")
    for stale in ("best.sh", "summary.png"):
        (folder / stale).unlink(missing_ok=True)
    _write_csv(folder / "summary.csv", student_rows(jobs))
    (folder / "summary.md").write_text(_markdown(pool, jobs, [head, *added] if added else [], lines), encoding="utf-8")
    if best is not None:
        told = f"# the best setting of {folder.name}: `make best` runs it\n{again}\n"
        (folder / "best.sh").write_text(told, encoding="utf-8")
    if pool:
        named = {setting.overrides: index for index, setting in enumerate(pool)}
        circle = (named[best.overrides], best.score(objective)) if best else None
        by = "test" if objective == "test_acc" else "validation"
        draw_summary(folder / "summary.png", pool, _shared(pool), circle, by)
    return [*([head] if added else []), *(f"  {line}" for line in _first(added, "more difference")), *lines]


def _best_lines(pool: Sequence[Setting], best: Setting | None, objective: str, again: str) -> list[str]:
    if len(pool) < 2:
        return []
    if best is None:
        return ["no best setting: without a validation split, only the test set could choose one"]
    chosen = "CHOSEN ON THE TEST SET, as in the paper" if objective == "test_acc" else "chosen on validation"
    text = f"validation {percent(best.val)} %, test {best.mean:.2f} %, {count(len(best.test), 'student')}"
    equals = sum(setting.score(objective) == best.score(objective) for setting in pool)
    tie = f"; {equals} settings are equal, and this is the first by name" if equals > 1 else ""
    name = difference(best.overrides, _shared(pool))
    return [f"best setting, {chosen}: {name}: {text}{tie}", f"again: {again}"]


def _whose(pool: Sequence[Setting]) -> list[str]:
    """Sentences on whose seeds the intervals are over."""
    shared = _shared(pool)
    usual = ["It is over the students' seeds."] if not all(setting.whose for setting in pool) else []
    others = [f"Of {each.label(shared)} it is over seeds {each.whose}." for each in pool if each.whose]
    return [*usual, *others]


def _write_csv(path: Path, table: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def _markdown(pool: Sequence[Setting], jobs: Sequence[Job], added: Sequence[str], best: Sequence[str]) -> str:
    shared = _shared(pool)
    lines = [f"All with `{' '.join(shared)}`.", ""] if shared else []
    results = [job.result for job in jobs if job.result]
    if results:
        datasets = " and ".join(dict.fromkeys(result.dataset for result in results))
        modes = " and ".join(dict.fromkeys(result.mode for result in results))
        marks = dict.fromkeys(mark for result in results for mark in test_set_choices(result))
        lines += [f"Data set {datasets}. " + "; ".join((f"Mode {modes}", *marks)) + ".", ""]
    if pool:
        lines += ["| setting | chain | validation % | test % (mean ± std) | n | 95 % interval |", "|---" * 6 + "|"]
        for setting in pool:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in setting.cells(shared)) + " |")
        lines += [
            "",
            "Students that differ only in their seed are one line. The interval is Student's t.",
            *_whose(pool),
            "",
        ]
    if added:
        lines += [added[0][0].upper() + added[0][1:], "", *(f"- {line}" for line in added[1:]), ""]
    if said := alarm_lines(jobs):
        lines += [*(f"- {line}" for line in said), ""]
    lines += [f"{line}\n" for line in best]
    lines += [f"- job {job.number} ({' '.join(job.overrides)}): {job.reason}" for job in jobs if job.result is None]
    return "\n".join(lines) + "\n"
