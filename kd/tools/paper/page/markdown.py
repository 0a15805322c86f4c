"""The report as Markdown, with its figures in files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kd.tools.paper.page import content
from kd.tools.paper.page.content import Value
from kd.tools.paper.page.figures import Drawing
from kd.tools.paper.report import Draw, Report, RowResult, TableResult

Drawings = Mapping[tuple[str, str], Sequence[Drawing]]  # by the ids of table and row


def markdown(report: Report, drawings: Drawings, folder: str) -> str:
    """The page; `folder` is the path of its figures, relative to the page."""
    return "\n".join(_page(report, drawings, folder)) + "\n"


def _page(report: Report, drawings: Drawings, folder: str) -> Iterator[str]:
    yield f"# {content.heading(report)}\n"
    yield f"**{report.title}**\n" if report.profile != "full" else f"Trained by {report.title}.\n"
    yield "## Findings\n"
    yield from (f"- {line}" for line in content.findings(report))
    yield ""
    if told := content.of_two_seeds(report):
        yield f"{told}\n"
    for table in report.tables:
        yield from _table(report, table, drawings, folder)
    yield "## How to read the numbers\n"
    yield from (f"- {line}" for line in content.PROTOCOL)
    yield "\n## Stages\n"
    yield f"{content.about_stages(report)}\n"
    yield from _lines(content.STAGE_HEADINGS, (content.stage_entries(report, s) for s in report.stages.values()))
    yield "\n".join(content.origin(report))


def _table(report: Report, table: TableResult, drawings: Drawings, folder: str) -> Iterator[str]:
    if len(report.tables) > 1:
        yield f"## {table.title}: {table.data}\n"
    yield f"{table.paper or content.OURS}.\n"
    yield from (f"- {line}" for line in content.about(table))
    yield ""
    for row in table.rows:
        yield from _row(report, table, row)
        for drawing in drawings.get((table.id, row.id), ()):
            yield f"![{drawing.caption}]({folder}/{drawing.name}.svg)\n\n{drawing.caption}\n"


def _row(report: Report, table: TableResult, row: RowResult) -> Iterator[str]:
    yield f"### {row.title}\n"
    yield from _lines(content.headings(table, row), (content.entries(report, row, cell) for cell in row.cells))
    yield from (f"- {line}" for line in content.below(report, row))
    yield "\n<details><summary>chains, stages and commands</summary>\n"
    for cell in row.cells:
        yield f"- {cell.label}, {cell.chain}: `{cell.command}`"
        yield from (f"  - {_keys(report, draw)}" for draw in cell.draws)
    yield "\n</details>\n"


def _keys(report: Report, draw: Draw) -> str:
    stages = [report.stages[key] for key in draw.chain]
    return f"seed {draw.seed}: " + " → ".join(f"{s.model} `{s.key}` {s.test_acc:.2f}" for s in stages)


def _lines(headings: Sequence[str], lines: Iterator[Sequence[Value]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for line in lines:
        shown = (f"**{entry.text}**" if entry.bold else entry.text for entry in line)
        yield f"| {' | '.join(text.replace('|', chr(92) + '|') for text in shown)} |"
    yield ""
