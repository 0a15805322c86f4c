"""The report for people: figures, an HTML page, and the same page in Markdown."""

from __future__ import annotations

from pathlib import Path

from kd.core import files
from kd.tools.paper.report import Report

_FIGURES = "figures"


def write_report(report: Report, folder: Path) -> list[str]:
    """Write report.html, which needs no other file, report.md with figures/, and tables.json. Returns their names.

    Raises OSError if the folder cannot be written.
    """
    from kd.tools.paper.page.figures import draw_row
    from kd.tools.paper.page.html import html
    from kd.tools.paper.page.markdown import markdown

    drawings = {(table.id, row.id): draw_row(report, table, row) for table in report.tables for row in table.rows}
    files.make(folder / _FIGURES)
    for drawing in (drawing for row in drawings.values() for drawing in row):
        files.write(folder / _FIGURES / f"{drawing.name}.svg", drawing.svg)
    pages = {
        "report.html": html(report, drawings),
        "report.md": markdown(report, drawings, _FIGURES),
        "tables.json": report.model_dump_json(indent=1),
    }
    for name, text in pages.items():
        files.write(folder / name, text)
    return list(pages)
