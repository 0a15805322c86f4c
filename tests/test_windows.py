"""What Windows lacks, taken away: signals, folders that can be opened, fork, and calls of POSIX."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kd.core import files
from kd.datasets import streamed
from tests.conftest import QUICK, ROOT

# Read by every process before anything else. os.open() refuses folders, and fsync() what cannot be written.
LACKS = """
import errno, os, signal, multiprocessing

for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "pthread_sigmask", "sigwait", "setitimer"):
    delattr(signal, name)
for name in ("pwrite", "pread", "preadv", "fdatasync", "sched_getaffinity", "O_DIRECTORY"):
    delattr(os, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]

def open_(path, flags, *rest, really=os.open, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return really(path, flags, *rest, **options)

def fsync(descriptor, really=os.fsync):
    import fcntl
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    really(descriptor)

def kill(pid, number):
    raise AssertionError("os.kill(pid, 0) is Ctrl-C on Windows")

os.open, os.fsync, os.kill = open_, fsync, kill
"""


@pytest.mark.slow
def test_a_run_trains_and_its_store_is_whole(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LACKS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def ran(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout

    assert 'kd.load("' in ran(str(ROOT / "run.py"), *QUICK, "runtime.checkpoint_every=1", "hydra.run.dir=out")
    assert "2 stages" in ran("-m", "kd.store", "verify")


def test_a_folder_that_cannot_be_opened_or_forced_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    really = os.open

    def opened(path: Any, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, flags)

    monkeypatch.setattr(os, "open", opened)
    files.settle(tmp_path)
    monkeypatch.undo()

    def refused(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")  # a folder of a network file system

    monkeypatch.setattr(os, "fsync", refused)
    files.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "file")


def test_a_file_that_cannot_be_opened_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    def refused(path: Any, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        files.sync(tmp_path / "file")


def test_no_process_is_asked_whether_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = files.temporary(tmp_path / "stage")
    leftover.touch()
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(os, "kill", None)
    assert not files.abandoned(leftover)
    os.utime(leftover, (0, 0))
    assert files.abandoned(leftover)


def test_workers_start_without_fork_and_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "pthread_sigmask")
    with streamed._signals_held():
        pass
    made: list[Any] = []

    def loader(*arguments: object, **options: Any) -> list[object]:
        made.append(options["multiprocessing_context"])
        return []

    monkeypatch.setattr(streamed, "DataLoader", loader)
    for methods, context in ((["spawn"], None), (["fork", "spawn"], "fork")):
        monkeypatch.setattr(streamed, "get_all_start_methods", lambda methods=methods: methods)
        monkeypatch.setattr(streamed, "_fitting", lambda workers, size: workers)
        assert list(streamed._by_workers(Two(), 2)) == []  # type: ignore[arg-type]
        assert made.pop() == context


class Two:
    """Two parts of photographs."""

    class spec:  # noqa: N801
        image_size = 8

    def __len__(self) -> int:
        return 2
