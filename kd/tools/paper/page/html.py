"""The report as one HTML page that needs no other file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from kd.tools.paper.page import content
from kd.tools.paper.page.figures import Drawing
from kd.tools.paper.report import Report


def html(report: Report, drawings: Mapping[tuple[str, str], Sequence[Drawing]]) -> str:
    """The page; drawings are by the ids of table and row.

    Every number in a table has the keys of its stages in `data-key`: it comes from store/<key>/result.json.
    """
    environment = Environment(
        loader=PackageLoader("kd.tools.paper.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = _marked
    environment.filters["base64"] = lambda text: b64encode(text.encode()).decode()
    return environment.get_template("page.html.jinja").render(report=report, drawings=drawings, content=content)


def _marked(text: str) -> Markup:
    """A sentence in Markdown as HTML."""
    return Markup(MarkdownIt("commonmark", {"html": False}).renderInline(text))
