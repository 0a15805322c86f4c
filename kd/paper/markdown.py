"""The tables as Markdown: published beside ours, every number with its interval, its status and its stages."""

from __future__ import annotations

from collections.abc import Iterator

from kd.paper.results import CellResult, Draw, Report, RowResult, TableResult
from kd.progress import duration
from kd.statistics import Spread
from kd.tables import SELECTED, percent

_PROTOCOL = (
    "- *last* and *best on test* are of the same trainings: the last epoch, and the best on the test set, which is the",
    "  papers' protocol. The chain above a student is chosen on validation in all three.",
    "- Intervals are 95 %, Student's t; differences are paired by seed. Bold is a difference whose interval excludes",
    "  zero; many cells are compared, and one in twenty would be bold by luck.",
)


def page(report: Report, table: TableResult) -> str:
    """One table's page."""
    return "\n".join(
        [*_head(report, table), *(line for row in table.rows for line in _row(row, table)), *_foot(report)]
    )


def _head(report: Report, table: TableResult) -> Iterator[str]:
    yield f"# {table.title}: {table.dataset}\n"
    yield f"{table.paper}.\n"
    yield f"**{report.title}**\n" if report.profile != "full" else f"Trained by {report.title}.\n"
    copy = "" if table.data == table.dataset else f"; the published numbers are of {table.dataset}"
    yield f"- Ours are of **{table.data}**{copy}."
    yield f"- Mode {table.mode}; {SELECTED[table.select]}."
    yield from _PROTOCOL
    yield from (f"- {note}" for note in table.notes)
    yield ""


def _row(row: RowResult, table: TableResult) -> Iterator[str]:
    yield f"## {row.title}\n"
    headings = (
        "",
        "chain",
        f"published, {table.dataset} %",
        "n",
        "test % (mean ± std)",
        "95 % interval",
        f"difference to {row.baseline}, interval",
        "p",
        "last %",
        "best on test %",
        "val %",
        "time",
    )
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    yield from (f"| {' | '.join(_cell(cell, row.baseline))} |" for cell in row.cells)
    yield ""
    kinds = dict.fromkeys(cell.varied for cell in row.cells)
    for kind in kinds:
        which = ", ".join(cell.label for cell in row.cells if cell.varied == kind)
        yield f"- What varied: {kind}" + (f" ({which})." if len(kinds) > 1 else ".")
    yield from _worth(row)
    for cell in row.cells:
        yield from (f"- {cell.label}, seed {seed}: **no result**, {why}" for seed, why in cell.missing.items())
    yield "\n<details><summary>stages and commands</summary>\n"
    for cell in row.cells:
        yield f"- {cell.label}: `{cell.command}`"
        yield from (f"  - {_keys(draw)}" for draw in cell.draws)
    yield "\n</details>\n"


def _worth(row: RowResult) -> Iterator[str]:
    """What choosing the epoch on the test set adds to the last one: the papers' protocol, in percent."""
    both = [(d.best_test, d.last) for cell in row.cells for d in cell.draws]
    gains = [best - last for best, last in both if best is not None and last is not None]
    if gains:
        mean, most = sum(gains) / len(gains), max(gains)
        told = f"{mean:+.2f} on average, {most:+.2f} at the most, of {len(gains)} students"
        yield f"- Best on test less last epoch: {told}."


def _cell(cell: CellResult, baseline: str) -> tuple[str, ...]:
    return (
        cell.label,
        cell.chain,
        _published(cell, baseline),
        str(len(cell.draws)),
        _mean(cell.test_acc, [draw.test_acc for draw in cell.draws]),
        _interval(cell.test_acc),
        _against(cell),
        "" if cell.against is None or cell.against.p is None else f"{cell.against.p:.3f}",
        _mean(cell.last, [draw.last for draw in cell.draws]),
        _mean(cell.best_test, [draw.best_test for draw in cell.draws]),
        percent(_average([draw.val_acc for draw in cell.draws])),
        duration(cell.seconds),
    )


def _published(cell: CellResult, baseline: str) -> str:
    known = cell.published
    if known is None:
        return "n/a"
    value = f"{known.value:+g} against {baseline}" if known.difference else f"{known.value:g}"
    return value if known.status == "verified" else f"{value} ({known.status}: {known.source})"


def _against(cell: CellResult) -> str:
    known = cell.against
    if known is None:
        return ""
    low, high = known.ci95
    text = f"{known.mean:+.2f}, {low:+.2f} to {high:+.2f}"
    return f"**{text}**" if known.told_apart else text


def _mean(known: Spread | None, values: list[float | None]) -> str:
    return percent(_average(values)) if known is None else f"{known.mean:.2f} ± {known.std:.2f}"


def _average(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _interval(known: Spread | None) -> str:
    if known is None:
        return "n/a"
    low, high = known.ci95
    return f"{max(low, 0):.2f} to {min(high, 100):.2f}"


def _keys(draw: Draw) -> str:
    stages = " → ".join(f"{stage.model} `{stage.key}` {stage.test_acc:.2f}" for stage in draw.chain)
    return f"seed {draw.seed}: {stages}"


def _foot(report: Report) -> Iterator[str]:
    yield f"Written by `{report.command}`, commit {report.commit or 'unknown'}, on {report.machine}, with"
    yield f"{', '.join(f'{name} {version}' for name, version in report.versions.items())}. The time of a cell is that"
    yield "of all its stages, whichever other cells use them too; tables.json has what each stage was made with.\n"
