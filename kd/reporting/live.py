"""The live table of a sweep in the terminal that runs it, below the lines that its jobs print.

One thread writes to the terminal. What this process and the processes below it print, in Python or not, goes through a
pipe to this thread, which prints it above the table. So nothing that is printed can tear the table. Jobs see no
terminal, and draw no bars. The thread reads the table from the jobs' files, so it is the same for every launcher.
"""

from __future__ import annotations

import os
import select
import sys
import time
from contextlib import suppress
from threading import Event, Thread

from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

from kd.reporting.board import Overview, Sweep, screen
from kd.reporting.status import TABLE

_EVERY = 1.0  # seconds between two looks at the jobs
_SHARE = 30  # a look that takes a second is followed by so many without one: the jobs need the processor
_BELOW = 4  # lines of the terminal that the table leaves for what is printed
_END = b"\0the table ends\n"  # in the pipe, behind what belongs above the table
_PATIENCE = 5.0  # seconds for the last lines, in a terminal that Ctrl-S may have stopped


def has_terminal() -> bool:
    """Whether a table can be written again and again where this process prints."""
    out = Console()
    return os.name == "posix" and 1 in _terminals() and out.is_terminal and not out.is_dumb_terminal


def _terminals() -> list[int]:
    """Which of standard output and standard error are a terminal."""
    found = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError, ValueError, AttributeError):  # it is no file, is closed, or is not there
            found += [number] if stream.fileno() == number and os.isatty(number) else []
    return found


class LiveTable:
    """The table of the jobs of a sweep that begin after `since`."""

    def __init__(self, sweep: Sweep, since: float) -> None:
        self._sweep = sweep
        self._overview = Overview(sweep.folder.absolute(), since)  # a job may change the working directory
        self._terminal, self._saved = os.dup(1), {number: os.dup(number) for number in _terminals()}
        self._reading, self._writing = os.pipe()
        file = open(self._terminal, "w", encoding=sys.stdout.encoding, errors="backslashreplace")  # noqa: SIM115
        self._out = Console(file=file, force_terminal=True)
        self._live: Live | None = Live(
            console=self._out, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._ended, self._due, self._rest = Event(), 0.0, b""

    def start(self) -> None:
        """Show the table. From here on, what is printed goes through the pipe."""
        for number in self._saved:
            os.dup2(self._writing, number)
        os.environ[TABLE] = str(os.fstat(self._writing).st_ino)
        Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        """Print what is in the pipe, remove the table, and give the terminal back."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(self._writing, _END)
        self._ended.wait(_PATIENCE)
        os.environ.pop(TABLE, None)
        for number, terminal in self._saved.items():
            os.dup2(terminal, number)
            os.close(terminal)
        os.close(self._writing)

    def _serve(self) -> None:
        """Until the last process closes the pipe, because a worker that outlives the sweep may print."""
        try:
            self._until_the_end()
        finally:
            os.close(self._reading)
            with suppress(OSError):  # the terminal is gone
                self._out.file.close()

    def _until_the_end(self) -> None:
        if self._live is not None:
            self._live.start()
        while True:
            left = None if self._live is None else max(0.0, self._due - time.monotonic())
            if select.select([self._reading], [], [], left)[0]:
                if not (data := os.read(self._reading, 1 << 16)):
                    return
                self._pass_on(data)
            if self._live is not None and time.monotonic() >= self._due:
                self._look(self._live)

    def _pass_on(self, data: bytes) -> None:
        """Print whole lines above the table; behind its end, everything as it comes."""
        text, self._rest = self._rest + data, b""
        if not self._ended.is_set():
            text, end, behind = text.partition(_END)
            if not end:
                text, newline, self._rest = text.rpartition(b"\n")
                text += newline
            self._print(text)
            if not end:
                return
            self._close()
            self._ended.set()
            text = behind
        self._print(text)

    def _print(self, data: bytes) -> None:
        text = data.decode(sys.stdout.encoding, errors="replace")
        with suppress(OSError):  # the terminal is gone, and the jobs go on
            if self._live is None:
                self._out.file.write(text)
                self._out.file.flush()
            elif text:  # of a line that was written again and again, the last
                lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.removesuffix("\n").split("\n"))
                self._out.print(Text.from_ansi("\n".join(lines)), soft_wrap=True)

    def _look(self, live: Live) -> None:
        began = time.monotonic()
        try:
            columns, rows = os.get_terminal_size(self._terminal)
            if columns and rows:  # a terminal may not know
                self._out.size = ConsoleDimensions(columns, rows)
            room = max(self._out.height - _BELOW, 1)
            lines = self._overview.lines()
            live.update(screen(self._sweep, lines, self._out, room), refresh=True)
        except OSError:  # a file that has just been removed, or a terminal that is gone
            pass
        except Exception as error:  # raised here, it would end the thread, and what is printed would go nowhere
            self._close()
            self._print(f"the live table ended: {type(error).__name__}: {error}\n".encode())
        now = time.monotonic()
        self._due = now + max(_EVERY, _SHARE * (now - began))

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):
                live.stop()
