"""`python -m kd.sweep watch`: a live table of all jobs of a sweep, on whatever launcher, until the sweep ends."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live
from yaml import YAMLError

from kd.app.multirun import sweep_of
from kd.app.parallel import jobs_of
from kd.core.spec import KnownError
from kd.reporting.board import (
    Line,
    Overview,
    Sweep,
    board,
    has_ended,
    headline_of,
    plain_line,
    screen,
    shared_by,
    was_killed,
)
from kd.reporting.status import PROCESS

_CONFIGURATION = "multirun.yaml"  # what Hydra writes of a sweep, before its jobs


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.sweep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    watching = commands.add_parser("watch", help="what each job does: stage, epoch, validation, images/s, time left")
    watching.add_argument("folder", type=Path, help="the sweep's folder: multirun/<date>/<time>")
    watching.add_argument("--once", action="store_true", help="print the table once")
    watching.add_argument(
        "--every", type=_seconds, metavar="SECONDS", help="between two looks; default: 2, without a terminal 10"
    )
    return parser.parse_args(given)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"should be a number of seconds above 0 (got {text})")
    return value


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns 1 if a job has failed or was killed."""
    arguments = _arguments(given)
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise KnownError(f"{folder} is not a folder; a sweep's is multirun/<date>/<time>")
    sweep, out = _sweep(folder), Console()
    is_sweep = any((folder / name).exists() for name in (_CONFIGURATION, PROCESS, "summary.md"))
    if not is_sweep and not Overview(folder).lines():
        raise KnownError(
            f"{folder} has no sweep: neither {_CONFIGURATION} nor jobs; a sweep's is multirun/<date>/<time>"
        )
    if not is_sweep and not arguments.once:  # nothing would tell that the last of its runs has ended
        raise KnownError(f"{folder} has runs, but no sweep: --once tells what they do")
    if arguments.once:
        if arguments.every:
            print("--every has no effect: --once looks once")
        lines = Overview(folder).lines()
        out.print(headline_of(folder, lines, sweep.expected), style="bold", highlight=False, markup=False)
        out.print(board(lines, shared_by(lines, sweep.fixed)))
    elif out.is_terminal:
        lines = _live(sweep, arguments.every or 2, out)
    else:
        lines = _plain_lines(sweep, arguments.every or 10)
    ended = has_ended(folder, lines)
    if not ended and (not arguments.once or was_killed(folder, lines)):
        print(f"{folder}: the sweep's process has ended before its last job, and no job runs", flush=True)
        return 1
    # A search may be another process's, too, which goes on. Of a grid, nothing runs after its summary.
    grid = ended and not (folder / "study.db").exists()
    lacks = len(lines) < sweep.expected or any(line.job.result is None and not line.job.pruned for line in lines)
    return int((grid and lacks) or any(line.failed for line in lines))


def _sweep(folder: Path) -> Sweep:
    """What the sweep's own file tells. The number of jobs is not known of a search."""
    path = folder / _CONFIGURATION
    try:
        config = OmegaConf.load(path) if path.exists() else None
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise KnownError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, DictConfig) or "hydra" not in config:
        return Sweep(folder)
    return sweep_of(config, folder, len(jobs_of(config)))


def _live(sweep: Sweep, every: float, out: Console) -> list[Line]:
    """The table, written anew until the sweep ends."""
    overview = Overview(sweep.folder)
    with Live(console=out, auto_refresh=False) as live:
        while True:
            lines = overview.lines()
            live.update(screen(sweep, lines, out, out.height), refresh=True)
            if has_ended(sweep.folder, lines) or was_killed(sweep.folder, lines):
                return lines
            time.sleep(every)


def _plain_lines(sweep: Sweep, every: float) -> list[Line]:
    """A line for each job whenever it does something else, until the sweep ends."""
    said, overview = dict[str, str](), Overview(sweep.folder)
    while True:
        lines = overview.lines()
        for line in lines:
            if said.get(line.job.number) != (text := plain_line(line, shared_by(lines, sweep.fixed))):
                print(text, flush=True)
                said[line.job.number] = text
        if has_ended(sweep.folder, lines) or was_killed(sweep.folder, lines):
            print(headline_of(sweep.folder, lines, sweep.expected), flush=True)
            return lines
        time.sleep(every)
