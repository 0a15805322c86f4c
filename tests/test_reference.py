"""mode=reference against the formulas of the released code, written again and computed in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kd
from kd.app.config import plan
from kd.app.parsing import parse
from kd.core.recipes import RECIPES, Task, recipe
from kd.core.settings import TrainSpec
from kd.core.spec import KnownError
from kd.core.stage import Stage, random_stream
from kd.datasets import DATASETS, Arrays, Facts, specify
from kd.datasets.data import Data
from kd.models.normalization import Normalized
from kd.training import loop as training
from kd.training.guide import Guide, LiveGuide
from kd.training.loop import train_stage
from kd.training.step import evaluate, learning_rate, make_network
from tests.conftest import composed
from tests.test_recipes import FAMILIES
from tests.test_train import Silent

TAKD = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
TRAINED_TEACHER = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
TINY = ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))


def planned(*overrides: str) -> list[Stage]:
    config = parse(composed("mode=reference", *overrides))
    classes = {"cifar10": 10, "cifar100": 100}.get(config.dataset.name, 200)
    facts = Facts(classes, 16, (0.1,) * 3, (0.9,) * 3)  # of the images themselves: not what the codes use
    return [stage for stage in plan(config, specify(config.dataset, facts))[0].chain if isinstance(stage, Stage)]


# what it implies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_takd_as_released(dataset: str) -> None:
    for stage in planned(f"dataset={dataset}", "model=resnet8", "teacher=resnet110", "method=ta"):
        data, train = stage.dataset, stage.train
        assert (data.mean, data.std, data.augment, data.val_fraction) == (*TAKD, "none", 0)
        assert (train.precision, train.select, train.batch_size, train.epochs) == ("fp32", "best_test", 128, 160)
        assert (train.optimizer, train.momentum, train.nesterov, train.weight_decay) == ("sgd", 0.9, False, 1e-4)
        assert getattr(stage.loss, "reduction", "mean") == "mean"


@pytest.mark.parametrize(
    ("dataset", "statistics", "augment"),
    [
        ("cifar10", TRAINED_TEACHER, "crop_flip"),
        ("cifar100", TRAINED_TEACHER, "crop_flip"),
        ("tiny_imagenet", TINY, "rotate_flip"),
    ],
)
def test_trained_teacher_as_released(dataset: str, statistics: Any, augment: str) -> None:
    networks = ("model=net", "teacher=resnet18", "method.reference=preresnet20")
    for stage in planned(f"dataset={dataset}", "method=trained_teacher", *networks):
        data, train = stage.dataset, stage.train
        assert (data.mean, data.std, data.augment, data.val_fraction) == (*statistics, augment, 0)
        assert (train.precision, train.select, train.batch_size) == ("fp32", "best_test_batches", 128)
        adam = stage.model == "net"
        assert (train.optimizer, train.weight_decay) == (("adam", 0) if adam else ("sgd", 5e-4))
        assert getattr(stage.loss, "reduction", "batchmean") == "batchmean"


def rates(*overrides: str) -> list[float]:
    student = planned(*overrides)[-1]
    return [learning_rate(student.train, epoch) for epoch in range(student.train.epochs)]


def test_learning_rates_of_every_epoch() -> None:
    takd = [0.01] * 120 + [0.001] * 40  # the step at 80 never comes
    a = [0.1] * 80 + [0.01] * 40 + [0.001] * 40
    b = [0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40
    for dataset in ("cifar10", "cifar100"):
        assert rates(f"dataset={dataset}", "model=resnet8") == pytest.approx(takd, rel=1e-6)
        assert rates(f"dataset={dataset}", "model=plane2", "teacher=plane4") == [0.01] * 160
    own = "teacher=resnet18"
    assert rates("dataset=cifar10", "model=preresnet20", own) == pytest.approx(a, rel=1e-6)
    assert rates("dataset=cifar100", "model=mobilenetv2", own) == pytest.approx(b, rel=1e-6)
    assert rates("dataset=tiny_imagenet", "model=shufflenetv2", own) == pytest.approx(b, rel=1e-6)
    assert rates("dataset=cifar10", "model=net", own) == [1e-3] * 100


def test_takds_learning_rate_at_every_number_of_epochs() -> None:
    """`epoch < int(epochs * 3 / 4)` keeps .01, in every epoch of 1 to 400."""
    settings = planned("dataset=cifar10", "model=resnet8")[-1].train.model_dump()
    for epochs in range(1, 401):
        known = recipe("reference", "cifar10", "cifar_resnet", task=Task(50_000, 32, epochs=epochs))
        train = TrainSpec(**{**settings, "epochs": epochs, "milestones": known["milestones"]})
        theirs = [0.01 if epoch < int(epochs * 3 / 4) else 0.001 for epoch in range(epochs)]
        assert [learning_rate(train, epoch) for epoch in range(epochs)] == pytest.approx(theirs, rel=1e-9), epochs
        before = TrainSpec(**{**train.model_dump(), "milestones": (0.75,)})
        same = [learning_rate(before, epoch) for epoch in range(epochs)] == pytest.approx(theirs, rel=1e-9)
        assert (known["milestones"] == (0.75,)) == same, epochs  # keys of equal trainings have not moved


@pytest.mark.parametrize(("epochs", "kept"), [(1, 0), (2, 1), (5, 3), (10, 7), (50, 37), (101, 75), (160, 120)])
def test_takds_milestone_moves_with_the_epochs_of_each_network(epochs: int, kept: int) -> None:
    teacher, student = planned("dataset=cifar100", "model=resnet8", f"teacher.train.epochs={epochs}")
    assert [learning_rate(teacher.train, epoch) for epoch in range(epochs)].count(0.01) == kept
    assert student.train.milestones == (0.75,)


def test_other_recipes_round_their_milestones() -> None:
    for overrides in (("mode=paper", "model=resnet8"), ("mode=reference", "model=preresnet20", "teacher=resnet18")):
        student = planned("dataset=cifar10", "train.epochs=10", *overrides)[-1]
        assert student.train.milestones == (0.5, 0.75)
        assert [learning_rate(student.train, epoch) for epoch in (4, 5, 7, 8)] == pytest.approx([0.1, 0.01, 0.01, 1e-3])


def test_takds_teacher_is_trained_by_the_rule_of_the_students_family() -> None:
    teacher, student = planned("dataset=cifar10", "model=resnet8", "teacher=plane10")
    assert teacher.train == student.train
    assert teacher.train.milestones == (0.75,)
    assert planned("dataset=cifar10", "model=plane2", "teacher=resnet20")[0].train.milestones == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dataset.val_fraction=0.1",), "dataset.val_fraction: should be 0 in mode=reference"),
        (("dataset.augment=crop_flip",), "dataset.augment: should be null in mode=reference"),
        (("teacher.image_size=64",), "teacher.image_size: should be null in mode=reference"),
        (("dataset.views=3",), "dataset.views: should be null"),
        (("train.batch_size=64",), r"student resnet8: mode=reference needs .* train.batch_size=128 \(got 64\)"),
        (("train.precision=bf16",), r"train.precision=fp32 \(got bf16\)"),
        (("model.train.select=last",), r"train.select=best_test \(got last\)"),
        (("teacher=resnet18",), r"teacher resnet18: TAKD's .* student resnet8, does not have this network"),
        (("method=trained_teacher",), "follows TAKD's code for resnet8, which has only scratch, kd, ta"),
        (("teacher=resnet18", "teacher.checkpoint=weights.pt"), r"teacher resnet18: .* does not have this network"),
        (("train.lr=0.05",), r"train.lr=0.01 \(got 0.05\)"),
        (("model=net", "teacher=resnet18", "train.momentum=0.5", "train.weight_decay=0.1"), "train.weight_decay=0.0"),
    ],
)
def test_what_contradicts_it_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(KnownError, match=message):
        planned("dataset=cifar10", *overrides)


def test_networks_that_are_not_trained_are_not_judged() -> None:
    assert len(planned("dataset=cifar10", "model=resnet18", "method=scratch")) == 1  # with resnet20 as the teacher
    with pytest.raises(KnownError) as caught:
        planned("dataset=cifar10", "model=resnet18", "method=scratch", "train.batch_size=64")
    assert str(caught.value).count("\n") == 0


def test_the_released_codes_own_flags_stay_free() -> None:
    takd = planned("dataset=cifar10", "train.epochs=4", "train.momentum=0.8", "train.precision=fp32")[-1].train
    assert (takd.epochs, takd.momentum) == (4, 0.8)
    own = planned("dataset=cifar10", "model=preresnet20", "teacher=net", "model.train.lr=0.05", "train.epochs=4")
    assert (own[-1].train.epochs, own[-1].train.lr, own[0].train.lr) == (4, 0.05, 1e-3)


def test_every_network_of_the_papers_has_a_reference() -> None:
    covered = {family for recipes in RECIPES["reference"].values() for family in recipes}
    assert covered == FAMILIES


def test_a_recipe_that_a_network_brings_is_not_the_released_codes() -> None:
    own = {"epochs": 3}
    assert recipe("reference", "cifar10", "resnet", own) == recipe("reference", "cifar10", "resnet")
    with pytest.raises(KnownError, match="no recipe for the tiny networks in mode=reference"):
        recipe("reference", "cifar10", "tiny", own)


# three steps in float64 -------------------------------------------------------------------------------------------


def few_images(stage: Stage) -> Data:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (384, 16, 16, 3)).astype(np.uint8)
    labels = rng.integers(0, stage.dataset.num_classes, 384)
    return Data.of(stage.dataset, Arrays(images, labels, images[:20], labels[:20]), "cpu")


def in_float64(stage: Stage, **changes: Any) -> Stage:
    short = {"precision": "fp64", "epochs": 1, "milestones": (), "schedule": "constant"}
    fields = {name: getattr(stage, name) for name in Stage.model_fields}
    return Stage(**{**fields, "train": TrainSpec(**{**stage.train.model_dump(), **short, **changes})})


def softmax(z: Tensor) -> Tensor:
    powers = (z - z.max(1, keepdim=True).values.detach()).exp()
    return powers / powers.sum(1, keepdim=True)


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    return -softmax(z)[torch.arange(len(z)), labels].log().sum() / len(z)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Σ p·log(p/q) over batch and classes."""
    return (p * (p / q).log()).sum()


