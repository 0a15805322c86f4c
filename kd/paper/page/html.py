"""The report as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from kd.paper.page import content, svg
from kd.paper.page.figures import Drawing
from kd.paper.results import Report


def html(report: Report, drawings: Mapping[tuple[str, str], Sequence[Drawing]]) -> str:
    """The page; drawings are by the ids of table and row.

    Every number has the keys of its stages in `data-key`: store/<key>/result.json is what it comes from.
    """
    environment = Environment(
        loader=PackageLoader("kd.paper.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    template = environment.get_template("page.html.jinja")
    return template.render(report=report, drawings=drawings, content=content, colours=Markup(svg.root()), Markup=Markup)


def _marked(text: str) -> Markup:
    """The Markdown of our sentences."""
    return Markup(MarkdownIt("commonmark", {"html": False}).renderInline(text))
