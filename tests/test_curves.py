"""curves.png: what a run has trained, over its epochs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kd.reporting.curves import draw_curves
from kd.reporting.results import RunResult, read_result
from tests.conftest import QUICK, run_py

Panels = list[tuple[str, dict[str, list[float]]]]  # the y-label of each panel, and its lines by label


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Panels]:
    """The panels of the last figure."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **named: Any) -> None:
        figures.append(self)
        save(self, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep)

    def panels() -> Panels:
        found = []
        for axes in figures[-1].axes:
            lines = {str(line.get_label()): [float(y) for y in line.get_ydata()] for line in axes.lines}
            found.append((axes.get_ylabel(), lines if axes.axison else {}))
        return found

    return panels


@pytest.mark.slow
def test_a_run_draws_what_it_trains_and_nothing_else(
    job: Callable[..., Any], tmp_path: Path, drawn: Callable[[], Panels]
) -> None:
    job("method=kd", "replicates=2")
    picture = tmp_path / "out" / "curves.png"
    assert picture.stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    student = [row for row in rows if row["role"] == "student"][:2]  # of the first seed
    teacher_loss, teacher_accuracy, no_guide, loss, accuracy, share = drawn()
    assert (teacher_loss[0], loss[0]) == ("teacher plane4", "student plane2")
    assert [*teacher_loss[1]] == ["loss"]
    assert {*loss[1]} == {"loss", "ce", "kl", *(name for name in loss[1] if name.startswith("_"))}
    assert loss[1]["kl"] == [row["kl"] for row in student]
    assert accuracy[1]["validation"] == [row["val_acc"] for row in student]
    assert accuracy[1]["its guide"] == [row["guide_acc"] for row in student]
    assert "its guide" not in teacher_accuracy[1]
    assert no_guide[1] == {}
    assert len(share[1]) == 2  # a line for each of the two students
    job("method=kd", "replicates=2", "vary=chain", "seed=5", folder="chains")
    rows = [json.loads(line) for line in (tmp_path / "chains" / "metrics.jsonl").read_text().splitlines()]
    assert {(row["role"], row["model"]) for row in rows} == {("teacher", "plane4"), ("student", "plane2")}
    assert [label for label, _ in drawn()][::3] == ["student plane2", "teacher plane4"]  # of seed 5, then the others
    job("method=kd", "replicates=2")  # all from the store
    assert not picture.exists()
    job("method=kd", "method.T=2")  # with the teacher from the store
    assert [label for label, _ in drawn()] == ["student plane2", "", ""]


@pytest.mark.usefixtures("figures")
def test_a_point_is_no_curve(job: Callable[..., Any], tmp_path: Path) -> None:
    job("method=scratch", "train.epochs=1")
    assert not (tmp_path / "out" / "curves.png").exists()


@pytest.mark.slow
def test_a_run_imports_only_what_it_uses(tmp_path: Path) -> None:
    """Of what takes long: a training imports no compiler and no SciPy, and a stored run no matplotlib."""

    def imported(state: str) -> set[str]:
        run = (*QUICK, "method=scratch", "hydra.run.dir=out")
        done = run_py(*run, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
        assert state in done.stdout
        return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}

    trained, stored = imported("student plane2"), imported("reused")
    assert {"torch", "kd.training.step", "matplotlib"} <= trained
    assert not {"torch._dynamo", "torch._inductor", "torchvision", "sklearn", "scipy"} & trained
    assert "kd.reporting.curves" in stored
    assert "matplotlib" not in stored


def test_a_figure_that_cannot_be_written_is_one_line(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job("method=scratch")
    result = read_result(tmp_path / "out" / "result.json")
    assert isinstance(result, RunResult)

    def full(self: Figure, *arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    draw_curves(tmp_path / "out", result)
    assert capsys.readouterr().out.endswith("out/curves.png cannot be written (No space left on device)\n")