def takd_loss(z: Tensor, labels: Tensor, guide: Tensor, T: float, lam: float) -> Tensor:
    apart = divergence(softmax(guide / T), softmax(z / T)) / z.numel()
    return (1 - lam) * cross_entropy(z, labels) + lam * T * T * apart


def tt_kd_loss(z: Tensor, labels: Tensor, guide: Tensor, T: float, alpha: float) -> Tensor:
    apart = divergence(softmax(guide / T), softmax(z / T)) / len(z)
    return (1 - alpha) * cross_entropy(z, labels) + alpha * T * T * apart


def tt_teacher_loss(z: Tensor, labels: Tensor, guide: Tensor, T: float, w: float) -> Tensor:
    return cross_entropy(z, labels) + w * T * T * divergence(softmax(z / T), softmax(guide / T)) / len(z)


def by_hand(
    stage: Stage, data: Data, guide: Normalized, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> tuple[nn.Module, list[float]]:
    """Three steps of SGD with momentum and weight decay: v ← m·v + g + wd·w; w ← w − lr·v.

    Images are normalised here, in float64, by the statistics in the released code.
    """
    network = make_network(stage, "cpu").network.train()
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    losses = []
    statistics = [*zip(*(TAKD if stage.dataset.augment == "none" else TRAINED_TEACHER), strict=True)]
    for images, labels in batches_of(stage, data):
        x = torch.stack([(images[:, c].double() / 255 - mean) / std for c, (mean, std) in enumerate(statistics)], 1)
        z = network(x)
        with torch.no_grad():
            taught = guide.network(x)
        value = loss(z, labels, taught)
        gradients = torch.autograd.grad(value, parameters)
        losses.append(value.item())
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + stage.train.weight_decay * p)
                p.sub_(stage.train.lr * v)
    return network, losses


