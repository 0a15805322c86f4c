"""Longer trainings with meaningful accuracies; `make test-slow` runs them."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

REAL_IMAGES = (
    ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"
)  # CIFAR-10 as JPEG in folders; no part of the project
DEFAULTS = ("model=resnet8", "teacher=resnet20", "train.epochs=null", "train.precision=null", "runtime.threads=null")


@pytest.mark.parametrize("method", ["scratch", "kd", "ta", "trained_teacher"])
def test_each_method_ends_above_90_percent_on_digits(job: Callable[..., Any], method: str) -> None:
    result = job(*DEFAULTS, f"method={method}")
    assert result["chain"][-1]["test_acc"] > 90


def test_plane2_learns_real_images(job: Callable[..., Any], tmp_path: Path) -> None:
    if not REAL_IMAGES.exists():
        pytest.skip(f"{REAL_IMAGES.name} is not beside the project")
    with tarfile.open(REAL_IMAGES) as archive:
        archive.extractall(tmp_path, filter="data")
    data = ("dataset=folder", f"dataset.root={tmp_path / 'cifar10-jpeg'}", "train=cifar10", "method=scratch")
    result = job(*data, "train.precision=null", f"runtime.threads={os.cpu_count()}")
    assert result["chain"][0]["test_acc"] > 50  # after two epochs; chance is 10
