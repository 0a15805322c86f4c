"""What the figures share: axes, dots with intervals, legends."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.paper.page.svg import COLOURS, WIDTH, gid
from kd.paper.results import CellResult, Report, RowResult, mean
from kd.statistics import Spread

Made = tuple[Figure, str] | None  # a figure and its caption, where there is something to show
MOST = 100.4  # percent of an axis, whatever an interval says
_AT_ONCE = 5  # cells whose curves are told apart by an eye


def plain(height: float) -> tuple[Figure, Axes]:
    """One pair of axes, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.6)
    return figure, axes


def lines(cells: Sequence[CellResult], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A line a cell, in panels side by side."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(cells)), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for panel in axes:
        panel.grid(axis="x", alpha=0.6)
    axes[0].set_yticks(range(len(cells)), [cell.label for cell in cells])
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    return figure, axes


def dots(axes: Axes, cell: CellResult, y: float, values: Sequence[float], known: Spread | None) -> None:
    """A line of dots, with the interval that is known of them."""
    apart = [y + 0.1 * (i - (len(values) - 1) / 2) for i in range(len(values))]  # equal ones stay visible
    axes.plot(values, apart, "o", color=COLOURS["blue"], ms=4, alpha=0.8, label="a student", gid=gid(cell.students))
    if known:
        axes.errorbar(
            known.mean,
            y,
            xerr=half(known),
            fmt="|",
            color=COLOURS["ink"],
            ms=11,
            capsize=3,
            label="mean, 95 % interval",
        )


def half(known: Spread | None) -> float | None:
    """Of an interval; None where there is none."""
    return known.ci95[1] - known.mean if known else None


def average(report: Report, cell: CellResult) -> float:
    """A cell's mean test accuracy in percent."""
    return mean([student.test_acc for student in report.students(cell)]) or 0.0


def few(report: Report, row: RowResult) -> tuple[Sequence[CellResult], str]:
    """The cells whose curves are drawn, and which they are if not all."""
    if len(row.cells) <= _AT_ONCE:
        return row.cells, ""
    ranked = sorted(row.cells, key=lambda cell: average(report, cell))
    chosen = {cell.label: cell for cell in (*(c for c in row.cells if c.label == row.baseline), ranked[-1], ranked[0])}
    return list(chosen.values()), f" of the baseline, and of the best and the worst of {len(row.cells)} cells"


def legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Every label once, above the axes."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
