"""Damaged stages are found, moved aside and trained again; locks, and what happens without them."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import kd
from kd.core import files
from kd.core.spec import KnownError
from kd.store import Store
from tests.conftest import QUICK, ROOT, run_py
from tests.test_faults import KEY, save
from tests.test_stage import stage

Job = Callable[..., Any]
NAMES = ("stage.json", "model.safetensors", "metrics.jsonl", "result.json", "SHA256SUMS")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    save(tmp_path / "store", 1)
    return Store(tmp_path / "store")


def set_aside(store: Store, reason: str, output: str) -> None:
    assert f"stage {KEY} is damaged ({reason}): it is moved to {store.damaged / KEY}-" in output
    assert output.count("\n") == 1
    assert len(list(store.damaged.iterdir())) == 1
    assert not (store.root / KEY).exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_found(store: Store, name: str) -> None:
    path = store.root / KEY / name
    content, rng = path.read_bytes(), random.Random(0)
    assert store.problem(KEY) is None
    for _ in range(200):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert store.problem(KEY) is not None
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert store.problem(KEY) is not None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["flipped", "empty", "gone", "a folder"])
def test_a_damaged_stage_is_set_aside(store: Store, name: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = store.root / KEY / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "empty":
        path.touch()
    elif how == "a folder":
        path.mkdir()
    differs = f"{name} does not " + ("list the stage's files" if name == "SHA256SUMS" else "match its checksum")
    reason = {"gone": f"it has no {name}", "a folder": f"{name} cannot be read: Is a directory"}
    assert not store.whole(KEY)
    readers = {"stage.json": store.source, "result.json": store.result, "model.safetensors": store.fingerprint}
    if name in readers:
        with pytest.raises(KnownError, match=f"stage {KEY} is damaged"):
            readers[name](KEY)
    assert (store.root / KEY).exists()  # reading moves nothing
    with store.lock(KEY):
        set_aside(store, reason.get(how, differs), capsys.readouterr().out)


def test_a_copy_under_another_key_is_no_stage(store: Store) -> None:
    other = "0123456789abcdef"
    (store.root / KEY).rename(store.root / other)
    assert store.problem(other) == f"it is a copy of {KEY}"


def test_what_may_not_be_read_is_not_set_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """root may read everything, so the refusal is simulated."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(KnownError, match=f"stage {KEY} cannot be read: .*Permission denied"):
        store.whole(KEY)
    with pytest.raises(KnownError, match="cannot be read"), store.lock(KEY):
        pass
    assert not store.damaged.exists()


def test_a_read_only_store_gives_what_it_has(store: Store) -> None:
    shutil.rmtree(store.root / ".locks")
    store.root.chmod(0o500)
    if os.access(store.root, os.W_OK):
        pytest.skip("who runs this may write anywhere, as root does")
    assert store.whole(KEY)
    with pytest.raises(KnownError, match=r"cannot write to the store: .*Permission denied"), store.lock(KEY):
        pass
    store.root.chmod(0o700)


