"""SIGKILL at random moments, hundreds of times: the final files are the same as those of an undisturbed run.

`make torture` runs it and writes results/torture.json, which docs/reliability.md shows.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from kd.store import Store
from kd.store.housekeeping import collect
from tests.conftest import QUICK, ROOT

ROUNDS = int(os.environ.get("KD_TORTURE_ROUNDS", "101"))  # kills of each kind of run
EPOCHS, EVERY = 8, 2
COMMON = (*QUICK, f"train.epochs={EPOCHS}", f"runtime.checkpoint_every={EVERY}")
CHAIN = (*COMMON, "method=ta", "method.assistants=[plane4]", "teacher=plane6", "hydra.run.dir=out")
SWEEP = (
    *("-m", "method=kd", "method.T=1,4", "seed=0,1", "hydra.sweep.dir=out", *COMMON),
    *("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
)
KEY = "[0-9a-f]" * 16


@dataclass
class Record:
    """The outcome of the kills of one kind of run."""

    kills: int = 0
    finished: int = 0  # runs that came to their end, each compared with the undisturbed one
    resumed: int = 0  # stages that went on after a checkpoint
    by_phase: Counter[str] = field(default_factory=Counter)
    epochs_lost: list[int] = field(default_factory=list)  # of stages that a kill met


@dataclass
class Place:
    """The folders of a run, and their content before it was started."""

    folder: Path
    before: set[str] = field(default_factory=set)  # temporary files that earlier kills left
    checkpoints: dict[str, int] = field(default_factory=dict)  # by key, after how many epochs

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def start(self, command: tuple[str, ...]) -> subprocess.Popen[str]:
        """Start the run in its own process group, which includes its workers."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)  # so that what is logged is this round's
        self.before = self.temporaries()
        self.checkpoints = {path.name: checkpointed(path) for path in self.store.glob(f"partial/{KEY}")}
        environment = {**os.environ, "KD_STORE": str(self.store), "OMP_NUM_THREADS": "1"}
        with (self.folder / "said").open("w") as said:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *command],
                cwd=self.folder, env=environment, stdout=said, stderr=said, start_new_session=True, text=True,
            )  # fmt: skip

    def temporaries(self, pattern: str = "*") -> set[str]:
        """What is being written: `.<key>.*` is a stage, partial/<key>/.state.* a checkpoint."""
        found = {"stage": self.store.glob(".[0-9a-f]*.new"), "checkpoint": self.store.glob("partial/*/.state.*")}
        try:
            return {str(path) for kind in found if pattern in ("*", kind) for path in found[kind]}
        except FileNotFoundError:  # a folder went while it was looked into
            return self.temporaries(pattern)

    def writing(self, pattern: str = "*") -> bool:
        """Whether this run is about to write a stage or a checkpoint."""
        return bool(self.temporaries(pattern) - self.before)

    def logged(self) -> dict[str, int]:
        """The number of epochs of each stage that this run has printed."""
        told: dict[str, int] = {}
        for line in "".join(path.read_text() for path in (self.folder / "out").rglob("metrics.jsonl")).splitlines():
            with suppress(ValueError):  # the last line may be half of one
                row = json.loads(line)
                told[row["key"]] = max(told.get(row["key"], 0), row["epoch"])
        return told

    def finished(self) -> dict[str, tuple[int, bytes, bytes]]:
        """By key: which file the record is (publishing again makes another), and the bytes of weights and metrics."""
        found = {}
        for folder in self.store.glob(KEY):
            files = [folder / name for name in ("stage.json", "model.safetensors", "metrics.jsonl")]
            found[folder.name] = (files[0].stat().st_ino, files[1].read_bytes(), files[2].read_bytes())
        return found

    def phase(self) -> str:
        """What a killed run was doing."""
        if self.writing("stage"):
            return "publishing a stage"
        if self.writing("checkpoint"):
            return "writing a checkpoint"
        return "training" if self.logged() else "starting, or before the first epoch's end"

    def lost(self) -> list[int]:
        """For each unfinished stage of this run: the printed epochs that are in no checkpoint."""
        trained = {key: epoch for key, epoch in self.logged().items() if not (self.store / key).exists()}
        return [epoch - checkpointed(self.store / "partial" / key) for key, epoch in trained.items()]


def checkpointed(folder: Path) -> int:
    """The number of whole epochs in the checkpoint of an unfinished stage."""
    if not (folder / "state").exists():
        return 0
    record = torch.load(BytesIO((folder / "state").read_bytes()[32:]), weights_only=True)
    return len(record["state"]["history"])


def resumed(checkpoints: dict[str, int], logged: Collection[str], said: str) -> int:
    """How many stages were resumed. Fails if a stage with a checkpoint was trained from the first epoch."""
    expected = Counter(epoch for key, epoch in checkpoints.items() if epoch and key in logged)
    told = Counter(int(epoch) for epoch in re.findall(r"resuming after epoch (\d+)\n", said))
    assert not expected - told, f"checkpoints after {dict(expected)} epochs, and it went on after {dict(told)}"
    assert told.keys() <= set(checkpoints.values())
    return told.total()


