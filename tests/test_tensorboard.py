"""TensorBoard's page, read by TensorBoard's own reader."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.reporting.tracking import TrackingSpec, track_sweep
from tests.conftest import QUICK, run_py
from tests.test_tracking import TABLE, write_figure

SPEC = TrackingSpec(name="tensorboard", project="p")


def read(folder: Path, name: str) -> Any:
    reader = EventAccumulator(str(folder / "tensorboard" / name))
    reader.Reload()
    return reader


def text(reader: Any, tag: str) -> str:
    (event,) = reader.Tensors(tag)
    return str(event.tensor_proto.string_val[0].decode())


@pytest.mark.slow
def test_the_page_of_a_run(job: Callable[..., Any], tmp_path: Path) -> None:
    for _ in range(2):  # the second run in the same folder shows what it trained, and nothing twice
        result = job("tracking=tensorboard", "runtime.retrain=true")
    page = read(tmp_path / "out", "plane2 ← plane4 · T4 λ0.5 · s0")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for role in ("teacher", "student"):
        logged = [(event.step, pytest.approx(event.value)) for event in page.Scalars(f"{role}/loss")]
        assert [(row["epoch"], row["loss"]) for row in rows if row["role"] == role] == logged
    for name, outcome in (("test_acc", result["chain"][1]), ("teacher/test_acc", result["chain"][0])):
        (final,) = page.Scalars(f"summary/{name}")
        assert final.value == pytest.approx(outcome["test_acc"])
    assert "| method.lambda | 0.5 |" in text(page, "configuration/text_summary")
    assert f"| objective | {result['objective']:g} |" in text(page, "result/text_summary")
    compared = page.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"method.lambda" in compared
    assert b"runtime" not in compared


def test_the_page_of_a_multirun(tmp_path: Path) -> None:
    track_sweep(SPEC, tmp_path, "three", TABLE, [write_figure(tmp_path)])
    page = read(tmp_path, "summary of three")
    assert text(page, "jobs/text_summary").splitlines() == [
        "| T | test | failed |",
        "| --- | --- | --- |",
        "| 1 | 97.5 |  |",
        "| auto |  | the loss is nan \\| inf |",
    ]
    (image,) = page.Images("accuracy")
    assert (image.width, image.height) == (30, 20)


def test_a_name_longer_than_a_file_system_takes_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track_sweep(SPEC, tmp_path, "g" * 250, TABLE, [])
    assert text(read(tmp_path, "summary of " + "g" * 116 + "…"), "jobs/text_summary")
    assert capsys.readouterr().out.startswith("tracking: run_name is longer than 128 characters, and is cut: summary")


def test_a_group_names_one_folder_inside_the_sweep_s(tmp_path: Path) -> None:
    track_sweep(SPEC, tmp_path / "sweep", "a/../../../b", TABLE, [])
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert text(read(tmp_path / "sweep", "summary of a-..-..-..-b"), "jobs/text_summary")


def test_a_missing_package_is_one_line(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    job("tracking=tensorboard", code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'tensorboard" in said


def test_a_dry_run_leaves_no_page(tmp_path: Path) -> None:
    done = run_py(*QUICK, "tracking=tensorboard", "dry_run=true", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0
    assert not (tmp_path / "out" / "tensorboard").exists()
