"""Evidence that a guide teaches: what is measured, and an alarm within two epochs for each planted fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import kd
from kd.core.stage import Batch, LossSpec, Outputs, Stage
from kd.datasets.data import Data
from kd.losses import LOSSES, Distill, TeachableTeacher, kl
from kd.models.normalization import Normalized
from kd.reporting import results
from kd.reporting.results import Outcome, Replicate, ReplicatedResult, read_result, student_rows
from kd.reporting.tracking import Page, Tracker
from kd.store import Metrics, TrainedStage, alarms_in
from kd.training.evidence import alarms, guide_share, hits
from kd.training.guide import Guide
from kd.training.loop import train_stage
from kd.training.step import make_network
from tests.test_stage import distilled
from tests.test_train import Silent, a_stage, data, spec

__all__ = ["data"]  # a fixture

Job = Callable[..., Any]


@pytest.fixture(scope="module")
def teacher(data: Data) -> tuple[Stage, Normalized]:
    """A teacher that knows its digits."""
    stage = a_stage(data, model="net", seed=9, epochs=6, lr=0.05)
    network = make_network(stage, "cpu")
    network.network.load_state_dict(train_stage(stage, data=data, device="cpu", watch=Silent()).state)
    return stage, network.eval()


def taught(
    data: Data, teacher: tuple[Stage, Normalized], loss: LossSpec | None = None, guide: Any = None, **changes: Any
) -> TrainedStage:
    """A student of two epochs."""
    student = Stage(
        role="student",
        model="mlp",
        loss=loss or Distill(T=4, lam=0.5),
        dataset=data.spec,
        train=spec(**{"epochs": 2, "lr": 0.05, **changes}),
        seed=0,
        guide=teacher[0],
    )
    made = guide or Guide(teacher[1], data, "fp32", "cpu", needs=student.loss.needs)
    return train_stage(student, data=data, guides=[made], device="cpu", watch=Silent())


# what is measured -------------------------------------------------------------------------------------------------


def outputs(logits: Tensor, **others: Tensor) -> Outputs:
    return Outputs({"logits": logits, **others})


def test_the_share_of_a_distilled_network() -> None:
    torch.manual_seed(0)
    net, guide = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.randn(8, 5, dtype=torch.float64)
    labels, loss = torch.arange(8) % 5, Distill(T=3, lam=0.7)
    share = guide_share(loss(Batch(labels, labels, outputs(net), outputs(guide))), loss.label_weight, outputs(net))
    # By hand: the gradient of KL is (q − p)/T, that of CE is q − y; both divided by the batch.
    net = net.detach()
    of_guide = 0.7 * 9 * ((net / 3).softmax(1) - (guide / 3).softmax(1)) / 3
    of_labels = 0.3 * (net.softmax(1) - torch.eye(5, dtype=torch.float64)[labels])
    assert share == pytest.approx(float(of_guide.norm() / (of_guide.norm() + of_labels.norm())), abs=1e-6)


@pytest.mark.parametrize(("loss", "share"), [(Distill(T=3, lam=0), 0), (Distill(T=3, lam=1), 1)])
def test_one_side_alone(loss: Distill, share: float) -> None:
    torch.manual_seed(0)
    net, guide, labels = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5), torch.arange(8) % 5
    assert (
        guide_share(loss(Batch(labels, labels, outputs(net), outputs(guide))), loss.label_weight, outputs(net)) == share
    )


def test_a_loss_on_features_counts_the_gradient_of_features() -> None:
    net, pooled = torch.randn(4, 3, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    ce, term = cross_entropy(net, torch.zeros(4, dtype=torch.long)), pooled.square().sum()
    labels, features = torch.autograd.grad(ce, net, retain_graph=True)[0].norm(), 2 * pooled.detach().norm()
    share = guide_share({"loss": ce + term, "ce": ce}, 1.0, outputs(net, pooled=pooled))
    assert share == pytest.approx(float(features / (features + labels)), abs=1e-6)
    assert guide_share({"loss": ce}, 1.0, outputs(net)) is None  # a loss without the part `ce`


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].needs])
def test_every_loss_says_the_weight_of_its_labels(name: str) -> None:
    """The rest of the loss has no gradient of the labels: it does not depend on the labels' cross-entropy alone."""
    fields = {"name": name, "T": 4.0, "lambda": 0.3, "weight": 0.2}
    kind = LOSSES[name]
    taken = {
        key: value
        for key, value in fields.items()
        if key == "name" or kind.model_fields.get(key.replace("lambda", "lam"))
    }
    loss = kind.model_validate(taken)
    assert loss.label_weight == (0.7 if name == "distill" else 0 if name == "simkd" else 1)
    if "ce" in kind.model_fields:
        assert kind.model_validate({**taken, "ce": 0.4}).label_weight == 0.4


