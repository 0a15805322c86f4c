"""Compiled steps: chosen if they save time, the same bits every time, and for whole stages only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kd.app.config import plan
from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import Facts, specify
from kd.datasets.data import Data
from kd.models import MODELS
from kd.training import step as compilation
from kd.training.checkpoint import Checkpoint
from kd.training.loop import train_stage
from kd.training.step import PAYS_AFTER, resolve_compile
from tests.conftest import composed
from tests.test_train import Interrupted, Silent, data, same
from tests.test_train import a_stage as training_stage

__all__ = ["data"]  # the fixture


def a_stage(*overrides: str, size: int = 32) -> Stage:
    config = parse(composed("dataset=cifar10", "method=scratch", "train.precision=bf16", *overrides))
    return plan(config, specify(config.dataset, Facts(10, size, (0.5,) * 3, (0.2,) * 3)))[0]


@pytest.fixture
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch compiles."""
    monkeypatch.setattr(compilation, "_problem", lambda device: None)


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_problem", lambda device: "no C++ compiler")


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("overrides", "images", "size", "device", "compiled"),
    [
        (("model=resnet8",), 45_000, 32, "cpu", True),  # 160 epochs by its recipe
        (("model=resnet8", "train.epochs=2"), 45_000, 32, "cpu", False),
        (("model=resnet8",), 4_000, 32, "cpu", False),
        (("model=resnet8",), 20_000, 16, "cpu", False),  # smaller images save less
        (("model=resnet8", "train.precision=fp32"), 45_000, 32, "cpu", False),
        (("model=resnet8",), 45_000, 32, "cuda", False),
        (("model=plane2",), 45_000, 32, "cpu", False),
    ],
)
def test_auto_is_a_function_of_network_length_and_device(
    overrides: tuple[str, ...], images: int, size: int, device: str, compiled: bool
) -> None:
    assert resolve_compile("auto", a_stage(*overrides, size=size), images, device) is compiled


@pytest.mark.usefixtures("_compiler")
def test_true_and_false_are_obeyed() -> None:
    stage = a_stage("model=plane2", "train.epochs=1")
    assert resolve_compile(True, stage, 100, "cpu") is True
    assert resolve_compile(False, a_stage("model=resnet8"), 45_000, "cpu") is False


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    stage = a_stage("model=resnet8")
    assert resolve_compile("auto", stage, 45_000, "cpu") is False
    assert "student resnet8: slower without torch.compile, which fails here: no C++ compiler" in capsys.readouterr().out
    with pytest.raises(KnownError, match=r"runtime\.compile=true: torch cannot compile here: no"):
        resolve_compile(True, stage, 45_000, "cpu")


def test_the_table_names_networks() -> None:
    assert PAYS_AFTER.keys() <= MODELS.keys()


def test_a_stage_records_whether_it_was_compiled(job: Any, tmp_path: Path) -> None:
    key = job()["chain"][-1]["key"]
    assert json.loads((tmp_path / "store" / key / "stage.json").read_text())["made_with"]["compiled"] is False


@pytest.mark.slow
def test_compiled_stages_have_bits_of_their_own(data: Data, tmp_path: Path) -> None:
    """Trained twice, and interrupted: the same bits. Compared with an uncompiled training: nearly the same accuracy."""
    if problem := compilation._problem("cpu"):
        pytest.skip(f"torch cannot compile here: {problem}")
    stage = training_stage(data, epochs=4)
    eager = train_stage(stage, data=data, device="cpu", watch=Silent())
    one, two = (train_stage(stage, data=data, device="cpu", watch=Silent(), compiled=True) for _ in range(2))
    partial = Checkpoint(tmp_path, stage, {"compiled": True}, every=1)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, data=data, device="cpu", watch=Interrupted(3), checkpoint=partial, compiled=True)
    assert same(one, two)
    assert same(one, train_stage(stage, data=data, device="cpu", watch=Silent(), checkpoint=partial, compiled=True))
    assert not same(one, eager)  # else nothing was compiled
    assert abs(one.result.test_acc - eager.result.test_acc) < 5
