"""`python -m kd.sweep watch`: a live table of all jobs of a sweep, on whatever launcher, until the sweep ends."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from kd.app.multirun import jobs_of_a_grid
from kd.core.spec import KnownError
from kd.reporting.board import IDLE, Line, board, has_ended, headline_of, lines_of, plain_line, shared_by


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.sweep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    watching = commands.add_parser("watch", help="what each job does: stage, epoch, validation, images/s, time left")
    watching.add_argument("folder", type=Path, help="the sweep's folder: multirun/<date>/<time>")
    watching.add_argument("--once", action="store_true", help="print the table once")
    watching.add_argument(
        "--every", type=float, metavar="SECONDS", help="between two looks; default: 2, without a terminal 10"
    )
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns 1 if a job has failed."""
    arguments = _arguments(given)
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise KnownError(f"{folder} is not a folder; a sweep's is multirun/<date>/<time>")
    expected, out = _expected(folder), Console()
    if arguments.once:
        lines = lines_of(folder)
        out.print(_screen(folder, lines, expected))
    elif out.is_terminal:
        lines = _live(folder, expected, arguments.every or 2, out)
    else:
        lines = _plain_lines(folder, expected, arguments.every or 10)
    return int(any(line.job.failed and line.job.reason != IDLE for line in lines))


def _expected(folder: Path) -> int:
    """The number of jobs of a grid; 0 if it is not known, as in a search."""
    path = folder / "multirun.yaml"
    config = OmegaConf.load(path) if path.exists() else None
    return jobs_of_a_grid(config) if isinstance(config, DictConfig) and "hydra" in config else 0


def _screen(folder: Path, lines: Sequence[Line], expected: int) -> Group:
    return Group(Text(headline_of(folder, lines, expected), style="bold"), board(lines))


def _live(folder: Path, expected: int, every: float, out: Console) -> list[Line]:
    """The table, written anew until the sweep ends."""
    with Live(console=out, auto_refresh=False) as live:
        while True:
            lines = lines_of(folder)
            live.update(_screen(folder, lines, expected), refresh=True)
            if has_ended(folder, lines):
                return lines
            time.sleep(every)


def _plain_lines(folder: Path, expected: int, every: float) -> list[Line]:
    """A line for each job whenever it does something else, until the sweep ends."""
    said = dict[str, str]()
    while True:
        lines = lines_of(folder)
        for line in lines:
            if said.get(line.job.number) != (text := plain_line(line, shared_by(lines))):
                print(text, flush=True)
                said[line.job.number] = text
        if has_ended(folder, lines):
            print(headline_of(folder, lines, expected), flush=True)
            return lines
        time.sleep(every)
