"""What became of the cells: tables.json, from the store alone, each number with the stages that it rests on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from kd import hardware
from kd.paper.plan import Graph, PlannedCell, PlannedRow, PlannedTable
from kd.paper.request import Request, shown
from kd.paper.tables import CONF, Published
from kd.spec import Frozen
from kd.stage import Role, Select, Stage
from kd.statistics import Paired, Spread, paired, spread
from kd.store import Store


class Trained(Frozen):
    """A stage of a chain; accuracies in percent."""

    key: str
    role: Role
    model: str
    seed: int | None  # null of given weights
    params: int
    val_acc: float | None
    test_acc: float  # of the kept weights
    epochs: int
    selected_epoch: int
    seconds: float  # that its training took, whenever that was
    made_with: dict[str, Any]


class Draw(Frozen):
    """A cell at one seed. The student's accuracies, in percent, all of one training.

    They are null where the test set was not read every epoch.
    """

    seed: int
    chain: tuple[Trained, ...]  # oldest first
    val_acc: float | None
    test_acc: float  # of the kept weights
    last: float | None  # test accuracy after the last epoch
    best_test: float | None  # the best of all epochs: the papers' protocol


class CellResult(Frozen):
    """A cell over its seeds; spreads are null where there are fewer than two draws."""

    label: str
    chain: str
    command: str
    published: Published | None
    varied: str  # what an interval is of
    draws: tuple[Draw, ...]
    missing: dict[int, str]  # seeds without a result: why
    test_acc: Spread | None
    last: Spread | None
    best_test: Spread | None
    against: Paired | None  # test_acc less the baseline's, over the seeds that both have
    seconds: float  # of all its stages, each once, whoever else uses them


class RowResult(Frozen):
    """Cells beside their baseline."""

    id: str
    title: str
    baseline: str
    cells: tuple[CellResult, ...]


class TableResult(Frozen):
    """A table, published and ours."""

    id: str
    title: str
    paper: str
    dataset: str  # the published numbers'
    data: str  # ours, as tables name it
    mode: str
    select: Select  # how our epochs are chosen
    notes: tuple[str, ...]
    rows: tuple[RowResult, ...]


class Report(Frozen):
    """tables.json."""

    profile: str
    title: str  # of the profile
    command: str
    commit: str | None  # of the code that wrote this; what trained a stage is in its `made_with`
    versions: dict[str, str]
    machine: str
    left_out: dict[str, str]
    seconds: float  # of all stages, each once
    tables: tuple[TableResult, ...]


def report(request: Request, command: str, graph: Graph, store: Store, failures: Mapping[str, str]) -> Report:
    """Everything that the store has of a graph. Raises KnownError where it cannot be read."""
    tables = [_table(table, store, failures, request.vary) for table in graph.tables]
    return Report(
        profile=request.name,
        title="; with ".join(filter(None, [request.profile.title, " ".join(map(shown, request.overrides))])),
        command=command,
        commit=_commit(),
        versions={"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "torchvision")}},
        machine=hardware.describe(),
        left_out=graph.left_out,
        seconds=_seconds([draw for t in tables for row in t.rows for cell in row.cells for draw in cell.draws]),
        tables=tuple(tables),
    )


def _table(planned: PlannedTable, store: Store, failures: Mapping[str, str], vary: str) -> TableResult:
    table, job = planned.table, next(iter(planned.rows[0].cells[0].jobs.values()))
    return TableResult(
        id=table.id,
        title=table.title,
        paper=planned.paper,
        dataset=table.dataset,
        data=job.config.dataset.title,
        mode=job.config.mode,
        select=job.student.train.select,
        notes=table.notes,
        rows=tuple(_row(row, store, failures, vary) for row in planned.rows),
    )


def _row(planned: PlannedRow, store: Store, failures: Mapping[str, str], vary: str) -> RowResult:
    row = planned.row
    draws = {cell.cell.label: _draws(cell, store) for cell in planned.cells}
    base = draws[row.baseline]
    cells = [
        _cell(cell, draws[cell.cell.label], None if cell.cell.label == row.baseline else base, failures, row.published)
        for cell in planned.cells
    ]
    return RowResult(id=row.id, title=row.title, baseline=row.baseline, cells=tuple(cells))


def _draws(planned: PlannedCell, store: Store) -> dict[int, Draw]:
    return {seed: _draw(seed, job.student, store) for seed, job in planned.jobs.items() if store.whole(job.student.key)}


def _draw(seed: int, student: Stage, store: Store) -> Draw:
    chain, curve = list[Trained](), [row.get("test_acc") for row in store.metrics(student.key)]
    read = [accuracy for accuracy in curve if accuracy is not None]
    for source in student.chain:
        result, record = store.result(source.key), store.record(source.key)
        drawn = source.seed if isinstance(source, Stage) else None
        chain.append(
            Trained(
                key=source.key,
                role=source.role,
                model=source.model,
                seed=drawn,
                made_with=record["made_with"],
                **result.model_dump(),
            )
        )
    own = chain[-1]
    return Draw(
        seed=seed,
        chain=tuple(chain),
        val_acc=own.val_acc,
        test_acc=own.test_acc,
        last=curve[-1],
        best_test=max(read, default=None),
    )


def _cell(
    planned: PlannedCell,
    draws: dict[int, Draw],
    base: dict[int, Draw] | None,
    failures: Mapping[str, str],
    published: Mapping[str, Published],
) -> CellResult:
    students = {seed: job.student for seed, job in planned.jobs.items()}
    both = sorted(draws.keys() & (base or {}).keys())
    pairs = [[found[seed].test_acc for seed in both] for found in (draws, base or {})]
    return CellResult(
        label=planned.cell.label,
        chain=" → ".join(source.model for source in next(iter(students.values())).chain),
        command=planned.command,
        published=published.get(planned.cell.label),
        varied=varied([[source.key for source in student.chain] for student in students.values()]),
        draws=tuple(draws.values()),
        missing={s: failures.get(student.key, "not trained") for s, student in students.items() if s not in draws},
        test_acc=_spread(draws.values(), lambda draw: draw.test_acc),
        last=_spread(draws.values(), lambda draw: draw.last),
        best_test=_spread(draws.values(), lambda draw: draw.best_test),
        against=paired(*pairs) if len(both) > 1 else None,
        seconds=_seconds(draws.values()),
    )


def varied(chains: Sequence[Sequence[str]]) -> str:
    """What differs between chains [draw, stage] of keys."""
    own = [len(set(keys)) == len(chains) for keys in zip(*chains, strict=True)]
    if len(chains) < 2:
        return "nothing: one seed"
    if all(own):
        return "the whole chain" if len(own) > 1 else "the student's seed, with nothing above it"
    return "the student's seed, over one chain" if own[-1] and not any(own[:-1]) else "a part of the chain"


def _spread(draws: Iterable[Draw], of: Callable[[Draw], float | None]) -> Spread | None:
    known = [value for draw in draws if (value := of(draw)) is not None]
    return spread(known) if len(known) > 1 else None


def _seconds(draws: Iterable[Draw]) -> float:
    stages = {stage.key: stage.seconds for draw in draws for stage in draw.chain}
    return round(sum(stages.values()), 1)


def _commit() -> str | None:
    """Of the checkout, `+` behind it where files differ; None where it is none."""
    asked = ["git", "-C", str(CONF), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
