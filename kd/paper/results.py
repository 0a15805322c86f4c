"""What became of the cells: tables.json, each number with the keys of the stages that it rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kd.inspection.measures import Calibration, Confusion, Fidelity
from kd.paper.tables import Published
from kd.spec import Frozen
from kd.stage import Role, Select
from kd.statistics import Paired, Spread, spread


class Trained(Frozen):
    """A stage; accuracies in percent. Its curves have an entry an epoch."""

    key: str
    model: str
    seed: int | None  # null of given weights
    guide: str | None
    loss: str  # its name and parameters
    training: str  # how it was optimised; "" of given weights
    params: int
    val_acc: float | None
    test_acc: float  # of the kept weights
    epochs: int
    selected_epoch: int
    seconds: float  # that its training took, whenever that was
    made_with: dict[str, Any]
    val_curve: tuple[float | None, ...]
    test_curve: tuple[float | None, ...]
    fidelity: Fidelity | None  # to its guide, on the test images
    calibration: Calibration
    confusion: Confusion | None  # with its guide, of classes few enough to be looked at

    @property
    def last(self) -> float | None:
        """Test accuracy after the last epoch, where the test set was read every epoch."""
        return self.test_curve[-1] if self.test_curve else None

    @property
    def best_test(self) -> float | None:
        """The best of all epochs on the test set, the papers' protocol, where it was read every epoch."""
        return max((value for value in self.test_curve if value is not None), default=None)


class Draw(Frozen):
    """A cell at one seed: the stages of its chain, oldest first, by their keys."""

    seed: int
    chain: tuple[str, ...]


class CellResult(Frozen):
    """A cell over its seeds; spreads are null where there are fewer than two draws."""

    label: str
    axis: str | None  # what it is a point of, with others of its row: T, λ, the assistant's size
    at: float | None  # where on it
    chain: str
    roles: tuple[Role, ...]  # along the chain
    command: str
    published: Published | None
    varied: str  # what an interval is of
    planned: tuple[tuple[str, ...], ...]  # keys [seed, stage], whether they are there or not
    draws: tuple[Draw, ...]
    missing: dict[int, str]  # seeds without a result: why
    test_acc: Spread | None
    last: Spread | None
    best_test: Spread | None
    against: Paired | None  # test_acc less the baseline's, over the seeds that both have
    seconds: float  # of all its stages, each once, whoever else uses them; divided by the seeds
    flops: float  # the same in floating-point operations, counted and not measured

    @property
    def students(self) -> tuple[str, ...]:
        """Their keys."""
        return tuple(draw.chain[-1] for draw in self.draws)

    @property
    def published_accuracy(self) -> float | None:
        """In percent, where what was published is no difference."""
        return self.published.value if self.published and not self.published.difference else None

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all its stages."""
        return tuple(dict.fromkeys(key for draw in self.draws for key in draw.chain))


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
    paper: str | None
    dataset: str  # the published numbers'
    data: str  # ours, as tables name it
    mode: str
    select: Select  # how our epochs are chosen
    notes: tuple[str, ...]
    rows: tuple[RowResult, ...]


class Report(Frozen):
    """tables.json."""

    profile: str
    title: str  # of the profile, with what was overridden
    command: str
    commit: str | None  # of the code that wrote this; what trained a stage is in its `made_with`
    versions: dict[str, str]
    machine: str
    left_out: dict[str, str]
    seconds: float  # of all stages, each once
    tables: tuple[TableResult, ...]
    stages: dict[str, Trained]  # by key

    def roles(self, key: str) -> list[Role]:
        """A stage's, which may be one cell's student and another's reference."""
        cells = (cell for table in self.tables for row in table.rows for cell in row.cells)
        places = ((cell, draw.chain.index(key)) for cell in cells for draw in cell.draws if key in draw.chain)
        return list(dict.fromkeys(cell.roles[place] for cell, place in places))

    def students(self, cell: CellResult) -> list[Trained]:
        """A cell's, a seed each."""
        return [self.stages[key] for key in cell.students]


def mean(values: list[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def spread_of(students: list[Trained], of: Callable[[Trained], float | None]) -> Spread | None:
    """Over the students of whom it is known, where they are two or more."""
    known = [value for student in students if (value := of(student)) is not None]
    return spread(known) if len(known) > 1 else None