def test_a_run_trains_a_damaged_stage_again_to_the_same_bits(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = (each["key"] for each in job()["chain"])
    weights = tmp_path / "store" / teacher / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1])
    with pytest.raises(KnownError, match=r"is damaged \(model.safetensors does not match its checksum\)"):
        kd.load(teacher)
    capsys.readouterr()
    job("dry_run=true")
    assert "1 of 2 stages to train" in capsys.readouterr().out
    assert not (tmp_path / "store" / "damaged").exists()
    again = job(folder="again")
    assert [each["reused"] for each in again["chain"]] == [False, True]
    assert weights.read_bytes() == before
    assert f"stage {teacher} is damaged" in capsys.readouterr().out
    assert student in set(Store(tmp_path / "store"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_no_stage(tmp_path: Path) -> None:
    """A real file system of 200 kB, in its own mount namespace."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=200k none {disk} && exec "
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*space, mount + "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here, not even in a namespace of one's own")
    chosen = (*QUICK, "model=resnet8", "method=scratch", f"runtime.store={disk}", f"hydra.run.dir={tmp_path}/out")
    command = " ".join(f"'{part}'" for part in (sys.executable, str(ROOT / "run.py"), *chosen))
    done = subprocess.run([*space, mount + command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "No space left on device" in done.stderr


@pytest.mark.slow
def test_a_file_too_large_is_one_line_and_no_stage(tmp_path: Path) -> None:
    """A file size limit of the process, which needs no rights."""
    chosen = (*QUICK, "model=resnet8", "method=scratch", f"hydra.run.dir={tmp_path}/out")
    command = " ".join(f"'{part}'" for part in (sys.executable, str(ROOT / "run.py"), *chosen))
    limited = ["bash", "-c", f"ulimit -f 200 && exec {command}"]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name not in ("partial", ".locks")] == []


# locks ------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from kd.store import Store
with Store(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(root: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(root), KEY, str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_who_waits_is_told_for_whom(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(store.root, 1) as process, store.lock(KEY):
        waited = capsys.readouterr().out
    assert f"stage {KEY} is being trained by another process (pid {process.pid} on " in waited
    assert not store.lock_file(KEY).with_suffix(".holder").exists()


def test_a_killed_holder_holds_nothing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with hold(store.root, 60) as process:
        process.kill()
        process.wait()
    with store.lock(KEY):
        assert capsys.readouterr().out == ""


def test_a_store_that_vanishes_while_one_waits_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **kwargs: object) -> bool:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(store.lock_file(KEY)))

    monkeypatch.setattr(files.FileLock, "acquire", gone)
    with pytest.raises(KnownError, match=r"cannot write to the store: .*No such file"), store.lock(KEY):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(KnownError, match="is on a file system without locks") as caught, store.lock(KEY):
        pass
    assert "\n" not in str(caught.value)


UNLOCKED = """
import runpy, sys
from contextlib import contextmanager
from kd.core import files

@contextmanager
def nobody(path, waiting):
    yield True

files.hold_lock = nobody
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_without_locks_two_processes_end_in_one_whole_stage(tmp_path: Path) -> None:
    """The worst case: both processes train, and publish the same bits."""
    code = UNLOCKED.replace("runpy.run", f"sys.argv = {[str(ROOT / 'run.py'), *QUICK]!r} + sys.argv[1:]\nrunpy.run")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"hydra.run.dir={tmp_path / name}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one", "two")
    ]
    output = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], output
    assert not any("waiting" in each for each in output)
    store = Store(tmp_path / "store")
    assert len(list(store)) == 2
    assert all(store.whole(key) for key in store)
    assert not files.temporaries(store.root)
    run_py(*QUICK, f"runtime.store={tmp_path / 'alone'}", f"hydra.run.dir={tmp_path / 'three'}", cwd=tmp_path)
    for key in store:
        mine, theirs = (load_file(root / key / "model.safetensors") for root in (store.root, tmp_path / "alone"))
        assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


def test_another_who_publishes_meanwhile_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks, between the two renames."""
    rename = os.rename

    def other_first(source: Path, target: Path) -> None:
        rename(source, target)
        if str(target).endswith(".old"):
            monkeypatch.setattr(os, "rename", rename)
            other = Store(store.root.parent / "other")
            save(other.root, 7)
            rename(other.root / KEY, store.root / KEY)

    monkeypatch.setattr(os, "rename", other_first)
    save(store.root, 2)
    assert Store(store.root).result(KEY).seconds == 7
    assert Store(store.root).whole(KEY)
    assert not files.temporaries(store.root)


def test_what_another_process_writes_is_left_alone(store: Store) -> None:
    mine = files.temporary(store.root / stage().key)
    running = mine.with_name(mine.name.replace(f".{os.getpid()}@", f".{os.getppid()}@"))
    far = mine.with_name(f".{KEY}.1@another-host.new")
    for path in (mine, running, far):
        path.mkdir()
    with store.lock(KEY):
        assert [path.exists() for path in (mine, running, far)] == [False, True, True]
    os.utime(far, (0, 0))
    with store.lock(KEY):
        assert [path.exists() for path in (running, far)] == [True, False]
