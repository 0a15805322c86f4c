"""The tables as data: what each cell trains, what was published for it, and how reliable that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from kd.app.experiments import PAPERS, Declaration, Experiment, Name, experiments, read_yaml
from kd.core.spec import Frozen, KnownError, explain
from kd.models import MODELS, NetworkName

Status = Literal[
    "verified",
    "quoted at second hand",
    "recalled from the paper, not read again",
    "by the author in an issue",
    "by the author in an issue, rounded",
    "claimed, in no table that could be verified",
    "last epoch",
    "epoch not stated",
    "epoch not stated, probably the best on the test set",
    "epoch not stated, by its logs near the last",
    "epoch not stated, by its logs near the best on the test set",
]


class Published(Frozen):
    """A published test accuracy in percent, and its source."""

    value: float
    difference: bool = False  # the value is a difference to the row's baseline
    status: Status
    source: str = Field(min_length=1)


class Cell(Frozen):
    """One setting: its name in the table, and the overrides that make it."""

    label: str = Field(min_length=1)
    overrides: tuple[str, ...] = ()
    axis: str | None = None  # the setting in which it differs from other cells of its row
    at: float | None = None

    def cells(self, row: Row) -> list[Cell]:
        """This cell."""
        return [self]


class Paths(Frozen):
    """A cell for every path from the row's teacher to its student through some of the networks."""

    every: Literal["path"]
    through: tuple[NetworkName, ...] = Field(min_length=1)  # largest first
    assistants: int | None = Field(None, ge=0)  # the number of assistants in a path; null: any number

    def cells(self, row: Row) -> list[Cell]:
        """The cells of all paths between the row's teacher and student."""
        lengths = range(len(self.through) + 1) if self.assistants is None else [self.assistants]
        return [self._cell(row, path) for length in lengths for path in combinations(self.through, length)]

    def _cell(self, row: Row, path: Sequence[str]) -> Cell:
        label = "→".join(str(MODELS[name].depth) for name in (row.teacher, *path, row.student) if name)
        if not path:
            return Cell(label=label, overrides=("method=kd",))
        assisted = "method=ta", f"method.assistants=[{','.join(path)}]"
        if self.assistants != 1:
            return Cell(label=label, overrides=assisted)
        return Cell(label=label, overrides=assisted, axis="depth of the assistant", at=MODELS[path[0]].depth)


class Settings(Frozen):
    """A cell for every value of a key."""

    every: Literal["setting"]
    key: str = Field(pattern=r"^\w+(\.\w+)+$")
    values: tuple[float, ...] = Field(min_length=1)
    overrides: tuple[str, ...] = ()

    def cells(self, row: Row) -> list[Cell]:
        """The cells, which are the same for every row."""
        name = self.key.rpartition(".")[2].replace("lambda", "λ")
        return [
            Cell(label=f"{name} {v:g}", overrides=(*self.overrides, f"{self.key}={v:g}"), axis=name, at=v)
            for v in self.values
        ]


def _kind(value: Any) -> str:
    return str(value.get("every", "one") if isinstance(value, dict) else getattr(value, "every", "one"))


CellOrMany = Annotated[
    Annotated[Cell, Tag("one")] | Annotated[Paths, Tag("path")] | Annotated[Settings, Tag("setting")],
    Discriminator(_kind),
]


class Row(Frozen):
    """Cells over the same seeds. Each is compared with the `baseline`."""

    id: Name
    title: str
    teacher: NetworkName | None = None
    student: NetworkName | None = None
    baseline: str
    cells: tuple[CellOrMany, ...] = Field(min_length=1)
    published: dict[str, Published] = Field({})  # by the cells' labels

    @property
    def expanded(self) -> list[Cell]:
        """All cells, each with the row's networks in front of its own overrides."""
        ends = (("teacher", self.teacher), ("model", self.student))
        networks = tuple(f"{group}={name}" for group, name in ends if name)
        cells = [cell for member in self.cells for cell in member.cells(self)]
        return [cell.model_copy(update={"overrides": (*networks, *cell.overrides)}) for cell in cells]

    @model_validator(mode="after")
    def _fits_together(self) -> Row:
        if any(isinstance(cell, Paths) for cell in self.cells) and not (self.teacher and self.student):
            raise ValueError(f"row {self.id}: paths need a teacher and a student")
        labels = [cell.label for cell in self.expanded]
        if len(set(labels)) < len(labels):
            raise ValueError(f"row {self.id}: two cells have the same label (got {', '.join(labels)})")
        if unknown := {self.baseline, *self.published} - set(labels):
            raise ValueError(f"row {self.id}: has no cell {' or '.join(sorted(unknown))}, but {', '.join(labels)}")
        return self


class ReportedRows(Frozen):
    """What one source published for some rows: numbers by the row's id and the cell's label."""

    source: str = Field(min_length=1)
    status: Status
    rows: dict[Name, dict[str, float]]


