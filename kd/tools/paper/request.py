"""A request: a profile, some tables and rows, seeds, and other copies of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from kd.app.config import Vary
from kd.app.experiments import Name, read_yaml
from kd.core.spec import Frozen, KnownError, explain
from kd.datasets import DATASETS
from kd.models import NetworkName
from kd.tools.paper.tables import Row, Table, papers

# Weights are chosen on validation. The test curve shows what the papers' protocol would give.
PROTOCOL = ("mode=paper", "train.select=best_val", "train.test_curve=true", "tracking=none")
# Overrides that have no effect on tables, and what to use instead.
_OTHERWISE = {
    "seed": "--seeds",
    "replicates": "--seeds",
    "baseline": "a row of method=scratch, as most tables have one",
    "vary": "--vary",
    "teacher.seed": "--vary",
    "method.assistant.seed": "--vary",
    "dry_run": "--plan",
    "method": "another row, or a table of your own in conf/paper/ours.yaml",
    "method.assistants": "another row, or a table of your own in conf/paper/ours.yaml",
    "loss": "another row, or a table of your own in conf/paper/ours.yaml",
    "loss@assistant_loss": "another row, or a table of your own in conf/paper/ours.yaml",
    "experiment": "another row, or a table of your own in conf/paper/ours.yaml",
    "runtime.retrain": "python -m kd.store rm",
}
_PLACES = ("dataset.root", "runtime.store", "runtime.data", "teacher.checkpoint")


class Profile(Frozen):
    """How long all tables are trained, and on which data."""

    title: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    dataset: Name | None = None  # replaces every table's data set
    stand_ins: dict[NetworkName, NetworkName] = Field({})
    rows: dict[Name, tuple[Name, ...]] = Field({})  # by table: the default rows


def profiles() -> dict[str, Profile]:
    """The profiles in conf/paper/profiles.yaml. Raises KnownError with all problems of the file."""
    found, problems = {}, []
    for name, tree in read_yaml("profiles").items():
        try:
            found[name] = Profile.model_validate(tree)
        except ValidationError as error:
            problems += [f"conf/paper/profiles.yaml: {problem}" for problem in explain(error, name)]
    if problems:
        raise KnownError("\n".join(problems))
    return found


@dataclass(frozen=True)
class Copy:
    """Another copy of a data set: the folder, and the name that tables give it."""

    path: Path
    label: str

    def overrides(self, dataset: str) -> list[str]:
        """The overrides that use this copy: by dataset=folder, or by dataset.root if the data set has one."""
        name = "folder" if DATASETS[dataset].facts else dataset
        return [f"dataset={name}", f"dataset.root={quoted(str(self.path))}", f"dataset.label={quoted(self.label)}"]


def quoted(text: str) -> str:
    """A text quoted for Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def shown(override: str) -> str:
    """An override for records: folders of this machine are shown by name only."""
    key, _, value = override.partition("=")
    name = Path(value.strip("'")).name
    return f"{key}=<{name}>" if key in _PLACES else override


@dataclass(frozen=True)
class Request:
    """The options of `python -m kd.paper`."""

    name: str  # of the profile
    profile: Profile
    tables: tuple[str, ...] = ()  # empty: all
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()  # empty: the profile's
    copies: tuple[tuple[str, Copy], ...] = ()  # by data set
    vary: Vary = "chain"
    overrides: tuple[str, ...] = ()  # Hydra's, for every cell

    def check(self) -> None:
        """Raise KnownError for overrides that have another spelling for tables."""
        keys = [override.partition("=")[0] for override in self.overrides]
        if wrong := [f"{key}: for tables it is {_OTHERWISE[key]}" for key in keys if key in _OTHERWISE]:
            raise KnownError("\n".join(wrong))

    def chosen(self) -> list[tuple[str | None, Table, list[Row]]]:
        """The requested tables, each with its paper and its rows. Raises KnownError for unknown names."""
        known = [(paper, table) for paper in papers() for table in paper.tables]
        _refuse("table", self.tables, [table.id for _, table in known])
        named = self.tables or (*self.profile.rows, *(table.id for paper, table in known if not paper.by_name))
        asked = [(paper.paper, table) for paper, table in known if table.id in named]
        _refuse("data", [name for name, _ in self.copies], [self._dataset(table) for _, table in asked])
        _refuse("row", self.rows, [row.id for _, table in asked for row in table.expanded])
        found = [(paper, table, [row for row in table.expanded if self._wants(table, row)]) for paper, table in asked]
        return [(paper, table, rows) for paper, table, rows in found if rows]

    def _wants(self, table: Table, row: Row) -> bool:
        if self.tables or self.rows:
            return not self.rows or row.id in self.rows
        return not self.profile.rows or row.id in self.profile.rows.get(table.id, ())

    def _dataset(self, table: Table) -> str:
        return self.profile.dataset or table.dataset

    def data(self, table: Table) -> list[str]:
        """The overrides for a table's data and its recipe."""
        dataset = self._dataset(table)
        copy = dict(self.copies).get(dataset)
        recipe = self.profile.dataset or table.recipe or dataset
        return [*(copy.overrides(dataset) if copy else [f"dataset={dataset}"]), f"train={recipe}"]


def _refuse(what: str, asked: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in asked if name not in known]:
        there = ", ".join(dict.fromkeys(known))
        raise KnownError(f"{what}: there is no {' and no '.join(unknown)} here, but {there}")
