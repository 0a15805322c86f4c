"""Figures of accuracy: of the cells, over a setting, over epochs, beside the cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from kd.paper.page.axes import MOST, Made, average, dots, few, half, legend, lines, plain
from kd.paper.page.svg import COLOURS, DASHES, LINES, MARKERS, gid
from kd.paper.results import CellResult, Report, RowResult, Trained


def accuracies(report: Report, row: RowResult) -> Made:
    """Each student, mean and interval, and what was published."""
    figure, (axes,) = lines(row.cells)
    for y, cell in enumerate(row.cells):
        dots(axes, cell, y, [student.test_acc for student in report.students(cell)], cell.test_acc)
        if cell.published_accuracy:
            axes.plot(cell.published_accuracy, y, "D", color=COLOURS["red"], mfc="none", mew=1.5, label="published")
    axes.set_xlabel("test accuracy, %")
    axes.set_xlim(right=min(axes.get_xlim()[1], MOST))
    legend(figure, axes)
    told = ["a dot a student"]
    told += ["mean and 95 % interval of the mean"] if any(cell.test_acc for cell in row.cells) else []
    told += (
        ["diamonds are the published numbers"]
        if any(c.published and not c.published.difference for c in row.cells)
        else []
    )
    return figure, f"{row.title}: {'; '.join(told)}."


def over_axis(report: Report, row: RowResult) -> Made:
    """Accuracy over what the cells are points of, beside the baseline."""
    points = [(cell.at, cell) for cell in row.cells if cell.axis is not None and cell.at is not None]
    if len(points) < 2:
        return None
    figure, axes = plain(3.0)
    base = next((cell for cell in row.cells if cell.label == row.baseline), None)
    if base:
        look: dict[str, Any] = {"color": COLOURS["ink"], "ls": "--", "lw": 1, "gid": gid(base.students)}
        axes.axhline(average(report, base), label=f"{base.label} (baseline)", **look)
        if base.test_acc:
            axes.axhspan(*base.test_acc.ci95, color=COLOURS["ink"], alpha=0.1, lw=0)
    axes.plot([at for at, _ in points], [average(report, cell) for _, cell in points], color=COLOURS["blue"], lw=1.2)
    for at, cell in points:
        error, label = half(cell.test_acc), "mean, 95 % interval" if cell.test_acc else "one student"
        look = {"color": COLOURS["blue"], "marker": "o", "capsize": 3, "gid": gid(cell.students)}
        axes.errorbar(at, average(report, cell), yerr=error, label=label, **look)
    name = str(points[0][1].axis)
    axes.set_xlabel(name)
    axes.set_xticks([at for at, _ in points])
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], MOST))
    legend(figure, axes)
    return figure, f"{row.title}: accuracy over {name}" + (f"; dashed is {row.baseline}." if base else ".")


def curves(report: Report, row: RowResult) -> Made:
    """Accuracy over epochs: students with the seeds' band, and what stands above them."""
    cells, which = few(report, row)
    tested = all(stage.test_curve for cell in cells for stage in _stages(report, cell))
    figure, axes = plain(3.2)
    shown: list[list[float]] = []
    for cell, colour, dash in zip(cells, cycle(LINES), cycle(DASHES)):
        drawn = [_curve(student, tested) for student in report.students(cell)]
        epochs = range(1, min(map(len, drawn)) + 1)
        columns = list(zip(*drawn, strict=False))
        middle = [sum(c) / len(c) for c in columns]
        axes.plot(epochs, middle, color=colour, ls=dash, lw=1.4, label=cell.label, gid=gid(cell.students))
        axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, lw=0)
        shown += drawn
    for (stage, label), marker in zip(_above(report, cells), cycle(MARKERS)):
        curve = _curve(stage, tested)
        axes.plot(
            range(1, len(curve) + 1), curve, color=COLOURS["ink"], lw=0.8, marker=marker, ms=3.5, mfc="none",
            markevery=max(1, len(curve) // 8), label=label, gid=gid([stage.key]),
        )  # fmt: skip
        shown.append(curve)
    if not any(shown):
        return None
    # The first epochs would flatten the rest.
    settled = [value for curve in shown for value in curve[min(len(curve) - 1, max(1, len(curve) // 8)) :]]
    axes.set_ylim(bottom=min(settled) - 0.05 * (max(settled) - min(settled)) - 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{'test' if tested else 'validation'} accuracy, %")
    legend(figure, axes, columns=2)
    of = "mean and range of the seeds" if any(len(cell.draws) > 1 for cell in cells) else "one seed"
    return figure, f"{row.title}: learning curves{which}; of students {of}, of what is above them the first seed."


def cost(report: Report, row: RowResult) -> Made:
    """Accuracy beside the operations of all stages."""
    costs = [cell.flops for cell in row.cells]
    if min(costs) <= 0 or max(costs) < 1.05 * min(costs):
        return None  # nothing to weigh
    figure, axes = plain(3.0)
    named = {cell.label for cell in few(report, row)[0]}
    for cell, colour, marker in zip(row.cells, cycle(LINES), cycle(MARKERS)):
        at = cell.flops / 1e15, average(report, cell)
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "gid": gid(cell.keys)}
        axes.errorbar(*at, yerr=half(cell.test_acc), **look)
        if cell.label in named:
            axes.annotate(cell.label, at, xytext=(6, 3), textcoords="offset points", fontsize=8)
    if max(costs) > 5 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("PFLOP of all stages, for each seed")
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], MOST))
    return figure, f"{row.title}: cost beside accuracy. Operations are counted, as if nothing had been there before."


def _stages(report: Report, cell: CellResult) -> list[Trained]:
    return [stage for key in cell.keys if (stage := report.stages[key]).val_curve]  # given weights have no curve


def _curve(stage: Trained, tested: bool) -> list[float]:
    return [value for value in (stage.test_curve if tested else stage.val_curve) if value is not None]


def _above(report: Report, cells: Sequence[CellResult]) -> list[tuple[Trained, str]]:
    """What stands above the students of the first seed, each with its role, and in which cells."""
    places: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        for key, role in zip(cell.draws[0].chain[:-1], cell.roles, strict=False):
            places.setdefault(key, {}).setdefault(role, []).append(cell.label)
    told = {
        key: "; ".join(f"{role} of {', '.join(labels)}" for role, labels in roles.items())
        for key, roles in places.items()
    }
    return [(report.stages[key], f"{report.stages[key].model}, {roles}") for key, roles in told.items()]
