"""Networks of libraries in a run: names, initial weights, probes, recipes for photographs, and costs in advance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd.core.recipes import Task, recipe
from kd.core.stage import Stage
from kd.models import build
from kd.store import Store
from kd.training import forecast
from tests.test_photos import root

pytest.importorskip("timm", reason="the extra kd[timm] is not installed")

__all__ = ["root"]  # the fixture

Job = Callable[..., Any]
Shown = pytest.CaptureFixture[str]
LCNET = "timm/lcnet_035"
QUICK = ("teacher.train.epochs=2", "model.train.epochs=1", "train.batch_size=12", "model=resnet8")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of trained weights of a network with five classes, in place of ImageNet's."""
    torch.manual_seed(1)
    file = tmp_path / "lcnet.safetensors"
    save_file(build(LCNET, num_classes=5, image_size=32).state_dict(), file)
    return file


def photos(root: Path, *more: str) -> list[str]:
    return ["dataset=folder", f"dataset.root={root}", "dataset.image_size=32", "dataset.views=2", *QUICK, *more]


def lcnet(weights: Path, end: str = "teacher") -> list[str]:
    return [f"{end}=timm", f"{end}.arch=lcnet_035", f"{end}.init={weights}"]


def stored(key: str, tmp_path: Path) -> tuple[Stage, dict[str, torch.Tensor]]:
    source = Store(tmp_path / "store").source(key)
    assert isinstance(source, Stage)
    return source, load_file(tmp_path / "store" / key / "model.safetensors")


@pytest.mark.slow
def test_a_probe_teaches(job: Job, root: Path, weights: Path, tmp_path: Path, capsys: Shown) -> None:
    asked = photos(root, *lcnet(weights), "teacher.freeze=backbone")
    result = job(*asked)
    assert f"teacher {LCNET}: its classifier of 5 classes is made anew for 3" in capsys.readouterr().out
    teacher, student = result["chain"]
    assert (teacher["model"], student["model"]) == (LCNET, "resnet8")
    assert result["classes"] == ["blue", "green", "red"]
    stage, trained = stored(teacher["key"], tmp_path)
    before = load_file(weights)
    assert (stage.freeze, stage.dataset.classes) == ("backbone", ("blue", "green", "red"))
    assert {name for name in before if not torch.equal(before[name], trained[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert teacher["params"] == sum(each.numel() for each in build(LCNET, num_classes=3).parameters())
    weights.rename(tmp_path / "elsewhere.safetensors")  # a path decides nothing
    again = job(*photos(root, *lcnet(tmp_path / "elsewhere.safetensors"), "teacher.freeze=backbone"))
    assert [each["reused"] for each in again["chain"]] == [True, True]
    assert str(tmp_path) not in (tmp_path / "store" / teacher["key"] / "stage.json").read_text()


def test_fine_tuning_begins_with_the_file(job: Job, root: Path, weights: Path, tmp_path: Path) -> None:
    tuned = job(*photos(root, *lcnet(weights), "teacher.train.lr=1e-12"))["chain"][0]
    fresh = job(*photos(root, "teacher=timm", "teacher.arch=lcnet_035", "teacher.train.lr=1e-12"))["chain"][0]
    assert tuned["key"] != fresh["key"]
    (_, first), (_, other), before = stored(tuned["key"], tmp_path), stored(fresh["key"], tmp_path), load_file(weights)
    torch.testing.assert_close(first["conv_stem.weight"], before["conv_stem.weight"], atol=1e-6, rtol=0)
    assert not torch.allclose(other["conv_stem.weight"], before["conv_stem.weight"], atol=1e-3)


def test_an_assistant_begins_with_the_file_of_its_name(job: Job, root: Path, weights: Path, tmp_path: Path) -> None:
    chain = [f"method.assistants=[{LCNET}]", f"+init={{{LCNET}: {weights}}}", f"freeze=[{LCNET}]", "teacher=resnet14"]
    _, assistant, _ = job(*photos(root, "method=ta", *chain))["chain"]
    _, trained = stored(assistant["key"], tmp_path)
    assert torch.equal(trained["conv_stem.weight"], load_file(weights)["conv_stem.weight"])


def test_a_network_may_see_another_size_and_has_its_own_normalisation(
    job: Job, root: Path, weights: Path, tmp_path: Path
) -> None:
    asked = photos(root, *lcnet(weights), "teacher.image_size=48", "teacher.freeze=backbone")
    key = job(*asked)["chain"][0]["key"]
    stage, _ = stored(key, tmp_path)
    assert (stage.dataset.image_size, stage.input_size) == (32, 48)
    assert stage.normalize.mean == (0.485, 0.456, 0.406)
    network, seen = Store(tmp_path / "store").network(key), list[torch.Size]()
    network.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert seen == [torch.Size([1, 3, 48, 48])]


def test_a_size_that_the_network_is_not_made_for_is_said(job: Job, root: Path, weights: Path, capsys: Shown) -> None:
    said = f"teacher {LCNET} is made for 224×224 images, and sees 32×32; teacher.image_size=224 resizes what it sees"
    asked = photos(root, *lcnet(weights), "teacher.freeze=backbone", "dry_run=true")
    for told in ((), ("teacher.image_size=224",)):
        job(*asked, *told, multirun=True)
        assert (said in capsys.readouterr().out) == (told == ())


def test_a_teacher_without_trained_weights_is_said(job: Job, root: Path, weights: Path, capsys: Shown) -> None:
    said = f"teacher {LCNET} begins with random weights: teacher.init=pretrained or a file gives it trained ones"
    for chosen in (["teacher=timm", "teacher.arch=lcnet_035"], lcnet(weights)):
        job(*photos(root, *chosen, "dry_run=true"), multirun=True)
        assert (said in capsys.readouterr().out) == (len(chosen) == 2)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["teacher=timm"], "teacher: timm needs teacher.arch=<network>, e.g. teacher.arch=resnet18"),
        (["teacher=timm", "teacher.arch=lcnet_036"], "did you mean timm/lcnet_035"),
        (["teacher.arch=lcnet_035"], "teacher: arch and args are for timm and torchvision (got plane4)"),
        (["teacher.freeze=backbone"], "teacher plane4: freeze=backbone needs initial weights: init=<file>"),
        (["teacher.init=a.pt", "teacher.checkpoint=b.pt"], "teacher.init: a teacher from teacher.checkpoint is not"),
        (["teacher.init=pretrained"], "teacher.init: plane4 has no published weights"),
        (["teacher.init=/nowhere.pt"], "teacher.init: /nowhere.pt cannot be read"),
        (["+teacher.args.drop_rate=much", "teacher=timm", "teacher.arch=lcnet_035"], "timm/lcnet_035?drop_rate=much"),
    ],
)
def test_what_cannot_be(job: Job, root: Path, capsys: Shown, overrides: list[str], line: str) -> None:
    assert job(*photos(root, *overrides), code=2) is None
    assert line in capsys.readouterr().err


