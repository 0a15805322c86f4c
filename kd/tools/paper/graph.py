"""From tables to stages: each cell is composed by Hydra and planned at every seed. All cells make one graph."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.app.config import Config, Vary, plan, seed_keys
from kd.app.experiments import CONF
from kd.app.options import register
from kd.app.parsing import parse, recorded
from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec, Stage
from kd.datasets import DatasetConfig, resolve
from kd.tools.paper.request import PROTOCOL, Request, shown
from kd.tools.paper.tables import Cell, Row, Table

_NETWORKS = ("model.name", "teacher.name", "method.reference")


@dataclass(frozen=True)
class PlannedJob:
    """One cell at one seed: its configuration, and its student."""

    config: Config
    tree: dict[str, Any]  # the configuration as a tree, for records
    student: Stage


@dataclass(frozen=True)
class PlannedCell:
    """A cell, and its job at each seed."""

    cell: Cell
    command: str  # the command that trains the first job
    jobs: dict[int, PlannedJob]


@dataclass(frozen=True)
class PlannedRow:
    """A row, and its cells."""

    row: Row
    cells: list[PlannedCell]


@dataclass(frozen=True)
class PlannedTable:
    """A table, its paper (None for a table of our own), and its rows."""

    paper: str | None
    table: Table
    rows: list[PlannedRow]


@dataclass
class Graph:
    """The union of all chains: each stage once, after its guide. The first seed of all tables comes first."""

    tables: list[PlannedTable]
    left_out: dict[str, str] = field(default_factory=dict)  # reasons, by the tables' ids

    @property
    def jobs(self) -> list[PlannedJob]:
        """All jobs, seed by seed, so that the first results come early."""
        cells = [cell for table in self.tables for row in table.rows for cell in row.cells]
        seeds = dict.fromkeys(seed for cell in cells for seed in cell.jobs)
        return [cell.jobs[seed] for seed in seeds for cell in cells]

    @property
    def stages(self) -> dict[str, tuple[Stage, PlannedJob]]:
        """Every stage by key, with the first job that needs it."""
        found: dict[str, tuple[Stage, PlannedJob]] = {}
        for job in self.jobs:
            for source in job.student.chain:
                if isinstance(source, Stage):
                    found.setdefault(source.key, (source, job))
        return found


def graph(request: Request) -> Graph:
    """The plan of the requested tables. A table without its data is left out, with the reason.

    Raises KnownError if no table is left, or if the configuration has problems.
    """
    request.check()
    planned, composer = Graph([]), _Composer(request)
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for paper, table, rows in request.chosen():
            try:
                own = [PlannedRow(row, [composer.cell(table, cell) for cell in row.expanded]) for row in rows]
            except _AbsentError as absent:
                planned.left_out[table.id] = str(absent)
            else:
                planned.tables.append(PlannedTable(paper, table, own))
    if composer.idle and planned.tables:
        raise KnownError("\n".join(f"{idle}: there is no such key in any cell's method" for idle in composer.idle))
    if not planned.tables:
        raise KnownError("\n".join(f"{name}: {reason}" for name, reason in planned.left_out.items()))
    return planned


class _AbsentError(KnownError):
    """The images of a table are missing."""


class _Composer:
    """Turns cells of tables into jobs, and looks for the images of each data set once."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._resolve = cache(_resolved)
        self.idle = [override for override in request.overrides if _is_of_method(override)]  # that no cell has used

    def cell(self, table: Table, cell: Cell) -> PlannedCell:
        """The cell at every seed. Cells that differ only in values are composed once."""
        request, profile = self._request, self._request.profile
        common = [override for override in request.overrides if not _is_of_method(override)]
        given = [*PROTOCOL, *request.data(table), *profile.overrides, *common]
        groups = _last([*(override for override in cell.overrides if not _is_value(override)), *given])
        cfg = _composed(tuple(groups))
        values = [*self._taken(cfg), *(override for override in cell.overrides if _is_value(override))]
        for key in _NETWORKS:
            if stand_in := profile.stand_ins.get(OmegaConf.select(cfg, key)):
                values.append(f"{key}={stand_in}")
        seeds = request.seeds or profile.seeds
        jobs = {seed: self._job(_merged(cfg, [*values, *_seeds(cfg, seed, request.vary)])) for seed in seeds}
        return PlannedCell(cell, _command([*groups, *values, *_seeds(cfg, seeds[0], request.vary)]), jobs)

    def _taken(self, cfg: DictConfig) -> list[str]:
        """The requested overrides that this cell's method has: NOKD has no T. The cell's own overrides come later."""
        own = [o for o in self._request.overrides if _is_of_method(o) and _key(o).split(".")[1] in cfg.method]
        self.idle = [override for override in self.idle if override not in own]
        return own

    def _job(self, cfg: DictConfig) -> PlannedJob:
        config = parse(cfg)
        dataset = self._resolve(config.dataset, config.data_root, config.workers, config.image_size)
        return PlannedJob(config, recorded(cfg), plan(config, dataset)[0])


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise KnownError(f"{' '.join(overrides)}: {error}") from error


def _resolved(dataset: DatasetConfig, data_root: Path, workers: int, image_size: int) -> DatasetSpec:
    try:
        return resolve(dataset, data_root, workers, image_size)
    except KnownError as error:
        raise _AbsentError(str(error)) from error


def _merged(cfg: DictConfig, values: list[str]) -> DictConfig:
    try:
        merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist(values))
    except OmegaConfBaseException as error:
        raise KnownError(f"{' '.join(values)}: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _seeds(cfg: DictConfig, seed: int, vary: Vary) -> list[str]:
    """The overrides that vary the whole chain, or only the student."""
    return [f"{key}={seed}" for key in seed_keys(vary, "assistant" in cfg.method)]


def _is_value(override: str) -> bool:
    return "." in _key(override)


def _is_of_method(override: str) -> bool:
    return _key(override).startswith("method.")


def _key(override: str) -> str:
    return override.partition("=")[0]


def _last(overrides: list[str]) -> list[str]:
    """The last override of each key: Hydra accepts a group only once."""
    return list({_key(override): override for override in overrides}.values())


def _command(overrides: list[str]) -> str:
    """The command for a shell."""
    return shlex.join(["python", "run.py", *map(shown, overrides)])
