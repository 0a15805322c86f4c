"""A terminal for tests: a command runs in a pseudo terminal, and what it would show is kept after each write."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import ROOT

_PIECE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\x1b\][^\x07]*\x07|[\r\n\t]|[^\x1b\r\n\t]")
_OWN = {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
_NEVER = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Terminal:
    """Lines as a terminal shows them. Those above the screen cannot be reached by the cursor any more."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0
        self.cursor_shown = True
        self._rest = ""

    def write(self, text: str) -> None:
        """Show what a program writes."""
        whole = re.match(r"(?s)(.*?)(\x1b(\[[?0-9;]*)?)?\Z", self._rest + text)  # a sequence may come in two parts
        assert whole is not None
        self._rest = whole[2] or ""
        for piece in _PIECE.findall(whole[1]):
            self._take(piece)

    def _take(self, piece: str) -> None:
        if piece == "\r":
            self.column = 0
        elif piece == "\n":
            self._down()
        elif piece.startswith("\x1b["):
            self._control(piece[2:-1], piece[-1])
        elif piece >= " ":
            if self.column == self.columns:
                self.column = 0
                self._down()
            line = self.lines[self.row]
            line += [" "] * (self.column + 1 - len(line))
            line[self.column] = piece
            self.column += 1

    def _control(self, told: str, kind: str) -> None:
        if kind == "A":
            self.row = max(self.row - int(told or 1), len(self.lines) - self.rows, 0)
        elif kind == "K":
            assert told == "2", told
            self.lines[self.row] = []
        elif told == "?25":
            self.cursor_shown = kind == "h"
        else:
            assert kind == "m", (told, kind)

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    @property
    def text(self) -> str:
        """Everything that it shows, and what is scrolled away."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip("\n")


def in_terminal(
    command: Sequence[str],
    folder: Path,
    columns: int,
    rows: int = 40,
    act: Callable[[str], bytes] = lambda shown: b"",
) -> tuple[Terminal, list[str], int]:
    """Run a command in a terminal of its own.

    Returns the terminal at the end, what was shown after each write, and the exit code. `act` sees what is shown, and
    returns what is typed.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in _NEVER} | _OWN
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )
    os.close(its)
    terminal, shown = Terminal(columns, rows), list[str]()
    decoder = codecs.getincrementaldecoder("utf-8")()
    while data := _read(ours):
        terminal.write(decoder.decode(data))
        shown.append(terminal.text)
        if typed := act(shown[-1]):
            os.write(ours, typed)
    os.close(ours)
    return terminal, shown, process.wait(timeout=60)


def _hear_ctrl_c() -> None:
    """Tests that run in the background may ignore it, and a program inherits that."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so that the last program has closed the other end
        return b""
