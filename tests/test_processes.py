"""runtime.processes: how many processes train students side by side, and that a run is the same but for its time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig

from kd.app import jobs
from kd.app.parsing import parse
from kd.core import hardware
from kd.core.spec import KnownError
from kd.training import forecast
from kd.training.children import _Child
from kd.training.ranks import World
from kd.training.workplace import RuntimeSpec
from tests.conftest import QUICK, ROOT, composed
from tests.test_launchers import in_job
from tests.test_signals import interrupted
from tests.test_vary import students

RunJob = Callable[..., Any]
PAIR = (*QUICK, "replicates=2", "train.epochs=1")
FORCED, OUT = "runtime.processes=2", "hydra.run.dir=out"

# their number --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "threads", "students", "processors", "device", "room", "expected"),
    [
        (None, None, 4, 8, "cpu", None, 1),  # make demo: the bits of before
        (None, 1, 4, 2, "cpu", None, 2),
        (None, 1, 4, 8, "cpu", None, 4),  # at most the students
        (None, 2, 8, 8, "cpu", None, 4),
        (None, 2, 8, 7, "cpu", None, 3),
        (None, 8, 8, 8, "cpu", None, 1),
        (None, 16, 8, 8, "cpu", None, 1),
        (None, 1, 8, 8, "cpu", 3, 3),  # as many as fit the memory
        (None, 1, 8, 8, "cpu", 100, 8),
        (None, 1, 8, 8, "cpu", 0, 1),  # the check of the memory is another one's
        (None, 1, 4, 8, "cuda", None, 1),
        (None, 1, 4, 8, "cuda:1", None, 1),
        (None, 1, 4, 8, "mps", None, 1),
        (None, 1, 0, 8, "cpu", None, 1),
        (3, 1, 8, 2, "cpu", 1, 3),  # asked for: neither processors nor memory count
        (3, None, 8, 2, "cpu", None, 3),
        (3, 1, 2, 8, "cpu", None, 2),
        (3, 1, 0, 8, "cpu", None, 1),
        (2, None, 4, 8, "cuda", None, 2),
        (1, 1, 4, 8, "cpu", None, 1),
    ],
)
def test_how_many(
    processes: int | None, threads: int | None, students: int, processors: int, device: str, room: Any, expected: int
) -> None:
    runtime = RuntimeSpec(processes=processes, threads=threads)
    assert runtime.processes_for(students, processors, device, room) == expected


@pytest.mark.parametrize(
    ("processes", "threads", "processors", "expected"),
    [
        (None, None, 8, None),
        (None, 3, 8, 3),
        (1, None, 8, None),
        (2, None, 8, 4),
        (3, None, 8, 2),
        (16, None, 8, 1),
        (2, 5, 8, 5),
    ],
)
def test_their_threads(processes: int | None, threads: int | None, processors: int, expected: int | None) -> None:
    assert RuntimeSpec(processes=processes, threads=threads).threads_of(processors) == expected


@pytest.mark.parametrize(
    ("launcher", "given", "threads", "processes"),
    [
        ("basic", {}, None, None),
        ("basic", {"processes": 3}, 4, 3),
        ("joblib", {}, 6, 1),  # its jobs are the processes
        ("joblib", {"threads": 2}, 2, 1),
        ("joblib", {"processes": 3}, 2, 3),
        ("joblib", {"processes": 3, "threads": 5}, 5, 3),
    ],
)
def test_in_a_sweep(
    launcher: str, given: dict[str, int], threads: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd.app.jobs.cpu_count", lambda: 12)
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: False)
    monkeypatch.setattr(HydraConfig, "get", lambda: in_job(0, launcher).hydra)
    shared = jobs.with_share(RuntimeSpec.model_validate(given))
    assert (shared.threads, shared.processes) == (threads, processes)


@pytest.mark.parametrize("processes", [None, 1, 2])
def test_under_torchrun_the_ranks_are_the_processes(processes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "world", lambda: World(0, 2, 0, 2))
    monkeypatch.setattr(HydraConfig, "get", lambda: in_job(0, "basic").hydra)
    if processes == 2:
        with pytest.raises(KnownError, match=r"^runtime.processes: should be 1 or null under torchrun \(got 2\)$"):
            jobs.with_share(RuntimeSpec(processes=processes))
    else:
        assert jobs.with_share(RuntimeSpec(processes=processes)).processes == processes


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "all", "true", "[1,2]", "1025"])
def test_what_is_no_number_is_one_line(value: str) -> None:
    with pytest.raises(KnownError, match=r"^runtime\.processes: should be ") as problem:
        parse(composed(f"runtime.processes={value}"))
    assert "\n" not in str(problem.value)


def test_the_memory_counts_the_images_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    few = students("replicates=2", "method=scratch")
    one = forecast.memory_of(few[0]) + 1797 * 3 * 16 * 16 + 640_000_000  # measured beside: bench/README.md
    for free, room in ((2 * one, 2), (2 * one - 1, 1), (one - 1, 0), (None, None)):
        monkeypatch.setattr(forecast, "free_memory", lambda device, free=free: free)
        assert forecast.room_for(few) == room


# what is printed -----------------------------------------------------------------------------------------------------


def test_every_line_names_a_network_and_its_seed() -> None:
    student = students("method=kd", "teacher=plane4", "vary=chain", "replicates=2")[1]
    child = _Child(None, student)  # type: ignore[arg-type]
    for line, shown in {
        "student plane2 s1  epoch 1/2": "student plane2 s1  epoch 1/2",
        "teacher plane4 s1: 9 epochs of 1,000 images": "teacher plane4 s1: 9 epochs of 1,000 images",
        "teacher plane4: resuming after epoch 1": "teacher plane4 s1: resuming after epoch 1",
        "student plane2: resuming after epoch 1": "student plane2 s1: resuming after epoch 1",
        "stage 0a is being trained by another": "student plane2 s1: stage 0a is being trained by another",
        "plane2: warning": "student plane2 s1: plane2: warning",
    }.items():
        assert child.named(line) == shown


# runs ----------------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, dict[str, bytes]]:
    """What a store has of each finished stage and does not depend on time, by key."""
    names = ("model.safetensors", "metrics.jsonl")
    return {
        path.parent.name: {name: (path.parent / name).read_bytes() for name in names}
        for path in folder.glob("*/result.json")
    }


@pytest.mark.slow
def test_the_bits_are_those_of_one_process(
    job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so are the table and the records. What students share is trained once."""
    run, said, results = ("train.epochs=1", "replicates=2", "baseline=true"), {}, {}
    for name, processes in (("one", 1), ("two", 2)):
        monkeypatch.setenv("KD_STORE", str(tmp_path / name / "store"))
        results[name] = job(*run, f"runtime.processes={processes}", folder=name)
        said[name] = capsys.readouterr().out
    one, two = (stored(tmp_path / name / "store") for name in ("one", "two"))
    assert len(one) == 5
    assert one == two
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == (tmp_path / "two" / "metrics.jsonl").read_text()
    assert said["two"].count("2 processes of 1 thread train the 2 students\n") == 2  # and those of the baseline
    assert "processes of" not in said["one"]
    assert said["two"].count("teacher plane4 s0  epoch 1/1") == 1
    for seed in (0, 1):
        assert len(re.findall(rf"^student plane2 s{seed}  epoch 1/1 .*images/s$", said["two"], re.MULTILINE)) == 2
    rows = [line.split() for line in said["two"].splitlines() if re.match("(teacher|student|alone) +plane[24] ", line)]
    assert [row[-1] for row in rows if len(row) == 9] == ["trained"] * 3
    assert results["one"]["replicates"] == results["two"]["replicates"]
    assert not [*(tmp_path / "two" / "store" / "partial").glob("*")]
    assert not (tmp_path / "two" / "status.json").exists()
    job(*run, "runtime.processes=2", folder="two")
    again = capsys.readouterr().out
    assert "processes of" not in again  # nothing is left to train
    assert re.search(r"student +plane2 .* reused", again)


