"""Probes: a classifier on a frozen backbone, whose features are remembered; and students that it teaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.core.spec import KnownError
from kd.models import build
from kd.models.normalization import Normalized
from kd.training.guide import Guide
from kd.training.loop import Loop
from kd.training.probe import Probe, ProbedGuide
from tests.test_photos import photographs, root, stage_files

__all__ = ["root"]  # the fixture

Job = Callable[..., Any]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Initial weights of a resnet8, with statistics of its own."""
    torch.manual_seed(5)
    network = build("resnet8", num_classes=3, image_size=32).train()
    network(torch.randn(64, 3, 32, 32))
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "resnet8.safetensors"
    )
    return tmp_path / "resnet8.safetensors"


def probed(part: str, weights: Path, network: str = "resnet8") -> list[str]:
    return [f"{part}={network}", f"{part}.init={weights}", f"{part}.freeze=backbone"]


@pytest.mark.parametrize("decode", ["array", pytest.param("stream", marks=pytest.mark.slow)])
def test_a_probe_and_its_student_have_the_same_bits_whatever_was_there_before(
    job: Job, root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    """With a new and a filled bank, without one, and decoded in another place."""
    run = [*photographs(root, decode), *probed("teacher", weights), "method=kd", "train.epochs=4"]
    job(*run, "method.T=7", folder="earlier")
    warm = [stage["key"] for stage in job(*run, folder="warm")["chain"]]
    for name, place, more in [
        ("cold", "data", []),
        ("unbanked", "data", ["runtime.bank=false"]),
        ("other", "other", []),
    ]:
        monkeypatch.setenv("KD_STORE", str(tmp_path / name))
        monkeypatch.setenv("KD_DATA", str(tmp_path / place))
        result = job(*run, *more, folder=f"out-{name}")
        assert [stage["reused"] for stage in result["chain"]] == [False, False]
        assert [stage["key"] for stage in result["chain"]] == warm
        for key in warm:
            assert stage_files(tmp_path / name, key) == stage_files(tmp_path / "store", key), name
        assert (tmp_path / name / "bank").exists() == (name != "unbanked")


def test_only_the_classifier_of_a_probe_is_trained(job: Job, root: Path, weights: Path, tmp_path: Path) -> None:
    run = [*photographs(root), *probed("model", weights), "method=scratch", "train.epochs=40", "train.lr=0.1"]
    (outcome,) = job(*run)["chain"]
    before, after = load_file(weights), load_file(tmp_path / "store" / outcome["key"] / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert outcome["params"] == sum(p.numel() for p in build("resnet8", num_classes=3).parameters())
    assert outcome["test_acc"] > 60  # chance is 33
    rows = [json.loads(row) for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_probe_says_what_the_whole_network_says(
    job: Job, root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded accuracy of the classifier on remembered features is that of the saved network on the pictures."""
    import kd
    from tests.test_photos import loaded

    (outcome,) = job(*photographs(root), *probed("model", weights), "method=scratch", "train.epochs=20")["chain"]
    network = kd.load(outcome["key"], store=tmp_path / "store")
    images = loaded(root, tmp_path / "data")
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch in images.batches("test")])
    accuracy = 100 * (logits.argmax(1) == images.test_labels).double().mean().item()
    assert accuracy == pytest.approx(outcome["test_acc"], abs=1e-3)


def test_a_view_passes_the_backbone_once_for_all_seeds_and_students(
    job: Job, root: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 classes · 9 training photographs · 4 views; plain photographs once a stage."""
    rows: list[int] = []
    compute = Guide._compute

    def counted(self: Guide, samples: Any, views: Any, advance: Any) -> Any:
        rows.append(len(samples))
        return compute(self, samples, views, advance)

    monkeypatch.setattr(Guide, "_compute", counted)
    run = [*photographs(root), *probed("teacher", weights), "method=kd", "train.epochs=12", "dataset.val_fraction=0.25"]
    job(*run, folder="first")
    first = sum(rows)
    assert first <= 27 * 4
    job(*run, "teacher.seed=1", "seed=1,2", folder="more", multirun=True)
    assert sum(rows) <= 27 * 4
    assert sum(rows) > 0.9 * 27 * 4


@pytest.mark.slow
def test_an_interrupted_probe_goes_on_to_the_same_bits(
    job: Job, root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*photographs(root, "stream"), *probed("model", weights), "method=scratch", "train.epochs=6"]
    validate = Loop._validate

    def interrupted(loop: Loop) -> float | None:
        if len(loop.history) == 3:
            raise KeyboardInterrupt
        return validate(loop)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_validate", interrupted)
        job(*run, "runtime.checkpoint_every=2", code=130)
    resumed = job(*run, folder="resumed")["chain"][0]["key"]
    monkeypatch.setenv("KD_STORE", str(tmp_path / "unbroken"))
    assert job(*run, folder="unbroken")["chain"][0]["key"] == resumed
    assert stage_files(tmp_path / "store", resumed) == stage_files(tmp_path / "unbroken", resumed)


def test_a_probe_that_teaches_leaves_its_backbones_network_where_it_is() -> None:
    """The device `meta` stands for a GPU."""
    whole = Normalized(build("resnet8", num_classes=3, image_size=32), (0.5,) * 3, (0.2,) * 3)
    guide = ProbedGuide(SimpleNamespace(network=whole), "fp32", "meta")  # type: ignore[arg-type]
    assert guide._classifier.weight.device.type == "meta"
    assert {each.device.type for each in whole.parameters()} == {"cpu"}


class Convolutional(torch.nn.Sequential):
    """Its last layer is a convolution."""

    head = "0"


def test_a_network_that_does_not_end_in_a_linear_layer_is_no_probe() -> None:
    whole = Normalized(Convolutional(torch.nn.Conv2d(3, 4, 1)), (0.5,) * 3, (0.2,) * 3)
    with pytest.raises(KnownError, match=r"own: freeze=backbone needs a network that ends in nn.Linear .*: Conv2d"):
        Probe(whole, "own")


def test_a_teacher_that_needed_fp32_teaches_in_fp32(
    job: Job, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its features overflow in the precision that the stage asks for, also when its student reads them."""
    state = load_file(weights)
    state["fc.weight"] = torch.randn(10, *state["fc.weight"].shape[1:])
    state["fc.bias"] = torch.zeros(10)
    last = [name for name in state if name.endswith("weight") and state[name].dim() == 1][-1]
    state[last] = torch.full_like(state[last], 1e6)
    save_file(state, weights)
    run = [*probed("teacher", weights), "model=resnet8", "train.precision=fp16", "train.on_nan=retry_fp32"]
    chain = job(*run, "method=kd", "train.epochs=1", "model.train.lr=1e-6")[
        "chain"
    ]  # ends with 1 without such features
    assert [stage["role"] for stage in chain] == ["teacher", "student"]
    assert "teacher resnet8: the loss is nan" in capsys.readouterr().out
