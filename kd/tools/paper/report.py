"""The results of all cells: tables.json, each number with the keys of its stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd.core.settings import Select
from kd.core.spec import Frozen
from kd.core.stage import Role
from kd.core.statistics import Paired, Spread, spread
from kd.datasets import DATASETS
from kd.tools.inspection.measures import Calibration, Confusion, Fidelity
from kd.tools.paper.tables import Published


class StageReport(Frozen):
    """A stage; accuracies in percent. Its curves have an entry per epoch."""

    key: str
    model: str
    seed: int | None  # null for given weights
    guide: str | None
    loss: str  # its name and parameters
    training: str  # its training settings; "" for given weights
    params: int
    val_acc: float | None
    test_acc: float  # of the kept weights
    epochs: int
    selected_epoch: int
    seconds: float  # of its training, in this run or an earlier one
    made_with: dict[str, Any]
    val_curve: tuple[float | None, ...]
    test_curve: tuple[float | None, ...]
    fidelity: Fidelity | None  # to its guide, on the test images
    calibration: Calibration
    confusion: Confusion | None  # with its guide; null if there are too many classes to show
    alarms: tuple[str, ...] = ()  # what looked wrong while it was trained; none in reports of earlier versions

    @property
    def last(self) -> float | None:
        """Test accuracy after the last epoch; None without a test curve."""
        return self.test_curve[-1] if self.test_curve else None

    @property
    def best_test(self) -> float | None:
        """The best test accuracy of all epochs, the papers' protocol; None without a test curve."""
        return max((value for value in self.test_curve if value is not None), default=None)


class Draw(Frozen):
    """A cell at one seed: the keys of its chain, in the order of training."""

    seed: int
    chain: tuple[str, ...]


class CellResult(Frozen):
    """A cell over its seeds. Spreads are null for fewer than two draws."""

    label: str
    axis: str | None  # the setting in which it differs from other cells of its row: T, λ, the assistant's size
    at: float | None  # its value of that setting
    chain: str
    roles: tuple[Role, ...]  # along the chain
    command: str
    published: Published | None
    varied: str  # what varies between the seeds of an interval
    draws: tuple[Draw, ...]
    missing: dict[int, str]  # seeds without a result, with the reason
    test_acc: Spread | None
    last: Spread | None
    best_test: Spread | None
    against: Paired | None  # test_acc minus the baseline's, over the seeds that both have
    seconds: float  # of all its stages, also those that other cells use; divided by the number of seeds
    flops: float  # the same in floating-point operations, counted and not measured

    @property
    def students(self) -> tuple[str, ...]:
        """The keys of the students."""
        return tuple(draw.chain[-1] for draw in self.draws)

    @property
    def published_accuracy(self) -> float | None:
        """The published accuracy in percent; None if a difference or nothing was published."""
        return self.published.value if self.published and not self.published.difference else None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all its stages."""
        return tuple(dict.fromkeys(key for draw in self.draws for key in draw.chain))


class RowResult(Frozen):
    """The cells of a row, which are compared with its baseline."""

    id: str
    title: str
    baseline: str
    cells: tuple[CellResult, ...]


class TableResult(Frozen):
    """A table, with the published numbers and our own."""

    id: str
    title: str
    paper: str | None
    dataset: str  # of the published numbers
    data: str  # of our numbers, as tables name it
    mode: str
    select: Select  # how our epochs are chosen
    notes: tuple[str, ...]
    rows: tuple[RowResult, ...]

    @property
    def elsewhere(self) -> bool:
        """Whether our numbers are of another data set that has a name, and not of a copy: digits, in smoke."""
        return self.data != self.dataset and self.data in DATASETS


class Report(Frozen):
    """tables.json."""

    profile: str
    title: str  # of the profile, with what was overridden
    command: str
    commit: str | None  # of the code that wrote this; the commit that trained a stage is in its `made_with`
    versions: dict[str, str]
    machine: str
    left_out: dict[str, str]
    seconds: float  # of all stages, each once
    tables: tuple[TableResult, ...]
    stages: dict[str, StageReport]  # by key

    def roles(self, key: str) -> list[Role]:
        """The roles of a stage. It may be the student of one cell and the reference of another."""
        cells = (cell for table in self.tables for row in table.rows for cell in row.cells)
        places = ((cell, draw.chain.index(key)) for cell in cells for draw in cell.draws if key in draw.chain)
        return list(dict.fromkeys(cell.roles[place] for cell, place in places))

    def students(self, cell: CellResult) -> list[StageReport]:
        """The students of a cell, one per seed."""
        return [self.stages[key] for key in cell.students]


def mean(values: list[float | None]) -> float | None:
    """The mean of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread_of(students: list[StageReport], of: Callable[[StageReport], float | None]) -> Spread | None:
    """The spread over the students with a known value; None for fewer than two."""
    known = [value for student in students if (value := of(student)) is not None]
    return spread(known) if len(known) > 1 else None
