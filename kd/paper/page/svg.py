"""matplotlib's figures as SVG that follows the reader's light or dark page, the same bytes for the same data."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour blindness leaves apart, each with a brighter one for dark pages. Lines differ in
# markers and dashes too, so that grey is enough.
_PALETTE = {
    "ink": ("#1f2328", "#e6edf3"),
    "grid": ("#d0d7de", "#3d444d"),
    "paper": ("#ffffff", "#0d1117"),
    "blue": ("#0072b2", "#56b4e9"),
    "red": ("#d55e00", "#f28e4b"),
    "green": ("#009e73", "#35d0a5"),
    "purple": ("#9c4f7c", "#dba3c6"),
    "gold": ("#8a6d00", "#f0e442"),
}
COLOURS = {name: light for name, (light, _) in _PALETTE.items()}
LINES = tuple(COLOURS[name] for name in ("blue", "red", "green", "purple", "gold"))
DASHES = "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))
MARKERS = "o", "s", "^", "D", "v"

STYLE: dict[Any, Any] = {
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "kd",
}
WIDTH = 4.9  # inches: a phone shows it at three quarters, where 9 points are still read
BROAD = 5.5
_KEYS = "data-key:"  # an artist's gid that begins so is the keys of the stages that it shows


def gid(keys: Iterable[str]) -> str:
    """For an artist that shows numbers of these stages."""
    return _KEYS + " ".join(keys)


def draw(figure: Figure, name: str) -> str:
    """The figure as an <svg> element; `name` keeps its ids apart from those of others on a page.

    Its colours are CSS variables of a page's `root`.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(rf'id="{_KEYS}([^"]*)"', r'data-key="\1"', text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", text)
    for colour, (light, _) in _PALETTE.items():
        text = text.replace(light, f"var(--{colour})")
    return text


def root() -> str:
    """The CSS that gives the variables their values."""
    light, dark = (" ".join(f"--{name}: {pair[i]};" for name, pair in _PALETTE.items()) for i in (0, 1))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def standing_alone(svg: str) -> str:
    """The element as a file of its own, which any browser shows."""
    head, rest = svg.split(">", 1)
    return f"{head}><style>{root()}</style>{rest}"
