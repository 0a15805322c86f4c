"""The report of a graph, read from the store."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version

from kd.core import hardware
from kd.core.files import commit
from kd.core.stage import Source, Stage, joined
from kd.core.statistics import paired
from kd.reporting.console import training
from kd.reporting.results import what_varied
from kd.store import Store, alarms_in
from kd.tools.inspection.measures import calibration, confusion, fidelity
from kd.tools.inspection.outputs import outputs
from kd.tools.paper.graph import Graph, PlannedCell, PlannedJob, PlannedRow, PlannedTable
from kd.tools.paper.report import CellResult, Draw, Report, RowResult, StageReport, TableResult, spread_of
from kd.tools.paper.request import Request, shown
from kd.tools.paper.tables import Published
from kd.training.workplace import Workplace

_LINE_EVERY = 10.0  # seconds
_LEGIBLE = 20  # a confusion matrix with more classes cannot be read on a page
Count = Callable[[Sequence[Stage]], float]  # the operations of training these stages


def gather(
    request: Request, command: str, graph: Graph, store: Store, failures: Mapping[str, str], count: Count
) -> Report:
    """Everything that the store has of a graph. Networks without cached test logits are run on the test images.

    Raises KnownError if the store cannot be read.
    """
    stages: dict[str, StageReport] = {}
    tables = [_Reader(table, store, stages, failures, count).table() for table in graph.tables]
    return Report(
        profile=request.name,
        title="; but changed by ".join(filter(None, [request.profile.title, " ".join(map(shown, request.overrides))])),
        command=command,
        commit=commit(),
        versions={"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "torchvision")}},
        machine=hardware.describe(),
        left_out=graph.left_out,
        seconds=_seconds(stages.values()),
        tables=tuple(tables),
        stages=stages,
    )


class _Reader:
    """Reads one table, and adds its stages to `stages`."""

    def __init__(
        self,
        planned: PlannedTable,
        store: Store,
        stages: dict[str, StageReport],
        failures: Mapping[str, str],
        count: Count,
    ) -> None:
        self._planned, self._store, self._stages = planned, store, stages
        self._failures, self._count = failures, count
        self._told = time.monotonic()
        self._job = next(iter(planned.rows[0].cells[0].jobs.values()))
        self._place = Workplace(store, self._job.config.data_root, self._job.config.runtime)

    def table(self) -> TableResult:
        table, job = self._planned.table, self._job
        return TableResult(
            id=table.id,
            title=table.title,
            paper=self._planned.paper,
            dataset=table.dataset,
            data=job.config.dataset.title,
            mode=job.config.mode,
            select=job.student.train.select,
            notes=table.notes,
            rows=tuple(map(self._row, self._planned.rows)),
        )

    def _row(self, planned: PlannedRow) -> RowResult:
        row = planned.row
        draws = {cell.cell.label: self._draws(cell) for cell in planned.cells}
        base = {seed: self._student(draw) for seed, draw in draws[row.baseline].items()}
        cells = [
            self._cell(
                cell,
                draws[cell.cell.label],
                {} if cell.cell.label == row.baseline else base,
                row.published.get(cell.cell.label),
            )
            for cell in planned.cells
        ]
        return RowResult(id=row.id, title=row.title, baseline=row.baseline, cells=tuple(cells))

    def _draws(self, planned: PlannedCell) -> dict[int, Draw]:
        there = {seed: job for seed, job in planned.jobs.items() if self._is_whole(job)}
        return {seed: Draw(seed=seed, chain=tuple(map(self._add, job.student.chain))) for seed, job in there.items()}

    def _is_whole(self, job: PlannedJob) -> bool:
        return all(self._store.whole(source.key) for source in job.student.chain)

    def _student(self, draw: Draw) -> StageReport:
        return self._stages[draw.chain[-1]]

    def _cell(
        self, planned: PlannedCell, draws: dict[int, Draw], base: dict[int, StageReport], published: Published | None
    ) -> CellResult:
        jobs = {seed: job.student for seed, job in planned.jobs.items()}
        students = {seed: self._student(draw) for seed, draw in draws.items()}
        both = sorted(students.keys() & base.keys())
        pairs = [[found[seed].test_acc for seed in both] for found in (students, base)]
        own = {source.key: source for seed in draws for source in jobs[seed].chain}
        trained = [source for source in own.values() if isinstance(source, Stage)]
        return CellResult(
            label=planned.cell.label,
            axis=planned.cell.axis,
            at=planned.cell.at,
            chain=joined(next(iter(jobs.values())).chain),
            command=planned.command,
            published=published,
            roles=tuple(source.role for source in next(iter(jobs.values())).chain),
            varied=what_varied([draw.chain for draw in draws.values()]),
            draws=tuple(draws.values()),
            missing={s: self._failures.get(stage.key, "not trained") for s, stage in jobs.items() if s not in draws},
            test_acc=spread_of([*students.values()], lambda student: student.test_acc),
            last=spread_of([*students.values()], lambda student: student.last),
            best_test=spread_of([*students.values()], lambda student: student.best_test),
            against=paired(*pairs) if len(both) > 1 else None,
            seconds=_seconds(self._stages[key] for key in own) / max(1, len(draws)),
            flops=self._count(trained) / max(1, len(draws)),
        )

    def _add(self, source: Source) -> str:
        """Add what the store has of the stage. Returns the stage's key."""
        if source.key not in self._stages:
            self._stages[source.key] = self._read(source)
            if time.monotonic() - self._told > _LINE_EVERY:
                self._told = time.monotonic()
                print(f"table {self._planned.table.id}: {len(self._stages)} stages read", flush=True)
        return source.key

    def _read(self, source: Source) -> StageReport:
        stage = source if isinstance(source, Stage) else None
        guide = stage.guide if stage else None
        metrics = self._store.metrics(source.key)
        tested = [row["test_acc"] for row in metrics if "test_acc" in row]
        labels = self._place.data(source).test_labels.cpu().numpy()
        logits = outputs(self._place, source)
        guided = outputs(self._place, guide) if guide else None
        few = source.dataset.num_classes <= _LEGIBLE
        return StageReport(
            key=source.key,
            model=source.model,
            seed=stage.seed if stage else None,
            guide=guide.key if guide else None,
            loss=stage.loss.described if stage else "given weights",
            training=training(stage.train) if stage else "",
            made_with=self._store.record(source.key)["made_with"],
            val_curve=tuple(row.get("val_acc") for row in metrics),
            test_curve=tuple(tested),
            fidelity=None if guided is None else fidelity(logits, guided),
            calibration=calibration(logits, labels),
            confusion=None if guided is None or not few else confusion(guide=guided, student=logits, labels=labels),
            alarms=alarms_in(metrics),
            **self._store.result(source.key).model_dump(),
        )


def _seconds(stages: Iterable[StageReport]) -> float:
    return round(sum(stage.seconds for stage in stages), 1)
