"""The bank of a guide's logits: full, empty, shared or damaged, it gives the same student to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd.datasets.data import Data
from kd.training.bank import Bank, open_bank
from kd.training.guide import Guide, _in_own_order
from tests.conftest import QUICK, ROOT
from tests.test_train import data, teacher_of

__all__ = ["data"]  # the fixture

Job = Callable[..., Any]
KEY = "0123456789abcdef"
AUGMENTED = ("dataset.augment=crop_flip", "train.epochs=3", "method=kd")


def nobody(images: int) -> None:
    pass


def opened(place: Path, data: Data, precision: str = "bf16", weights: str = "w") -> Bank:
    bank = open_bank(place, KEY, weights, data, precision, "cpu")
    assert bank is not None
    return bank


def rows(count: int = 700) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.permutation(1437)[:count], rng.integers(0, 162, count)


class Counting(Guide):
    """Counts the rows that its network computes."""

    computed = 0

    def _compute(self, samples: Any, views: Any, advance: Any) -> torch.Tensor:
        self.computed += len(samples)
        return super()._compute(samples, views, advance)


# logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_remembered_logits_are_the_computed_ones(data: Data, tmp_path: Path, precision: str) -> None:
    _, network = teacher_of(data)
    samples, views = rows()
    plain = Guide(network, data, precision, "cpu").logits(samples, views, nobody)
    seen: list[int] = []
    guide = Counting(network, data, precision, "cpu", opened(tmp_path, data, precision))
    assert torch.equal(guide.logits(samples[:300], views[:300], nobody), plain[:300])
    assert torch.equal(guide.logits(samples, views, seen.append), plain)
    assert (guide.computed, sum(seen)) == (700, 700)
    warm = Counting(network, data, precision, "cpu", opened(tmp_path, data, precision))
    assert torch.equal(warm.logits(samples[::-1].copy(), views[::-1].copy(), nobody), plain.flip(0))
    assert warm.computed == 0
    assert "_folded" not in vars(warm)  # nothing to compute, nothing to prepare


def test_a_bank_that_is_deleted_is_left(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a stage trains, too: its guide computes from then on."""
    _, network = teacher_of(data)
    samples, views = rows()
    bank = opened(tmp_path, data)
    guide = Counting(network, data, "bf16", "cpu", bank)
    said = guide.logits(samples, views, nobody)
    shutil.rmtree(bank.folder)
    assert torch.equal(guide.logits(samples, views, nobody), said)
    assert guide.computed == 1400
    assert capsys.readouterr().out.startswith("the guide's logits are not cached from here on: ")