def test_a_healthy_training_is_measured_and_raises_no_alarm(
    data: Data, teacher: tuple[Stage, Normalized], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = taught(data, teacher).metrics
    for row in rows:
        assert 0.2 < row["guide_share"] < 0.99
        assert row["guide_acc"] > 80
        assert "alarms" not in row
    assert capsys.readouterr().out == ""


def test_a_stage_without_a_guide_has_none(data: Data) -> None:
    row = train_stage(a_stage(data, epochs=1), data=data, device="cpu", watch=Silent()).metrics[0]
    assert not {"guide_share", "guide_acc"} & row.keys()


# planted faults ---------------------------------------------------------------------------------------------------


class Faulty(Guide):
    """A guide whose logits are spoiled."""

    spoil: Callable[[Tensor], Tensor]

    def outputs(self, where: slice, images: Tensor) -> Outputs:
        return Outputs({"logits": self.spoil(super().outputs(where, images).logits)})


def faulty(network: Normalized, data: Data, spoil: Callable[[Tensor], Tensor]) -> Guide:
    guide = Faulty(network, data, "fp32", "cpu")
    guide.spoil = spoil
    return guide


def test_a_random_classifier(data: Data, teacher: tuple[Stage, Normalized], capsys: pytest.CaptureFixture[str]) -> None:
    stage, network = teacher
    spoiled = make_network(stage, "cpu")
    spoiled.network.load_state_dict(network.network.state_dict())
    torch.manual_seed(1)
    last = [each for each in spoiled.modules() if isinstance(each, torch.nn.Linear)][-1]
    last.reset_parameters()
    taught(data, (stage, spoiled.eval()))
    line = r"student mlp: its guide net classifies \d+\.\d\d % of the training views correctly: near chance\n"
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.parametrize("spoil", [torch.zeros_like, lambda logits: logits.roll(1, 0)], ids=["zeroed", "other images"])
def test_logits_that_say_nothing_of_the_image(
    data: Data,
    teacher: tuple[Stage, Normalized],
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Tensor], Tensor],
) -> None:
    taught(data, teacher, guide=faulty(teacher[1], data, spoil))
    assert "correctly: near chance" in capsys.readouterr().out


def test_a_detached_term(
    data: Data, teacher: tuple[Stage, Normalized], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def detached(target: Tensor, logits: Tensor, *rest: Any) -> Tensor:
        return kl(target, logits.detach(), *rest)

    monkeypatch.setattr("kd.losses.distillation.kl", detached)
    taught(data, teacher)
    assert (
        "student mlp: its guide net teaches nothing: its term in the loss has no gradient (kd T=4"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (Distill(T=4, lam=0), "its guide net teaches nothing: its term in the loss has no gradient (kd T=4 lambda=0)"),
        (Distill(T=1e-3, lam=0.5), "its guide net makes only"),
        (Distill(T=100, lam=0.99999), "its guide net makes 100 % of the gradient: the labels hardly count"),
    ],
    ids=["lambda 0", "T 1e-3", "large"],
)
def test_settings_under_which_one_side_vanishes(
    data: Data, teacher: tuple[Stage, Normalized], capsys: pytest.CaptureFixture[str], loss: Distill, line: str
) -> None:
    taught(data, teacher, loss)
    assert line in capsys.readouterr().out


def test_a_term_that_does_not_change(data: Data, teacher: tuple[Stage, Normalized]) -> None:
    stage = a_stage(data, guide=teacher[0])
    rows: list[Metrics] = [{"epoch": 1, "loss": 1.5, "ce": 1.0}, {"epoch": 2, "loss": 1.25, "ce": 0.5}]
    assert [alarm.kind for alarm in alarms(stage, rows)] == ["constant"]
    rows[1]["guide_share"] = 0.0
    assert [alarm.kind for alarm in alarms(stage, rows)] == ["zero"]  # which says why the term does not change
    del rows[1]["guide_share"]
    rows[1]["loss"] = 1.3
    assert not [*alarms(stage, rows)]


