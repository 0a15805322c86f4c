"""The figures of a row: accuracy, learning curves, cost, fidelity, calibration and confusion."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from kd.core.statistics import Spread
from kd.tools.paper.report import CellResult, Report, RowResult, StageReport, TableResult, mean

# Okabe and Ito's colours for colour-blind readers; the last two are darker, for contrast on white paper.
COLOURS = "#0072b2", "#d55e00", "#009e73", "#9c4f7c", "#8a6d00"
_BLUE, _RED, *_ = COLOURS
# Lines differ in markers and dashes too, so that a print in grey can be read.
_MARKERS = "o", "s", "^", "D", "v"
_DASHES = "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))
_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "grid.alpha": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "errorbar.capsize": 3,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "kd",  # equal numbers give equal ids and bytes
}
_WIDTH = 4.9  # inches: on a phone, at three quarters of it, 9 points can still be read
_HIGHEST = 100.4  # percent: the end of an axis, also for longer intervals
_AT_ONCE = 5  # more curves cannot be told apart

_Figure = tuple[Figure, str] | None  # with its caption; None if there is nothing to show


@dataclass(frozen=True)
class Drawing:
    """A figure: the name of its file, its caption, and the SVG that matplotlib writes."""

    name: str
    caption: str
    svg: str


def draw_row(report: Report, table: TableResult, row: RowResult) -> list[Drawing]:
    """All figures of a row of the table; cells without a result, and published numbers of other data, are left out."""
    left = {"published": None} if table.elsewhere else {}
    done = row.model_copy(update={"cells": tuple(cell.model_copy(update=left) for cell in row.cells if cell.draws)})
    drawings = []
    with rc_context(_STYLE):
        for kind, make in _KINDS.items() if done.cells else ():
            if made := make(report, done):
                figure, caption = made
                drawings.append(Drawing(f"{table.id}-{row.id}-{kind}", f"{row.title}: {caption}", _svg(figure)))
    return drawings


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _accuracy(report: Report, row: RowResult) -> _Figure:
    """Each student, their mean with its interval, and the published number."""
    figure, (axes,) = _lines(row.cells)
    for y, cell in enumerate(row.cells):
        _dots(axes, y, [student.test_acc for student in report.students(cell)])
        if known := cell.test_acc:
            interval: dict[str, Any] = {"xerr": _half(known), "fmt": "|", "ms": 11, "color": "black"}
            axes.errorbar(known.mean, y, label="mean, 95 % interval", **interval)
        if cell.published_accuracy:
            axes.plot(cell.published_accuracy, y, "D", color=_RED, mfc="none", mew=1.5, label="published")
    axes.set_xlabel("test accuracy, %")
    axes.set_xlim(right=min(axes.get_xlim()[1], _HIGHEST))
    _legend(figure, axes)
    told = ["each dot is one student"]
    told += ["the bar is their mean with its 95 % interval"] if any(cell.test_acc for cell in row.cells) else []
    told += ["diamonds are the published numbers"] if any(cell.published_accuracy for cell in row.cells) else []
    return figure, f"test accuracy; {', '.join(told)}."


def _axis(report: Report, row: RowResult) -> _Figure:
    """Accuracy over the setting in which the cells differ, with the baseline."""
    points = [(cell.at, cell) for cell in row.cells if cell.axis is not None and cell.at is not None]
    if len(points) < 2:
        return None
    figure, axes = _plain(3.0)
    base = next((cell for cell in row.cells if cell.label == row.baseline), None)
    if base:
        axes.axhline(_average(report, base), color="black", ls="--", lw=1, label=f"{base.label} (baseline)")
        if base.test_acc:
            axes.axhspan(*base.test_acc.ci95, color="black", alpha=0.1, lw=0)
    axes.plot([at for at, _ in points], [_average(report, cell) for _, cell in points], color=_BLUE, lw=1.2)
    for at, cell in points:
        label = "mean, 95 % interval" if cell.test_acc else "one student"
        axes.errorbar(at, _average(report, cell), yerr=_half(cell.test_acc), color=_BLUE, marker="o", label=label)
    name = str(points[0][1].axis)
    axes.set_xlabel(name)
    axes.set_xticks([at for at, _ in points])
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], _HIGHEST))
    _legend(figure, axes)
    return figure, f"test accuracy over {name}" + (f"; the dashed line is {row.baseline}." if base else ".")


def _curves(report: Report, row: RowResult) -> _Figure:
    """Accuracy over epochs: the students' mean and range over the seeds, and their guides at the first seed."""
    cells, which = _few(report, row)
    # Given weights have no curve. Without a test curve all are drawn on validation.
    own = [stage for cell in cells for key in cell.keys if (stage := report.stages[key]).val_curve]
    tested = all(stage.test_curve for stage in own)
    figure, axes = _plain(3.2)
    shown: list[list[float]] = []
    for cell, colour, dash in zip(cells, cycle(COLOURS), cycle(_DASHES)):
        curves = [_curve(student, tested) for student in report.students(cell)]
        columns = list(zip(*curves, strict=False))
        epochs = range(1, len(columns) + 1)
        axes.plot(epochs, [sum(c) / len(c) for c in columns], color=colour, ls=dash, lw=1.4, label=cell.label)
        axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, lw=0)
        shown += curves
    for (stage, label), marker in zip(_guides(report, cells), cycle(_MARKERS)):
        curve = _curve(stage, tested)
        look: dict[str, Any] = {"color": "black", "lw": 0.8, "marker": marker, "ms": 3.5, "mfc": "none"}
        axes.plot(range(1, len(curve) + 1), curve, markevery=max(1, len(curve) // 8), label=label, **look)
        shown.append(curve)
    if not any(shown):
        return None
    # The axis leaves out the first epochs: they are so low that the rest looks flat.
    settled = [value for curve in shown for value in curve[min(len(curve) - 1, max(1, len(curve) // 8)) :]]
    axes.set_ylim(bottom=min(settled) - 0.05 * (max(settled) - min(settled)) - 0.5)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{'test' if tested else 'validation'} accuracy, %")
    _legend(figure, axes, columns=2)
    many = any(len(cell.draws) > 1 for cell in cells)
    seeds = "students as mean and range over the seeds, guides of the first seed" if many else "one seed"
    return figure, f"learning curves{which}; {seeds}."


def _curve(stage: StageReport, tested: bool) -> list[float]:
    return [value for value in (stage.test_curve if tested else stage.val_curve) if value is not None]


def _guides(report: Report, cells: Sequence[CellResult]) -> Iterator[tuple[StageReport, str]]:
    """The guides of the first seed, each with its roles and the cells that use it."""
    places: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        for key, role in zip(cell.draws[0].chain[:-1], cell.roles, strict=False):
            places.setdefault(key, {}).setdefault(role, []).append(cell.label)
    for key, roles in places.items():
        told = "; ".join(f"{role} of {', '.join(labels)}" for role, labels in roles.items())
        yield report.stages[key], f"{report.stages[key].model}, {told}"


def _fidelity(report: Report, row: RowResult) -> _Figure:
    """How closely each student follows its guide."""
    cells = [cell for cell in row.cells if any(student.fidelity for student in report.students(cell))]
    if not cells:
        return None
    figure, (left, right) = _lines(cells, panels=2)
    for y, cell in enumerate(cells):
        known = [student.fidelity for student in report.students(cell) if student.fidelity]
        _dots(left, y, [found.agreement for found in known])
        _dots(right, y, [found.kl for found in known])
    for panel in (left, right):
        panel.xaxis.set_major_locator(MaxNLocator(3))  # more would print over each other
    left.set_xlabel("agreement, %")
    right.set_xlabel("KL(guide ‖ student), nats")
    return figure, (
        "fidelity of each student to its own guide, on the test images. Agreement is how often both choose the same "
        "class; KL is the mean divergence of their predictions at T 1."
    )


def _calibration(report: Report, row: RowResult) -> _Figure:
    """Accuracy over confidence."""
    cells, which = _few(report, row)
    figure, axes = _plain(3.2)
    axes.plot([0, 100], [0, 100], color="black", lw=0.8, ls=":")
    for cell, colour, marker in zip(cells, cycle(COLOURS), cycle(_MARKERS)):
        students = report.students(cell)
        bins = [(b.confidence or 0, b.accuracy or 0) for b in students[0].calibration.bins if b.count]
        label = f"{cell.label}: ECE {mean([student.calibration.ece for student in students]):.1f}"
        axes.plot(*zip(*bins, strict=True), color=colour, marker=marker, ms=4, lw=1, label=label)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    _legend(figure, axes)
    return figure, (
        f"calibration{which}: the first student of each cell, in 15 bins of the test images. ECE is the mean over the "
        "seeds. Above the dotted line a student is right more often than it expects."
    )


def _confusion(report: Report, row: RowResult) -> _Figure:
    """Which classes a student chooses, for each class that its guide chooses."""
    cells, which = _few(report, row)
    matrices = {cell.label: known for cell in cells if (known := report.students(cell)[0].confusion)}
    if not matrices:
        return None
    across = min(2, len(matrices))
    down = -(-len(matrices) // across)
    figure = Figure(figsize=(_WIDTH, 0.3 + 2.5 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(matrices) :]:
        panel.set_axis_off()
    for panel, (label, known) in zip(panels.flat, matrices.items(), strict=False):
        shares = [[count / max(1, sum(line)) for count in line] for line in known.matrix]
        panel.pcolormesh(shares, cmap="Greys", vmin=0, vmax=1)
        panel.grid(visible=False)
        panel.set_aspect("equal")
        panel.set_ylim(len(shares), 0)
        panel.set_title(f"{label}: {known.guide_only:.1f} %", fontsize=8)
        panel.set_xlabel("student's class", fontsize=8)
        panel.set_ylabel("guide's class", fontsize=8)
        panel.tick_params(labelsize=8)
    return figure, (
        f"confusion of student and guide{which}: the first student of each cell. A line shows which classes the "
        "student chooses where its guide chooses that class; black is always. The number is how often the guide is "
        "right and the student wrong."
    )


def _cost(report: Report, row: RowResult) -> _Figure:
    """Accuracy over the operations of all stages."""
    costs = [cell.flops for cell in row.cells]
    if min(costs) <= 0 or max(costs) < 1.05 * min(costs):
        return None  # nothing to compare
    figure, axes = _plain(3.0)
    named = [cell.label for cell in _few(report, row)[0]]
    for cell in sorted(row.cells, key=lambda cell: cell.label in named):  # the named ones are in front
        look: dict[str, Any] = {"color": "0.6", "marker": ".", "label": "other cells"}
        if cell.label in named:
            place = named.index(cell.label)
            look = {"color": COLOURS[place], "marker": _MARKERS[place], "label": cell.label}
        half = _half(cell.test_acc)
        axes.errorbar(cell.flops / 1e15, _average(report, cell), yerr=half, ls="none", **look)
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("PFLOP of all stages, for each seed")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], _HIGHEST))
    _legend(figure, axes)
    return figure, "test accuracy over cost. Operations are counted, as if no stage had been in the store."


_KINDS: dict[str, Callable[[Report, RowResult], _Figure]] = {
    "accuracy": _accuracy,
    "axis": _axis,
    "curves": _curves,
    "fidelity": _fidelity,
    "calibration": _calibration,
    "confusion": _confusion,
    "cost": _cost,
}


def _plain(height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, `height` inches high."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _lines(cells: Sequence[CellResult], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A line for each cell, in panels side by side."""
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.3 * len(cells)), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for panel in axes:
        panel.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(cells)), [cell.label for cell in cells])
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    return figure, axes


def _dots(axes: Axes, y: float, values: Sequence[float]) -> None:
    """A dot for each student of a line; equal ones lie apart."""
    apart = [y + 0.1 * (i - (len(values) - 1) / 2) for i in range(len(values))]
    axes.plot(values, apart, "o", color=_BLUE, ms=4, alpha=0.8, label="one student")


def _half(known: Spread | None) -> float | None:
    """Half of the 95 % interval; None if there is none."""
    return known.ci95[1] - known.mean if known else None


def _average(report: Report, cell: CellResult) -> float:
    """A cell's mean test accuracy in percent."""
    return mean([student.test_acc for student in report.students(cell)]) or 0.0


def _few(report: Report, row: RowResult) -> tuple[Sequence[CellResult], str]:
    """The cells whose curves are drawn, and a phrase that names them if they are not all."""
    if len(row.cells) <= _AT_ONCE:
        return row.cells, ""
    ranked = sorted(row.cells, key=lambda cell: _average(report, cell))
    chosen = {cell.label: cell for cell in (*(c for c in row.cells if c.label == row.baseline), ranked[-1], ranked[0])}
    return list(chosen.values()), f" of the baseline, the best and the worst of {len(row.cells)} cells"


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Every label once, above the axes."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns)
