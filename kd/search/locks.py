"""Who is searching a study: locks that go with their process, on every machine that shares the store."""

from __future__ import annotations

import json
import os
import socket
import uuid
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout

from kd.spec import KnownError


class Locks:
    """What this process holds while it searches: a lock of its own, and the study's unless it only joins."""

    process: ClassVar[str] = ""  # the name of this one

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[FileLock] = []
        folder.mkdir(parents=True, exist_ok=True)

    def enter(self, study: str, join: bool) -> None:
        """Hold them until the process ends. Raises KnownError, saying who, where another process sweeps the study."""
        owner = self._folder / "owner.json"
        if not join:
            lock = FileLock(self._folder / "owner.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                who = json.loads(owner.read_text()) if owner.exists() else {}
                named = f"process {who['pid']} on {who['host']}, since {who['since']}" if who else "another process"
                raise KnownError(
                    f"the study {study} is being searched by {named}; sweep.join=true adds trials beside it"
                ) from error
            self._held.append(lock)
            since = datetime.now().isoformat(" ", "seconds")
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        Locks.process = uuid.uuid4().hex
        own = FileLock(self._folder / f"{Locks.process}.lock")
        own.acquire()
        self._held.append(own)

    def leave(self) -> None:
        """Hold nothing any more."""
        for lock in self._held:
            lock.release()
        (self._folder / f"{Locks.process}.lock").unlink(missing_ok=True)

    def alive(self, process: str | None) -> bool:
        """Whether the process is still searching; its lock goes with it, however it ends."""
        path = self._folder / f"{process}.lock"
        if process is None or not path.exists():
            return False
        try:
            FileLock(path).acquire(timeout=0).lock.release()
        except Timeout:
            return True
        path.unlink(missing_ok=True)
        return False