def test_what_another_process_fills_meanwhile_is_not_computed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two guides on one bank: when one has computed its first block, the other one has filled all the others."""
    monkeypatch.setattr("kd.training.guide._BLOCK", 1)
    _, network = teacher_of(data)
    samples, views = rows()
    plain = Guide(network, data, "bf16", "cpu").logits(samples, views, nobody)
    first, other = (Counting(network, data, "bf16", "cpu", opened(tmp_path, data)) for _ in range(2))
    seen: list[int] = []

    def advance(images: int) -> None:
        seen.append(images)
        if first.computed and not other.computed:
            assert torch.equal(other.logits(samples, views, nobody), plain)

    assert torch.equal(first.logits(samples, views, advance), plain)
    assert sum(seen) == 700
    assert first.computed <= 128
    assert other.computed == 700  # this block among them: it was not on disk yet


def test_processes_fill_a_bank_in_their_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for process in (101, 102):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        orders.append(_in_own_order(np.arange(1000), 100))
    assert [len(order) for order in orders] == [10, 10]
    assert all(np.array_equal(np.sort(np.concatenate(order)), np.arange(1000)) for order in orders)
    assert [block[0] for block in orders[0]] != [block[0] for block in orders[1]]


def test_rounding_moves_a_logit_by_half_a_float16_step_at_most(data: Data) -> None:
    _, network = teacher_of(data)
    samples, views = rows()
    exact = Guide(network, data, "fp32", "cpu").logits(samples, views, nobody)
    rounded = exact.half().float()
    bound = exact.abs() * 2.0**-11 + 2.0**-25
    assert ((rounded - exact).abs() <= bound).all()
    T = 4
    moved = (torch.softmax(rounded / T, 1) - torch.softmax(exact / T, 1)).abs().max().item()
    assert moved < 1e-3


def test_a_file_is_sparse(data: Data, tmp_path: Path) -> None:
    bank = opened(tmp_path, data)
    file = bank.folder / "logits.bin"
    assert file.stat().st_size == 1437 * 162 * 10 * 2
    assert file.stat().st_blocks * 512 < file.stat().st_size / 10


def test_whatever_moves_bits_is_another_bank(data: Data, tmp_path: Path) -> None:
    one = opened(tmp_path, data).folder
    assert opened(tmp_path, data).folder == one
    others = {opened(tmp_path, data, "fp32").folder, opened(tmp_path, data, weights="v").folder}
    torch.set_num_threads(threads := torch.get_num_threads() + 1)
    try:
        others.add(opened(tmp_path, data).folder)
    finally:
        torch.set_num_threads(threads - 1)
    assert len(others - {one}) == 3
    assert f"{KEY}-bf16-cpu-crop_flip-" in one.name


# what can go wrong ------------------------------------------------------------------------------------------------


def test_a_crash_between_data_and_mark_leaves_nothing_wrong(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, network = teacher_of(data)
    samples, views = rows()
    plain = Guide(network, data, "bf16", "cpu").logits(samples, views, nobody)

    def pulled(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", pulled)
    with pytest.raises(KeyboardInterrupt):
        Guide(network, data, "bf16", "cpu", opened(tmp_path, data)).logits(samples, views, nobody)
    monkeypatch.undo()
    bank = opened(tmp_path, data)
    assert not bank.filled(samples, views).any()
    assert torch.equal(Guide(network, data, "bf16", "cpu", bank).logits(samples, views, nobody), plain)
    assert bank.filled(samples, views).all()


@pytest.mark.parametrize("call", ["pathlib.Path.open", "os.fsync"])
def test_a_disk_that_fills_up(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    _, network = teacher_of(data)
    samples, views = rows()
    plain = Guide(network, data, "bf16", "cpu").logits(samples, views, nobody)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    guide = Guide(network, data, "bf16", "cpu", opened(tmp_path, data))
    monkeypatch.setattr(call, full)
    assert torch.equal(guide.logits(samples, views, nobody), plain)
    assert torch.equal(guide.logits(samples, views, nobody), plain)
    assert capsys.readouterr().out.count("not cached from here on: [Errno 28] No space left on device") == 1


def test_without_room_or_right_nothing_is_kept(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert open_bank(tmp_path / "file", KEY, "w", data, "bf16", "cpu") is None
    assert "the guide's logits are not cached: [Errno" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result([0] * 10) and type("U", (), {"free": 9}))
    assert open_bank(tmp_path / "new", KEY, "w", data, "bf16", "cpu") is None
    assert "1 GB to spare" in capsys.readouterr().out


def test_what_exceeds_the_budget_is_not_cached(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 1437 * 162 * 10 * 2  # float16
    assert open_bank(tmp_path, KEY, "w", data, "bf16", "cpu", budget=size) is None  # its marks need a little
    assert "exceed runtime.bank_budget (4.66 MB); python -m kd.store gc --banks" in capsys.readouterr().out
    assert open_bank(tmp_path, KEY, "w", data, "bf16", "cpu", budget=2 * size) is not None
    assert open_bank(tmp_path, KEY, "w", data, "bf16", "cpu", budget=1) is not None  # it is there already
    assert open_bank(tmp_path, KEY, "other", data, "bf16", "cpu", budget=2 * size) is None  # both may be filled
    few = replace(data, spec=data.spec.model_copy(update={"views": 8}))  # of 162, and only these are written
    for weights, room in (("w", size / 4), ("other", size / 8), ("other", size / 4)):  # two take a tenth of `size`
        there = open_bank(tmp_path / "few", KEY, weights, few, "bf16", "cpu", budget=room) is not None
        assert there == (room == size / 4)


@pytest.mark.parametrize("features", [None, 512])
def test_a_new_bank_that_may_become_large_is_announced_once(
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    features: int | None,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        bank = open_bank(tmp_path / "bank", KEY, "w", data, "bf16", "cpu", features=features)
    assert bank is not None
    line = f"caches the guide's pooled features: up to 238 MB in ~/bank/{bank.folder.name}\n"  # 1437·162·512·2
    assert capsys.readouterr().out == (line if features else "")  # the logits' takes 4.7 MB


# runs -------------------------------------------------------------------------------------------------------------


def student(job: Job, monkeypatch: pytest.MonkeyPatch, store: Path, *overrides: str) -> dict[str, torch.Tensor]:
    monkeypatch.setenv("KD_STORE", str(store))
    result = job(*AUGMENTED, *overrides)
    return load_file(store / result["chain"][-1]["key"] / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_on_off_cold_and_warm(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    how = f"train.precision={precision}"
    off = student(job, monkeypatch, tmp_path / "off", how, "runtime.bank=false")
    assert not (tmp_path / "off" / "bank").exists()
    cold = student(job, monkeypatch, tmp_path / "on", how)
    (bank,) = (tmp_path / "on" / "bank").iterdir()
    before = (bank / "logits.bin").read_bytes()
    monkeypatch.setattr(Guide, "_compute", lambda *arguments: pytest.fail("the bank is warm"))
    warm = student(job, monkeypatch, tmp_path / "on", how, "runtime.retrain=true")
    assert equal(off, cold)
    assert equal(off, warm)
    assert (bank / "logits.bin").read_bytes() == before


@pytest.mark.slow
def test_a_sweep_over_temperatures_sees_each_view_once(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student(job, monkeypatch, tmp_path / "store")
    monkeypatch.setattr(Guide, "_compute", lambda *arguments: pytest.fail("the bank is warm"))
    student(job, monkeypatch, tmp_path / "store", "method.T=2", "method.lambda=0.9", "model=plane4")


@pytest.mark.slow
def test_losses_on_logits_and_on_pooled_features_run_the_guide_once_each(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the estimate of a plan has it."""
    computed: list[int] = []
    original = Guide._compute

    def counted(guide: Guide, samples: Any, views: Any, advance: Any) -> Any:
        computed[-1] += len(samples)
        return original(guide, samples, views, advance)

    monkeypatch.setattr(Guide, "_compute", counted)
    for loss in ("kd", "rkd", "dkd", "pkt"):
        computed.append(0)
        student(job, monkeypatch, tmp_path / "store", f"loss={loss}")
    assert computed[0] == computed[1] > 0
    assert computed[2:] == [0, 0]
    assert len([*(tmp_path / "store" / "bank").iterdir()]) == 2