def test_a_probe_learns_by_losses_on_logits_alone(job: Job, root: Path, weights: Path, capsys: Shown) -> None:
    assert job(*photos(root, *lcnet(weights, "model"), "model.freeze=backbone", "loss=fitnet"), code=2) is None
    assert "freeze=backbone needs a loss on logits (loss=fitnet reads features)" in capsys.readouterr().err


def test_pretrained_weights_are_fetched_once(
    job: Job, root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = build(LCNET, num_classes=5, image_size=32)
    published.load_state_dict(load_file(weights))
    asked: list[str] = []
    monkeypatch.setattr("kd.store.foreign.published_weights", lambda name: asked.append(name) or published)
    named = job(*photos(root, *lcnet(Path("pretrained"))))["chain"][0]
    assert asked == [LCNET]
    file = next(tmp_path.rglob("pretrained/timm-lcnet_035.safetensors"))
    assert job(*photos(root, *lcnet(file)))["chain"][0]["key"] == named["key"]


def test_without_network_a_plan_says_what_else_there_is(
    job: Job, root: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Any, timeout: float) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    asked = photos(root, "teacher=timm", "teacher.arch=lcnet_050", "teacher.init=pretrained")
    for told in ((), ("dry_run=true",)):
        assert job(*asked, *told, code=2) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("teacher.init: the weights of timm/lcnet_050 cannot be fetched: https://")
        assert line.endswith("; where you have the weights in a file, teacher.init=<file> takes them")


def test_photographs_have_their_own_recipe(job: Job, root: Path, tmp_path: Path, capsys: Shown) -> None:
    large = ["dataset.image_size=72", "dry_run=true"]
    job(*photos(root, "teacher=timm", "teacher.arch=lcnet_035", *large), multirun=True)
    shown = capsys.readouterr().out
    assert "recipe train=photos, because the images are larger than 64 pixels; train=<name> takes another" in shown
    assert re.search("adamw, lr 0.001 cosine, weight decay 0.05", shown)
    job(*photos(root, "dry_run=true"), multirun=True)
    shown = capsys.readouterr().out
    assert "train=photos" not in shown
    assert "recipe train=cifar10, because the images are not larger than 64 pixels; train=<name> takes another" in shown
    assert not (tmp_path / "store").exists()


def test_the_recipe_of_photographs_goes_by_their_number() -> None:
    def settings(**task: Any) -> dict[str, Any]:
        return recipe("paper", "photos", "resnet", task=Task(**{"images": 400, "image_size": 224, **task}))

    assert [settings(images=n)["epochs"] for n in (100, 400, 1_000, 1_000_000)] == [60, 50, 20, 10]
    assert [settings(image_size=size)["batch_size"] for size in (96, 224, 384)] == [64, 32, 16]
    assert settings()["lr"] > settings(begun=True)["lr"]
    assert settings(begun=True, frozen=True)["epochs"] == 100
    assert [settings(epochs=n)["warmup"] for n in (3, 100)] == [0, 5]


def test_costs_are_said_and_what_does_not_fit_is_refused(
    job: Job, root: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = photos(root, "dataset.image_size=72", "dry_run=true", "method=scratch")
    job(*asked, multirun=True)
    assert "student resnet8: about " in (shown := capsys.readouterr().out)
    assert "of memory and " in shown
    assert "(1 epoch of 32 images)" in shown
    monkeypatch.setattr(forecast, "free_memory", lambda device: 1_000)
    assert job(*asked, code=2) is None
    told = capsys.readouterr().err
    assert "student resnet8: needs about " in told
    assert "1 kB are free; try a smaller train.batch_size or dataset.image_size" in told


def test_a_batch_is_no_larger_than_the_training_set(job: Job, root: Path, capsys: Shown) -> None:
    said = []
    for batch in (32, 1_000_000):  # there are 32 images
        asked = photos(root, "dataset.image_size=72", "dry_run=true", "method=scratch", f"train.batch_size={batch}")
        job(*asked, multirun=True)
        said += re.findall(r"about (\S+ \S+) of memory", capsys.readouterr().out)
    assert len(said) == 2
    assert said[0] == said[1]


def test_a_probe_and_its_students_pay_for_one_pass(
    job: Job, root: Path, weights: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "step_seconds", lambda stage, device, batch: 3.0 * batch)  # a pass takes a second
    many = ["dataset.image_size=72", "dry_run=true", "replicates=2", "model.train.epochs=10", "teacher.train.epochs=9"]
    job(*photos(root, *lcnet(weights), "teacher.freeze=backbone", *many), multirun=True)
    shown = capsys.readouterr().out
    assert re.search(r"teacher timm/lcnet_035: .* 64 s \(9 epochs of 32 images\)", shown)  # 2 views
    assert re.search(r"student resnet8: .* 16 min \(10 epochs of 32 images\), for each of 2 seeds", shown)


def test_the_memory_of_activations_is_what_autograd_keeps() -> None:
    bytes_of_one, weights = forecast.activations("resnet8", 10, 32)
    network, kept = build("resnet8", num_classes=10).train(), list[torch.Tensor]()
    own = {each.data_ptr() for each in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.rand(4, 3, 32, 32))
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    real = sum(size for pointer, size in held.items() if pointer not in own)
    assert bytes_of_one == pytest.approx(real / 4, rel=0.1)
    assert weights == 4 * sum(each.numel() for each in network.parameters())


def test_result_and_stage_name_the_classes(job: Job, root: Path, tmp_path: Path) -> None:
    key = job(*photos(root, "method=scratch"))["chain"][0]["key"]
    record = json.loads((tmp_path / "store" / key / "stage.json").read_text())
    assert record["stage"]["dataset"]["classes"] == ["blue", "green", "red"]


def test_labels_are_smoothed_where_a_network_learns_from_labels_alone(job: Job, root: Path, tmp_path: Path) -> None:
    teacher, student = job(*photos(root, "train.label_smoothing=0.1"))["chain"]
    assert (teacher["loss"]["name"], teacher["loss"]["smoothing"]) == ("label_smoothing", 0.1)
    assert student["loss"]["name"] == "distill"
