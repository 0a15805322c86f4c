"""`python -m kd.predict`, and exports of networks of timm and torchvision that are trained on photographs."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import kd
from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec, Normalization
from kd.datasets import DatasetConfig, digits, load_data, resolve
from kd.models import build
from kd.models.normalization import Normalized
from kd.tools import predict
from kd.tools.export import exporter
from kd.tools.export.contract import Contract
from kd.tools.export.formats import run_of
from kd.tools.predict import main
from tests.conftest import run_py
from tests.test_stage import DATASET, stage

Job = Callable[..., Any]
Shown = pytest.CaptureFixture[str]

STUDENT, TEACHER = "timm/resnet10t?drop_rate=0.1", "torchvision/resnet18"


def photographs(root: Path, counts: dict[str, int]) -> Path:
    """Noise of two colours that are hard to tell apart, of every shape; some lie on their side, some have a ground."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, colour in (("ants", (136, 128, 120)), ("bees", (120, 128, 136))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 60, (6, 6, 3)), 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).resize((int(rng.integers(40, 120)), int(rng.integers(40, 120))))
                exif = Image.Exif()
                exif[0x0112] = 6 if i % 3 == 0 else 1
                if i % 4 == 1:
                    image.putalpha(image.convert("L"))
                ending, quality = ("png", {}) if i % 4 == 1 else ("jpg", {"quality": 95})
                image.save(root / split / name / f"{i}.{ending}", exif=exif, **quality)
    return root


def seasoned(name: str) -> torch.nn.Module:
    """A network of five classes whose BatchNorm has seen images, so that its features differ."""
    torch.manual_seed(0)
    network = build(name, num_classes=5, image_size=32).train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(16, 3, 32, 32) + torch.randn(16, 3, 1, 1))
    return network


@dataclass(frozen=True)
class Study:
    """A teacher, of which the classifier alone was trained, and a student that resizes its images, on photographs."""

    photos: Path
    store: Path
    exports: dict[tuple[str, str], Path]  # by network and format
    chain: dict[str, dict[str, Any]]  # results by network


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("study")
    photographs(place / "photos", {"train": 24, "test": 12})
    torch.save(seasoned(TEACHER).state_dict(), place / "init.pt")
    networks = "teacher=torchvision teacher.arch=resnet18 teacher.init=init.pt teacher.freeze=backbone "
    networks += "model=timm model.arch=resnet10t +model.args.drop_rate=0.1 model.image_size=48"
    training = (
        "method=kd train=photos train.epochs=8 train.lr=0.01 train.precision=fp32 train.batch_size=8 tracking=none"
    )
    data = "dataset=folder dataset.root=photos dataset.image_size=32 runtime.threads=1 runtime.compile=false"
    where = {"KD_STORE": str(place / "store"), "KD_DATA": str(place / "data")}
    done = run_py(*f"{networks} {training} {data} hydra.run.dir=out".split(), cwd=place, **where)
    assert done.returncode == 0, done.stderr
    chain = json.loads((place / "out" / "result.json").read_text())["chain"]
    exports = {}
    with pytest.MonkeyPatch.context() as there:
        there.chdir(place)
        for name, value in where.items():
            there.setenv(name, value)
        for outcome in chain:
            for form in ("onnx", "safetensors"):
                assert exporter.main([outcome["key"], "--format", form]) == 0
                folder = next((place / "exports").glob(f"*{outcome['key']}-{form}"))
                exports[outcome["model"], form] = folder
    return Study(place / "photos", place / "store", exports, {each["model"]: each for each in chain})


