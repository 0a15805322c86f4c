"""The report as people read it: figures, an HTML page, and its twin in Markdown."""

from __future__ import annotations

from pathlib import Path

from kd import files
from kd.paper.results import Report

_FIGURES = "figures"


def write(report: Report, folder: Path) -> list[str]:
    """Write report.html, which stands alone, report.md with its figures/, and tables.json; returns their names.

    Raises OSError where the folder cannot be written.
    """
    from kd.paper.page.figures import drawings
    from kd.paper.page.html import html
    from kd.paper.page.markdown import markdown
    from kd.paper.page.svg import standing_alone

    drawn = {(table.id, row.id): drawings(report, table.id, row) for table in report.tables for row in table.rows}
    files.make(folder / _FIGURES)
    for drawing in (drawing for row in drawn.values() for drawing in row):
        files.write(folder / _FIGURES / f"{drawing.name}.svg", standing_alone(drawing.svg))
    pages = {
        "report.html": html(report, drawn),
        "report.md": markdown(report, drawn, _FIGURES),
        "tables.json": report.model_dump_json(indent=1),
    }
    for name, text in pages.items():
        files.write(folder / name, text)
    return list(pages)
