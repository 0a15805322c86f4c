"""Figures of what a student is like beside its accuracy: fidelity, calibration, confusion with its guide."""

from __future__ import annotations

from itertools import cycle

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from kd.paper.page.axes import Made, dots, few, legend, lines, plain
from kd.paper.page.svg import COLOURS, LINES, MARKERS, WIDTH, gid
from kd.paper.results import Report, RowResult, mean

# Ink from transparent to full: of no colour that a dark page would take for its paper.
_SHARE = LinearSegmentedColormap.from_list("share", [(COLOURS["ink"], 0.0), (COLOURS["ink"], 1.0)])


def fidelity(report: Report, row: RowResult) -> Made:
    """How far a student does as its guide does."""
    cells = [cell for cell in row.cells if any(student.fidelity for student in report.students(cell))]
    if not cells:
        return None
    figure, (left, right) = lines(cells, panels=2)
    for y, cell in enumerate(cells):
        known = [student.fidelity for student in report.students(cell) if student.fidelity]
        dots(left, cell, y, [found.agreement for found in known], None)
        dots(right, cell, y, [found.kl for found in known], None)
    left.set_xlabel("agreement, %")
    right.set_xlabel("KL(guide ‖ student), nats")
    return figure, (
        f"{row.title}: fidelity on the test images, of each student to its own guide: how often both choose the same "
        "class, and the mean divergence of their predictions at T 1."
    )


def calibration(report: Report, row: RowResult) -> Made:
    """Confidence beside accuracy."""
    cells, which = few(report, row)
    figure, axes = plain(3.2)
    axes.plot([0, 100], [0, 100], color=COLOURS["ink"], lw=0.8, ls=":")
    for cell, colour, marker in zip(cells, cycle(LINES), cycle(MARKERS)):
        students = report.students(cell)
        bins = [(b.confidence or 0, b.accuracy or 0) for b in students[0].calibration.bins if b.count]
        ece = mean([student.calibration.ece for student in students])
        axes.plot(
            *zip(*bins, strict=True),
            color=colour, marker=marker, ms=4, lw=1, label=f"{cell.label}: ECE {ece:.1f}", gid=gid([students[0].key]),
        )  # fmt: skip
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    legend(figure, axes)
    return figure, (
        f"{row.title}: reliability{which}, in 15 bins of the test images, of one student a cell; ECE is the mean over "
        "the seeds. Above the dotted line a student is better than it believes."
    )


def confusions(report: Report, row: RowResult) -> Made:
    """Which classes a student chooses where its guide chooses others."""
    cells, which = few(report, row)
    students = {cell.label: student for cell in cells if (student := report.students(cell)[0]).confusion}
    if not students:
        return None
    across = min(2, len(students))
    down = -(-len(students) // across)
    figure = Figure(figsize=(WIDTH, 0.3 + 2.5 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (label, student) in zip(panels.flat, students.items(), strict=False):
        assert student.confusion is not None
        panel.set_axis_on()
        shares = [[count / max(1, sum(line)) for count in line] for line in student.confusion.matrix]
        panel.pcolormesh(shares, cmap=_SHARE, vmin=0, vmax=1, gid=gid([student.key]))
        panel.set_aspect("equal")
        panel.set_ylim(len(shares), 0)
        panel.set_title(f"{label}: {student.confusion.guide_only:.1f} %", fontsize=8)
        panel.set_xlabel("student's class", fontsize=8)
        panel.set_ylabel("guide's class", fontsize=8)
        panel.tick_params(labelsize=8)
    return figure, (
        f"{row.title}: confusion of student and guide{which}, one student a cell. A line is what the student chooses "
        "where the guide chooses that class, full strength being always; the number is how often the guide alone is "
        "right."
    )
