"""Cost and tables as people read them on a screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kd.paper.cost import Cost
from kd.paper.results import Report, mean
from kd.paper.train import describe
from kd.progress import console, duration
from kd.store import Store
from kd.tables import percent


def print_stages(costs: Sequence[Cost]) -> None:
    """Every stage, after those that it stands on: whether it is there, or what it will take."""
    for cost in costs:
        print(f"{describe(cost.stage)}: {'stored' if cost.stored else f'to train, {duration(cost.seconds)}'}")


def print_costs(costs: Sequence[Cost], store: Store) -> None:
    """What there is to train, summed over equal networks, and what that will take."""
    out = console()
    table = _table("role", "network", "guide", "data", "stored>", "to train>", "epochs>", "PFLOP>", "time>")
    alike = dict[tuple[str, ...], list[Cost]]()
    for cost in costs:
        stage = cost.stage
        guide = stage.guide.model if stage.guide else ""
        alike.setdefault((stage.role, stage.model, guide, stage.dataset.name), []).append(cost)
    for kind, members in alike.items():
        table.add_row(*kind, *_sums(members))
    table.add_section()
    table.add_row("all", "", "", "", *_sums(costs))
    out.print(table)
    missing = [cost for cost in costs if not cost.stored]
    out.print(
        f"{len(missing)} of {len(costs)} stages to train, about {duration(sum(cost.seconds for cost in missing))} on "
        f"this machine by a few measured steps of each network, not compiled; finished stages are in {store.root}",
        highlight=False,
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
    """Every row: published, ours, and the difference to the baseline."""
    out = console()
    out.print(report.title, style="bold")
    for table in report.tables:
        shown = _table(table.id, "", "published %>", "n>", "test %>", "to baseline>", "best on test %>")
        for row in table.rows:
            for cell in row.cells:
                against, students = cell.against, report.students(cell)
                shown.add_row(
                    row.id,
                    cell.label,
                    "n/a" if cell.published is None else f"{cell.published.value:g}, {cell.published.status}",
                    str(len(cell.draws)),
                    percent(mean([student.test_acc for student in students])),
                    f"{against.mean:+.2f} ({against.ci95[0]:+.2f} to {against.ci95[1]:+.2f})" if against else "",
                    percent(mean([student.best_test for student in students])),
                )
        out.print(f"{table.data}: {table.title}", highlight=False)
        out.print(shown)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading.removesuffix(">"), justify="right" if heading.endswith(">") else "left")
    return table
