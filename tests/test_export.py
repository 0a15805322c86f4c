"""`python -m kd.export`: the files compute the same as the stored network, and the card names their origin."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import kd
from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec
from kd.datasets import Arrays, digits
from kd.datasets.data import Data
from kd.models import MODELS, build
from kd.models.normalization import Normalized
from kd.reporting.console import in_bytes
from kd.store import StageResult, Store, TrainedStage
from kd.tools.export import destination
from kd.tools.export.comparison import compare_logits
from kd.tools.export.exporter import folder_name, main
from kd.tools.export.formats import FORMATS, open_format
from tests.conftest import ROOT
from tests.faults import every_fault
from tests.test_faults import trained
from tests.test_stage import DATASET, stage

Job = Callable[..., Any]

TEST = digits.read(Path(), None)
QUICK = {"net", "mlp"}  # a second each; plane2 is exported below


def logits_by_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The logits of the test images, by the code in the model card."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    images = TEST.test_images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    names: dict[str, Any] = {"images": images}
    with monkeypatch.context() as there:
        there.chdir(out)
        exec(code, names)
    return np.asarray(names["logits"])


def original_logits(key: str) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(kd.load(key)(torch.from_numpy(TEST.test_images).permute(0, 3, 1, 2)))


def accuracy(logits: np.ndarray) -> float:
    return 100 * float((logits.argmax(1) == TEST.test_labels).mean())


def test_onnx(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (student,) = job("method=scratch")["chain"]
    monkeypatch.chdir(tmp_path)
    assert main([student["key"][:12], "--format", "onnx"]) == 0
    out = tmp_path / "exports" / f"plane2-{student['key']}-onnx"
    assert {path.name for path in out.iterdir()} == {"model.onnx", "labels.txt", "README.md"}

    logits, original = logits_by_card(out, monkeypatch), original_logits(student["key"])
    np.testing.assert_allclose(logits, original, atol=1e-5 * np.abs(original).max())
    # The stage was trained in fp32, so that what was recorded is what both compute.
    assert accuracy(logits) == accuracy(original) == pytest.approx(student["test_acc"], abs=1e-4)

    model = onnx.load(out / "model.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert told["key"] == student["key"]
    assert told["images"] == "float32 [batch, 3, 16, 16], RGB in [0, 1]; normalisation is inside"
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]

    accuracies = f"test {student['test_acc']:.2f} % and {student['test_acc']:.2f} %"
    assert f"same class for 100.00 %; {accuracies}" in capsys.readouterr().out
    for path in out.iterdir():
        assert not any(place.encode() in path.read_bytes() for place in (str(ROOT), str(tmp_path), "/site-packages/"))


def weights_of(key: str) -> Path:
    """A stage's weights in the store."""
    return Path(os.environ["KD_STORE"]) / key / "model.safetensors"


def test_safetensors(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = job("method=kd")["chain"]
    out = tmp_path / "out of the store"
    command = [student["key"], "--format", "safetensors", "--out", str(out)]
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "model.json", "labels.txt", "README.md"}
    assert np.array_equal(logits_by_card(out, monkeypatch), original_logits(student["key"]))
    card = (out / "README.md").read_text()
    for each in (teacher, student):
        (line,) = (line for line in card.splitlines() if f"| `{each['key']}` |" in line)
        assert f"| {each['params']:,} | {in_bytes(weights_of(each['key']).stat().st_size)} |" in line
        assert f"| {each['val_acc']:.2f} | {each['test_acc']:.2f} |" in line
    size = in_bytes((out / "model.safetensors").stat().st_size)
    for part in ("kd T=4 lambda=0.5", "epoch chosen on validation accuracy", f"`model.safetensors`: {size}."):
        assert part in card

    with pytest.raises(KnownError, match="exists already; --force replaces it"):
        main(command)
    shutil.rmtree(weights_of(teacher["key"]).parent)
    assert main([*command, "--force"]) == 0
    line = next(line for line in (out / "README.md").read_text().splitlines() if teacher["key"] in line)
    assert line.endswith("| – | – | – | – |")  # parameters, weights and accuracies of a network that is gone
    assert not list(tmp_path.glob(".*"))  # the earlier one is gone

    (out / "notes.txt").touch()
    for place in (out, out / "notes.txt"):
        with pytest.raises(KnownError, match=r"--out: .* use another"):
            main([*command[:-1], str(place), "--force"])
    assert (out / "notes.txt").exists()


