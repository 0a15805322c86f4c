"""The benchmarks run. Their numbers are not checked: they need an idle machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import figure, losses, machine, profile, speed, sweep
from bench.workloads import WORKLOADS, Workload
from tests.conftest import QUICK, ROOT

TINY = {
    "kd plane10 → plane2": Workload("plane2", "plane4", 1, 4),
    "kd resnet110 → resnet8": Workload("plane2", "plane4", 1, 4),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one processor
def test_a_round_of_the_benchmark_and_its_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "WORKLOADS", {**TINY, "scratch plane2": Workload("plane2", None, 1, 4)})
    monkeypatch.setattr(sweep, "SHORT", TINY["kd plane10 → plane2"])
    monkeypatch.setattr(machine, "matrix_peak", lambda dtype: 100.0)
    measured = speed.measure(1)
    found = speed.summary(measured)
    assert found["workloads"]["kd plane10 → plane2"]["ratio"].keys() == {"usual", "cold", "warm", "step"}
    assert found["workloads"]["scratch plane2"]["ratio"].keys() == {"usual", "warm", "step"}
    assert found["workloads"]["scratch plane2"]["share_of_bf16_peak"] > 0
    found["sweep"] = speed.sweep_cost(found["workloads"], measured["short_sweep_seconds"], 0.5)
    assert len(found["sweep"]["short"]["ours"]) == len(sweep.SHORT_JOBS)
    figure.draw(found, tmp_path / "speed.svg")
    assert "images a second" in (tmp_path / "speed.svg").read_text()


def test_a_round_of_every_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(losses, "IMAGES", 500)
    monkeypatch.setattr(losses, "BATCH", 8)
    found = losses.measure(("resnet8", "resnet8"), 1)["table"]
    assert {*found} == {"cross_entropy", *(path.stem for path in (ROOT / "conf" / "loss").glob("*.yaml"))}
    assert (found["cross_entropy"]["plain"], found["kd"]["kd"]) == (1, 1)
    guides = {name: row["guide"] for name, row in found.items()}
    assert (guides["tf_kd"], guides["dist"], guides["crd"], guides["at"]) == ("none", "cached", "cached", "live")
    assert all(row["ms"] > 0 for row in found.values())
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_what_a_sweep_costs() -> None:
    assert sweep.views_met(0) == 0
    assert sweep.views_met(1) == pytest.approx(1)
    assert sweep.views_met(480) == pytest.approx(162 * (1 - (161 / 162) ** 480))
    speeds = {"usual": 100.0, "cold": 500.0, "warm": 1000.0}  # so the guide alone: 1,000
    usual, ours = sweep.cost(1, speeds, job_seconds=36.0)
    assert usual == pytest.approx(160 * 45_000 / 100 / 3600)
    assert ours == pytest.approx(160 * 45_000 / 1000 / 3600 + 0.01 + 45_000 * sweep.views_met(160) / 1000 / 3600)
    eighteen, nineteen = (sweep.cost(jobs, speeds, 0)[1] for jobs in (18, 19))
    assert nineteen - eighteen > sweep.cost(18, speeds, 0)[1] - sweep.cost(17, speeds, 0)[1]  # a new seed


def test_an_image_s_step_is_counted() -> None:
    gflop, gb = machine.step_cost("resnet8")
    assert gflop == pytest.approx(6 * 12.5e6 / 1e9, rel=0.05)  # but for the gradient of the images, which nobody needs
    maps = 16 * 32 * 32
    assert 2 * 3 * maps * 3 < gb * 1e9 < 2 * 8 * maps * 40


def test_the_profile_finds_each_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(profile, "_STEPS", 3)
    monkeypatch.setattr("sys.argv", ["profile", "scratch plane2"])
    profile.main()
    printed = capsys.readouterr().out
    assert "scratch plane2" in printed
    assert all(kind in printed for kind in ("convolutions, backward", "BatchNorm, both ways", "optimiser", "views"))
    assert "scratch plane2" in WORKLOADS


def test_one_run_crosses_at_most_thirty_files(tmp_path: Path) -> None:
    """The promise of docs/design.md, by the command that counts."""
    command = [sys.executable, "-m", "bench.structure", "--follow", *QUICK, "train.epochs=1"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, _, files = done.stdout.strip().splitlines()[-1].partition(" files crossed: ")
    assert int(count) == len(files.split()) <= 30
    assert "run.py" in files.split()
