"""hydra.job.chdir=true: a job works in its own folder, and typed paths are relative to where the command was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.app.parsing import parse
from kd.models import build
from tests.conftest import QUICK, composed, run_py

CHDIR = "hydra.job.chdir=true"


@pytest.mark.slow
def test_the_jobs_of_a_sweep_share_one_store(tmp_path: Path) -> None:
    jobs = ("-m", *QUICK, "train.epochs=1", CHDIR, "method.T=1,2", "hydra.sweep.dir=sweep")
    done = run_py(*jobs, "runtime.store=relstore", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "job 0: method.T=1: validation" in done.stdout  # and not all that is typed
    assert [path.parent for path in tmp_path.rglob("relstore")] == [tmp_path]
    assert len([*tmp_path.glob("relstore/*/stage.json")]) == 3  # the teacher, once, and two students
    assert {path.name for path in (tmp_path / "sweep").glob("*/result.json")} == {"result.json"}
    assert (tmp_path / "sweep" / "summary.csv").exists()


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("runtime.store=s", "runtime.store"),
        ("runtime.data=d/e", "runtime.data"),
        ("dataset.root=../pets", "dataset.root"),
        ("teacher.checkpoint=t.pt", "teacher.checkpoint"),
        ("model.init=w.pt", "model.init"),
        ("teacher.init=./w.pt", "teacher.init"),
        ("+init={resnet14: w.pt}", "init.resnet14"),
    ],
)
def test_every_path_is_relative_to_where_the_command_was_given(
    override: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = override.rstrip("}").replace(": ", "=").rpartition("=")[2]
    torch.save(build("resnet20", num_classes=10, image_size=16).state_dict(), tmp_path / "t.pt")
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    dataset = ("dataset=folder",) if "root" in path else ()
    value: Any = parse(composed(*dataset, override), home=tmp_path)
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    assert value == os.path.join(tmp_path, text)


def test_a_path_from_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_STORE", "relstore")
    assert parse(composed(), home=tmp_path).store_root == tmp_path / "relstore"


@pytest.mark.parametrize("text", ["/abs/store", "~/store"])
def test_absolute_paths_stay(text: str, tmp_path: Path) -> None:
    config = parse(composed(f"runtime.store='{text}'"), home=tmp_path)
    assert config.store_root == Path(text).expanduser()


def test_pretrained_is_no_path(tmp_path: Path) -> None:
    chosen = ("model=timm", "model.arch=resnet18", "model.init=pretrained", "dataset=cifar10")
    assert parse(composed(*chosen), home=tmp_path).model.init == "pretrained"


def test_without_it_paths_stay_as_they_are_typed() -> None:
    assert parse(composed("runtime.store=s")).runtime.store == "s"


@pytest.mark.slow
def test_a_relative_checkpoint_is_found(tmp_path: Path) -> None:
    torch.save(build("plane4", num_classes=10, image_size=16).state_dict(), tmp_path / "t.pt")
    done = run_py(*QUICK, CHDIR, "teacher.checkpoint=t.pt", "dry_run=true", "hydra.run.dir=out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plane4" in done.stdout
