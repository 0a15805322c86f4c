"""The benchmarks run. Their numbers are not checked: they need an idle machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import apart, figure, losses, machine, photos, profile, reading, speed, sweep
from bench.workloads import Workload
from tests.conftest import QUICK, ROOT

TINY = {
    "kd plane10 → plane2": Workload("plane2", "plane4", 1, 4),
    "kd resnet110 → resnet8": Workload("plane2", "plane4", 1, 4),
}


@pytest.mark.slow
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


@pytest.mark.slow
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


TIMM = """import sys
value = dict(zip(sys.argv[1::], sys.argv[2::]))
assert value["--kd-model-name"].startswith("local-dir:") and value["--num-classes"] == "2"
for epoch in range(int(value["--epochs"])):
    speed = f"   {10 + epoch}.50/s  (1.000s,   {20 + epoch}.50/s)"
    print(f"Train: {epoch} [   1/2 (100%)]  Loss: 1.61 (1.61)  Time: 1.000s,{speed}  LR: 1e-03", file=sys.stderr)
"""


@pytest.mark.slow
def test_photographs_beside_timm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a script in place of timm's, which is not in its wheel: ours trains, and what theirs prints is read."""
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    rng = np.random.default_rng(0)
    for path in (tmp_path / part / name / f"{i}.jpg" for part in ("train", "val") for name in "ab" for i in range(3)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 110, 3), dtype=np.uint8)).save(path)
    safetensors.save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "train.py").write_text(TIMM)
    monkeypatch.setattr(photos, "SEEDS", (0,))
    monkeypatch.setattr(photos, "TEMPERATURES", (4,))
    pair = photos.Pair(
        *(tmp_path / "train.py", tmp_path, tmp_path / "teacher.safetensors", tmp_path / "place"),
        teacher="test_efficientnet",
        student="test_efficientnet",
        batch=4,
        size=72,
        threads=2,
    )
    pair.place.mkdir()
    photos.serve_teacher(pair)
    assert timm.create_model(f"local-dir:{pair.place / 'teacher'}", pretrained=True, num_classes=2).num_classes == 2
    measured = photos.measure(pair, 1, 2, study_epochs=2)
    speeds = measured["images_per_second"]
    assert speeds["timm fp32"] == speeds["timm bf16"] == [[21.5, 22.5]]
    assert speeds["timm fp32, 2 at a time"] == speeds["timm bf16, 2 at a time"] == [[43, 45]]
    assert measured["images"] == {"timm": 4, "ours": 6}
    assert len(speeds["ours"][0]) == 2
    found = photos.summary(measured)
    assert found["timm fp32, 2 at a time"]["images_per_second"] == 44
    assert found["ours"]["study_seconds"] == round(measured["our_study_seconds"])


def test_what_a_study_of_photographs_costs() -> None:
    found = photos.summary(
        {
            "images_per_second": {
                "ours": [[40.0, 40.0], [30.0, 30.0]],
                "timm bf16": [[10.0, 10.0], [10.0, 12.0]],
                "timm bf16, 2 at a time": [[20.0, 20.0], [20.0, 20.0]],
            },
            "images": {"timm": 40, "ours": 70},
            "guide_images_per_second": 20.0,
            "timm_start_seconds": {"timm bf16": [5.0, 6.0, 7.0], "timm bf16, 2 at a time": [8.0]},
            "our_study_seconds": 100.4,
            "study_epochs": 60,
        }
    )
    assert found["ours"] == {"images_per_second": 35, "study_seconds": 100}
    one, two = found["timm bf16"], found["timm bf16, 2 at a time"]
    assert one["ratio"] == pytest.approx((40 / 10 + 30 / 11) / 2, abs=0.01)
    assert one["study_seconds"] == 9 * (6 + 60 * 4)
    assert two["study_seconds"] == 9 * (8 / 2 + 60 * 2)
    assert two["study_ratio"] == pytest.approx(9 * (4 + 120) / 100.4, abs=0.01)


def test_side_by_side_is_a_ratio_of_each_round() -> None:
    found = apart.summary({"six": {"serial": [10.0, 30.0, 20.0], "parallel": [10.0, 20.0, 10.0]}})
    assert found == {"six": {"serial": 20, "parallel": 10, "ratio": 1.5}}


@pytest.mark.slow
def test_students_and_jobs_run_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apart, "IMAGES", {"train": 200, "test": 20})
    found = apart.measure(tmp_path, 1)
    assert {name: len(each) for both in found.values() for name, each in both.items()} == {"serial": 1, "parallel": 1}
    assert len(list((tmp_path / "jobs").glob("*/result.json"))) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one processor
def test_photographs_are_read_by_all(tmp_path: Path) -> None:
    """Each shows full batches of the same photographs."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / ("val" if number >= 36 else "train") / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    root = reading.repeated(tmp_path / "photos", 2, tmp_path / "more")
    epochs = [reading.by_torchvision(root), reading.by_timm(root)]
    epochs += [reading.ours(root, decode, tmp_path / "data") for decode in ("array", "stream")]
    for epoch in epochs:
        assert reading.seconds(epoch)[1] == 72 // 32 * 32
    measured = {"torchvision": [2.0, 4.0, 8.0], "ours": [4.0, 4.0, 4.0]}
    assert reading.ratios(measured)["ours"] == {"images_per_second": 4, "ratio": 1}


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


@pytest.mark.slow
def test_one_run_crosses_at_most_46_files(tmp_path: Path) -> None:
    """The promise of docs/design.md, by the command that counts."""
    command = [sys.executable, "-m", "bench.structure", "--follow", *QUICK, "train.epochs=1"]
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    count, _, files = done.stdout.strip().splitlines()[-1].partition(" files crossed: ")
    assert int(count) == len(files.split()) <= 46
    assert "run.py" in files.split()
