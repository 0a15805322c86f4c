"""status.json of a job while it trains: how far it is, for the live table of a sweep and `python -m kd.sweep watch`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from kd.core import files
from kd.core.spec import Frozen

STATUS = "status.json"
PROCESS = "process.json"
TABLE = "KD_TABLE"  # of the environment: the number of the pipe that leads above a live table
_EVERY = 2.0  # seconds between two writes of a status


class Advance(Frozen):
    """How far the training of a stage is."""

    stage: str  # role, network and seed
    epoch: int  # that is trained now, from 1
    epochs: int
    val_acc: float | None  # after the last whole epoch, in percent
    speed: float | None  # images a second; null before the first step
    left: float | None  # seconds of this stage


class Process(Frozen):
    """process.json of a sweep: the process that started its jobs."""

    pid: int
    host: str

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more. False where this cannot be seen: on another machine, or of another user."""
        if self.host != platform.node():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class Status(Advance, Process):
    """status.json of a job that runs."""

    at: float  # seconds of Unix


class StatusFile:
    """Writes a job's status.json: often enough to watch, and without waiting for the disk."""

    def __init__(self, folder: Path) -> None:
        self._path, self._last = folder / STATUS, 0.0

    def report(self, progress: Callable[[], Advance]) -> None:
        """Write how far a stage is, if the last time was long enough ago. A full disk stops no training."""
        if (now := time.time()) - self._last < _EVERY:
            return
        self._last = now
        status = Status(**progress().model_dump(), pid=os.getpid(), host=platform.node(), at=now)
        partial = files.temporary(self._path)
        with suppress(OSError):
            partial.write_text(status.model_dump_json(), encoding="utf-8")
            os.replace(partial, self._path)

    def close(self) -> None:
        """The job has ended: its result or its failure says the rest."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def read_status(folder: Path) -> Status | None:
    """The status in a job's folder. None before and after a training, and for a file that is damaged."""
    try:
        return Status.model_validate_json((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def record_process(folder: Path) -> None:
    """Write that this process does the sweep in a folder. Raises OSError."""
    files.write(folder / PROCESS, Process(pid=os.getpid(), host=platform.node()).model_dump_json())


def read_process(folder: Path) -> Process | None:
    """The process of the sweep in a folder. None where no file says it, and for a file that is damaged."""
    try:
        return Process.model_validate_json((folder / PROCESS).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def beside_table() -> bool:
    """Whether what is printed goes above the live table of a sweep (kd/reporting/live.py), which shows each status."""
    try:
        return os.environ.get(TABLE) == str(os.fstat(1).st_ino)
    except OSError:  # there is no standard output
        return False
