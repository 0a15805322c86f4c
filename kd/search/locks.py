"""Who is searching a study: locks that go with their process, on every machine that shares the store."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from kd.spec import KnownError
from kd.store import locks


class Locks:
    """What this process holds while it searches: a lock of its own, and the study's unless it only joins."""

    process: ClassVar[str] = ""  # the name of this one

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, uuid.uuid4().hex
        self._held = ExitStack()

    def enter(self, study: str, join: bool) -> None:
        """Hold them until the process ends. Raises KnownError, saying who, where another process sweeps the study."""
        owner = self._folder / "owner.lock"
        if not join and not self._held.enter_context(locks.hold(owner, None)):
            raise KnownError(
                f"the study {study} is being searched by {locks.holder(owner)}; sweep.join=true adds trials beside it"
            )
        Locks.process = self._name
        self._held.enter_context(locks.hold(self._own(self._name), None))

    def leave(self) -> None:
        """Hold nothing any more."""
        self._held.close()
        self._own(self._name).unlink(missing_ok=True)

    def alive(self, process: str | None) -> bool:
        """Whether the process is still searching; its lock goes with it, however it ends."""
        if process is None or not (path := self._own(process)).exists():
            return False
        with locks.hold(path, None) as gone:
            if gone:
                path.unlink(missing_ok=True)
            return not gone

    def _own(self, process: str) -> Path:
        return self._folder / f"{process}.lock"
