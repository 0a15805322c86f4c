"""An unfinished stage's state, so that a training goes on where its last checkpoint left it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from kd.spec import KnownError
from kd.stage import Stage


@dataclass(frozen=True)
class Partial:
    """`folder`/state.pt, written every `every` epochs and taken up only under the key and runtime it began with.

    `runtime` is the kind of device, threads, compiled or not, and torch's version: they move the last bits of a
    result, so a state that began under others is not continued.
    """

    folder: Path
    stage: Stage
    runtime: dict[str, Any]
    every: int

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None, with a line that says why, where there is none that fits."""
        import torch

        path = self.folder / "state.pt"
        if not path.exists():
            return None
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
            fits = record["key"] == self.stage.key and record["runtime"] == self.runtime
        except (OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
            self._start_again(f"its checkpoint cannot be read ({type(error).__name__})")
            return None
        if not fits:
            others = "device, number of threads, runtime.compile or torch"
            self._start_again(f"its checkpoint was made under another {others}")
            return None
        state: dict[str, Any] = record["state"]
        print(f"{self.stage.role} {self.stage.model}: going on after epoch {state['epoch']}", flush=True)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by a newer one, at no moment leaving none or half of one."""
        import torch

        path = self.folder / "state.pt"
        partial = path.with_suffix(f".{os.getpid()}")
        record = {"key": self.stage.key, "runtime": self.runtime, "state": state}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(record, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise KnownError(f"cannot write a checkpoint: {error}") from error

    def remove(self) -> None:
        """Forget the state: the stage is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_again(self, reason: str) -> None:
        print(f"{self.stage.role} {self.stage.model}: {reason}; it is trained from the start", flush=True)