def test_somebodys_weights(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(build("plane4", num_classes=10, image_size=16).state_dict(), tmp_path / "plane4.pt")
    teacher, _ = job("method=kd", f"teacher.checkpoint={tmp_path / 'plane4.pt'}", "teacher.normalize=takd")["chain"]
    assert main([teacher["key"], "--format", "safetensors", "--out", str(tmp_path / "given")]) == 0
    assert np.array_equal(logits_by_card(tmp_path / "given", monkeypatch), original_logits(teacher["key"]))
    assert "given weights" in (tmp_path / "given" / "README.md").read_text()


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(Path(os.environ["KD_STORE"]))
    store.save(stage(), trained(1), {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KnownError, match="xyz: should be the key of one finished stage"):
        main(["xyz", "--format", "onnx"])
    with monkeypatch.context() as lacking:
        lacking.delitem(sys.modules, "kd.tools.export.onnx", raising=False)
        lacking.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(KnownError, match=r"onnxruntime.*pip install -e '\.\[export\]'"):
            main([stage().key, "--format", "onnx"])
    (store.root / stage().key / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(KnownError, match="is damaged"):
        main([stage().key, "--format", "safetensors"])
    assert not (tmp_path / "exports").exists()


def test_data_without_names_has_no_labels(tmp_path: Path) -> None:
    store, source = Store(Path(os.environ["KD_STORE"])), stage()
    state = build(source.model, num_classes=10, image_size=16).state_dict()
    result = StageResult(params=1, val_acc=10, test_acc=10, epochs=1, selected_epoch=1, seconds=1)
    store.save(source, TrainedStage(state, [], result), {})
    assert main([source.key, "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "model.json", "README.md"}
    assert "[batch, 10], in the order of the data set's classes." in (tmp_path / "out" / "README.md").read_text()


class Forked(nn.Module):
    """A network that no graph can hold: what it computes depends on its images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def test_a_network_that_onnx_cannot_hold() -> None:
    network = Normalized(Forked(), DATASET.mean, DATASET.std)
    with pytest.raises(
        KnownError, match=r"^resnet8 cannot be written as ONNX \(.*\): --format safetensors takes"
    ) as caught:
        open_format("onnx").pack(network, stage())
    assert "\n" not in str(caught.value)


def test_names_of_folders() -> None:
    names = {
        "resnet8": "resnet8",
        "timm/resnet18?drop_rate=0.1&act_layer=gelu": "timm-resnet18-drop_rate-0.1-act_layer-gelu",
        "torchvision/vgg16_bn": "torchvision-vgg16_bn",
        'timm/x?stem_type="a b"': "timm-x-stem_type-a-b",
        "package.module.TINY": "package.module.TINY",
    }
    assert {name: folder_name(name) for name in names} == names


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kd.export", "xyz", "--format", "onnx"])
    monkeypatch.delitem(sys.modules, "kd.export", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("kd.export", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("xyz: should be the key of one finished stage (no key begins with it in ")


def test_an_export_is_whole_or_absent_whatever_fails(tmp_path: Path) -> None:
    place = tmp_path / "parent" / "export"
    earlier, newer = ({"README.md": text, "model.onnx": text} for text in (b"earlier", b"newer"))

    def held(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def fresh() -> None:
        shutil.rmtree(tmp_path / "parent", ignore_errors=True)
        destination.publish_export(place, earlier, force=False)

    def check() -> None:
        assert not place.exists() or held(place) in (earlier, newer)
        destination.publish_export(place, newer, force=True)
        assert held(place) == newer
        assert os.listdir(tmp_path / "parent") == ["export"]

    calls, _ = every_fault(lambda: destination.publish_export(place, newer, force=True), fresh, check)
    assert {"mkdir", "open", "write", "fsync", "rename"} <= {call.split()[0] for call in calls}


def network_of(name: str) -> Normalized:
    torch.manual_seed(0)
    network = Normalized(build(name, num_classes=10), DATASET.mean, DATASET.std)
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 32, 32))  # statistics of its own
    return network.eval()


IMAGES = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
ARRAYS = Arrays(IMAGES.numpy(), np.arange(9) % 10, IMAGES.numpy(), np.zeros(9, np.int64))
SHOWN = Data.of(DatasetSpec(**{**DATASET.model_dump(), "val_fraction": 0, "augment": "none"}), ARRAYS, "cpu")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_every_network(name: str) -> None:
    network = network_of(name)
    source = stage(model=name, dataset=DATASET.model_copy(update={"image_size": 32}))
    for form in map(open_format, FORMATS):
        run = form.unpack(form.pack(network, source))
        assert compare_logits(network, run, SHOWN).agreement == 100
        assert run((IMAGES[:1].permute(0, 3, 1, 2) / 255).numpy()).shape == (1, 10)


def test_float64() -> None:
    network = network_of("plane2").double()
    source = stage(model="plane2", dataset=DATASET.model_copy(update={"image_size": 32}))
    for name, dtype in (("onnx", "float32"), ("safetensors", "float64")):
        form = open_format(name)
        assert compare_logits(network, form.unpack(form.pack(network, source)), SHOWN).dtype == dtype
    assert network.mean.dtype == torch.float64


def test_a_network_that_is_not_the_original() -> None:
    network = network_of("plane2")
    with pytest.raises(KnownError, match="differs from the original: logits by"), torch.inference_mode():
        compare_logits(network, lambda images: network.network(torch.from_numpy(images)).numpy(), SHOWN)
    with pytest.raises(KnownError, match="logits by nan"):
        compare_logits(network, lambda images: np.full((len(images), 10), np.nan, np.float32), SHOWN)
