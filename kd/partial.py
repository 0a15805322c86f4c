"""An unfinished stage's state, so that a training goes on where it was left."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from kd import files
from kd.signals import Deferred
from kd.spec import KnownError
from kd.stage import Stage

_DIGEST = hashlib.sha256().digest_size  # of what follows it in the file


@dataclass(frozen=True)
class Partial:
    """`folder`/state, taken up only under the spec and runtime it began with.

    It is written every `every` epochs, and at the next step where one of the `signals` asks for an end. `runtime` is
    the kind of device, threads, compiled or not, and torch's version: they move the last bits of a result, so a state
    that began under others is not continued.
    """

    folder: Path
    stage: Stage
    runtime: dict[str, Any]
    every: int
    signals: Deferred = field(default_factory=Deferred)

    def load(self) -> dict[str, Any] | None:
        """The state to go on from; None, with a line that says why, where there is none that fits."""
        who = f"{self.stage.role} {self.stage.model}"
        try:
            state = self._read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            print(f"{who}: its checkpoint {error}; it is trained from the start", flush=True)
            return None
        steps = state["begun"]["steps"]
        place = f"epoch {len(state['history'])}" + (f" and {steps} steps" if steps else "")
        print(f"{who}: going on after {place}", flush=True)
        return state

    def _read(self) -> dict[str, Any]:
        """Raises ValueError with what is wrong with the checkpoint."""
        import torch

        content = (self.folder / "state").read_bytes()
        digest, content = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("is damaged")
        record = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        if record["stage"] != self._identity():
            raise ValueError("is another stage's")
        if record["runtime"] != self.runtime:
            raise ValueError("was made under another processor, number of threads, runtime.compile or torch")
        state: dict[str, Any] = record["state"]
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by a newer one, at no moment leaving none or half of one."""
        import torch

        content = BytesIO()
        torch.save({"stage": self._identity(), "runtime": self.runtime, "state": state}, content)
        try:
            files.make(self.folder)
            with files.replacing(self.folder / "state") as file:
                file.write(hashlib.sha256(content.getbuffer()).digest())
                file.write(content.getbuffer())
        except OSError as error:
            raise KnownError(f"cannot write a checkpoint: {error}") from error

    def _identity(self) -> dict[str, Any]:
        return {"key": self.stage.key, **self.stage.dump()}
