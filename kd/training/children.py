"""Processes that train students side by side, one student each, while the run's own has the screen and the records."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, BinaryIO

from kd.core import hardware
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.training.checkpoint import exit_code, ignore, raise_on_sigterm

if TYPE_CHECKING:
    from kd.training.pipeline import Pipeline

# multiprocessing's spawn would import the user's script again, which then calls kd.run again unless it is written for
# that. So a process begins here, with its parent's places of modules.
_BEGIN = (
    "import os, pickle, sys; told = os.fdopen(os.dup(0), 'rb'); sys.path[:] = pickle.load(told); "
    "from kd.training.children import work; sys.exit(work(told))"
)
_PLAIN = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace", "TTY_COMPATIBLE": "0"}
_POLL = 0.5  # seconds; on Windows a wait without an end hears no Ctrl-C


def train_beside(pipeline: Pipeline, students: Sequence[Stage], processes: int) -> set[str]:
    """Train the chain of each student in a process of its own. Returns the keys of the stages that are new.

    Whatever ends this process or one of the others ends all, each after a checkpoint; a second Ctrl-C ends them at
    once. Raises the error of the first that fails.
    """
    children = [_Child(pipeline, student) for student in students]
    with ThreadPoolExecutor(processes, initializer=hardware.unbind) as pool:
        left = {pool.submit(child.run) for child in children}
        new = set[str]()
        try:
            while left:
                ended, left = wait(left, _POLL, FIRST_COMPLETED)
                new |= {key for future in ended for key in future.result()}
        except BaseException:
            _end(children, left)
            raise
    return new


def _end(children: Sequence[_Child], left: set[Future[set[str]]]) -> None:
    for child in children:
        child.end()
    try:
        while left:
            left = wait(left, _POLL).not_done
    except BaseException:
        for child in children:
            child.kill()
        raise


class _Child:
    """A process that trains a student. It ends when its standard input is closed, also by the death of this process."""

    def __init__(self, pipeline: Pipeline, student: Stage) -> None:
        self._errand, self._lock, self._ended = (pipeline, student), Lock(), False
        self._names = {f"{each.role} {each.model}": _name(each) for each in student.chain if isinstance(each, Stage)}
        self._who = _name(student)
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> set[str]:
        """Start the process, print its lines, and return the keys of the stages that it has trained."""
        if (process := self._start()) is None:
            return set()
        with process:
            with suppress(OSError, ValueError):  # it has died, or is to end: the rest says how
                _pipe(process.stdin).write(pickle.dumps(sys.path) + pickle.dumps(self._errand))
                _pipe(process.stdin).flush()
            for line in _pipe(process.stderr):
                if said := line.decode(errors="replace").rstrip():
                    print(f"{self.named(said)}\n", end="", flush=True)  # in one piece
            answer, code = _pipe(process.stdout).read(), process.wait()
            with suppress(OSError):  # it has died before it was told everything
                _pipe(process.stdin).close()
        if not answer and not self._ended:
            resume = "start the same command again to resume from the last checkpoint"
            raise KnownError(f"{self._who}: its process {_cause(code)}; {resume}")
        new, error = pickle.loads(answer) if answer else (set(), None)
        if error is not None:
            raise error
        return set(new)

    def named(self, line: str) -> str:
        """A line of the process, with the network and its seed in front, if they are not there."""
        if line.startswith(tuple(f"{name}{after}" for name in self._names.values() for after in " :")):
            return line
        who, colon, rest = line.partition(": ")
        return f"{self._names[who]}: {rest}" if colon and who in self._names else f"{self._who}: {line}"

    def _start(self) -> subprocess.Popen[bytes] | None:
        """In a group of its own: a Ctrl-C in the terminal reaches it through this process alone."""
        environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | _PLAIN
        options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options |= {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        with self._lock:
            if not self._ended:
                self._process = subprocess.Popen([sys.executable, "-c", _BEGIN], env=environment, **options)
            return self._process

    def end(self) -> None:
        """Ask the process to write a checkpoint and end."""
        with self._lock, suppress(OSError):
            self._ended = True
            if self._process is not None:
                _pipe(self._process.stdin).close()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()


def _pipe(stream: Any) -> Any:
    assert stream is not None  # each is a pipe
    return stream


def _name(stage: Stage) -> str:
    return f"{stage.role} {stage.model} s{stage.seed}"


def _cause(code: int) -> str:
    """How a process without an answer ended. A shell adds 128 to a signal's number, subprocess negates it."""
    number = -code if code < 0 else code - 128
    known = {each.value: each.name for each in signal.Signals}
    return f"was ended by {known[number]}" if number in known else f"ended with exit code {code}"


def work(told: BinaryIO) -> int:
    """In the new process: train what is told. Its answer has the standard output for itself; the rest is printed."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    raise_on_sigterm()
    found: tuple[set[str], Exception | None]
    try:
        pipeline, student = pickle.load(told)
        Thread(target=_heed, args=(told.fileno(),), daemon=True).start()
        found = pipeline.made_for(student), None
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    except (KnownError, OSError) as error:
        found = set(), KnownError(str(error))
    except Exception as error:  # its class may not be picklable
        found = set(), RuntimeError(f"{error or type(error).__name__}\n{traceback.format_exc()}")
    ignore()
    with answer:
        pickle.dump(found, answer)
    return 0


def _heed(told: int) -> None:
    os.read(told, 1)  # returns when the parent closes the pipe, or has ended
    signal.raise_signal(signal.SIGINT)
