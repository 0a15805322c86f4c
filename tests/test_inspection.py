"""Outputs of finished stages agree with their accuracy; measures agree with the papers' definitions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kd.core import files
from kd.core.spec import KnownError
from kd.models import build
from kd.store import Store
from kd.tools.inspection.measures import Bin, calibration, confusion, fidelity
from kd.tools.inspection.outputs import outputs
from kd.tools.store import main
from kd.training.workplace import RuntimeSpec, Workplace
from tests.test_datasets import write_folder
from tests.test_faults import trained
from tests.test_stage import stage

Job = Callable[..., Any]


@pytest.fixture
def workplace() -> Workplace:
    runtime = RuntimeSpec(device="cpu", threads=1)
    return Workplace(Store(Path(os.environ["KD_STORE"])), Path(os.environ["KD_DATA"]), runtime)


def accuracy(logits: np.ndarray, workplace: Workplace, key: str) -> float:
    labels = workplace.data(workplace.store.source(key)).test_labels.numpy()
    return round(100 * float((logits.argmax(1) == labels).mean()), 10)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_accuracy_is_that_of_the_stage(job: Job, workplace: Workplace, precision: str) -> None:
    for outcome in job("method=kd", f"train.precision={precision}", "teacher.train.epochs=1")["chain"]:
        logits = outputs(workplace, workplace.store.source(outcome["key"]))
        assert logits.dtype == np.float32
        assert logits.shape == (360, 10)
        assert accuracy(logits, workplace, outcome["key"]) == outcome["test_acc"]


def test_of_somebodys_network(job: Job, workplace: Workplace, tmp_path: Path) -> None:
    torch.save(build("plane4", num_classes=10, image_size=16).state_dict(), tmp_path / "plane4.pt")
    teacher, _ = job("method=kd", f"teacher.checkpoint={tmp_path / 'plane4.pt'}", "teacher.normalize=takd")["chain"]
    logits = outputs(workplace, workplace.store.source(teacher["key"]))
    assert accuracy(logits, workplace, teacher["key"]) == teacher["test_acc"]


def test_a_stage_retried_in_fp32(job: Job, workplace: Workplace) -> None:
    """Its test accuracy was computed in fp32, although its spec has another precision."""
    (student,) = job("method=scratch", "train.precision=bf16")["chain"]
    source, store = workplace.store.source(student["key"]), workplace.store
    before = outputs(workplace, source)
    state = store.network(source.key).network.state_dict()
    store.save(source, replace(trained(1), state=state), {"in fp32 after": "the loss is nan"})
    shutil.rmtree(store.outputs)
    after = outputs(workplace, source)
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(before, after, atol=0.05 * np.abs(after).max())


def test_of_one_data_set_after_another(job: Job, workplace: Workplace, tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    chosen = "method=scratch", "train.epochs=1", "dataset.val_fraction=0.5"
    pets = job(*chosen, "dataset=folder", f"dataset.root={tmp_path / 'pets'}", folder="pets")
    digits = job(*chosen, folder="digits")
    for result in (pets, digits, pets):
        shutil.rmtree(workplace.store.outputs, ignore_errors=True)
        (student,) = result["chain"]
        logits = outputs(workplace, workplace.store.source(student["key"]))
        assert accuracy(logits, workplace, student["key"]) == student["test_acc"]


@pytest.fixture
def student(job: Job) -> str:
    (outcome,) = job("method=scratch", "train.epochs=1")["chain"]
    return str(outcome["key"])


def test_outputs_are_kept(student: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    source = workplace.store.source(student)
    logits = outputs(workplace, source)
    (path,) = workplace.store.outputs.iterdir()
    assert path.name == f"{student}-{workplace.store.fingerprint(student)[:16]}.npy"
    with monkeypatch.context() as without:
        without.setattr(Workplace, "data", None)
        assert np.array_equal(outputs(workplace, source), logits)
    whole = path.read_bytes()
    for damaged in (b"", b"rubbish", whole[:100], whole[:-1], whole[:8] + b"\xff" * 100):
        path.write_bytes(damaged)
        assert np.array_equal(outputs(workplace, source), logits)
        assert path.read_bytes() == whole
    for other in (logits.astype(np.float64), logits[:, :9], logits[0]):
        np.save(path, other)
        assert np.array_equal(outputs(workplace, source), logits)


def test_a_store_that_cannot_be_written(student: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    source = workplace.store.source(student)
    workplace.store.outputs.write_text("in the way")
    logits = outputs(workplace, source)
    workplace.store.outputs.unlink()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert np.array_equal(outputs(workplace, source), logits)
    assert not list(workplace.store.outputs.glob("*"))


def test_what_has_no_outputs(student: str, workplace: Workplace) -> None:
    with pytest.raises(KnownError, match="no finished stage"):
        outputs(workplace, stage())
    source, store = workplace.store.source(student), workplace.store
    state = {name: t * torch.nan for name, t in store.network(student).network.state_dict().items()}
    store.save(source, replace(trained(1), state=state), {})
    with pytest.raises(KnownError, match=f"stage {student}: some of its logits on the test images are not finite"):
        outputs(workplace, source)


def test_housekeeping(student: str, workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    outputs(workplace, workplace.store.source(student))
    folder = workplace.store.outputs
    (kept,) = folder.iterdir()
    gone, torn = folder / f"{'7' * 16}-{'8' * 16}.npy", files.temporary(folder / "x.npy")
    for path in (gone, torn):
        path.write_bytes(b"logits")
    assert main(["gc"]) == 0
    assert f"outputs/{gone.name}: logits of a stage that is not in the store" in capsys.readouterr().out
    assert list(folder.iterdir()) == [kept]
    assert main(["rm", student]) == 0
    assert list(folder.iterdir()) == []


def logits_of(*probabilities: tuple[float, ...]) -> np.ndarray:
    """Logits with this softmax, shifted by another number in every row."""
    return np.log(np.array(probabilities)) + np.arange(len(probabilities))[:, None]


def test_fidelity_by_hand() -> None:
    guide = logits_of((0.5, 0.5), (0.25, 0.75))
    student = logits_of((0.75, 0.25), (0.75, 0.25))
    found = fidelity(student, guide)
    first = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    second = 0.25 * log(0.25 / 0.75) + 0.75 * log(0.75 / 0.25)
    assert found.kl == pytest.approx((first + second) / 2, abs=1e-6)
    assert found.kl != pytest.approx(fidelity(guide, student).kl, abs=1e-3)  # it has a direction
    assert (found.agreement, found.n) == (50, 2)  # of equal probabilities the first


def test_calibration_by_hand() -> None:
    logits = logits_of((0.9, 0.1), (0.95, 0.05), (0.39, 0.61), (0.36, 0.64))
    found = calibration(logits, np.array([0, 1, 1, 1]), bins=5)
    empty = Bin(confidence=None, accuracy=None, count=0)
    sure = Bin(confidence=92.5, accuracy=50, count=2)
    assert found.bins == (empty, empty, empty, Bin(confidence=62.5, accuracy=100, count=2), sure)
    assert found.ece == pytest.approx((2 * 42.5 + 2 * 37.5) / 4)
    # A confidence on the border of two bins is in the lower; whole confidence is in the last.
    on_border = calibration(np.zeros((1, 2)), np.array([0]), bins=4)
    assert [each.count for each in on_border.bins] == [0, 1, 0, 0]
    certain = calibration(np.array([[1000.0, 0]]), np.array([0]))
    assert (certain.ece, certain.bins[-1].count) == (0, 1)


def test_confusion_by_hand() -> None:
    guide, student = np.eye(3)[[0, 0, 1, 2, 2]], np.eye(3)[[0, 1, 1, 2, 0]]
    found = confusion(guide=guide, student=student, labels=np.array([0, 0, 2, 1, 0]))
    assert found.matrix == ((1, 1, 0), (0, 1, 0), (1, 0, 1))
    shares = found.both_right, found.guide_only, found.student_only, found.neither_right
    assert shares == (20, 20, 20, 40)


LOGITS = arrays(np.float32, (7, 4), elements=st.floats(-200, 200, width=32))
LABELS = arrays(np.int64, 7, elements=st.integers(0, 3))


@given(LOGITS, LOGITS, LABELS, st.integers(1, 20))
def test_what_holds_of_all_logits(a: np.ndarray, b: np.ndarray, labels: np.ndarray, bins: int) -> None:
    assert fidelity(a, a).model_dump() == {"agreement": 100, "kl": 0, "n": 7}
    assert fidelity(a, b).kl >= 0
    assert fidelity(a, b).agreement == fidelity(b, a).agreement

    table = confusion(guide=a, student=b, labels=labels)
    matrix = np.array(table.matrix)
    assert matrix.sum() == 7
    assert 100 * np.trace(matrix) / 7 == pytest.approx(fidelity(b, a).agreement, abs=1e-4)
    assert np.array_equal(matrix.T, confusion(guide=b, student=a, labels=labels).matrix)
    shares = table.both_right, table.guide_only, table.student_only, table.neither_right
    assert sum(shares) == pytest.approx(100, abs=1e-3)
    right = 100 * float((a.argmax(1) == labels).mean())
    assert table.both_right + table.guide_only == pytest.approx(right, abs=1e-3)

    found = calibration(a, labels, bins)
    counts = [each.count for each in found.bins]
    assert (len(counts), sum(counts)) == (bins, 7)
    assert 0 <= found.ece <= 100
    mean = sum(each.accuracy * each.count for each in found.bins if each.accuracy is not None) / 7
    assert mean == pytest.approx(right, abs=1e-3)
    for i, each in enumerate(found.bins):
        if each.confidence is not None:
            assert 100 * i / bins - 1e-3 <= each.confidence <= 100 * (i + 1) / bins + 1e-3
    assert type(found).model_validate_json(found.model_dump_json()) == found


GOOD, RIGHT = np.zeros((2, 3)), np.zeros(2, np.int64)


@pytest.mark.parametrize("bad", [np.full((2, 3), np.nan), np.array([[0, np.inf, 0], [0, 0, 0]])])
def test_what_is_not_finite_is_refused(bad: np.ndarray) -> None:
    for ask in (
        lambda: fidelity(bad, GOOD),
        lambda: fidelity(GOOD, bad),
        lambda: calibration(bad, RIGHT),
        lambda: confusion(guide=bad, student=GOOD, labels=RIGHT),
        lambda: confusion(guide=GOOD, student=bad, labels=RIGHT),
    ):
        with pytest.raises(ValueError, match="logits should be finite"):
            ask()


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guide's logits should be \[2, 3\] \(got \[1, 3\]\)"):
        fidelity(GOOD, GOOD[:1])
    with pytest.raises(ValueError, match=r"labels should be \[2\] \(got \[1\]\)"):
        calibration(GOOD, RIGHT[:1])
    with pytest.raises(ValueError, match="labels should be below 3 and not negative"):
        confusion(guide=GOOD, student=GOOD, labels=np.array([0, 3]))
    with pytest.raises(ValueError, match="bins should be at least 1"):
        calibration(GOOD, RIGHT, bins=0)
    with pytest.raises(ValueError, match=r"logits should be \[sample, class\] and not empty"):
        fidelity(GOOD[:0], GOOD[:0])
