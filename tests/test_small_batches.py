"""Batches of one image: a line before training where a BatchNorm would see one value a channel, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.app.jobs import known_reason
from kd.core.spec import KnownError
from kd.models import build
from kd.training.checks import _check_batches, _sees_one_value
from kd.training.ranks import batches, length
from tests.test_stage import stage

Job = Callable[..., Any]
LINE = "leaves its BatchNorm one value a channel, from which it cannot learn: it needs at least 2 images a batch\n"


@pytest.mark.parametrize("dry", ["true", "false"])
@pytest.mark.parametrize(
    ("overrides", "who"),
    [
        (("model=net", "method=scratch", "train.batch_size=1"), "student net"),
        (("teacher=net", "train.batch_size=1"), "teacher net"),
        (("model=mobilenetv2_half", "model.train.batch_size=1", "model.train.lr=0.01"), "student mobilenetv2_half"),
    ],
)
def test_it_is_said_before_anything_is_trained(
    job: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: tuple[str, ...], who: str, dry: str
) -> None:
    job(*overrides, f"dry_run={dry}", code=2)
    assert capsys.readouterr().err == f"{who}: train.batch_size=1 {LINE}"
    assert not [*tmp_path.glob("store/*/stage.json")]


def test_other_networks_are_not_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("method=scratch", "train.batch_size=1", "dry_run=true", multirun=True)
    assert "1 of 1 stages to train" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["net", "mobilenetv2_half", "plane2", "resnet8", "vgg8", "shufflenetv1"])
def test_what_is_said_is_what_torch_does(name: str) -> None:
    network = build(name, num_classes=10, image_size=16).train()
    fails = False
    try:
        network(torch.zeros(1, 3, 16, 16))
    except ValueError:
        fails = True
    assert _sees_one_value(stage(model=name)) == fails == (name in ("net", "mobilenetv2_half"))


@pytest.mark.parametrize(
    ("samples", "size", "lengths"), [(129, 64, [64, 64]), (5, 2, [2, 2]), (66, 64, [64, 2]), (3, 1, [1, 1, 1])]
)
def test_a_last_batch_of_one_is_left_out(samples: int, size: int, lengths: list[int]) -> None:
    """The order differs in each epoch, so every image is trained on."""
    assert [*map(length, batches(samples, size))] == lengths


def test_of_several_ranks_each_needs_two() -> None:
    few = stage(model="net", train={**stage().train.model_dump(), "batch_size": 3, "ranks": 2})
    with pytest.raises(KnownError, match="at least 4 images a batch, for 2 ranks"):
        _check_batches([few])
    _check_batches([stage(model="net", train={**few.train.model_dump(), "batch_size": 4})])


def test_a_loss_that_fails_later_is_a_line() -> None:
    said = known_reason(ValueError("Expected more than 1 value per channel when training, got input size [1, 8, 1, 1]"))
    assert said is not None
    assert said.endswith("use a larger train.batch_size")
    assert known_reason(ValueError("another one")) is None