@pytest.mark.slow
def test_chains_of_their_own_and_a_retraining(job: RunJob, capsys: pytest.CaptureFixture[str]) -> None:
    """vary=chain: nothing is shared. The stages are in the store already, and are trained again."""
    run = ("train.epochs=1", "replicates=2", "vary=chain")
    job(*run)
    capsys.readouterr()
    job(*run, "runtime.retrain=true", "runtime.processes=2")
    said = capsys.readouterr().out
    for name in ("teacher plane4", "student plane2"):
        for seed in (0, 1):
            assert said.count(f"{name} s{seed}  epoch 1/1") == 1
    assert " reused" not in said


@pytest.mark.slow
@pytest.mark.skipif(hardware.cpu_count() == 1, reason="needs two processors")
def test_without_a_number_of_threads_each_has_a_part(
    job: RunJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processors = hardware.cpu_count()
    run = ("method=scratch", "train.epochs=1", "replicates=2", "runtime.threads=null")
    job(*run, f"runtime.processes={processors}")
    assert f"runtime.processes={processors}: runtime.threads=1 in each\n" in capsys.readouterr().out
    records = [json.loads(path.read_text())["made_with"] for path in (tmp_path / "store").glob("*/stage.json")]
    assert [each["threads"] for each in records] == [1, 1]


LONG = (*PAIR, "method=scratch", FORCED, "runtime.checkpoint_every=1", "train.epochs=25")


def begun(folder: Path) -> Callable[[], bool]:
    """Whether two students have a checkpoint."""
    return lambda: len([*(folder / "store" / "partial").glob("*/state")]) == 2


@pytest.mark.slow
def test_an_interrupted_run_goes_on_at_its_steps(
    job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = interrupted(tmp_path, signal.SIGTERM, *LONG, OUT, after=begun(tmp_path))
    assert code == 143
    assert err == "interrupted: start the same command again to continue\n"
    for seed in (0, 1):
        assert f"student plane2 s{seed}: asked to end: writing a checkpoint first" in out
    assert not [*(tmp_path / "store" / ".locks").glob("*.holder")]  # they have ended before
    job(*LONG)
    assert capsys.readouterr().out.count(": resuming after epoch ") == 2
    monkeypatch.setenv("KD_STORE", str(tmp_path / "unbroken"))
    job(*LONG, "runtime.processes=1", folder="unbroken")
    assert stored(tmp_path / "store") == stored(tmp_path / "unbroken")
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("out", "unbroken")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_they_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    locks = tmp_path / "store" / ".locks"
    assert interrupted(tmp_path, signal.SIGKILL, *LONG, "train.epochs=1000", OUT, after=begun(tmp_path))[0] == -9
    end = time.monotonic() + 60
    while [*locks.glob("*.holder")]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert begun(tmp_path)()


def test_a_failure_of_one_is_the_run_s(job: RunJob, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job("method=scratch", "replicates=2", "runtime.processes=2", "train.lr=1e30", code=2)
    err = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(err) == 1, err
    assert re.fullmatch(r"student plane2: .* is (not finite|nan|inf) .*; try a lower train\.lr.*", err[0])
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.slow
def test_one_that_is_killed_ends_the_run_in_a_line(tmp_path: Path) -> None:
    run = (*LONG, "train.epochs=1000", OUT)
    locks = tmp_path / "store" / ".locks"
    command = [sys.executable, str(ROOT / "run.py"), *run]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (notes := [*locks.glob("*.holder")]):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(json.loads(notes[0].read_text())["pid"], signal.SIGKILL)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert re.fullmatch(
        r"student plane2 s[01]: its process was ended by SIGKILL; start the same command again to resume .*",
        err.strip(),
    )


SCRIPT = """
import kd
for method in ("scratch", "kd"):
    result = kd.run({run!r} + [f"method={{method}}"])
    print("seeds", [each.seed for each in result.students], len(result.chain))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_trains_with_them_too(tmp_path: Path) -> None:
    """multiprocessing would import it again in each process."""
    (tmp_path / "mine.py").write_text(SCRIPT.format(run=[*PAIR, FORCED, f"hydra.run.dir={tmp_path / 'out'}"]))
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("seeds")] == [
        "seeds [0, 1] 1",
        "seeds [0, 1] 2",
    ]
    assert done.stdout.count("2 processes of 1 thread train the 2 students") == 2
