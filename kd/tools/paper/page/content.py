"""The content of the HTML page and the Markdown page: the entries of the tables, and the sentences around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kd.core.statistics import Spread
from kd.reporting.console import duration, percent
from kd.reporting.results import SELECTED
from kd.tools.paper.report import CellResult, Report, RowResult, StageReport, TableResult, mean

REPRODUCED = "The papers' tables, reproduced"
_TWO_SEEDS = (  # 12.706/√2 and 4.303/√3
    "n = 2: the interval of two seeds reaches 9.0 standard deviations to each side; that of three would reach 2.5. So "
    "two seeds tell cells apart only where the difference is nearly the same at both."
)
OURS = "A table of our own, in no paper"
PROTOCOL = (
    "*Last* is the student's last epoch. *Best on test* is its best epoch by test accuracy, which is the papers' "
    "protocol. Both come from the same trainings as *test*.",
    "Intervals are 95 %, by Student's t. Differences are paired by seed. A difference is bold if its interval excludes "
    "zero. Many cells are compared: without any real difference, about one in twenty is bold by chance.",
    "*Agreement* is how often the student and its guide choose the same class of a test image. *KL* is "
    "KL(guide ‖ student) in nats at T 1. *ECE* is the expected calibration error of 15 bins, in percent.",
    "*PFLOP* and *time* are the cost of all stages of a cell, divided by the number of its seeds. A stage that other "
    "cells use too is counted in full. Operations are counted, not measured. Time is what the training took.",
)


@dataclass(frozen=True)
class Value:
    """An entry of a table: its text, the keys of the stages that its number comes from, and whether it is bold."""

    text: str
    keys: tuple[str, ...] = ()
    bold: bool = False


_FEW = 3  # cells beside the baseline that are told one by one


def heading(report: Report) -> str:
    """The heading of the page. Tables on other data than the papers' reproduce no number."""
    if len(report.tables) == 1:
        return f"{report.tables[0].title}: {report.tables[0].data}"
    data = " and ".join(dict.fromkeys(table.data for table in report.tables))
    return f"The papers' tables, on {data}" if all(table.elsewhere for table in report.tables) else REPRODUCED


def findings(report: Report) -> Iterator[str]:
    """A sentence for each row: what is better than its baseline, by how much, and how certain that is."""
    for table in report.tables:
        for row in table.rows:
            yield f"**{row.title}**, {table.data}: {_found(report, row)}."


def of_two_seeds(report: Report) -> str:
    """What intervals over two seeds are worth; "" where there are none."""
    known = [cell.against for table in report.tables for row in table.rows for cell in row.cells if cell.against]
    return _TWO_SEEDS if any(pair.n == 2 and pair.p is not None for pair in known) else ""


def _found(report: Report, row: RowResult) -> str:
    base = next((cell for cell in row.cells if cell.label == row.baseline and cell.draws), None)
    others = [cell for cell in row.cells if cell.label != row.baseline and cell.draws]
    if base is None or not others:
        return f"nothing to compare with {row.baseline}"
    compared = [cell for cell in others if cell.against]
    if not compared:
        told = (f"{cell.label} has {_average(report, cell)} %" for cell in (base, *others[:_FEW]))
        return f"{', '.join(told)}: one seed, which does not tell them apart"
    if len(compared) <= _FEW:
        return "; ".join(_sentence(cell, row.baseline) for cell in compared)
    return _many(compared, row.baseline)


def _many(compared: Sequence[CellResult], baseline: str) -> str:
    """Of many cells: how many are better or worse than the baseline, and the highest."""
    certain = [cell.against.mean > 0 for cell in compared if cell.against and cell.against.told_apart]
    best = max(compared, key=lambda cell: cell.against.mean if cell.against else 0.0)
    better, worse = sum(certain), len(certain) - sum(certain)
    rest = len(compared) - len(certain)
    counted = f"{better} of {len(compared)} cells are better than {baseline}, {worse} worse"
    return f"{counted}, {rest} cannot be told apart; the highest: {_sentence(best, baseline)}"


