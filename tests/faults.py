"""Fault injection: one of the calls that change files fails, once, from there on, or as if the process had died."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kd.core.spec import KnownError

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
FAULTS = ("ENOSPC", "EIO", "EACCES", "EROFS from there on", "crash")


class CrashError(BaseException):
    """Not caught by `except Exception`, like a kill."""


class _Written:
    """A file with writes that may fail half done."""

    def __init__(self, file: Any, enter: Callable[[str], None]) -> None:
        self._file, self._enter = file, enter

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        try:
            self._enter("write")
        except BaseException:
            self._file.write(data[: len(data) // 2])
            raise
        return int(self._file.write(data))


class Faults:
    """The calls made within `injected`, by name and place; call number `at` fails."""

    def __init__(self, at: int | None = None, fault: str = "") -> None:
        self.calls: list[str] = []
        self._at, self._fault = at, fault

    def enter(self, call: str, path: object = "") -> None:
        number = len(self.calls)
        name = re.sub(r"\d+@[^/]*\.", "<pid>.", os.path.basename(str(path)))
        self.calls.append(f"{call} {name}".strip())
        if self._at is None or number < self._at:
            return
        if self._fault == "crash":
            raise CrashError(self.calls[self._at])
        if number == self._at or self._fault.endswith("on"):
            number = getattr(errno, self._fault.split()[0])
            raise OSError(number, os.strerror(number))

    @contextmanager
    def injected(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            for module in (builtins, io):
                patch.setattr(module, "open", self._open(io.open))
            yield

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *rest: Any, **options: Any) -> Any:
            self.enter(name, "" if name == "fsync" else path)
            return None if name == "fsync" else call(path, *rest, **options)  # nothing here needs a disk

        return watched

    def _open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return call(path, mode, *rest, **options)
            self.enter("open", path)
            return _Written(call(path, mode, *rest, **options), self.enter)

        return watched


def _outcome(work: Callable[[], object], faults: Faults) -> BaseException | None:
    try:
        with faults.injected():
            work()
    except (KnownError, CrashError) as error:
        return error
    return None


def every_fault(
    work: Callable[[], object], fresh: Callable[[], None], check: Callable[[], None]
) -> tuple[list[str], int]:
    """Fail each call that `work` makes in each way, from a `fresh` start, and `check` what is left.

    Returns the calls, and how many failures were injected. An error may be overcome, or ends as one of `KnownError`.
    """
    fresh()
    undisturbed = Faults()
    with undisturbed.injected():
        work()
    for at, call in enumerate(undisturbed.calls):
        for fault in FAULTS:
            fresh()
            print(f"{fault} at call {at}, {call}")  # pytest shows it of a test that fails
            error = _outcome(work, Faults(at, fault))
            assert (fault == "crash") == isinstance(error, CrashError)
            assert "\n" not in str(error)
            check()
    return undisturbed.calls, len(undisturbed.calls) * len(FAULTS)