@pytest.mark.slow
def test_restricted_views_are_computed_once_for_all_seeds(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student(job, monkeypatch, tmp_path / "store", "dataset.views=2", "train.epochs=8")
    (bank,) = (tmp_path / "store" / "bank").iterdir()
    marks = np.fromfile(bank / "filled.bin", np.uint8).reshape(1437, 162)
    assert marks.sum(1).max() == 2
    assert marks.sum() > 0.98 * 2 * np.count_nonzero(marks.any(1))  # after eight draws of one of two


def start(store: Path, folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "run.py"), *QUICK, *AUGMENTED, *overrides, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "KD_STORE": str(store), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_two_processes_share_a_bank(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {
        seed: student(job, monkeypatch, tmp_path / "alone", f"seed={seed}", "runtime.bank=false") for seed in (0, 1)
    }
    shared = tmp_path / "shared"
    both = [start(shared, tmp_path / f"out{seed}", f"seed={seed}") for seed in alone]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    assert len(list((shared / "bank").iterdir())) == 1
    for seed, undisturbed in alone.items():
        key = json.loads((tmp_path / f"out{seed}" / "result.json").read_text())["chain"][-1]["key"]
        assert equal(undisturbed, load_file(shared / key / "model.safetensors"))


@pytest.mark.slow
def test_killed_while_filling(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = student(job, monkeypatch, tmp_path / "undisturbed", "train.epochs=10")
    store = tmp_path / "store"
    for wait in (0.0, 0.2):
        process = start(store, tmp_path / "out", "train.epochs=10")
        deadline = time.monotonic() + 60
        while not list(store.glob("bank/*/header.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert equal(undisturbed, student(job, monkeypatch, store, "train.epochs=10"))
