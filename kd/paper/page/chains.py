"""The chains of a row as one graph: a box a stage, an arrow from each guide to what it taught."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.figure import Figure

from kd.paper.page.svg import COLOURS, WIDTH, gid
from kd.paper.results import Report, RowResult, mean

_COLUMN, _LINE = 1.45, 0.55  # inches
_LETTER = 0.058  # of a column


@dataclass
class _Node:
    """A place in a chain: the stages there, one a seed or the same one for all."""

    model: str
    keys: list[str]
    labels: list[str] = field(default_factory=list)  # of the cells that end here
    children: list[_Node] = field(default_factory=list)
    x: int = 0
    y: float = 0.0


def chains(report: Report, row: RowResult) -> tuple[Figure, str]:
    """Chains that begin alike share their boxes. A box has the mean test accuracy over the seeds, in percent."""
    roots = _trees(report, row)
    lines = _place(roots, 0, 0)
    nodes = list(_walk(roots))
    columns = 1 + max(node.x for node in nodes)
    longest = max(len(", ".join(node.labels)) - 4 * (columns - 1 - node.x) for node in nodes)
    beyond = max(0.2, _LETTER * longest - 0.1)  # columns that the last labels take
    width = max(WIDTH, _COLUMN * (columns + beyond + 0.1))
    figure = Figure(figsize=(width, 0.3 + _LINE * lines))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-0.55, columns - 0.45 + beyond)
    axes.set_ylim(lines - 0.4, -0.6)
    for node in nodes:
        accuracy = mean([report.stages[key].test_acc for key in node.keys])
        axes.text(
            node.x, node.y, f"{node.model}\n{accuracy:.2f}", ha="center", va="center", fontsize=8, gid=gid(node.keys),
            bbox={"boxstyle": "round,pad=0.35", "fc": COLOURS["paper"], "ec": COLOURS["blue"], "lw": 1.2},
        )  # fmt: skip
        if node.labels:  # beside the box, or off the arrows of a student that was the reference too
            place = (node.x + 0.42, node.y) if not node.children else (node.x - 0.34, node.y + 0.45)
            axes.text(*place, ", ".join(node.labels), va="center", fontsize=8)
        for child in node.children:
            axes.annotate(
                "", (child.x - 0.36, child.y), (node.x + 0.36, node.y),
                arrowprops={"arrowstyle": "->", "color": COLOURS["ink"], "lw": 1},
            )  # fmt: skip
    return (
        figure,
        f"{row.title}: the chains, oldest network first, with mean test accuracies in percent.",
    )


def _trees(report: Report, row: RowResult) -> list[_Node]:
    """Cells share a box where they plan the same stages at every seed."""
    roots: list[_Node] = []
    found: dict[tuple[str, ...], _Node] = {}
    for cell in row.cells:
        siblings = roots
        for planned in zip(*cell.planned, strict=True):
            if planned not in found:
                there = [key for key in dict.fromkeys(planned) if key in report.stages]
                found[planned] = _Node(report.stages[there[0]].model, there)
                siblings.append(found[planned])
            node = found[planned]
            siblings = node.children
        node.labels.append(cell.label)
    return roots


def _place(nodes: list[_Node], x: int, line: int) -> int:
    """Leaves on lines of their own, what is above them in their middle; returns the next free line."""
    for node in nodes:
        node.x = x
        end = _place(node.children, x + 1, line)
        if node.children:
            node.y = (node.children[0].y + node.children[-1].y) / 2
        else:
            node.y, end = line, line + 1
        line = end
    return line


def _walk(nodes: list[_Node]) -> list[_Node]:
    return [found for node in nodes for found in (node, *_walk(node.children))]
