"""Signals that ask a process to end: kept back while a stage is trained, until its state is on disk."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

_ASKING = (signal.SIGINT, signal.SIGTERM)
_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # they ask where somebody has a handler for them, as submitit has
_SAID = b"\nasked to end: as soon as the state is on disk; once more ends at once\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is: what is open gets closed, and a multirun is summarized."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What a shell would report of a process that the signal had ended."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def raise_on_sigterm() -> None:
    """Let SIGTERM raise Terminated in this process."""
    signal.signal(signal.SIGTERM, _terminate)


def ignore() -> None:
    """Let this process come to its end, whatever it is asked."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class Deferred:
    """A block in which signals that ask for an end are kept, until deliver() or the end of the block.

    They then go to whoever would have got them. The same signal once more goes there at once. Only the main thread
    of a process hears of signals; elsewhere, or if not `active`, the block does nothing.
    """

    def __init__(self, active: bool = True) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._kept: list[int] = []
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal is waiting."""
        return bool(self._kept)

    def __enter__(self) -> Deferred:
        if self._active:
            for number in (*_ASKING, *filter(_handled, _SCHEDULERS)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.deliver()

    def deliver(self) -> None:
        """Hand the waiting signals over. Returns where there are none, or their handlers let the process go on."""
        while self._kept:
            self._hand_over(self._kept.pop(0))

    def _hand_over(self, number: int) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        else:  # the system's way: the process ends here
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if number in self._kept:
            self._kept.remove(number)
            self._hand_over(number)
            return
        self._kept.append(number)
        os.write(2, _SAID)  # print() may have been interrupted itself


def _handled(number: int) -> bool:
    return callable(signal.getsignal(number))
