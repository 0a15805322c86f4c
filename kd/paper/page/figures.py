"""The figures of a row: what its cells came to, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.paper.page.chains import chains
from kd.paper.page.svg import BROAD, COLOURS, DASHES, LINES, MARKERS, STYLE, WIDTH, draw, gid
from kd.paper.results import CellResult, Report, RowResult, Trained, mean
from kd.statistics import Spread

_MOST = 100.4  # percent of an axis, whatever an interval says
_AT_ONCE = 6  # cells whose learning curves are told apart by an eye


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


Made = tuple[Figure, str] | None


def _accuracies(report: Report, row: RowResult) -> Made:
    """Each student, mean and interval, and what was published."""
    figure, (axes,) = _rows(row.cells)
    for y, cell in enumerate(row.cells):
        _students(axes, cell, y, [student.test_acc for student in report.students(cell)], cell.test_acc)
        if cell.published and not cell.published.difference:
            axes.plot(cell.published.value, y, "D", color=COLOURS["red"], mfc="none", mew=1.5, label="published")
    axes.set_xlabel("test accuracy, %")
    axes.set_xlim(right=min(axes.get_xlim()[1], _MOST))
    _legend(figure, axes)
    many = "mean and 95 % interval of the mean; " if any(cell.test_acc for cell in row.cells) else ""
    return (
        figure,
        f"{row.title}: a dot a student; {many}diamonds are published numbers, of other data where the table says so.",
    )


def _axis(report: Report, row: RowResult) -> Made:
    """Accuracy over what the cells are points of, beside the baseline."""
    points = [cell for cell in row.cells if cell.axis is not None and cell.at is not None]
    if len(points) < 2:
        return None
    figure, axes = _axes(3.0)
    base = next((cell for cell in row.cells if cell.label == row.baseline), None)
    if base:
        value = _mean(report, base)
        axes.axhline(
            value, color=COLOURS["ink"], ls="--", lw=1, label=f"{base.label} (baseline)", gid=gid(base.students)
        )
        if base.test_acc:
            axes.axhspan(*base.test_acc.ci95, color=COLOURS["ink"], alpha=0.1, lw=0)
    at = [float(cell.at or 0) for cell in points]
    values = [_mean(report, cell) for cell in points]
    errors = [_half(cell.test_acc) for cell in points]
    axes.errorbar(
        at, values, yerr=errors, color=COLOURS["blue"], marker="o", capsize=3, lw=1.2, label="mean, 95 % interval"
    )
    axes.set_xlabel(str(points[0].axis))
    axes.set_xticks(at)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], _MOST))
    _legend(figure, axes)
    return figure, f"{row.title}: accuracy over {points[0].axis}; dashed, with its interval, is {row.baseline}."


def _curves(report: Report, row: RowResult) -> Made:
    """Accuracy over epochs: students with the seeds' band, and what stands above them."""
    cells, which = _few(report, row)
    tested = all(stage.test_curve for cell in cells for stage in _stages(report, cell))
    figure, axes = _axes(3.2)
    shown: list[list[float]] = []
    for cell, colour, dash in zip(cells, cycle(LINES), cycle(DASHES)):
        curves = [_curve(student, tested) for student in report.students(cell)]
        epochs = range(1, min(map(len, curves)) + 1)
        columns = list(zip(*curves, strict=False))
        middle = [sum(c) / len(c) for c in columns]
        axes.plot(epochs, middle, color=colour, ls=dash, lw=1.4, label=cell.label, gid=gid(cell.students))
        axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, lw=0)
        shown += curves
    above = {key: report.stages[key] for cell in cells for draw in cell.draws[:1] for key in draw.chain[:-1]}
    for stage, marker in zip(above.values(), cycle(MARKERS)):
        curve = _curve(stage, tested)
        axes.plot(
            range(1, len(curve) + 1), curve, color=COLOURS["ink"], lw=0.8, marker=marker, ms=3.5, mfc="none",
            markevery=max(1, len(curve) // 8), label=_above(stage), gid=gid([stage.key]),
        )  # fmt: skip
        shown.append(curve)
    if not any(shown):
        return None
    settled = [
        value for curve in shown for value in curve[len(curve) // 8 :]
    ]  # the first epochs would flatten the rest
    axes.set_ylim(bottom=min(settled) - 0.05 * (max(settled) - min(settled)) - 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{'test' if tested else 'validation'} accuracy, %")
    _legend(figure, axes, columns=2)
    return (
        figure,
        f"{row.title}: learning curves{which}; of students mean and range of the seeds, above them one seed.",
    )


def _fidelity(report: Report, row: RowResult) -> Made:
    """How far a student does as its guide does."""
    cells = [cell for cell in row.cells if any(student.fidelity for student in report.students(cell))]
    if not cells:
        return None
    figure, (left, right) = _rows(cells, panels=2)
    for y, cell in enumerate(cells):
        known = [student.fidelity for student in report.students(cell) if student.fidelity]
        _students(left, cell, y, [found.agreement for found in known], None)
        _students(right, cell, y, [found.kl for found in known], None)
    left.set_xlabel("agreement, %")
    right.set_xlabel("KL(guide ‖ student), nats")
    return figure, (
        f"{row.title}: fidelity on the test images, of each student to its own guide: how often both choose the same "
        "class, and the mean divergence of their predictions at T 1."
    )


def _calibration(report: Report, row: RowResult) -> Made:
    """Confidence beside accuracy."""
    cells, which = _few(report, row)
    figure, axes = _axes(3.2)
    axes.plot([0, 100], [0, 100], color=COLOURS["ink"], lw=0.8, ls=":")
    for cell, colour, marker in zip(cells, cycle(LINES), cycle(MARKERS)):
        students = report.students(cell)
        bins = [(b.confidence or 0, b.accuracy or 0) for b in students[0].calibration.bins if b.count]
        ece = mean([student.calibration.ece for student in students])
        axes.plot(
            *zip(*bins, strict=True),
            color=colour, marker=marker, ms=4, lw=1, label=f"{cell.label}: ECE {ece:.1f}", gid=gid(cell.students),
        )  # fmt: skip
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    _legend(figure, axes)
    return figure, (
        f"{row.title}: reliability{which}, in 15 bins of the test images, of one student a cell; ECE is the mean over "
        "the seeds. Above the dotted line a student is better than it believes."
    )


def _cost(report: Report, row: RowResult) -> Made:
    """Accuracy beside the operations of all stages."""
    if len(row.cells) < 2:
        return None
    figure, axes = _axes(3.0)
    for cell, colour, marker in zip(row.cells, cycle(LINES), cycle(MARKERS)):
        value = _mean(report, cell)
        axes.errorbar(
            cell.flops / 1e15,
            value,
            yerr=_half(cell.test_acc),
            color=colour,
            marker=marker,
            capsize=3,
            gid=gid(cell.students),
        )
        axes.annotate(cell.label, (cell.flops / 1e15, value), xytext=(6, 3), textcoords="offset points", fontsize=8)
    costs = [cell.flops for cell in row.cells]
    if min(costs) > 0 and max(costs) > 5 * min(costs):
        axes.set_xscale("log")
    axes.set_xlabel("PFLOP of all stages of all seeds, each stage once")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], _MOST))
    return figure, f"{row.title}: cost beside accuracy. Operations are counted, as if nothing had been there before."


