"""The processes that search a study. Each holds a lock file in the store, which is released when it ends."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from kd.core import files
from kd.core.spec import KnownError


class Locks:
    """The locks of this process while it searches: its own, and the study's unless it only joins."""

    process: ClassVar[str] = ""  # the name of this process

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, uuid.uuid4().hex
        self._held = ExitStack()

    def enter(self, study: str, join: bool) -> None:
        """Take the locks until the process ends. Raises KnownError, with the holder, if the study's is taken."""
        owner = self._folder / "owner.lock"
        if not join and not self._held.enter_context(files.hold_lock(owner, None)):
            raise KnownError(
                f"the study {study} is being searched by {files.lock_holder(owner)}; sweep.join=true adds trials"
            )
        Locks.process = self._name
        self._held.enter_context(files.hold_lock(self._own(self._name), None))

    def leave(self) -> None:
        """Release the locks."""
        self._held.close()
        self._own(self._name).unlink(missing_ok=True)

    def alive(self, process: str | None) -> bool:
        """Whether the process is still searching. The system releases its lock however it ends."""
        if process is None or not (path := self._own(process)).exists():
            return False
        with files.hold_lock(path, None) as gone:
            if gone:
                path.unlink(missing_ok=True)
            return not gone

    def _own(self, process: str) -> Path:
        return self._folder / f"{process}.lock"