def batches_of(stage: Stage, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    order = random_stream(stage.seed, 0, training.ORDER).permutation(data.train)
    views = data.draw_views(random_stream(stage.seed, 0, training.VIEW))[order]
    for start in range(0, 384, 128):
        rows = torch.from_numpy(order[start : start + 128])
        yield data.show(rows, torch.from_numpy(views[start : start + 128])), data.labels[rows]


@pytest.mark.parametrize(
    ("overrides", "role", "loss"),
    [
        (
            ("dataset=cifar100", "model=resnet8", "teacher=plane4", "method.T=5", "method.lambda=0.15"),
            "student",
            lambda z, y, g: takd_loss(z, y, g, 5, 0.15),
        ),
        (
            ("dataset=cifar10", "model=plane2", "teacher=plane4", "method.T=2", "method.lambda=0.2"),
            "student",
            lambda z, y, g: takd_loss(z, y, g, 2, 0.2),
        ),
        (
            ("dataset=cifar100", "model=preresnet20", "teacher=net", "method.T=20", "method.lambda=0.9"),
            "student",
            lambda z, y, g: tt_kd_loss(z, y, g, 20, 0.9),
        ),
        (
            ("dataset=cifar10", "method=trained_teacher", "model=net", "teacher=preresnet20", "method.teacher.T=4"),
            "teacher",
            lambda z, y, g: tt_teacher_loss(z, y, g, 4, 0.005),
        ),
        pytest.param(
            (
                *("dataset=cifar10", "method=trained_teacher", "model=net", "teacher=preresnet20"),
                *("method.teacher.T=4", "method.teacher.weight=-0.04"),
            ),
            "teacher",
            lambda z, y, g: tt_teacher_loss(z, y, g, 4, -0.04),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_three_steps(overrides: tuple[str, ...], role: str, loss: Callable[..., Tensor]) -> None:
    stage = in_float64(next(stage for stage in planned(*overrides) if stage.role == role))
    data = few_images(stage)
    assert stage.guide is not None
    guide_stage = stage.guide
    assert isinstance(guide_stage, Stage)
    guide = make_network(guide_stage, "cpu").train()
    with torch.no_grad():  # statistics of its own
        guide(data.show(torch.arange(100), torch.zeros(100, dtype=torch.int64)))
    trained = train_stage(
        stage, data=data, guides=[Guide(guide.eval(), data, "fp64", "cpu")], device="cpu", watch=Silent()
    )
    expected, losses = by_hand(stage, data, guide.double(), loss)
    assert trained.metrics[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-6)  # recorded to six digits
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(trained.state[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Guide, LiveGuide])
def test_a_guide_of_fp32_sees_exact_images_where_its_student_computes_in_float64(kind: Any) -> None:
    stage = planned("dataset=cifar10", "model=resnet8", "method=scratch")[-1]
    data, network = few_images(stage), make_network(stage, "cpu").eval()
    guide = kind(network, data, "fp64", "cpu", needs=frozenset({"logits"}))
    samples, views = np.arange(5), np.zeros(5, np.int64)
    guide.begin(samples, views, lambda images: None)
    images = data.show(torch.from_numpy(samples), torch.from_numpy(views))
    x = torch.stack([(images[:, c].double() / 255 - TAKD[0][c]) / TAKD[1][c] for c in range(3)], 1)
    with torch.no_grad():
        expected = network.network.double()(x)
    said = guide.outputs(slice(0, 5), images).logits
    torch.testing.assert_close(said.log_softmax(1), expected.log_softmax(1), rtol=1e-12, atol=1e-12)


# the epoch that is kept -------------------------------------------------------------------------------------------


def test_the_mean_of_batch_accuracies() -> None:
    labels = torch.zeros(300, dtype=torch.int64)
    labels[:10] = 1  # ten of the first 128 are missed
    labels[-11:] = 1  # and eleven of the last 44
    network = Normalized(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (0.0,) * 3, (1.0,) * 3)
    images = torch.zeros(300, 3, 4, 4, dtype=torch.uint8)
    images[:, 0] = 9
    mean = evaluate(network, [images], labels, "fp32", 128)
    assert mean == pytest.approx(100 * (118 / 128 + 1 + 33 / 44) / 3, abs=1e-4)
    assert evaluate(network, [images], labels, "fp32") == pytest.approx(100 * 279 / 300, abs=1e-4)


@pytest.mark.parametrize(("select", "epoch"), [("best_test", 2), ("best_test_batches", 3)])
def test_of_equal_epochs(select: str, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TAKD's code keeps the first of equal epochs, Trained Teacher's the last."""
    scores = iter([50.0, 80.0, 80.0, 70.0, 42.0])
    asked: list[Any] = []

    def scripted(*arguments: Any) -> float:
        asked.append(arguments[4])
        return next(scores)

    monkeypatch.setattr(training, "evaluate", scripted)
    stage = planned("dataset=cifar10", "model=plane2", "method=scratch")[0]
    stage = in_float64(stage, select=select, epochs=4, precision="fp32")
    result = train_stage(stage, data=few_images(stage), device="cpu", watch=Silent()).result
    assert (result.selected_epoch, result.test_acc) == (epoch, 42)
    assert set(asked) == {128 if select == "best_test_batches" else None}


def test_a_run_names_its_mode(job: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    result = job("mode=reference", "dataset=digits", "train=cifar10", "method=kd")
    assert result["mode"] == "reference"
    assert "mode reference: EPOCH CHOSEN ON THE TEST SET, as the papers did" in capsys.readouterr().out
    assert result["objective"] is None
    assert result["chain"][1]["loss"]["reduction"] == "mean"
    written = json.loads((tmp_path / "store" / result["chain"][1]["key"] / "stage.json").read_text())["stage"]
    assert tuple(written["dataset"]["mean"]) == TAKD[0]


def test_a_chain_in_float64_stays_there(job: Callable[..., Any], tmp_path: Any) -> None:
    result = job("train.precision=fp64", "train.epochs=1", "method=kd")
    for outcome in result["chain"]:
        network = kd.load(outcome["key"], tmp_path / "store")
        assert {p.dtype for p in network.parameters()} == {torch.float64}
        assert network.mean.flatten().tolist() == list(DATASETS["digits"].facts.mean)  # type: ignore[union-attr]
        assert network(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).dtype == torch.float64
        saved = load_file(tmp_path / "store" / outcome["key"] / "model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in network.network.state_dict().items())
