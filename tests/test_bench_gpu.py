"""The benchmark for a GPU, as far as a CPU can run it: every contestant, its rows, and the bits of packed students."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import contestants, gpu
from bench.contestants import Airbench, GraphStep, PackedStep, single
from bench.gpu import Case
from bench.workloads import Clock, Workload, guides_of, images, planned
from kd.core.stage import Stage
from kd.datasets.data import Data
from kd.training.loop import Loop
from kd.training.step import Step

ROWS = 16  # of a batch


def replayed(work: Callable[[], None], device: str) -> Callable[[], None]:
    """In place of a CUDA graph: the same work on the same memory."""
    return work


def stage_of(student: str, teacher: str | None, *overrides: str) -> Stage:
    return planned(Workload(student, teacher, 0, 0), "train.epochs=1", f"train.batch_size={ROWS}", *overrides)


def batch(students: int) -> list[Tensor]:
    """Images, labels, samples' numbers and a guide's logits."""
    rows, rng = students * ROWS, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (rows, 32, 32, 3), dtype=torch.uint8, generator=rng).permute(0, 3, 1, 2)
    labels = torch.randint(0, 10, (rows,), generator=rng)
    return [pixels, labels, torch.arange(rows), torch.randn(rows, 10, generator=rng).half()]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("kd.core.hardware.resolve_device", lambda device: "cpu")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == f"{gpu.NO_GPU}\n"
    assert "\n" not in gpu.NO_GPU
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["resnet9"])
    assert "(got resnet9)" in capsys.readouterr().err


def test_every_contestant_has_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a compiler, with stand-ins for CUDA's graphs and the usual script, whose test is in test_bench.py."""

    def no_compiler(call: object, device: str, graphs: bool = False) -> None:
        raise RuntimeError("no compiler\nand more about it")

    monkeypatch.setattr(contestants, "record", replayed)
    monkeypatch.setattr(contestants, "compiled", no_compiler)
    monkeypatch.setattr(gpu, "TEACHERS", {"plane2": "plane4"})
    monkeypatch.setattr(gpu, "PACKS", (1, 2))
    for module in (contestants, gpu):
        monkeypatch.setattr(module, "BATCH", ROWS)
    small = (f"train.batch_size={ROWS}", "train.precision=fp32")
    monkeypatch.setattr(gpu, "planned", lambda work, *overrides: planned(work, *overrides, *small))
    monkeypatch.setattr(gpu, "usual_script", lambda work, device: {"usual": 50.0 if work.teacher else 100.0})
    rows = gpu.measure("plane2", "cpu", 3, 1)
    gpu.show("plane2", rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    found = {Case(*(row[key] for key in ("contestant", "guide", "mode", "students"))): row for row in rows}
    modes = {*gpu.KINDS}
    assert len(modes) == 4
    assert {case.mode for case in found if case.contestant == "step"} == modes
    for guide in ("none", "cold", "warm"):
        assert {case.mode for case in found if (case.contestant, case.guide) == ("epochs", guide)} == modes
    assert {case.students for case in found if case.contestant == "packed"} == {1, 2}
    assert {case.guide for case in found if case.contestant in ("usual script", "airbench-style")} == {"none", "live"}
    for case, row in found.items():
        if "compiled" in case.mode:
            assert row["failed"] == "RuntimeError: no compiler"
        else:
            assert row["images_per_second"] > 0
            assert row["rounds"] == [row["images_per_second"]]
            assert row["peak_memory_gb"] is None
            assert ("gain" in row) == (case.contestant == "packed")
    for guide, usual in (("none", 100), ("warm", 50)):
        ours = found[Case("epochs", guide, "eager")]
        assert ours["ratio"] == round(ours["images_per_second"] / usual, 2)
    one, packed = found[Case("step", "memory", "eager")], found[Case("packed", "memory", "eager", 2)]
    assert packed["gain"] == round(packed["images_per_second"] / one["images_per_second"], 2)
    for student in ("plane10", "plane2"):
        gpu.save(tmp_path / "gpu.json", student, {"card": "none", "rows": rows})
    assert json.loads((tmp_path / "gpu.json").read_text())["plane10"]["rows"] == rows


def test_a_contestant_that_fails_in_a_round_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {Case("usual script", "none", "eager"): [1, 10.0, 20.0, 30.0], Case("epochs", "none", "eager"): [1, 30.0]}

    def making(case: Case) -> Callable[[], Callable[[], float]]:
        left = iter(speeds[case])

        def run() -> float:
            if (speed := next(left, None)) is None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return speed

        return lambda: run

    monkeypatch.setattr(gpu, "cases", lambda *given: {case: making(case) for case in speeds})
    usual, ours = gpu.measure("plane2", "cpu", 2, 3)
    assert (usual["images_per_second"], usual["ratio"], usual["rounds"]) == (20, 1, [10, 20, 30])
    assert ours["failed"] == "OutOfMemoryError: CUDA out of memory"
    assert "rounds" not in ours
    speeds = {case: left[::-1] for case, left in speeds.items()}  # the usual script fails at its second call
    speeds[Case("usual script", "none", "eager")], speeds[Case("epochs", "none", "eager")] = [1.0], [1.0, 2.0, 3.0]
    usual, ours = gpu.measure("plane2", "cpu", 2, 2)
    assert "failed" in usual
    assert (ours["images_per_second"], ours["ratio"]) == (2.5, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("student", "teacher"), [("resnet8", None), ("plane2", "plane10")])
def test_one_packed_student_has_the_bits_of_a_step(student: str, teacher: str | None, precision: str) -> None:
    stage = stage_of(student, teacher, f"train.precision={precision}")
    data = Data.of(stage.dataset, images(ROWS * 2), "cpu")
    step, packed = Step(stage, data=data, device="cpu"), PackedStep(stage, "cpu", 1)
    call, given = single(step), batch(1)
    for _ in range(3):
        told = given if teacher else given[:3]
        loss, (losses,) = call(*told)[1]["loss"], packed(*told)
        assert torch.equal(losses, loss[None])
    assert {*packed.parameters, *packed.buffers} == {*step.network.network.state_dict()}
    for name, value in step.network.network.state_dict().items():
        assert torch.equal({**packed.parameters, **packed.buffers}[name][0], value), name


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("plane2", "plane4"),
        pytest.param("plane2", None, marks=pytest.mark.slow),
        pytest.param("resnet8", "plane10", marks=pytest.mark.slow),
    ],
)
def test_packed_students_learn_what_each_learns_alone(student: str, teacher: str | None) -> None:
    """In fp64, where only the order of sums differs; each student has its own seed and its own batch."""
    stage = stage_of(student, teacher, "train.precision=fp64")
    data = Data.of(stage.dataset, images(ROWS * 2), "cpu")
    packed, given = PackedStep(stage, "cpu", 3), batch(3) if teacher else batch(3)[:3]
    for _ in range(2):
        losses = packed(*given)[0]
    assert losses.shape == (3,)
    for number in range(3):
        step = Step(stage.model_copy(update={"seed": stage.seed + number}), data=data, device="cpu")
        call = single(step)
        own = [each[ROWS * number : ROWS * (number + 1)] for each in given]
        for _ in range(2):
            loss = call(*own)[1]["loss"]
        assert losses[number].item() == pytest.approx(loss.item(), rel=1e-10)
        for name, value in step.network.network.state_dict().items():
            stacked = {**packed.parameters, **packed.buffers}[name][number]
            torch.testing.assert_close(stacked, value, rtol=1e-7, atol=1e-10)


