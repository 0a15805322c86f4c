"""Figures of accuracy: of the cells, over a setting, over epochs, beside the cost."""

from __future__ import annotations

from itertools import cycle

from kd.paper.page.axes import MOST, Made, average, dots, few, half, legend, lines, plain
from kd.paper.page.svg import COLOURS, DASHES, LINES, MARKERS, gid
from kd.paper.results import CellResult, Report, RowResult, Trained


def accuracies(report: Report, row: RowResult) -> Made:
    """Each student, mean and interval, and what was published."""
    figure, (axes,) = lines(row.cells)
    for y, cell in enumerate(row.cells):
        dots(axes, cell, y, [student.test_acc for student in report.students(cell)], cell.test_acc)
        if cell.published and not cell.published.difference:
            axes.plot(cell.published.value, y, "D", color=COLOURS["red"], mfc="none", mew=1.5, label="published")
    axes.set_xlabel("test accuracy, %")
    axes.set_xlim(right=min(axes.get_xlim()[1], MOST))
    legend(figure, axes)
    many = "mean and 95 % interval of the mean; " if any(cell.test_acc for cell in row.cells) else ""
    return (
        figure,
        f"{row.title}: a dot a student; {many}diamonds are published numbers, of other data where the table says so.",
    )


def over_axis(report: Report, row: RowResult) -> Made:
    """Accuracy over what the cells are points of, beside the baseline."""
    points = [cell for cell in row.cells if cell.axis is not None and cell.at is not None]
    if len(points) < 2:
        return None
    figure, axes = plain(3.0)
    base = next((cell for cell in row.cells if cell.label == row.baseline), None)
    if base:
        value = average(report, base)
        axes.axhline(
            value, color=COLOURS["ink"], ls="--", lw=1, label=f"{base.label} (baseline)", gid=gid(base.students)
        )
        if base.test_acc:
            axes.axhspan(*base.test_acc.ci95, color=COLOURS["ink"], alpha=0.1, lw=0)
    at = [float(cell.at or 0) for cell in points]
    values = [average(report, cell) for cell in points]
    errors = [half(cell.test_acc) for cell in points]
    axes.errorbar(
        at, values, yerr=errors, color=COLOURS["blue"], marker="o", capsize=3, lw=1.2, label="mean, 95 % interval"
    )
    axes.set_xlabel(str(points[0].axis))
    axes.set_xticks(at)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], MOST))
    legend(figure, axes)
    return figure, f"{row.title}: accuracy over {points[0].axis}; dashed, with its interval, is {row.baseline}."


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
    # The first epochs would flatten the rest.
    settled = [value for curve in shown for value in curve[min(len(curve) - 1, max(1, len(curve) // 8)) :]]
    axes.set_ylim(bottom=min(settled) - 0.05 * (max(settled) - min(settled)) - 0.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{'test' if tested else 'validation'} accuracy, %")
    legend(figure, axes, columns=2)
    return (
        figure,
        f"{row.title}: learning curves{which}; of students mean and range of the seeds, above them one seed.",
    )


def cost(report: Report, row: RowResult) -> Made:
    """Accuracy beside the operations of all stages."""
    if len(row.cells) < 2:
        return None
    figure, axes = plain(3.0)
    for cell, colour, marker in zip(row.cells, cycle(LINES), cycle(MARKERS)):
        value = average(report, cell)
        axes.errorbar(
            cell.flops / 1e15,
            value,
            yerr=half(cell.test_acc),
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
    axes.set_ylim(top=min(axes.get_ylim()[1], MOST))
    return figure, f"{row.title}: cost beside accuracy. Operations are counted, as if nothing had been there before."


def _stages(report: Report, cell: CellResult) -> list[Trained]:
    return [stage for key in cell.keys if (stage := report.stages[key]).val_curve]  # given weights have no curve


def _curve(stage: Trained, tested: bool) -> list[float]:
    return [value for value in (stage.test_curve if tested else stage.val_curve) if value is not None]


def _above(stage: Trained) -> str:
    taught = stage.role if stage.guide is None else f"{stage.role}, taught"
    return f"{stage.model} ({taught})"