_KINDS: dict[str, Callable[[Report, RowResult], Made]] = {
    "accuracy": _accuracies,
    "axis": _axis,
    "chains": chains,
    "curves": _curves,
    "fidelity": _fidelity,
    "calibration": _calibration,
    "cost": _cost,
}


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.6)
    return figure, axes


def _rows(cells: Sequence[CellResult], panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A line a cell, in panels side by side."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(cells)), layout="constrained")
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for panel in axes:
        panel.grid(axis="x", alpha=0.6)
    axes[0].set_yticks(range(len(cells)), [cell.label for cell in cells])
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    return figure, axes


def _students(axes: Axes, cell: CellResult, y: float, values: Sequence[float], known: Spread | None) -> None:
    """A line of dots, with the interval that is known of them."""
    apart = [y + 0.1 * (i - (len(values) - 1) / 2) for i in range(len(values))]  # equal ones stay visible
    axes.plot(values, apart, "o", color=COLOURS["blue"], ms=4, alpha=0.8, label="a student", gid=gid(cell.students))
    if known:
        axes.errorbar(
            known.mean,
            y,
            xerr=_half(known),
            fmt="|",
            color=COLOURS["ink"],
            ms=11,
            capsize=3,
            label="mean, 95 % interval",
        )


def _half(known: Spread | None) -> float:
    return known.ci95[1] - known.mean if known else 0.0


def _mean(report: Report, cell: CellResult) -> float:
    return mean([student.test_acc for student in report.students(cell)]) or 0.0


def _few(report: Report, row: RowResult) -> tuple[Sequence[CellResult], str]:
    """The cells whose curves are drawn, and which they are if not all."""
    if len(row.cells) <= _AT_ONCE:
        return row.cells, ""
    ranked = sorted(row.cells, key=lambda cell: _mean(report, cell))
    chosen = {cell.label: cell for cell in (*(c for c in row.cells if c.label == row.baseline), ranked[-1], ranked[0])}
    return list(chosen.values()), f" of the baseline, and of the best and the worst of {len(row.cells)} cells"


def _stages(report: Report, cell: CellResult) -> list[Trained]:
    return [stage for key in cell.keys if (stage := report.stages[key]).val_curve]  # given weights have no curve


def _curve(stage: Trained, tested: bool) -> list[float]:
    return [value for value in (stage.test_curve if tested else stage.val_curve) if value is not None]


def _above(stage: Trained) -> str:
    taught = stage.role if stage.guide is None else f"{stage.role}, taught"
    return f"{stage.model} ({taught})"


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
