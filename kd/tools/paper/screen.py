"""What `python -m kd.paper` prints: the cost, and the tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from kd.reporting.console import console, duration, narrow_table, percent
from kd.store import Store
from kd.tools.paper.cost import Cost
from kd.tools.paper.page import content
from kd.tools.paper.report import Report, mean
from kd.tools.paper.trainer import stage_line


def print_stages(costs: Sequence[Cost]) -> None:
    """Print every stage, after its guide: whether it is stored, or how long it will take."""
    for cost in costs:
        print(f"{stage_line(cost.stage)}: {'stored' if cost.stored else f'to train, {duration(cost.seconds)}'}")


def print_costs(costs: Sequence[Cost], store: Store) -> None:
    """Print what is to train, summed over equal networks, and how long it will take."""
    out = console()
    table = narrow_table("role", "network", "guide", "data", "stored>", "to train>", "epochs>", "PFLOP>", "time>")
    alike = dict[tuple[str, ...], list[Cost]]()
    for cost in costs:
        stage = cost.stage
        guide = " + ".join(guide.model for guide in stage.guides)
        alike.setdefault((stage.role, stage.model, guide, stage.dataset.name), []).append(cost)
    for kind, members in alike.items():
        table.add_row(*kind, *_sums(members))
    table.add_section()
    table.add_row("all", "", "", "", *_sums(costs))
    out.print(table)
    missing = [cost for cost in costs if not cost.stored]
    out.print(
        f"{len(missing)} of {len(costs)} stages to train, about {duration(sum(cost.seconds for cost in missing))} on "
        f"this machine, estimated from a few steps of each network; finished stages are in {store.root}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _sums(costs: Sequence[Cost]) -> tuple[str, ...]:
    missing = [cost for cost in costs if not cost.stored]
    epochs = sum(cost.stage.train.epochs for cost in missing)
    flops, seconds = sum(cost.flops for cost in missing), sum(cost.seconds for cost in missing)
    return (
        str(len(costs) - len(missing)),
        str(len(missing)),
        str(epochs),
        f"{flops / 1e15:.3g}",
        duration(seconds),
    )


def print_tables(report: Report) -> None:
    """Print every row: published numbers, our own, and the difference to the baseline."""
    out = console()
    out.print(report.title, style="bold", markup=False)
    for line in content.findings(report):
        out.print(line.replace("**", ""), highlight=False, markup=False, soft_wrap=not out.is_terminal)
    if told := content.of_two_seeds(report):
        out.print(told, highlight=False, markup=False, soft_wrap=not out.is_terminal)
    for table in report.tables:
        published = [f"published, {table.dataset} %>"] if any(map(content.has_published, table.rows)) else []
        difference = "difference to baseline, interval, p>"
        shown = narrow_table(table.id, "", "n>", "test %>", difference, *published, "best on test %>")
        for row in table.rows:
            for cell in row.cells:
                students = report.students(cell)
                shown.add_row(
                    escape(row.id),
                    escape(cell.label),
                    str(len(cell.draws)),
                    percent(mean([student.test_acc for student in students])),
                    content.difference_of(cell),
                    *([content.published_of(cell, row.baseline)] if published else []),
                    percent(mean([student.best_test for student in students])),
                )
        out.print(f"{table.data}: {table.title}", highlight=False, markup=False)
        out.print(shown)