def test_a_stage_without_guides_has_no_alarm_about_one(data: Data) -> None:
    loss = LOSSES["label_smoothing"].model_validate({"name": "label_smoothing", "smoothing": 0})
    stage = Stage(**{**vars(a_stage(data)), "loss": loss})
    rows: list[Metrics] = [{"epoch": 1, "loss": 1.0, "ce": 1.0}, {"epoch": 2, "loss": 0.5, "ce": 0.5}]
    assert not [*alarms(stage, rows)]


def test_what_a_guide_knew_is_computed_where_the_labels_are() -> None:
    """The device `meta` stands for a GPU."""
    said, labels = Outputs({"pooled": torch.zeros(2, 4, device="meta")}), torch.zeros(2, dtype=torch.int64)
    found = hits(said, labels.to("meta"), lambda: torch.nn.Linear(4, 3, device="meta"))
    assert found is not None
    assert found.device.type == "meta"


def test_what_a_guide_knew_by_its_features() -> None:
    """By a linear layer and by a 1×1 convolution alike, and not at all by a layer that takes something else."""
    linear, convolution = torch.nn.Linear(4, 3), torch.nn.Conv2d(4, 3, 1)
    convolution.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    said = Outputs({"pooled": torch.randn(64, 4)})
    labels = linear(said.pooled).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    for layer in (linear, convolution):
        found = hits(said, labels, lambda layer=layer: layer)
        assert found is not None
        assert found.tolist() == [False] + 63 * [True]
    assert hits(said, labels, lambda: torch.nn.Conv2d(16, 3, 1)) is None
    assert hits(said, labels, lambda: None) is None


def test_of_a_guide_that_says_logits_no_classifier_is_asked_for() -> None:
    """It may have two, as networks that were distilled by a token."""
    said = Outputs({"logits": torch.tensor([[1.0, 0.0], [1.0, 0.0]])})
    found = hits(said, torch.tensor([0, 1]), lambda: pytest.fail("its classifier was asked for"))
    assert found is not None
    assert found.tolist() == [True, False]


def test_a_guide_that_is_worse_than_its_student(data: Data, teacher: tuple[Stage, Normalized]) -> None:
    stage = a_stage(data, guide=teacher[0])
    row: Metrics = {"epoch": 1, "loss": 1.5, "ce": 1.0, "train_acc": 90.0, "guide_acc": 80.0}
    (alarm,) = alarms(stage, [row])
    assert alarm.text == (
        "student plane2 classifies 90.00 % of the training views correctly, and its guide net 80.00 %: "
        "the guide is worse than its student"
    )
    assert not [*alarms(stage, [{**row, "train_acc": 99.9, "guide_acc": 99.7}])]  # a few images
    reference = Stage(**{**vars(stage), "loss": TeachableTeacher(T=4, weight=0.005)})
    assert not [*alarms(reference, [{**row, "guide_share": 0.001}])]  # a trained teacher's reference is a small network


def test_a_small_share_is_no_alarm_while_the_weight_grows(data: Data, teacher: tuple[Stage, Normalized]) -> None:
    def kinds(epoch: int, warmup: int) -> list[str]:
        loss = LOSSES["dkd"].model_validate({"name": "dkd", "T": 4, "warmup": warmup})
        stage = Stage(**{**vars(a_stage(data, guide=teacher[0])), "loss": loss})
        return [alarm.kind for alarm in alarms(stage, [{"epoch": epoch, "guide_share": 0.004}])]

    assert [kinds(epoch, warmup=20) for epoch in (1, 19, 20, 21)] == [[], [], ["small"], ["small"]]
    assert kinds(1, warmup=0) == ["small"]


def test_an_alarm_about_several_guides_names_them(data: Data, teacher: tuple[Stage, Normalized]) -> None:
    others, loss = (a_stage(data, model="mlp"),), Distill(T=4, lam=0)
    stage = Stage(**{**vars(a_stage(data, guide=teacher[0])), "others": others, "loss": loss})
    row: Metrics = {"epoch": 1, "train_acc": 30.0, "guide_acc": 12.0, "guide_share": 0}
    assert [alarm.text for alarm in alarms(stage, [row])] == [
        "student plane2: its guides mlp and net teach nothing: their term in the loss has no gradient "
        "(kd T=4 lambda=0)",
        "student plane2: the worst of its guides mlp and net classifies 12.00 % of the training views correctly: "
        "near chance",
    ]