def _sentence(cell: CellResult, baseline: str) -> str:
    """A cell beside its baseline, in words."""
    assert cell.against is not None
    known, (low, high) = cell.against, cell.against.ci95
    if known.p is None:
        return f"{cell.label} differs from {baseline} by {known.mean:+.2f} at every seed (n = {known.n})"
    certainty = f"95 % interval {low:+.2f} to {high:+.2f}, n = {known.n}"
    if not known.told_apart:
        return f"{cell.label} and {baseline} cannot be told apart ({known.mean:+.2f}, {certainty})"
    order = "better" if known.mean > 0 else "worse"
    return f"{cell.label} is {order} than {baseline} by {abs(known.mean):.2f} points ({certainty})"


def _average(report: Report, cell: CellResult) -> str:
    return percent(mean([student.test_acc for student in report.students(cell)]))


def headings(table: TableResult, row: RowResult) -> tuple[str, ...]:
    """The headings of `entries`."""
    return (
        "",
        "n",
        "test % (mean ± std)",
        "95 % interval",
        f"difference to {row.baseline}, interval, p",
        *([f"published, {table.dataset} %"] if has_published(row) else []),
        "last %",
        "best on test %",
        "val %",
        "agreement %",
        "KL",
        "ECE %",
        "PFLOP",
        "time",
    )


def has_published(row: RowResult) -> bool:
    """Whether a paper has a number of one of its cells."""
    return any(cell.published for cell in row.cells)


def entries(report: Report, row: RowResult, cell: CellResult) -> tuple[Value, ...]:
    """The entries of a cell's line."""
    students, keys = report.students(cell), cell.students
    published = [Value(published_of(cell, row.baseline))] if has_published(row) else []
    against, base = cell.against, next((found for found in row.cells if found.label == row.baseline), None)
    seeds = {draw.seed for draw in cell.draws} & {draw.seed for draw in base.draws} if base else set()
    both = [draw.chain[-1] for found in (cell, base) if found for draw in found.draws if draw.seed in seeds]
    return (
        Value(cell.label),
        Value(str(len(keys))),
        Value(_mean(cell.test_acc, [student.test_acc for student in students]), keys),
        Value(_interval(cell.test_acc), keys if cell.test_acc else ()),
        Value(difference_of(cell), tuple(both) if against else (), bool(against and against.told_apart)),
        *published,
        Value(_mean(cell.last, [student.last for student in students]), keys),
        Value(_mean(cell.best_test, [student.best_test for student in students]), keys),
        Value(percent(mean([student.val_acc for student in students])), keys),
        Value(percent(mean([s.fidelity.agreement if s.fidelity else None for s in students])), keys),
        Value(_number(mean([s.fidelity.kl if s.fidelity else None for s in students])), keys),
        Value(percent(mean([student.calibration.ece for student in students])), keys),
        Value(f"{cell.flops / 1e15:.3g}" if cell.draws else "", cell.keys),
        Value(duration(cell.seconds) if cell.draws else "", cell.keys),
    )


def about(table: TableResult) -> Iterator[str]:
    """What a reader has to know about a table."""
    other = table.data != table.dataset and any(map(has_published, table.rows))
    yield f"Our numbers are on **{table.data}**" + (f"; published numbers are on {table.dataset}." if other else ".")
    yield f"Mode {table.mode}; {SELECTED[table.select]}."
    yield from table.notes


def below(report: Report, row: RowResult) -> Iterator[str]:
    """What a reader has to know about a row."""
    kinds = dict.fromkeys(cell.varied for cell in row.cells)
    for kind in kinds:
        which = ", ".join(cell.label for cell in row.cells if cell.varied == kind)
        yield f"What varied: {kind}" + (f" ({which})." if len(kinds) > 1 else ".")
    yield from _worth(report, row)
    yield from _alarms(report, row)
    sources = dict.fromkeys(cell.published.source for cell in row.cells if cell.published)
    for source in sources:
        which = ", ".join(cell.label for cell in row.cells if cell.published and cell.published.source == source)
        yield f"Published numbers of {which}: {source}."
    for cell in row.cells:
        for seed, why in cell.missing.items():
            reason = "; ".join(why.splitlines())
            yield f"{cell.label}, seed {seed}: **no result**, `{reason}`"


def _worth(report: Report, row: RowResult) -> Iterator[str]:
    """The gain from the papers' protocol, in percent: the best epoch on the test set minus the last epoch."""
    students = [student for cell in row.cells for student in report.students(cell)]
    gains = [s.best_test - s.last for s in students if s.best_test is not None and s.last is not None]
    if gains:
        told = f"{mean([*gains]):+.2f} on average, {max(gains):+.2f} at most, over {len(gains)} students"
        yield f"Best on test minus last epoch: {told}."


