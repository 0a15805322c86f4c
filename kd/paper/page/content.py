"""What both pages say: the tables' entries, each with the stages that it rests on, and the words around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kd.paper.results import CellResult, Report, RowResult, TableResult, Trained, mean
from kd.progress import duration
from kd.statistics import Spread
from kd.tables import SELECTED, percent

OURS = "A table of our own, in no paper"
PROTOCOL = (
    "*last* and *best on test* are of the same trainings over the same chains: the student's last epoch, and its best "
    "on the test set, which is the papers' protocol.",
    "Intervals are 95 %, Student's t; differences are paired by seed. Bold is a difference whose interval excludes "
    "zero; many cells are compared, and one in twenty would be bold by luck.",
    "Fidelity is how often the student chooses its guide's class on the test images, and KL(guide ‖ student) in nats "
    "at T 1. ECE is the expected calibration error of 15 bins, in percent.",
    "Operations and time are for each seed: of all stages of a cell, each once, whoever else uses them, divided by its "
    "seeds. Operations are counted; time is what training took on the machine of the day, whatever else that did.",
)


@dataclass(frozen=True)
class Entry:
    """A number, or a few, as text; the keys of the stages it was made from; whether its interval lets it be bold."""

    text: str
    keys: tuple[str, ...] = ()
    bold: bool = False


def headings(table: TableResult, row: RowResult) -> tuple[str, ...]:
    """Over `entries`."""
    return (
        "",
        *([f"published, {table.dataset} %"] if _has_published(row) else []),
        "n",
        "test % (mean ± std)",
        "95 % interval",
        f"less {row.baseline}, interval, p",
        "last %",
        "best on test %",
        "val %",
        "agreement %",
        "KL",
        "ECE %",
        "PFLOP",
        "time",
    )


def _has_published(row: RowResult) -> bool:
    return any(cell.published for cell in row.cells)


def entries(report: Report, row: RowResult, cell: CellResult) -> tuple[Entry, ...]:
    """A cell's line."""
    students, keys = report.students(cell), cell.students
    published = [Entry(_published(cell, row.baseline))] if _has_published(row) else []
    against, base = cell.against, next((found for found in row.cells if found.label == row.baseline), None)
    seeds = {draw.seed for draw in cell.draws} & {draw.seed for draw in base.draws} if base else set()
    both = [draw.chain[-1] for found in (cell, base) if found for draw in found.draws if draw.seed in seeds]
    return (
        Entry(cell.label),
        *published,
        Entry(str(len(keys))),
        Entry(_mean(cell.test_acc, [student.test_acc for student in students]), keys),
        Entry(_interval(cell.test_acc), keys if cell.test_acc else ()),
        Entry(_against(cell), tuple(both) if against else (), bool(against and against.told_apart)),
        Entry(_mean(cell.last, [student.last for student in students]), keys),
        Entry(_mean(cell.best_test, [student.best_test for student in students]), keys),
        Entry(percent(mean([student.val_acc for student in students])), keys),
        Entry(percent(mean([s.fidelity.agreement if s.fidelity else None for s in students])), keys),
        Entry(_number(mean([s.fidelity.kl if s.fidelity else None for s in students])), keys),
        Entry(percent(mean([student.calibration.ece for student in students])), keys),
        Entry(f"{cell.flops / 1e15:.3g}" if cell.draws else "", cell.keys),
        Entry(duration(cell.seconds) if cell.draws else "", cell.keys),
    )


def about(table: TableResult) -> Iterator[str]:
    """What a reader has to know of a table."""
    other = table.data != table.dataset and any(map(_has_published, table.rows))
    yield f"Ours are of **{table.data}**" + (f"; the published numbers are of {table.dataset}." if other else ".")
    yield f"Mode {table.mode}; {SELECTED[table.select]}."
    yield from table.notes


def below(report: Report, row: RowResult) -> Iterator[str]:
    """What a reader has to know of a row."""
    kinds = dict.fromkeys(cell.varied for cell in row.cells)
    for kind in kinds:
        which = ", ".join(cell.label for cell in row.cells if cell.varied == kind)
        yield f"What varied: {kind}" + (f" ({which})." if len(kinds) > 1 else ".")
    yield from _worth(report, row)
    sources = dict.fromkeys(cell.published.source for cell in row.cells if cell.published)
    for source in sources:
        which = ", ".join(cell.label for cell in row.cells if cell.published and cell.published.source == source)
        yield f"Published numbers of {which}: {source}."
    for cell in row.cells:
        for seed, why in cell.missing.items():
            reason = "; ".join(why.splitlines())
            yield f"{cell.label}, seed {seed}: **no result**, `{reason}`"


def _worth(report: Report, row: RowResult) -> Iterator[str]:
    """What choosing the epoch on the test set adds to the last one: the papers' protocol, in percent."""
    students = [student for cell in row.cells for student in report.students(cell)]
    gains = [s.best_test - s.last for s in students if s.best_test is not None and s.last is not None]
    if gains:
        told = f"{mean([*gains]):+.2f} on average, {max(gains):+.2f} at the most, of {len(gains)} students"
        yield f"Best on test less last epoch: {told}."


def origin(report: Report) -> Iterator[str]:
    """Where the page is from."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield f"Written by `{report.command}`, commit {report.commit or 'unknown'}, on {report.machine}, with {versions}."
    yield f"All {len(report.stages)} stages took {duration(report.seconds)} of training."
    yield from (f"Table {name} is left out: `{reason}`" for name, reason in report.left_out.items())


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


def stage_entries(report: Report, stage: Trained) -> tuple[Entry, ...]:
    """A stage's line under STAGE_HEADINGS."""
    own = (stage.key,)
    return (
        Entry(stage.key),
        Entry(", ".join(report.roles(stage.key))),
        Entry(stage.model),
        Entry("" if stage.seed is None else str(stage.seed)),
        Entry(stage.guide or ""),
        Entry(stage.loss),
        Entry(stage.training),
        Entry(str(stage.epochs)),
        Entry(str(stage.selected_epoch), own),
        Entry(percent(stage.val_acc), own),
        Entry(percent(stage.test_acc), own),
        Entry(duration(stage.seconds), own),
        Entry(", ".join(f"{name} {value}" for name, value in stage.made_with.items())),
    )


def _published(cell: CellResult, baseline: str) -> str:
    """With its status, unless it is verified."""
    known = cell.published
    if known is None:
        return "n/a"
    value = f"{known.value:+g} against {baseline}" if known.difference else f"{known.value:g}"
    return value if known.status == "verified" else f"{value} ({known.status})"


def _against(cell: CellResult) -> str:
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
    low, high = known.ci95
    return f"{max(low, 0):.2f} to {min(high, 100):.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
