"""A run of several ranks under torchrun: exact gradients, the same bits, output of rank 0 only, and a common end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from kd.app.config import plan
from kd.app.multirun import Multirun
from kd.app.parsing import parse
from kd.core.settings import TrainSpec
from kd.core.spec import KnownError
from kd.datasets import resolve
from kd.training.ranks import World, batches, own_device, share_of, world
from kd.training.step import resolve_compile
from tests.conftest import QUICK, ROOT, composed, run_py
from tests.test_every_loss import CHOSEN
from tests.test_stage import TRAIN, stage

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
EXACT = ("model=mlp", "method=scratch", "train.precision=fp64", "train.epochs=1")
LOST = "a rank has died"


def launch(*arguments: str, cwd: Path, multirun: bool = False) -> subprocess.Popen[str]:
    """run.py by two ranks."""
    command = [*TORCHRUN, str(ROOT / "run.py"), *(["-m"] if multirun else []), *QUICK, "hydra.run.dir=out", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)  # type: ignore[call-overload,no-any-return]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Exit code, output, and the lines of stderr that are ours, not torchrun's."""
    out, err = process.communicate(timeout=240)
    ours, _, last = err.rpartition("Traceback (most recent call last):")
    lines = (ours if "ChildFailedError" in last else err).splitlines()
    return process.returncode, out, [line for line in lines if not re.match(r"[WE]\d{4} ", line)]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's environment of rank 0 of two, without a second process."""
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)


def weights(store: Path, key: str) -> dict[str, torch.Tensor]:
    return dict(load_file(store / key / "model.safetensors"))


# parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shares_are_the_batch_and_differ_by_one_at_most(ranks: int) -> None:
    for samples in (7, 64, 129):
        parts = [share_of(slice(100, 100 + samples), rank, ranks) for rank in range(ranks)]
        assert np.r_[tuple(parts)].tolist() == list(range(100, 100 + samples))
        sizes = {part.stop - part.start for part in parts}
        assert max(sizes) - min(sizes) <= 1


def test_no_rank_is_left_with_one_sample_of_the_last_batch() -> None:
    assert [b.stop - b.start for b in batches(131, 128, 2)] == [128]
    assert [b.stop - b.start for b in batches(132, 128, 2)] == [128, 4]
    assert [b.stop - b.start for b in batches(11, 3, 2)] == [3, 3, 3]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's, which is none of ours
    assert world() == World(0, 1, 0, 1)


