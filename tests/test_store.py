"""The store: stages are complete or absent, are trained once, and give their networks back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kd
from kd.core.spec import KnownError
from kd.store import StageResult, Store, TrainedStage
from kd.training.step import make_network
from tests.conftest import QUICK, ROOT
from tests.test_stage import stage

RESULT = StageResult(params=78_042, val_acc=91.5, test_acc=90.25, epochs=2, selected_epoch=1, seconds=3.5)


def trained() -> TrainedStage:
    state = make_network(stage(), "cpu").network.state_dict()
    return TrainedStage(state, [{"epoch": 1, "loss": 2.0, "val_acc": None}], RESULT)


def test_a_stage_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store, key = Store(tmp_path), stage().key
    assert not store.has(key)
    store.save(stage(), trained(), {"torch": "x"})
    assert store.has(key)
    assert store.result(key) == RESULT
    assert store.source(key) == stage()
    written = {"stage.json", "model.safetensors", "metrics.jsonl", "result.json", "SHA256SUMS"}
    assert {path.name for path in (tmp_path / key).iterdir()} == written
    assert [path.name for path in tmp_path.iterdir()] == [key]  # no temporary folder stays
    network = kd.load(key, tmp_path)
    assert not network.training
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        expected = make_network(stage(), "cpu").eval()(images)
        torch.testing.assert_close(network(images), expected)
        torch.testing.assert_close(network(images / 255), expected)


def test_the_line_that_loads_a_network_names_a_store_that_is_not_the_usual_one(tmp_path: Path) -> None:
    assert Store.at().loading("0123") == 'kd.load("0123")'
    other = Store(tmp_path / 'a "b"')
    other.save(stage(), trained(), {})
    assert list(eval(other.loading(stage().key), {"kd": kd}).parameters())  # as it would be pasted


def test_load_finds_the_store_of_the_environment(tmp_path: Path) -> None:
    Store(tmp_path / "store").save(stage(), trained(), {})  # $KD_STORE, set for every test
    assert sum(p.numel() for p in kd.load(stage().key).parameters()) == 78_042
    assert sum(p.numel() for p in kd.load(stage().key[:6]).parameters()) == 78_042  # as `python -m kd.store` takes it
    with pytest.raises(KnownError, match="zz: should be the key of one finished stage"):
        kd.load("zz")


def test_an_empty_key_is_no_stage(tmp_path: Path) -> None:
    """Every key begins with it: `rm "$KEY"` without the variable would remove the only stage."""
    with pytest.raises(KnownError, match="an empty text: should be the key of one finished stage"):
        Store(tmp_path).complete("")


def test_saving_again_replaces(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(stage(), trained(), {})
    again = TrainedStage(trained().state, [], RESULT.model_copy(update={"seconds": 9.0}))
    store.save(stage(), again, {})
    assert store.result(stage().key).seconds == 9.0
    assert [path.name for path in tmp_path.iterdir()] == [stage().key]


WORKER = """
import runpy, sys, time
from pathlib import Path
import kd.training.loop
from kd.training.loop import train_stage

folder, name = Path(sys.argv[1]), sys.argv[2]

def logged(stage, **rest):
    with (folder / "starts").open("a") as log:
        log.write(f"{name} {stage.role}\\n")
    time.sleep(1)  # long enough for the other process to come to the lock
    return train_stage(stage, **rest)

kd.training.loop.train_stage = logged
(folder / f"ready-{name}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
sys.argv = [sys.argv[3], f"hydra.run.dir={folder / name}", *sys.argv[4:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_names_may_share_one_tensor(tmp_path: Path) -> None:
    """As in a network whose layers are tied; safetensors refuses to write it."""
    shared = torch.arange(3.0)
    Store(tmp_path).save(stage(), TrainedStage({"a": shared, "b": shared}, [], RESULT), {})
    written = load_file(tmp_path / stage().key / "model.safetensors")
    assert torch.equal(written["a"], shared)
    assert torch.equal(written["b"], shared)


@pytest.mark.slow
def test_two_processes_train_each_stage_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen(
            [*command, name, str(ROOT / "run.py"), *QUICK],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"ready-{name}").exists() for name in ("one", "two")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "go").touch()
    output = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], output
    starts = (tmp_path / "starts").read_text().split("\n")[:-1]
    assert sorted(line.split()[1] for line in starts) == ["student", "teacher"]
    assert any("is being trained by another process" in out for out, _ in output)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [[s["test_acc"] for s in r["chain"]] for r in results] == [[s["test_acc"] for s in results[0]["chain"]]] * 2
    reused = [s["reused"] for r in results for s in r["chain"]]
    assert sorted(reused) == [False, False, True, True]
