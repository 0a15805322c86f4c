"""From tables to stages: each cell composed by Hydra and planned at every seed, all of them as one graph."""

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

from kd.config import Config, plan
from kd.datasets import resolve
from kd.datasets.base import DatasetConfig
from kd.paper.request import PROTOCOL, Request, Vary, shown
from kd.paper.tables import CONF, Cell, Row, Table
from kd.parsing import parse, recorded
from kd.spec import KnownError
from kd.stage import DatasetSpec, Stage

_NETWORKS = ("model.name", "teacher.name", "method.reference")


@dataclass(frozen=True)
class Job:
    """One cell at one seed: its configuration, and the student that it asks for."""

    config: Config
    tree: dict[str, Any]  # the same, as it was composed
    student: Stage


@dataclass(frozen=True)
class PlannedCell:
    """A cell, and its job at each seed."""

    cell: Cell
    command: str  # that trains the first of them
    jobs: dict[int, Job]


@dataclass(frozen=True)
class PlannedRow:
    """A row, and its cells."""

    row: Row
    cells: list[PlannedCell]


@dataclass(frozen=True)
class PlannedTable:
    """A table, the paper that it is from if any, and its rows."""

    paper: str | None
    table: Table
    rows: list[PlannedRow]


@dataclass
class Graph:
    """The union of all chains: each stage once, after those that it stands on; the tables' first seeds come first."""

    tables: list[PlannedTable]
    left_out: dict[str, str] = field(default_factory=dict)  # tables by id: why

    @property
    def jobs(self) -> list[Job]:
        """All jobs, seed by seed, so that there is something to read early."""
        cells = [cell for table in self.tables for row in table.rows for cell in row.cells]
        seeds = dict.fromkeys(seed for cell in cells for seed in cell.jobs)
        return [cell.jobs[seed] for seed in seeds for cell in cells]

    @property
    def stages(self) -> dict[str, tuple[Stage, Job]]:
        """Every stage by key, with the first job that needs it."""
        found: dict[str, tuple[Stage, Job]] = {}
        for job in self.jobs:
            for source in job.student.chain:
                if isinstance(source, Stage):
                    found.setdefault(source.key, (source, job))
        return found


def graph(request: Request) -> Graph:
    """Everything asked for, planned. A table whose data are not there is left out, with the reason.

    Raises KnownError where nothing is left, or the configuration has problems.
    """
    request.check()
    planned, composer = Graph([]), _Composer(request)
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
    """The images of a table are not there."""


class _Composer:
    """Makes cells of tables into jobs, and looks for the images of each data set once."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._resolve = cache(_resolved)
        self.idle = [override for override in request.overrides if _is_of_method(override)]  # that no cell has taken

    def cell(self, table: Table, cell: Cell) -> PlannedCell:
        """The cell at every seed. Cells that differ in values alone are composed once."""
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
        """Overrides of the method, where a cell's has them: NOKD has no T. What makes a cell what it is goes before."""
        own = [o for o in self._request.overrides if _is_of_method(o) and _key(o).split(".")[1] in cfg.method]
        self.idle = [override for override in self.idle if override not in own]
        return own

    def _job(self, cfg: DictConfig) -> Job:
        config = parse(cfg)
        dataset = self._resolve(config.dataset, config.data_root, config.workers)
        return Job(config, recorded(cfg), plan(config, dataset)[0])


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise KnownError(f"{' '.join(overrides)}: {error}") from error


def _resolved(dataset: DatasetConfig, data_root: Path, workers: int) -> DatasetSpec:
    try:
        return resolve(dataset, data_root, workers)
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
    """What makes the whole chain, or the student alone, a draw of its own."""
    if vary == "student":
        return [f"seed={seed}"]
    assisted = [f"method.assistant.seed={seed}"] if "assistant" in cfg.method else []
    return [f"seed={seed}", f"teacher.seed={seed}", *assisted]


def _is_value(override: str) -> bool:
    return "." in _key(override)


def _is_of_method(override: str) -> bool:
    return _key(override).startswith("method.")


def _key(override: str) -> str:
    return override.partition("=")[0]


def _last(overrides: list[str]) -> list[str]:
    """Of several overrides of one key the last: Hydra takes a group once."""
    return list({_key(override): override for override in overrides}.values())


def _command(overrides: list[str]) -> str:
    """As a shell takes it."""
    return shlex.join(["python", "run.py", *map(shown, overrides)])