def test_without_torchrun_torch_distributed_is_not_asked(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    assert job("method=scratch", "train.epochs=1")["chain"][0]["reused"] is False


# what enters the key, and what is refused ---------------------------------------------------------------------------


def test_the_world_enters_the_key(two_ranks: None) -> None:
    config = parse(composed(*QUICK))
    [student] = plan(config, resolve(config.dataset, ROOT))
    assert {source.train.ranks for source in student.chain} == {2}  # type: ignore[union-attr]
    alone = stage(train=TrainSpec(**{**TRAIN.model_dump(), "ranks": 1}))
    assert alone.key == stage().key
    assert stage(train=TrainSpec(**{**TRAIN.model_dump(), "ranks": 2})).key != stage().key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.ranks=3",), "train.ranks=3 needs torchrun --nproc_per_node=3 (got 2 ranks)"),
        (("train.batch_size=1",), "train.batch_size: 2 ranks share each batch, so it should be at least 2 (got 1)"),
        (
            ("experiment=takd/cifar10/kd_resnet110_resnet8", "mode=reference"),
            "mode=reference needs the released code's train.ranks=1 (got 2)",
        ),
    ],
)
def test_what_two_ranks_cannot_do(two_ranks: None, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(KnownError, match=re.escape(message)):
        parse(composed(*overrides))


def test_a_number_of_ranks_needs_torchrun() -> None:
    with pytest.raises(KnownError, match=re.escape("train.ranks=2 needs torchrun --nproc_per_node=2 (got 1 rank)")):
        parse(composed("train.ranks=2"))


def test_ranks_do_not_compile() -> None:
    shared = stage(train=TrainSpec(**{**TRAIN.model_dump(), "ranks": 2, "precision": "bf16", "epochs": 10**6}))
    assert resolve_compile("auto", shared, 10**6, "cpu") is False
    with pytest.raises(KnownError, match=r"runtime.compile=true"):
        resolve_compile(True, shared, 10**6, "cpu")


@pytest.mark.parametrize(("plugin", "refused"), [("sweeper=basic", False), ("sweeper=optuna", True)])
def test_a_search_by_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    two_ranks: None,
    tmp_path: Path,
    plugin: str,
    refused: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("folder", "began"):  # of the class, which a test must leave as it was
        monkeypatch.setattr(Multirun, name, getattr(Multirun, name))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [f"hydra/{plugin}", f"hydra.sweep.dir={tmp_path}"]
        config = compose("config", overrides, return_hydra_config=True)
    with pytest.raises(SystemExit) if refused else nullcontext():
        Multirun().on_multirun_start(config, config_name="config")
    line = "hydra/sweeper: should be basic under torchrun (got 'optuna')\n"
    assert capsys.readouterr().err == (line if refused else "")


def test_each_rank_takes_a_gpu_of_its_own(two_ranks: None) -> None:
    assert own_device("cpu") == "cpu"
    with pytest.raises(KnownError, match=r"runtime.device: each of 2 ranks"):
        own_device("cuda:1")


# two processes ----------------------------------------------------------------------------------------------------


GATHERED = """
import torch
from kd.training.ranks import team

ranks = team()
rows = torch.full((2 + ranks.rank, 3), float(ranks.rank), requires_grad=True)
gathered = ranks.gather(rows)
if ranks.rank == 1:
    assert gathered.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 3 and not gathered.requires_grad, gathered
    assert ranks.gather(torch.arange(1 + ranks.rank)).tolist() == [0, 0, 1]
    print("gathered")
else:
    ranks.gather(torch.arange(1 + ranks.rank))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_rows_are_gathered_from_ranks_with_different_numbers_of_them(tmp_path: Path) -> None:
    (tmp_path / "gathered.py").write_text(GATHERED)
    command, told = [*TORCHRUN, str(tmp_path / "gathered.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "gathered\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["fitnet", "crd"])  # a regressor at a live guide; memories that all ranks fill
def test_two_ranks_train_a_loss_with_parameters_as_one_does(loss: str, tmp_path: Path, job: Callable[..., Any]) -> None:
    """About: each rank has its own BatchNorm and draws its own negatives."""
    nets = ("model=resnet8", "teacher=resnet14", "train.batch_size=101", f"loss={loss}")
    code, out, problems = finish(launch(*nets, cwd=tmp_path))
    assert (code, problems) == (0, []), out
    by_two = json.loads((tmp_path / "out" / "result.json").read_text())["chain"][-1]["key"]
    by_one = job(*nets, folder="one")["chain"][-1]["key"]
    files = [Path(os.environ["KD_STORE"]) / key / "metrics.jsonl" for key in (by_two, by_one)]
    parts = [[json.loads(row)[loss] for row in file.read_text().splitlines()] for file in files]
    assert parts[0] == pytest.approx(parts[1], rel=0.15)


@pytest.mark.slow
def test_two_ranks_train_by_every_loss(tmp_path: Path) -> None:
    nets = ("model=resnet8", "teacher=resnet14", "train.batch_size=101", "hydra.sweep.dir=sweep")
    code, out, problems = finish(launch(*nets, f"loss={','.join(CHOSEN)}", cwd=tmp_path, multirun=True))
    assert (code, problems) == (0, []), out
    results = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/result.json")]
    students = [result["chain"][-1] for result in results]
    assert {student["loss"]["name"] for student in students} == {
        kind.model_fields["name"].default for kind in CHOSEN.values()
    }
    for student in students:
        rows = (Path(os.environ["KD_STORE"]) / student["key"] / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 2
        assert all(np.isfinite(json.loads(row)["loss"]) for row in rows), student["loss"]


@pytest.mark.slow
def test_an_epoch_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    """Without BatchNorm the gradient is the whole batch's in every step, also in the last, smaller one."""
    exact = (*EXACT, "train.batch_size=101")  # 1,293 = 12·101 + 81, shared as 50 and 51, and as 40 and 41
    code, out, problems = finish(launch(*exact, "runtime.bank=false", cwd=tmp_path))
    assert (code, problems) == (0, []), out
    alone = run_py(*QUICK, *exact, "hydra.run.dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    results = [json.loads((tmp_path / place / "result.json").read_text())["chain"][0] for place in ("out", "alone")]
    two, one = (weights(tmp_path / "store", result["key"]) for result in results)
    assert results[0]["key"] != results[1]["key"]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-10, atol=1e-12)
    rows = [json.loads((tmp_path / place / "metrics.jsonl").read_text()) for place in ("out", "alone")]
    for name in ("loss", "train_acc", "val_acc"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=2e-6)


@pytest.mark.slow
def test_two_ranks_speak_once_and_go_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is killed. The same command resumes, and gives the same bits as an unbroken run."""
    store, long = tmp_path / "store", ("train.epochs=12", "runtime.checkpoint_every=2")
    process = launch(*long, cwd=tmp_path)
    children = wait_for(lambda: list(store.glob("partial/*/state")) and ranks_of(process.pid), process)
    began = time.monotonic()
    os.kill(children[1], signal.SIGKILL)
    code, out, problems = finish(process)
    assert code != 0
    assert len(problems) == 1, problems
    assert problems[0].startswith(LOST)
    assert time.monotonic() - began < 25

    code, out, problems = finish(launch(*long, cwd=tmp_path))
    assert (code, problems) == (0, []), out
    assert "resuming after epoch" in out
    assert out.count("this run:") == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    keys = [outcome["key"] for outcome in result["chain"]]
    assert {path.name for path in store.iterdir()} - {".locks", "bank", "partial"} == set(keys)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 24
    assert {path.name for path in tmp_path.iterdir()} == {"out", "store"}

    monkeypatch.setenv("KD_STORE", str(tmp_path / "unbroken"))
    assert finish(launch(*long, cwd=tmp_path))[0] == 0
    for key in keys:
        for file in ("model.safetensors", "metrics.jsonl"):
            assert (store / key / file).read_bytes() == (tmp_path / "unbroken" / key / file).read_bytes()


@pytest.mark.slow
def test_every_rank_ends_with_the_failure_of_one(tmp_path: Path) -> None:
    code, _, problems = finish(launch("method=scratch", "train.lr=1e30", cwd=tmp_path))
    assert code != 0
    assert len(problems) == 1, problems
    assert re.match(r"student plane2: the loss is (nan|inf)", problems[0])


@pytest.mark.slow
def test_a_multirun_of_two_ranks(tmp_path: Path) -> None:
    """One of the jobs fails. The ranks still work together in the next one."""
    jobs = ("method=scratch", "train.epochs=1", "train.lr=0.01,1e30,0.02", "hydra.sweep.dir=sweep")
    code, _, problems = finish(launch(*jobs, cwd=tmp_path, multirun=True))
    assert (code, len(problems)) == (1, 1), problems
    assert {path.parent.name for path in tmp_path.glob("sweep/*/result.json")} == {"0", "2"}
    assert {path.parent.name for path in tmp_path.glob("sweep/*/error.json")} == {"1"}


def wait_for(found: Callable[[], list[int]], process: subprocess.Popen[str]) -> list[int]:
    for _ in range(600):
        if answer := found():
            return answer
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("nothing happened in a minute")


def ranks_of(torchrun: int) -> list[int]:
    """The processes that torchrun started, rank 0 first."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    told = {int(child): Path(f"/proc/{child}/environ").read_text().split("\0") for child in children}
    return [next(child for child, words in told.items() if f"RANK={rank}" in words) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_are_as_good_as_one(tmp_path: Path) -> None:
    """With BatchNorm over half of a batch, students' test accuracies are within the spread of the single process's."""
    usual = ("model=plane2", "method=scratch", "train.epochs=30", "replicates=3")
    code, out, problems = finish(launch(*usual, cwd=tmp_path))
    assert (code, problems) == (0, []), out
    alone = run_py(*QUICK, *usual, "hydra.run.dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    two, one = (json.loads((tmp_path / place / "result.json").read_text()) for place in ("out", "alone"))
    assert one["ci95"][0] <= two["mean"] <= one["ci95"][1]
