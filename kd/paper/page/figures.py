"""All figures of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib import rc_context

from kd.paper.page import accuracy, likeness
from kd.paper.page.axes import Made
from kd.paper.page.chains import chains
from kd.paper.page.svg import BROAD, STYLE, draw
from kd.paper.results import Report, RowResult

_KINDS: dict[str, Callable[[Report, RowResult], Made]] = {
    "accuracy": accuracy.accuracies,
    "axis": accuracy.over_axis,
    "chains": chains,
    "curves": accuracy.curves,
    "fidelity": likeness.fidelity,
    "calibration": likeness.calibration,
    "confusion": likeness.confusions,
    "cost": accuracy.cost,
}


@dataclass(frozen=True)
class Drawing:
    """A figure as an <svg> element, and what it shows."""

    name: str
    caption: str
    svg: str
    broad: bool  # too broad to stand beside another


def drawings(report: Report, table: str, row: RowResult) -> list[Drawing]:
    """All figures of a row that has something to show."""
    done = row.model_copy(update={"cells": tuple(cell for cell in row.cells if cell.draws)})
    found = []
    with rc_context(STYLE):
        for kind, make in _KINDS.items() if done.cells else ():
            if made := make(report, done):
                figure, caption = made
                name = f"{table}-{row.id}-{kind}"
                found.append(Drawing(name, caption, draw(figure, name), figure.get_figwidth() > BROAD))
    return found