def test_an_alarm_is_said_once(
    data: Data, teacher: tuple[Stage, Normalized], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = taught(data, teacher, Distill(T=4, lam=0), epochs=3).metrics
    line = "student mlp: its guide net teaches nothing: its term in the loss has no gradient (kd T=4 lambda=0)"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert line in rows[0]["alarms"]
    assert not any(line in row.get("alarms", ()) for row in rows[1:])
    assert alarms_in(rows)[0] == f"epoch 1: {line}"


# where an alarm is kept -------------------------------------------------------------------------------------------

LINE = (
    "epoch 1: student plane2: its guide plane4 teaches nothing: its term in the loss has no gradient (kd T=4 lambda=0)"
)


def test_an_alarm_stays_with_the_stage(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that reuses the stage tells it too."""
    tables = []
    for folder in ("out", "again"):
        student = job("method.lambda=0", folder=folder)["chain"][1]
        assert LINE in student["alarms"]
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: ")])
        assert tables[-1] == [f"alarm: {text}" for text in student["alarms"]]
        (row,) = kd.results(tmp_path / folder)
        assert row["alarms"] == len(student["alarms"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert list(alarms_in(row for row in rows if row["role"] == "student")) == student["alarms"]
    assert not any("alarms" in row for row in rows if row["role"] == "teacher")


def test_a_result_without_the_list_is_read(tmp_path: Path) -> None:
    """As results of earlier versions are."""
    outcome = {"role": "student", "model": "plane2", "key": "k", "seed": 3, "loss": None, "params": 1, "val_acc": 90}
    outcome |= {"test_acc": 80, "epochs": 2, "seconds": 1, "select": "last", "reused": False}
    tree: dict[str, Any] = {"chain": [outcome], "objective": 90, "mode": "paper", "method": "kd", "dataset": "digits"}
    spread = {"replicates": [{"seed": 3, "key": "k", "val_acc": 90, "test_acc": 80}], "mean": 80, "std": 0, "n": 1}
    for each in (tree, {**tree, **spread, "ci95": [80, 80]}):
        (tmp_path / "result.json").write_text(json.dumps(each))
        result = read_result(tmp_path / "result.json")
        assert result.alarms == []
        assert result.students[0].alarms == ()


def test_every_seed_tells_its_alarms_and_the_chain_its_own_once() -> None:
    def outcome(role: str, seed: int, *alarms: str) -> dict[str, Any]:
        common = {"role": role, "model": "plane2", "key": f"{role}{seed}", "seed": seed, "loss": None, "params": 1}
        reached = {"val_acc": 90, "test_acc": 80, "epochs": 2, "seconds": 1, "select": "last", "reused": False}
        return {**common, **reached, "alarms": alarms}

    chains = [
        [Outcome.model_validate(each) for each in (outcome("assistant", 0, "a"), outcome("student", seed, *own))]
        for seed, own in ((0, ("b",)), (1, ("c",)), (2, ("b",)))
    ]
    common = {"chain": chains[0], "objective": 90, "mode": "paper", "method": "takd", "dataset": "digits"}
    spread = {"mean": 80, "std": 0, "n": 3, "ci95": (80, 80)}
    replicates = [Replicate.of(chain) for chain in chains]
    result = ReplicatedResult.model_validate({**common, **spread, "replicates": replicates})
    assert result.alarms == ["a", "b", "seed 1: c"]
    assert [row["alarms"] for row in student_rows([results.Job("0", [], result, "")])] == [2, 2, 2]


def test_a_page_has_numbers_as_curves_and_alarms_in_its_summary(tmp_path: Path) -> None:
    """W&B and TensorBoard draw no text; their summary takes it, while the stage trains and when a run reuses it."""

    class Kept(Page):
        rows: list[Metrics]
        values: dict[str, Any]

        def log(self, axis: str, step: int, metrics: Metrics) -> None:
            self.rows.append(metrics)

        def summarize(self, values: dict[str, Any]) -> None:
            self.values |= values

    page, student = Kept(), distilled()
    page.rows, page.values = [], {}
    tracker = Tracker(tmp_path, student.chain, page)
    tracker.log(student, {"epoch": 1, "loss": 1.0, "alarms": ["this"]})
    tracker.log(student, {"epoch": 2, "loss": 1.0})
    assert page.values == {"student/alarms": "epoch 1: this"}
    tracker.log(student, {"epoch": 3, "loss": 1.0, "alarms": ["that", "more"]})
    assert page.values == {"student/alarms": "epoch 1: this; epoch 3: that; epoch 3: more"}
    assert page.rows == [{"epoch": epoch, "loss": 1.0} for epoch in (1, 2, 3)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("alarms") for row in rows] == [["this"], None, ["that", "more"]]