def test_a_replayed_step_trains_as_the_step_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a last batch that is smaller, and an epoch's first batch that is measured."""
    monkeypatch.setattr(contestants, "record", replayed)
    stage = stage_of("plane2", "plane4")
    data = Data.of(stage.dataset, images(ROWS * 5), "cpu")
    assert len(data.train) % ROWS
    found = []
    for kind in (Step, GraphStep):
        guides = guides_of(stage, data, tmp_path)
        loop = Loop(kind(stage, data=data, guides=guides, device="cpu"), data=data, guides=guides, watch=Clock())
        found.append(loop.run())
    plain, graph = found
    assert plain.metrics == graph.metrics
    assert all(torch.equal(graph.state[name], value) for name, value in plain.state.items())


def test_airbench_s_epoch_shows_crops_and_flips() -> None:
    arrays = images(200)
    loop = Airbench("plane2", None, arrays, "fp32", "cpu", graphs=False)
    shown, padded = loop.augmented(), loop.padded
    assert (shown.shape, padded.shape) == ((200, 32, 32, 3), (200, 40, 40, 3))
    views = set()
    for image, whole in zip(shown[:40], padded, strict=False):
        crops = whole.unfold(0, 32, 1).unfold(1, 32, 1).permute(0, 1, 3, 4, 2)  # [top, left, row, column, channel]
        places = [
            (*place, flipped)
            for flipped, wanted in ((False, image), (True, image.flip(1)))
            for place in (crops == wanted).all(4).all(3).all(2).nonzero().tolist()
        ]
        assert len(places) == 1
        views.add(tuple(places[0]))
    assert len(views) > 20
    assert np.unique([view[2] for view in views]).tolist() == [0, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_check_compiles_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr("kd.core.hardware.resolve_device", lambda device: "cpu")
    assert gpu.main(["--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "compiled" in line and "graph" not in line]) == 7
    for line in lines:
        assert line.endswith("failed: KnownError: CUDA graphs need a GPU") == ("graph" in line)
    assert not [*tmp_path.iterdir()]