class Pairs(Frozen):
    """A row for every pair of teacher and student in a group's experiments: the student alone, and each teacher."""

    every: Literal["pair"]
    group: Name
    published: dict[str, Published] = Field({})  # by the cells' labels, for the rows that have them
    reported: tuple[ReportedRows, ...] = ()

    def rows(self, dataset: str) -> list[Row]:
        """The rows for this data set, in the order of the experiments."""
        declared = [e for e in experiments().values() if (e.group, e.dataset) == (self.group, dataset)]
        pairs = dict.fromkeys((e.chain, e.networks) for e in declared if len(e.chain) == 2)
        rows = [self._row(names, [e for e in declared if e.chain in (chain, chain[1:])]) for chain, names in pairs]
        if unknown := {name for each in self.reported for name in each.rows} - {row.id for row in rows}:
            raise ValueError(f"reported: there is no row {' or '.join(sorted(unknown))}")
        return rows

    def _row(self, networks: tuple[str, ...], own: list[Experiment]) -> Row:
        named = {e.kind if len(e.chain) == 2 else "alone": e.name for e in own}
        name = "_".join(networks)
        found = [(each, *number) for each in self.reported for number in each.rows.get(name, {}).items()]
        if len({label for _, label, _ in found}) < len(found):
            raise ValueError(f"reported: two sources have a number of the same cell of {name}")
        reported = {label: Published(value=v, status=each.status, source=each.source) for each, label, v in found}
        return Row(
            id=name,
            title=" → ".join(networks),
            baseline="normal",
            cells=tuple(Cell(label=label, overrides=(f"experiment={name}",)) for label, name in named.items()),
            published=reported | {label: each for label, each in self.published.items() if label in named},
        )


class GridCell(Cell):
    """A cell that stands in every row of a grid, with more overrides in some rows."""

    pairs: dict[Name, tuple[str, ...]] = Field({})  # by the rows' ids

    def of(self, row: str) -> Cell:
        """This cell in one row."""
        return Cell(label=self.label, overrides=(*self.overrides, *self.pairs.get(row, ())))


class Reported(Frozen):
    """What one source published for a grid: for each cell one number for each pair, or null."""

    source: str = Field(min_length=1)
    status: Status
    values: dict[str, tuple[float | None, ...]]  # by the cells' labels


class PairGrid(Frozen):
    """A row for every pair of teacher and student, with the same cells in all of them."""

    every: Literal["grid"]
    pairs: tuple[tuple[NetworkName, NetworkName], ...] = Field(min_length=1)
    baseline: str
    cells: tuple[GridCell, ...] = Field(min_length=1)
    published: tuple[Reported, ...] = ()

    @property
    def ids(self) -> list[str]:
        """The rows' ids, in the order of the pairs."""
        return ["_".join(pair) for pair in self.pairs]

    def rows(self, dataset: str) -> list[Row]:
        """The rows, in the order of the pairs. They are the same for every data set."""
        return [
            Row(
                id=row,
                title=" → ".join(pair),
                teacher=pair[0],
                student=pair[1],
                baseline=self.baseline,
                cells=tuple(cell.of(row) for cell in self.cells),
                published=dict(self._published(i)),
            )
            for i, (row, pair) in enumerate(zip(self.ids, self.pairs, strict=True))
        ]

    def _published(self, pair: int) -> Iterator[tuple[str, Published]]:
        for reported in self.published:
            for label, values in reported.values.items():
                if (value := values[pair]) is not None:
                    yield label, Published(value=value, status=reported.status, source=reported.source)

    @model_validator(mode="after")
    def _fits_together(self) -> PairGrid:
        columns = [(label, values) for reported in self.published for label, values in reported.values.items()]
        if wrong := [label for label, values in columns if len(values) != len(self.pairs)]:
            raise ValueError(f"published: {', '.join(wrong)}: should be one number or null for each of the pairs")
        numbers = [(label, i) for label, values in columns for i, value in enumerate(values) if value is not None]
        if len(set(numbers)) < len(numbers):
            raise ValueError("published: two sources have a number of the same cell and pair")
        if unknown := {row for cell in self.cells for row in cell.pairs} - set(self.ids):
            raise ValueError(f"cells: there is no pair {' or '.join(sorted(unknown))}, but {', '.join(self.ids)}")
        return self


RowOrMany = Annotated[
    Annotated[Row, Tag("one")] | Annotated[Pairs, Tag("pair")] | Annotated[PairGrid, Tag("grid")],
    Discriminator(_kind),
]


class Table(Frozen):
    """One of a paper's tables on one data set."""

    id: Name
    title: str
    dataset: Name
    recipe: Name | None = None  # null: that of the data set
    notes: tuple[str, ...] = ()
    rows: tuple[RowOrMany, ...]

    @property
    def expanded(self) -> list[Row]:
        """All rows."""
        many = [[row] if isinstance(row, Row) else row.rows(self.dataset) for row in self.rows]
        return [row for rows in many for row in rows]

    @model_validator(mode="after")
    def _fits_together(self) -> Table:
        ids = [row.id for row in self.expanded]
        if len(set(ids)) < len(ids):
            raise ValueError(f"table {self.id}: two rows have the same id (got {', '.join(ids)})")
        return self


class Paper(Frozen):
    """A paper, and its tables that are reproduced."""

    paper: str | None = None  # null: tables of our own
    by_name: bool = False  # its tables are trained only if they are named
    experiments: dict[Name, tuple[Declaration, ...]] = Field({})  # by group
    tables: tuple[Table, ...]


def parse_paper(name: str, tree: Any) -> Paper:
    """The paper called `name`. Raises KnownError with all problems, one per line."""
    try:
        return Paper.model_validate(tree)
    except ValidationError as error:
        raise KnownError("\n".join(f"conf/paper/{name}.yaml: {problem}" for problem in explain(error))) from error


def papers() -> list[Paper]:
    """The papers and our own tables, from conf/paper."""
    return [parse_paper(name, read_yaml(name)) for name in PAPERS]
