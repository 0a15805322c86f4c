"""The tables as data: what each cell trains, what was published for it, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from kd.models import MODELS, NetworkName
from kd.problems import explain
from kd.spec import Frozen, KnownError

CONF = Path(__file__).resolve().parents[2] / "conf"

Name = Annotated[str, Field(pattern=r"^\w+$")]
Status = Literal[
    "verified",
    "quoted at second hand",
    "by the author in an issue",
    "by the author in an issue, rounded",
    "claimed, in no table that could be verified",
]


class Published(Frozen):
    """A published number in percent of the test set, and where it is from."""

    value: float
    difference: bool = False  # it is a difference to the row's baseline, and no accuracy
    status: Status
    source: str = Field(min_length=1)


class Cell(Frozen):
    """One setting: its name in the table, and the overrides that make it."""

    label: str = Field(min_length=1)
    overrides: tuple[str, ...] = ()
    axis: str | None = None  # what it is a point of, with others of its row
    at: float | None = None

    def cells(self, row: Row) -> list[Cell]:
        """Itself."""
        return [self]


class Paths(Frozen):
    """A cell for every way from the row's teacher to its student through some of the networks, or through so many."""

    every: Literal["path"]
    through: tuple[NetworkName, ...] = Field(min_length=1)  # largest first
    assistants: int | None = Field(None, ge=0)  # how many of them a path has; null is any number

    def cells(self, row: Row) -> list[Cell]:
        """Of the row, whose teacher and student the paths join."""
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
        """The same of every row."""
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
    """Cells over the same seeds, each of which is compared with the `baseline`."""

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
            raise ValueError(f"row {self.id}: every path needs a teacher and a student to join")
        labels = [cell.label for cell in self.expanded]
        if len(set(labels)) < len(labels):
            raise ValueError(f"row {self.id}: two cells have one label (got {', '.join(labels)})")
        if unknown := {self.baseline, *self.published} - set(labels):
            raise ValueError(f"row {self.id}: has no cell {' or '.join(sorted(unknown))}, but {', '.join(labels)}")
        return self


class Students(Frozen):
    """A row for every student: alone, and distilled from a teacher trained in several ways, all of them experiments."""

    every: Literal["student"]
    students: tuple[Name, ...] = Field(min_length=1)
    teacher: Name
    kinds: tuple[Literal["normal", "nasty", "trained"], ...]
    published: dict[str, Published] = Field({})

    def rows(self, dataset: str) -> list[Row]:
        """Of a table on this data set."""
        return [self._row(dataset, student) for student in self.students]

    def _row(self, dataset: str, student: str) -> Row:
        taught = [(str(kind), f"{kind}_{self.teacher}_{student}") for kind in self.kinds]
        named = {"alone": f"baseline_{student}", **dict(taught)}
        return Row(
            id=f"{self.teacher}_{student}",
            title=f"{self.teacher} → {student}",
            baseline="normal",
            cells=tuple(Cell(label=kind, overrides=(f"experiment=tt/{dataset}/{p}",)) for kind, p in named.items()),
            published=self.published,
        )


class Table(Frozen):
    """One of a paper's tables on one data set."""

    id: Name
    title: str
    dataset: Name
    notes: tuple[str, ...] = ()
    rows: tuple[Annotated[Annotated[Row, Tag("one")] | Annotated[Students, Tag("student")], Discriminator(_kind)], ...]

    @property
    def expanded(self) -> list[Row]:
        """All rows."""
        many = [row.rows(self.dataset) if isinstance(row, Students) else [row] for row in self.rows]
        return [row for rows in many for row in rows]

    @model_validator(mode="after")
    def _fits_together(self) -> Table:
        ids = [row.id for row in self.expanded]
        if len(set(ids)) < len(ids):
            raise ValueError(f"table {self.id}: two rows have one id (got {', '.join(ids)})")
        return self


class Paper(Frozen):
    """A paper, and those of its tables that are reproduced."""

    paper: str | None = None  # null: tables of our own, which are done where somebody names them
    tables: tuple[Table, ...]


def read_yaml(name: str) -> Any:
    """A file of conf/paper as plain data, its anchors resolved."""
    return OmegaConf.to_container(OmegaConf.load(CONF / "paper" / f"{name}.yaml"))


def parse_paper(name: str, tree: Any) -> Paper:
    """The paper called `name`. Raises KnownError with every problem found, a line each."""
    try:
        return Paper.model_validate(tree)
    except ValidationError as error:
        raise KnownError("\n".join(f"conf/paper/{name}.yaml: {problem}" for problem in explain(error))) from error


def papers() -> list[Paper]:
    """Both papers and our own rows, as conf/paper has them."""
    return [parse_paper(name, read_yaml(name)) for name in ("takd", "trained_teacher", "ours")]