def _alarms(report: Report, row: RowResult) -> Iterator[str]:
    """What looked wrong while the row's stages were trained, each text once, with the stages' keys."""
    keys = dict[str, list[str]]()
    for key in dict.fromkeys(key for cell in row.cells for key in cell.keys):
        for text in report.stages[key].alarms:
            keys.setdefault(text, []).append(f"`{key}`")
    yield from (f"**Alarm**, {text} ({', '.join(each)})." for text, each in keys.items())


def origin(report: Report) -> Iterator[str]:
    """The origin of the page."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"Written by `{report.command}`, commit {report.commit or 'unknown'}, on {report.machine}, with {versions}."
    yield f"All {len(report.stages)} stages took {duration(report.seconds)} of training."
    yield from (f"Table {name} is left out: `{reason}`" for name, reason in report.left_out.items())


def about_stages(report: Report) -> str:
    """What all stages have in common; their table has the rest."""
    common = {"trained": _shared(report, _settings), "made": _shared(report, _makers)}
    return " ".join(f"All are {how} with {', '.join(parts)}." for how, parts in common.items() if parts)


def _shared(report: Report, of: Callable[[StageReport], Sequence[str]]) -> list[str]:
    """What all stages have, of those that have anything: given weights have no training."""
    known = [parts for stage in report.stages.values() if (parts := of(stage))]
    return [part for part in known[0] if all(part in other for other in known)] if known else []


def _settings(stage: StageReport) -> list[str]:
    """The training settings one by one; the commas of a list separate nothing."""
    return re.split(r", (?![^\[]*\])", stage.training) if stage.training else []


def _makers(stage: StageReport) -> list[str]:
    return [f"{name} {value}" for name, value in stage.made_with.items()]


def _own(report: Report, stage: StageReport, of: Callable[[StageReport], Sequence[str]]) -> str:
    shared = _shared(report, of)
    return ", ".join(part for part in of(stage) if part not in shared)


STAGE_HEADINGS = (
    "stage",
    "role",
    "network",
    "seed",
    "guide",
    "loss",
    "training",
    "epochs",
    "kept",
    "val %",
    "test %",
    "time",
    "made with",
)


def stage_entries(report: Report, stage: StageReport) -> tuple[Value, ...]:
    """A stage's line under STAGE_HEADINGS."""
    own = (stage.key,)
    return (
        Value(stage.key),
        Value(", ".join(report.roles(stage.key))),
        Value(stage.model),
        Value("" if stage.seed is None else str(stage.seed)),
        Value(stage.guide or ""),
        Value(stage.loss),
        Value(_own(report, stage, _settings)),
        Value(str(stage.epochs)),
        Value(str(stage.selected_epoch), own),
        Value(percent(stage.val_acc), own),
        Value(percent(stage.test_acc), own),
        Value(duration(stage.seconds), own),
        Value(_own(report, stage, _makers)),
    )


def published_of(cell: CellResult, baseline: str) -> str:
    """The published number, with its status unless it is verified."""
    known = cell.published
    if known is None:
        return "n/a"
    value = f"{known.value:+g} to {baseline}" if known.difference else f"{known.value:g}"
    return value if known.status == "verified" else f"{value} ({known.status})"


def difference_of(cell: CellResult) -> str:
    """A cell's difference to its baseline, with interval and p; "" if there is none."""
    if cell.against is None:
        return ""
    known, (low, high) = cell.against, cell.against.ci95
    pairs = "" if known.n == len(cell.draws) else f", {known.n} pairs"
    if known.p is None:
        return f"{known.mean:+.2f} at every seed{pairs}"
    p = "p < 0.001" if known.p < 0.001 else f"p {known.p:.3f}"
    return f"{known.mean:+.2f}, {low:+.2f} to {high:+.2f}, {p}{pairs}"


def _mean(known: Spread | None, values: Iterable[float | None]) -> str:
    return percent(mean([*values])) if known is None else f"{known.mean:.2f} ± {known.std:.2f}"


def _interval(known: Spread | None) -> str:
    if known is None:
        return "n/a"
    if not known.std:
        return "equal at every seed"
    low, high = known.ci95
    return f"{max(low, 0):.2f} to {min(high, 100):.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
