"""Checkpoints of an unfinished stage, and signals that wait until a checkpoint is written."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from kd.core import files
from kd.core.spec import KnownError
from kd.core.stage import Stage

_DIGEST = hashlib.sha256().digest_size  # bytes; the hash comes first in the file


_ASKING = (signal.SIGINT, signal.SIGTERM)
# They ask for an end only if they have a handler, as under submitit. Windows has neither.
_SCHEDULERS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
_SAID = b"\nasked to end: writing a checkpoint first; the same signal again ends at once\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C: files are closed, and a multirun prints its summary."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code that a shell reports for a process that the signal has ended."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def raise_on_sigterm() -> None:
    """Let SIGTERM raise Terminated in this process."""
    signal.signal(signal.SIGTERM, _terminate)


def ignore() -> None:
    """Ignore SIGINT and SIGTERM from now on: the process is about to end."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class Deferred:
    """A block in which signals that ask for an end wait, until deliver() or the end of the block.

    Then their handlers are called. If the same signal comes again, its handler is called at once. Python handles
    signals in the main thread only. In other threads, or if not `active`, the block does nothing.
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
        """Call the handlers of the waiting signals. Returns if there are none, or if the handlers return."""
        while self._kept:
            self._hand_over(self._kept.pop(0))

    def _hand_over(self, number: int) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        else:  # the default action of the system: the process ends here
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if number in self._kept:
            self._kept.remove(number)
            self._hand_over(number)
            return
        self._kept.append(number)
        os.write(2, _SAID)  # the signal may have interrupted a print()


def _handled(number: int) -> bool:
    return callable(signal.getsignal(number))


@dataclass(frozen=True)
class Checkpoint:
    """The file `folder`/state. It is used only with the key and the runtime of the training that wrote it.

    It is written every `every` epochs, and at the next step after one of the `signals` asks for an end. `runtime` is
    the kind of device, the processor, threads, compiled or not, and torch's version. They change the last bits of a
    result, so the checkpoint of another runtime is not used. Nor is one after a guide was trained again: `guides` is
    Store.weights_of_guides().
    """

    folder: Path
    stage: Stage
    runtime: dict[str, Any]
    every: int
    signals: Deferred = field(default_factory=Deferred)
    guides: str = ""

    def load(self) -> dict[str, Any] | None:
        """The state to resume from. None if there is no checkpoint, or if it does not fit: then a line says why."""
        who = f"{self.stage.role} {self.stage.model}"
        try:
            state = self._read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            print(f"{who}: the checkpoint {error}; training starts from the first epoch", flush=True)
            return None
        steps = state["begun"]["steps"]
        place = f"epoch {len(state['history'])}" + (f" and {steps} steps" if steps else "")
        print(f"{who}: resuming after {place}", flush=True)
        return state

    def _read(self) -> dict[str, Any]:
        """Raises ValueError with what is wrong with the checkpoint."""
        import torch

        content = (self.folder / "state").read_bytes()
        digest, content = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("is damaged")
        record = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        if record["stage"]["key"] != self.stage.key:  # a stage is the same one as a teacher and as a student
            raise ValueError("belongs to another stage")
        if record["runtime"] != (self.runtime if "guides" in record else self._runtime_of_earlier_versions()):
            raise ValueError("was written with another processor, number of threads, runtime.compile or torch")
        if record.get("guides", self.guides) != self.guides:
            raise ValueError("was written with other weights of the guide")
        state: dict[str, Any] = record["state"]
        return state

    def _runtime_of_earlier_versions(self) -> dict[str, Any]:
        """They had the first of the processor's instruction sets alone, and did not write the guides."""
        return {name: value.split(", ")[0] if name == "processor" else value for name, value in self.runtime.items()}

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint. At every moment there is a complete one on disk."""
        import torch

        content = BytesIO()
        record = {"stage": {"key": self.stage.key}, "runtime": self.runtime, "guides": self.guides, "state": state}
        torch.save(record, content)
        try:
            files.make(self.folder)
            with files.replacing(self.folder / "state") as file:
                file.write(hashlib.sha256(content.getbuffer()).digest())
                file.write(content.getbuffer())
        except OSError as error:
            raise KnownError(f"cannot write a checkpoint: {error}") from error