def test_a_checkpoint_that_nobody_takes_up_is_noticed() -> None:
    assert resumed({"a": 4, "b": 0, "c": 2}, {"a", "b"}, "student plane2: resuming after epoch 4\n") == 1
    with pytest.raises(AssertionError):
        resumed({"a": 4}, {"a"}, "")
    with pytest.raises(AssertionError):
        resumed({"a": 4}, {"a"}, "student plane2: resuming after epoch 2\n")


def moment(process: subprocess.Popen[str], place: Place, chance: random.Random, longest: float) -> bool:
    """Wait for the moment of the kill. False if the run ends before it.

    Half of the moments are drawn evenly over an undisturbed run's time; the others come as a stage is published or a
    checkpoint is written, which takes milliseconds that few drawn moments would hit.
    """
    sought = chance.choice([None, None, "stage", "checkpoint"])
    drawn = time.monotonic() + chance.uniform(0, longest)
    while process.poll() is None:
        if place.writing(sought) if sought else time.monotonic() > drawn:
            time.sleep(chance.choice([0, 0.001, 0.003]))
            return True
        time.sleep(0.002 if sought else 0.01)
    return False


def workers(pid: int) -> list[int]:
    """The worker processes of a parallel sweep."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    pids = list(map(int, children.read_text().split())) if children.exists() else []
    return [child for child in pids if b"popen_loky" in Path(f"/proc/{child}/cmdline").read_bytes()]


def kill(process: subprocess.Popen[str], chance: random.Random) -> bool:
    """Kill the whole run, or sometimes one worker, as if it were out of memory. Returns whether it was a worker."""
    one = chance.random() < 0.25 and workers(process.pid)
    if one:
        os.kill(chance.choice(one), signal.SIGKILL)
        process.wait()  # its launcher gives up
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return bool(one)


@pytest.mark.torture
@pytest.mark.parametrize(("name", "command", "stages"), [("chain", CHAIN, 3), ("sweep", SWEEP, 5)])
def test_kills_leave_no_trace(name: str, command: tuple[str, ...], stages: int, tmp_path: Path) -> None:
    calm, place = Place(tmp_path / "calm"), Place(tmp_path / "killed")
    calm.folder.mkdir()
    place.folder.mkdir()
    began = time.monotonic()
    assert calm.start(command).wait() == 0, calm.said
    longest = time.monotonic() - began
    expected = {key: rest for key, (_, *rest) in calm.finished().items()}
    assert len(expected) == stages
    record, chance = Record(), random.Random(name)
    known: dict[str, int] = {}
    while record.kills < ROUNDS or known:
        process = place.start(command)
        killed = record.kills < ROUNDS and moment(process, place, chance, longest)
        alone = killed and kill(process, chance)
        code = process.wait()
        there = place.finished()
        for key, (inode, *rest) in there.items():
            assert rest == expected[key], f"{key} has other bits after {record.kills} kills"
            assert known.setdefault(key, inode) == inode, f"{key} was published twice"
        assert known.keys() <= there.keys()
        assert alone or "Traceback" not in place.said, place.said
        record.resumed += resumed(place.checkpoints, place.logged(), place.said)
        if killed:
            record.kills += 1
            record.by_phase[place.phase() + (" (one worker)" if alone else "")] += 1
            record.epochs_lost += place.lost()
            assert all(0 <= lost <= EVERY for lost in record.epochs_lost), record.epochs_lost
            continue
        assert code == 0, place.said
        assert there.keys() == expected.keys()
        no_traces(place.store)
        record.finished += 1
        shutil.rmtree(place.folder)
        place.folder.mkdir()
        known = {}
    assert record.resumed
    keep(name, record)


def no_traces(store: Path) -> None:
    """No lock is held. After `gc` there are no temporary files, and no notes of ended lock holders."""
    for path in store.glob(".locks/*.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout as error:
            raise AssertionError(f"{path} is held by nobody that lives") from error
    list(collect(Store(store), days=30, dry=False))
    assert not list(store.glob(".locks/*.holder"))
    names = {path.name for path in store.iterdir()}
    assert not {name for name in names if name.startswith(".")} - {".locks"}, names
    assert not list(store.glob("partial/*")), list(store.glob("partial/*"))
    assert not (store / "damaged").exists()


def keep(name: str, record: Record) -> None:
    """Write results/torture.json."""
    path = ROOT / "results" / "torture.json"
    with FileLock(path.with_suffix(".lock")):
        known = json.loads(path.read_text()) if path.exists() else {}
        lost = Counter(record.epochs_lost)
        known[name] = {
            "kills": record.kills,
            "runs finished and compared": record.finished,
            "stages that went on after a checkpoint": record.resumed,
            "kills by phase": dict(record.by_phase.most_common()),
            "unfinished stages by epochs lost": {str(epochs): lost[epochs] for epochs in sorted(lost)},
            "checkpoint_every": EVERY,
        }
        path.write_text(json.dumps(known, indent=2) + "\n")
    path.with_suffix(".lock").unlink(missing_ok=True)