def predicted(capsys: Shown, *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    """What --json prints, a line each."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# photographs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("network", [STUDENT, TEACHER])
def test_the_recorded_accuracy_from_the_store_and_from_exports(study: Study, network: str, capsys: Shown) -> None:
    outcome, files = study.chain[network], study.photos / "test"
    stored = predicted(capsys, outcome["key"][:8], files, "--store", study.store)
    assert [each["file"] for each in stored] == sorted(str(path) for path in files.glob("*/*"))
    assert {each["class"] for each in stored} == {"ants", "bees"}
    hits = [Path(each["file"]).parent.name == each["class"] for each in stored]
    assert 100 * np.mean(hits) == pytest.approx(outcome["test_acc"], abs=1e-3)
    for form in ("onnx", "safetensors"):
        folder = study.exports[network, form]
        for place in (folder, folder / f"model.{form}"):  # neither store nor data: both are empty here
            ours = predicted(capsys, place, files)
            assert [each["class"] for each in ours] == [each["class"] for each in stored]
            sure = [[each["confidence"] for each in one] for one in (ours, stored)]
            np.testing.assert_allclose(*sure, atol=1e-2)


@pytest.mark.parametrize("decode", ["array", "stream"])
@pytest.mark.parametrize("resize", ["short_side", "squash", "pad"])
def test_pictures_are_prepared_as_test_images(tmp_path: Path, resize: str, decode: str) -> None:
    fields = {"root": str(photographs(tmp_path / "photos", {"train": 4, "test": 8})), "resize": resize}
    fields |= {"name": "folder", "augment": "none", "val_fraction": 0.25, "split_seed": 0, "decode": decode}
    spec = resolve(DatasetConfig.model_validate({**fields, "image_size": 32, "background": "black"}), tmp_path)
    data = load_data(spec, tmp_path, "cpu")
    contract = Contract.of(stage(dataset=spec))
    files = sorted((tmp_path / "photos" / "test").glob("*/*"))
    for i, file in enumerate(files):
        shown = data.plain("test", np.array([i]))[0].permute(1, 2, 0)
        assert torch.equal(contract.image_of(file), shown), file
    assert contract.classes == ("ants", "bees")


@pytest.mark.parametrize(("background", "shade"), [("white", 255), ("black", 0)])
def test_what_is_transparent_is_as_in_the_test_images(tmp_path: Path, background: str, shade: int) -> None:
    for part in ("train", "test"):
        for name in ("ants", "bees"):
            (tmp_path / "icons" / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGBA", (32, 32)).save(tmp_path / "icons" / part / name / f"{i}.png")
    fields = {"name": "folder", "root": str(tmp_path / "icons"), "augment": "none", "split_seed": 0}
    spec = resolve(DatasetConfig.model_validate({**fields, "background": background, "val_fraction": 0.4}), tmp_path)
    contract = Contract.of(stage(dataset=spec))  # of squares of one size, which are kept in memory
    image = contract.image_of(tmp_path / "icons" / "test" / "ants" / "0.png")
    assert image.unique().tolist() == [shade]


@pytest.mark.slow
def test_an_export_names_classes_and_preprocessing(study: Study) -> None:
    spoken = "upright by its EXIF, white where it is transparent, the shorter side resized to 37, the centre of 32×32"
    for network, own in ((STUDENT, 48), (TEACHER, None)):
        folder = study.exports[network, "onnx"]
        assert re_safe(folder.name)
        assert (folder / "labels.txt").read_text() == "ants\nbees\n"
        told = {each.key: each.value for each in onnx.load(folder / "model.onnx").metadata_props}
        expected = {"network": network, "classes": '["ants", "bees"]', "image_size": "32", "resize": "short_side"}
        assert expected.items() <= told.items()
        assert told["images"] == "float32 [batch, 3, 32, 32], RGB in [0, 1]; normalisation is inside"
        assert told["preprocessing"].startswith(spoken)
        card = (folder / "README.md").read_text()
        assert spoken in card
        assert "in the order of these classes: ants, bees." in card
        assert ("mean 0.485/0.456/0.406, std 0.229/0.224/0.225" in card) == ("48×48" in card or own is None)
        assert ("after resizing to 48×48 (bicubic, antialiased)" in card) == (own == 48)
        json_told = json.loads((study.exports[network, "safetensors"] / "model.json").read_text())
        assert (json_told["classes"], json_told["side"]) == (["ants", "bees"], 37)
        assert json_told["normalization"]["size"] == own
    card = (study.exports[TEACHER, "onnx"] / "README.md").read_text()
    assert "from weights of sha256 " in card
    assert ", the classifier alone\n" in card


def re_safe(name: str) -> bool:
    """Whether a name needs no quotes in a shell and is one part of a path."""
    return all(char.isalnum() or char in "_.-" for char in name)


@pytest.mark.slow
def test_load_takes_the_same_images(study: Study, capsys: Shown) -> None:
    key, file = study.chain[STUDENT]["key"], study.photos / "test" / "ants" / "0.jpg"
    network = kd.load(key, study.store)
    contract = Contract.told(json.loads((study.exports[STUDENT, "safetensors"] / "model.json").read_text()))
    with torch.inference_mode():
        logits = network(contract.image_of(file).permute(2, 0, 1)[None])
    (line,) = predicted(capsys, key, file, "--store", study.store)
    assert line["label"] == int(logits.argmax())
    assert line["confidence"] == pytest.approx(100 * float(logits.softmax(1).max()), abs=1e-3)


# lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_line_for_each_picture(study: Study, capsys: Shown) -> None:
    export, file = study.exports[STUDENT, "onnx"], study.photos / "test" / "bees" / "0.jpg"
    (told,) = predicted(capsys, export, file)
    first, (second,) = told, told["next"]
    assert first["confidence"] >= second["confidence"]
    assert first["confidence"] + second["confidence"] == pytest.approx(100, abs=1e-3)
    assert {first["class"]: first["label"], second["class"]: second["label"]} == {"ants": 0, "bees": 1}
    assert main([str(export), str(file)]) == 0
    sure, other = (f"{each['class']} ({each['confidence']:.2f} %)" for each in (first, second))
    shown = capsys.readouterr()
    assert shown.out == f"{file}: {sure}, {other}\n"
    assert shown.err == ""
    assert main([str(export), str(file), "--top", "1"]) == 0
    assert capsys.readouterr().out == f"{file}: {sure}\n"
    assert predicted(capsys, export, file, "--top", "1")[0]["next"] == []
    for wrong in ("0", "-1", "x"):
        with pytest.raises(SystemExit):
            main([str(export), str(file), f"--top={wrong}"])
        assert "should be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_read_is_a_line_each(study: Study, tmp_path: Path, capsys: Shown) -> None:
    good = study.photos / "test" / "bees" / "0.jpg"
    (tmp_path / "notes.jpg").write_text("no picture")
    (tmp_path / "torn.png").write_bytes((study.photos / "test" / "bees" / "1.png").read_bytes()[:300])
    (tmp_path / "odd\nname.jpg").touch()
    given = [
        tmp_path / "none.jpg",
        good,
        tmp_path / "notes.jpg",
        tmp_path / "torn.png",
        tmp_path / "odd\nname.jpg",
        good,
    ]
    capsys.readouterr()
    assert main([str(study.exports[STUDENT, "onnx"]), *map(str, given), "--json"]) == 1
    shown = capsys.readouterr()
    assert [json.loads(line)["file"] for line in shown.out.splitlines()] == [str(good)] * 2
    lines = shown.err.splitlines()
    assert lines[0] == f"{tmp_path / 'none.jpg'}: does not exist"
    assert lines[1] == f"{tmp_path / 'notes.jpg'}: no picture that Pillow can read"
    assert lines[2].startswith(f"{tmp_path / 'torn.png'}: ")
    assert lines[3:] == [f"{tmp_path}/odd\\nname.jpg: empty"]


@pytest.mark.slow
def test_what_the_system_refuses_is_a_line_too(
    study: Study, tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("kd.tools.export.contract.read_square", refuse)
    file = study.photos / "test" / "bees" / "0.jpg"
    assert main([str(study.exports[STUDENT, "onnx"]), str(file)]) == 1
    assert capsys.readouterr().err == f"{file}: Permission denied\n"


@pytest.mark.slow
def test_folders_are_searched(study: Study, tmp_path: Path, capsys: Shown) -> None:
    good = study.photos / "test" / "bees" / "0.jpg"
    for name in ("b/deep/2.jpg", "a.jpg", ".hidden.jpg", "__MACOSX/x.jpg", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, tmp_path / "in" / name)
    export = str(study.exports[STUDENT, "onnx"])
    capsys.readouterr()
    assert main([export, str(tmp_path / "in"), "--json"]) == 0
    shown = capsys.readouterr()
    names = [json.loads(line)["file"] for line in shown.out.splitlines()]
    assert names == [f"{tmp_path}/in/{name}" for name in ("a.jpg", "b/deep/2.jpg")]
    assert shown.err.startswith(f"{tmp_path}/in: passed over: 1 .txt (notes.txt), 2 hidden or of the system (")
    (tmp_path / "empty").mkdir()
    assert main([export, str(tmp_path / "empty"), str(good)]) == 1  # the rest is classified
    shown = capsys.readouterr()
    assert shown.err == f"{tmp_path}/empty: has no pictures\n"
    assert len(shown.out.splitlines()) == 1


@pytest.mark.slow
def test_batches_are_bounded(study: Study, capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files = study.exports[STUDENT, "safetensors"], sorted((study.photos / "test").glob("*/*"))
    whole = predicted(capsys, folder, *files)
    sizes, real = [], predict.open_export

    def watched(path: Path) -> tuple[Contract, Callable[..., Any]]:
        contract, run = real(path)

        def counted(images: np.ndarray) -> Any:
            sizes.append(len(images))
            return run(images)

        return contract, counted

    monkeypatch.setattr(predict, "open_export", watched)
    monkeypatch.setattr(predict, "_PIXELS", 5 * 32 * 32)
    parts = predicted(capsys, folder, *files[:7], study.photos / "none", *files[7:], code=1)
    assert sizes == [5, 5, 5, 5, 4]
    assert [each["class"] for each in parts] == [each["class"] for each in whole]


# other data sets --------------------------------------------------------------------------------------------------


def test_data_sets_in_memory_take_pictures(job: Job, tmp_path: Path, capsys: Shown) -> None:
    (student,) = job("method=scratch")["chain"]
    arrays = digits.read(Path(), None)
    for i, pixels in enumerate(arrays.test_images):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i:03}.png")
    told = predicted(capsys, student["key"], tmp_path / "in")
    hits = [each["label"] == truth for each, truth in zip(told, arrays.test_labels, strict=True)]
    assert 100 * np.mean(hits) == pytest.approx(student["test_acc"], abs=1e-3)
    assert all(len(each["next"]) == 2 for each in told)

    Image.fromarray(arrays.test_images[0]).resize((64, 32)).save(tmp_path / "wide.png")
    assert main([student["key"], str(tmp_path / "wide.png")]) == 0
    line = (
        "digits has squares of 16 pixels, made from scans of 8×8 with each pixel doubled. "
        "Other pictures are made so: upright by its EXIF, white where it is transparent"
    )
    shown = capsys.readouterr()
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1
    assert shown.out.startswith(f"{tmp_path / 'wide.png'}: ")


def contract_of(**changes: Any) -> Contract:
    return Contract.of(stage(dataset=DatasetSpec(**{**DATASET.model_dump(), **changes})))


def test_classes_without_names_have_numbers(tmp_path: Path) -> None:
    contract = contract_of()
    assert (contract.labels, contract.shown_classes, contract.named(3)) == ("", "", 3)
    torch.manual_seed(0)
    network = Normalized.of(build("plane2", num_classes=10, image_size=16), contract.normalization).eval()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (found,) = predict.predictions(contract, run_of(network), [tmp_path / "a.png"], 10)
    assert sorted(found.labels) == [*range(10)]
    assert list(found.confidences) == sorted(found.confidences, reverse=True)
    assert sum(found.confidences) == pytest.approx(100)


def test_many_classes_are_in_a_file() -> None:
    names = tuple(f"c{i}" for i in range(120))
    contract = contract_of(num_classes=120, classes=names)
    assert contract.shown_classes == f"{', '.join(names[:20])} and 100 more (labels.txt)"
    assert contract.labels == "".join(f"{name}\n" for name in names)
    twenty = contract_of(num_classes=20, classes=names[:20])
    assert twenty.shown_classes == ", ".join(names[:20])
    assert contract_of(num_classes=2, classes=("a\nb", "c")).labels == "a\\nb\nc\n"


@pytest.mark.parametrize("resize", ["short_side", "squash", "pad", None])
def test_a_contract_is_read_as_it_was_written(resize: str | None) -> None:
    contract = contract_of(num_classes=2, classes=("a, b", "ünï"), resize=resize, background="black")
    assert Contract.told({**contract.entries(), "more": "text"}) == contract
    assert Contract.told(json.loads(json.dumps(contract.dump()))) == contract


# which network ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_names_no_network(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    key, file = study.chain[STUDENT]["key"], str(study.photos / "test" / "bees" / "0.jpg")
    (tmp_path / key[:6]).mkdir()
    (tmp_path / "two").mkdir()
    for form in ("onnx", "safetensors"):
        shutil.copy(study.exports[STUDENT, form] / f"model.{form}", tmp_path / "two")
    (tmp_path / "torn.onnx").write_bytes((tmp_path / "two" / "model.onnx").read_bytes()[:1000])
    bare = onnx.load(tmp_path / "two" / "model.onnx")
    bare.ClearField("metadata_props")
    onnx.save(bare, tmp_path / "bare.onnx")
    (tmp_path / "weights.pt").touch()
    cases = {
        key[:6]: f"{key[:6]} is the beginning of a stage's key, and a path too: write ./{key[:6]} for the path",
        f"./{key[:6]}": "has neither model.onnx nor model.safetensors",
        "xyz": "should be the key of one finished stage",
        "": "an empty text: should be the key of one finished stage",
        "none/model.onnx": "does not exist: it should be a stage's key, or the path of an export",
        "model.onnx": "does not exist: it should be a stage's key, or the path of an export",
        "two": "has model.onnx and model.safetensors: name one of them",
        "two/model.safetensors": "model.json cannot be read",
        "torn.onnx": "torn.onnx is damaged, or no export of this version",
        "bare.onnx": "bare.onnx is damaged, or no export of this version",
        "weights.pt": "weights.pt is no exported network: its file is model.onnx or model.safetensors",
        str(study.store / key): f"is a stage of a store, and not an export: give its key, {key}",
    }
    for name, message in cases.items():
        with pytest.raises(KnownError) as caught:
            main([name, file, "--store", str(study.store)])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert main([key, file, "--store", str(study.store)]) == 0


def test_a_failure_of_the_command_is_one_line(capsys: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kd.predict", "xyz", "a.jpg"])
    monkeypatch.delitem(sys.modules, "kd.predict", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("kd.predict", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("xyz: should be the key of one finished stage (no key begins with it in ")


def test_what_a_network_does_with_its_images_in_words() -> None:
    assert (
        Contract.of(
            stage(preprocessing=Normalization(mean=(0.5,) * 3, std=(0.5,) * 3, size=24, interpolation="bilinear"))
        ).inside
        == "mean 0.5/0.5/0.5, std 0.5/0.5/0.5, after resizing to 24×24 (bilinear, antialiased)"
    )
