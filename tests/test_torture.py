"""SIGKILL at random moments, hundreds of times: what is left at the end is what an undisturbed run leaves.

`make torture` runs it and writes results/torture.json, which docs/reliability.md shows.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from tests.conftest import QUICK, ROOT

ROUNDS = int(os.environ.get("KD_TORTURE_ROUNDS", "110"))  # kills of each kind of run
EPOCHS, EVERY = 8, 2
COMMON = (*QUICK, f"train.epochs={EPOCHS}", f"runtime.checkpoint_every={EVERY}")
CHAIN = ("method=ta", "method.assistants=[plane4]", "teacher=plane6", "hydra.run.dir=out", *COMMON)
SWEEP = (
    *("-m", "method=kd", "method.T=1,4", "seed=0,1", "hydra.sweep.dir=out", *COMMON),
    *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
)
KEY = "[0-9a-f]" * 16


@dataclass
class Record:
    """What came of the kills of one kind of run."""

    kills: int = 0
    finished: int = 0  # runs that came to their end, each compared with the undisturbed one
    by_phase: Counter[str] = field(default_factory=Counter)
    epochs_lost: list[int] = field(default_factory=list)  # by each kill within a stage


def start(folder: Path, command: tuple[str, ...]) -> subprocess.Popen[str]:
    """The run in a process group of its own, its workers included."""
    environment = {**os.environ, "KD_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *command],
            cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True, text=True,
        )  # fmt: skip


def finished(store: Path) -> dict[str, tuple[int, bytes, bytes]]:
    """By key: which file the record is (publishing again makes another), and the bytes of weights and metrics."""
    found = {}
    for folder in store.glob(KEY):
        files = [folder / name for name in ("stage.json", "model.safetensors", "metrics.jsonl")]
        found[folder.name] = (files[0].stat().st_ino, files[1].read_bytes(), files[2].read_bytes())
    return found


def phase(store: Path, out: Path) -> str:
    """What a run was at, by what it had open."""
    if list(store.glob(".*.new")):
        return "publishing a stage"
    if list(store.glob("partial/*/.state.*")):
        return "writing a checkpoint"
    if list(store.glob("partial/*/state")):
        return "training, after a checkpoint"
    if any(path.stat().st_size for path in out.rglob("metrics.jsonl")):
        return "training, before one, or between stages"
    return "starting"


def epochs_lost(store: Path, out: Path) -> list[int]:
    """Of each unfinished stage: how many epochs the run has told of that no checkpoint has."""
    told: dict[str, int] = {}
    for line in "".join(path.read_text() for path in out.rglob("metrics.jsonl")).splitlines():
        with suppress(ValueError):  # the last line may be half of one
            row = json.loads(line)
            told[row["key"]] = max(told.get(row["key"], 0), row["epoch"])
    return [told[key] - checkpointed(store / "partial" / key) for key in told if not (store / key).exists()]


def checkpointed(folder: Path) -> int:
    """How many whole epochs an unfinished stage goes on after."""
    if not (folder / "state").exists():
        return 0
    record = torch.load(BytesIO((folder / "state").read_bytes()[32:]), weights_only=True)
    return len(record["state"]["history"])


def watch(process: subprocess.Popen[str], folder: Path, chance: random.Random, longest: float) -> bool:
    """Wait for the moment of the kill. False where the run ends before it.

    Half of the moments are drawn evenly over an undisturbed run's time; the others come as a stage is published or a
    checkpoint is written, which takes milliseconds that few drawn moments would hit.
    """
    sought = chance.choice([None, None, ".*.new", "partial/*/.state.*"])
    moment = time.monotonic() + chance.uniform(0, longest)
    while process.poll() is None:
        if (sought and list((folder / "store").glob(sought))) or (not sought and time.monotonic() > moment):
            time.sleep(chance.choice([0, 0.001, 0.003]))
            return True
        time.sleep(0.001 if sought else 0.01)
    return False


@pytest.mark.torture
@pytest.mark.parametrize(("name", "command", "stages"), [("chain", CHAIN, 3), ("sweep", SWEEP, 5)])
def test_kills_leave_no_trace(name: str, command: tuple[str, ...], stages: int, tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    calm.mkdir()
    began = time.monotonic()
    assert start(calm, command).wait() == 0, (calm / "said").read_text()
    longest = time.monotonic() - began
    expected = {key: rest for key, (_, *rest) in finished(calm / "store").items()}
    assert len(expected) == stages
    record, chance, folder = Record(), random.Random(name), tmp_path / "killed"
    folder.mkdir()
    known: dict[str, int] = {}
    while record.kills < ROUNDS or known:
        process = start(folder, command)
        killed = record.kills < ROUNDS and watch(process, folder, chance, longest)
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
            record.kills += 1
        code = process.wait()
        there = finished(folder / "store")
        for key, (inode, *rest) in there.items():
            assert rest == expected[key], f"{key} has other bits after {record.kills} kills"
            assert known.setdefault(key, inode) == inode, f"{key} was published twice"
        assert known.keys() <= there.keys()
        said = (folder / "said").read_text()
        assert "Traceback" not in said or killed, said
        if killed:
            record.by_phase[phase(folder / "store", folder / "out")] += 1
            record.epochs_lost += epochs_lost(folder / "store", folder / "out")
            continue
        assert code == 0, said
        assert there.keys() == expected.keys()
        no_traces(folder / "store")
        record.finished += 1
        shutil.rmtree(folder)
        folder.mkdir()
        known = {}
    assert max(record.epochs_lost) <= EVERY
    keep(name, record)


def keep(name: str, record: Record) -> None:
    """Into results/torture.json."""
    path = ROOT / "results" / "torture.json"
    with FileLock(path.with_suffix(".lock")):
        _keep(path, name, record)
    path.with_suffix(".lock").unlink(missing_ok=True)


def _keep(path: Path, name: str, record: Record) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    lost = Counter(record.epochs_lost)
    known[name] = {
        "kills": record.kills,
        "runs finished and compared": record.finished,
        "kills by phase": dict(record.by_phase.most_common()),
        "unfinished stages by epochs lost": {str(epochs): lost[epochs] for epochs in sorted(lost)},
        "checkpoint_every": EVERY,
    }
    path.write_text(json.dumps(known, indent=2) + "\n")


def no_traces(store: Path) -> None:
    """No lock is held, and nothing half-done lies about."""
    for path in store.glob(".locks/*.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout as error:
            raise AssertionError(f"{path} is held by nobody that lives") from error
    names = {path.name for path in store.iterdir()}
    assert not {name for name in names if name.startswith(".")} - {".locks"}, names
    assert not list(store.glob("partial/*")), list(store.glob("partial/*"))
    assert not (store / "damaged").exists()
