"""Training: schedule, randomness, guide, and equal bits for equal stages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
from collections.abc import Iterator
from io import BytesIO
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from kd.core.settings import TrainSpec
from kd.core.spec import KnownError, NonFiniteError
from kd.core.stage import ORDER, VIEW, Batch, Outputs, Stage, random_stream
from kd.datasets import DatasetConfig, load_data, resolve
from kd.datasets.data import Data
from kd.losses import CrossEntropy, Distill
from kd.models import build
from kd.models.normalization import Normalized
from kd.store import Metrics, TrainedStage
from kd.training import loop as training
from kd.training.bank import CHUNK
from kd.training.checkpoint import Checkpoint, Deferred
from kd.training.guide import Guide
from kd.training.loop import train_stage
from kd.training.ranks import batches
from kd.training.step import evaluate, learning_rate, make_network
from tests.conftest import ROOT
from tests.test_stage import TRAIN


class Silent:
    """Watches and only counts."""

    def __init__(self) -> None:
        self.images = 0
        self.rows: list[Metrics] = []

    def resumed(self, history: list[Metrics], images: int) -> None:
        self.rows += history

    def guided(self, images: int) -> None:
        self.images += images

    def stepped(self, images: int) -> None:
        self.images += images

    def epoch_ended(self, metrics: Metrics) -> None:
        self.rows.append(metrics)


@pytest.fixture(scope="module")
def data() -> Data:
    config = DatasetConfig(name="digits", augment="crop_flip", val_fraction=0.1, split_seed=0)
    return load_data(resolve(config, ROOT), ROOT, "cpu")


def spec(**changes: Any) -> TrainSpec:
    return TrainSpec(**{**TRAIN.model_dump(), "lr": 0.01, **changes})


def a_stage(data: Data, *, model: str = "plane2", guide: Stage | None = None, seed: int = 0, **changes: Any) -> Stage:
    loss = Distill(T=4, lam=0.5) if guide else CrossEntropy()
    return Stage(
        role="student", model=model, loss=loss, dataset=data.spec, train=spec(**changes), seed=seed, guide=guide
    )


def train(stage: Stage, data: Data, network: Normalized | None = None) -> TrainedStage:
    guides = [Guide(network, data, stage.train.precision, "cpu")] if network else []
    return train_stage(stage, data=data, guides=guides, device="cpu", watch=Silent())


def teacher_of(data: Data) -> tuple[Stage, Normalized]:
    stage = a_stage(data, model="plane4", seed=9)
    network = make_network(stage, "cpu")
    network.train()
    with torch.no_grad():  # statistics of its own, so that folding them matters
        network(data.show(torch.arange(200), torch.full((200,), 80)))
    return stage, network.eval()


def same(one: TrainedStage, other: TrainedStage) -> bool:
    return one.metrics == other.metrics and all(torch.equal(one.state[k], other.state[k]) for k in one.state)


# schedule ---------------------------------------------------------------------------------------------------------


def test_step_schedule_of_the_paper() -> None:
    paper = spec(lr=0.1, epochs=160, milestones=(0.5, 0.75))
    rates = [learning_rate(paper, epoch) for epoch in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_milestones_are_rounded() -> None:
    short = spec(lr=1.0, epochs=5, milestones=(0.5, 0.75))  # round(2.5) = 2, round(3.75) = 4
    assert [learning_rate(short, epoch) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_constant_cosine_and_warmup() -> None:
    assert {learning_rate(spec(schedule="constant", lr=0.3, epochs=9), e) for e in range(9)} == {0.3}
    cosine = spec(schedule="cosine", lr=1.0, epochs=10, warmup=2)
    expected = [1 / 3, 2 / 3] + [(1 + cos(pi * e / 8)) / 2 for e in range(8)]
    assert [learning_rate(cosine, e) for e in range(10)] == pytest.approx(expected)


# randomness -------------------------------------------------------------------------------------------------------


def test_streams_are_named_by_seed_epoch_and_purpose() -> None:
    names = [(s, e, p) for s in range(4) for e in range(4) for p in range(4)]
    draws = {random_stream(*name).integers(2**62) for name in names}
    assert len(draws) == len(names)
    assert random_stream(1, 2, 3).integers(2**62) == random_stream(1, 2, 3).integers(2**62)


def test_initial_weights_depend_on_the_seed_alone(data: Data) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, other = (make_network(a_stage(data, epochs=e), "cpu").state_dict() for e in (2, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[k], other[k]) for k in one)
    third = make_network(a_stage(data, seed=1), "cpu").state_dict()
    assert not torch.equal(one["network.fc_layers.0.weight"], third["network.fc_layers.0.weight"])


def test_batches_keep_the_last_one_but_not_a_lone_sample() -> None:
    assert [b.stop - b.start for b in batches(300, 128)] == [128, 128, 44]
    assert [b.stop - b.start for b in batches(257, 128)] == [128, 128]
    assert len(batches(1, 128)) == 1
    assert len(batches(50_000, 128)) == 391


def test_the_same_stage_ends_in_the_same_bits(data: Data) -> None:
    teacher, network = teacher_of(data)
    stage = a_stage(data, guide=teacher)
    first = train(stage, data, network)
    torch.rand(7)  # the global generator has no say
    assert same(first, train(stage, data, network))
    assert not same(first, train(a_stage(data, guide=teacher, seed=1), data, network))


class Interrupted(Silent):
    """Raises at the end of an epoch, like a crash."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.last = epoch

    def epoch_ended(self, metrics: Metrics) -> None:
        if metrics["epoch"] == self.last:
            raise KeyboardInterrupt


# On a CPU fp16 is slow.
@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_an_interrupted_stage_goes_on_to_the_same_bits(data: Data, tmp_path: Path, precision: str) -> None:
    teacher, network = teacher_of(data)
    stage = a_stage(data, guide=teacher, epochs=5, precision=precision)
    guide = Guide(network, data, precision, "cpu")
    unbroken = train_stage(stage, data=data, guides=[guide], device="cpu", watch=Silent())
    partial = Checkpoint(tmp_path / "partial", stage, {"threads": 1}, every=2)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, data=data, guides=[guide], device="cpu", watch=Interrupted(4), checkpoint=partial)
    watch = Silent()
    resumed = train_stage(stage, data=data, guides=[guide], device="cpu", watch=watch, checkpoint=partial)
    assert same(unbroken, resumed)
    assert watch.rows == unbroken.metrics
    assert watch.images < 4 * 2 * len(data.train)  # two epochs were not done again


class Signalled(Silent):
    """Sends a signal in the middle of an epoch: at the count-th chunk of the guide, or at the count-th step."""

    def __init__(self, count: int, number: int = signal.SIGINT, guided: bool = False) -> None:
        super().__init__()
        self.left, self.number, self.hears_guide = count, number, guided

    def guided(self, images: int) -> None:
        if self.hears_guide:
            self._count()

    def stepped(self, images: int) -> None:
        super().stepped(images)
        if not self.hears_guide:
            self._count()

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)


def interrupted(stage: Stage, data: Data, guide: Guide, folder: Path, watch: Silent) -> Checkpoint:
    with Deferred() as signals:
        partial = Checkpoint(folder, stage, {"threads": 1}, 100, signals)
        with pytest.raises(KeyboardInterrupt):
            train_stage(stage, data=data, guides=[guide], device="cpu", watch=watch, checkpoint=partial)
    return partial


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("model", "precision", "stops"),
    [
        ("plane2", "fp32", (3, 30)),
        pytest.param("plane2", "fp16", (21,), marks=pytest.mark.slow),
        ("timm/test_resnet?drop_rate=0.5", "fp32", (7, 1)),
    ],
)
def test_a_signal_stops_at_a_step_and_the_stage_goes_on_there(
    data: Data, tmp_path: Path, model: str, precision: str, stops: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """The last network has dropout; its generator has to be restored. 1 is the first step after resuming."""
    if model.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra kd[timm] is not installed")
    teacher, network = teacher_of(data)
    stage = a_stage(data, model=model, guide=teacher, epochs=3, precision=precision)
    guide = Guide(network, data, precision, "cpu")
    unbroken = train_stage(stage, data=data, guides=[guide], device="cpu", watch=Silent())
    for stop in stops:
        partial = interrupted(stage, data, guide, tmp_path / "partial", Signalled(stop))
        assert "asked to end" in capfd.readouterr().err
    watch = Silent()
    resumed = train_stage(stage, data=data, guides=[guide], device="cpu", watch=watch, checkpoint=partial)
    assert same(unbroken, resumed)
    assert json.dumps(unbroken.metrics) == json.dumps(resumed.metrics)
    steps = len(batches(len(data.train), stage.train.batch_size))
    epochs, done = divmod(sum(stops), steps)
    place = f"epoch {epochs} and {done} steps" if done else f"epoch {epochs}"
    assert f"resuming after {place}\n" in capfd.readouterr().out


@pytest.mark.usefixtures("signals")
def test_a_signal_is_heard_while_the_guide_is_run(data: Data, tmp_path: Path) -> None:
    teacher, network = teacher_of(data)
    stage = a_stage(data, guide=teacher, epochs=2)
    guide = Guide(network, data, "fp32", "cpu")
    watch = Signalled(len(data.train) // CHUNK + 3, guided=True)  # in the second epoch
    partial = interrupted(stage, data, guide, tmp_path, watch)
    assert watch.images == len(data.train)
    unbroken = train_stage(stage, data=data, guides=[guide], device="cpu", watch=Silent())
    assert same(
        unbroken, train_stage(stage, data=data, guides=[guide], device="cpu", watch=Silent(), checkpoint=partial)
    )


def test_a_checkpoint_that_does_not_fit_is_not_used(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = a_stage(data, epochs=3)
    partial = Checkpoint(tmp_path, stage, {"threads": 1}, every=1)
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, data=data, device="cpu", watch=Interrupted(3), checkpoint=partial)
    other = Checkpoint(tmp_path, stage, {"threads": 2}, every=1)
    assert other.load() is None
    assert "threads, runtime.compile or torch; training starts from the first epoch" in capsys.readouterr().out
    assert Checkpoint(tmp_path, a_stage(data, epochs=4), {"threads": 1}, every=1).load() is None
    assert "belongs to another stage" in capsys.readouterr().out
    assert partial.load() is not None
    teacher = Checkpoint(tmp_path, stage.model_copy(update={"role": "teacher"}), {"threads": 1}, every=1)
    assert teacher.load() is not None  # the role is not in the key: the same stage
    guided = Checkpoint(tmp_path, stage, {"threads": 1}, every=1, guides="0123456789abcdef")
    assert guided.load() is None  # as after its teacher was trained again
    assert "was written with other weights of the guide" in capsys.readouterr().out
    new = Checkpoint(tmp_path / "new", stage, {"processor": "AVX512, amx_bf16"}, every=1, guides="0123456789abcdef")
    content = BytesIO()
    state = {"begun": {"steps": 0}, "history": []}
    torch.save({"stage": {"key": stage.key}, "runtime": {"processor": "AVX512"}, "state": state}, content)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "state").write_bytes(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    assert new.load() is not None  # of an earlier version, which wrote less
    whole = (tmp_path / "state").read_bytes()
    for torn in (b"", b"half of a", whole[:-1], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]):
        (tmp_path / "state").write_bytes(torn)
        assert partial.load() is None
        assert "the checkpoint is damaged; training starts from the first epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        *(("sgd", precision) for precision in ("fp32", "bf16", "fp16")),
        ("adam", "fp32"),
        *(pytest.param("adam", precision, marks=pytest.mark.slow) for precision in ("bf16", "fp16")),
    ],
)
def test_precisions_and_optimizers_learn(data: Data, precision: str, optimizer: str) -> None:
    lr = 0.01 if optimizer == "sgd" else 0.001
    result = train(a_stage(data, precision=precision, optimizer=optimizer, lr=lr, epochs=1, schedule="constant"), data)
    assert result.result.test_acc > 20  # chance is 10


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_distilled_epochs_by_hand(data: Data, optimizer: str) -> None:
    """A naive loop with torch's optimisers, the teacher unfolded and run per batch, ends in the same weights."""
    few = dataclasses.replace(data, train=data.train[:256])
    teacher, teacher_network = teacher_of(data)
    lr = {"sgd": 0.05, "adam": 0.002}[optimizer]
    changes = {"nesterov": True, "momentum": 0.9} if optimizer == "sgd" else {"nesterov": False, "momentum": 0.0}
    stage = a_stage(
        few, guide=teacher, lr=lr, optimizer=optimizer, weight_decay=0.05, select="last", milestones=(0.5,), **changes
    )
    trained = train(stage, few, teacher_network)
    network = make_network(stage, "cpu")
    if optimizer == "sgd":
        naive: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr, 0.9, weight_decay=0.05, nesterov=True)
    else:
        naive = torch.optim.Adam(network.parameters(), lr, weight_decay=0.05)
    for epoch in range(2):
        naive.param_groups[0]["lr"] = lr * 0.1**epoch
        order = random_stream(0, epoch, ORDER).permutation(few.train)
        views = few.draw_views(random_stream(0, epoch, VIEW))[order]
        for start in range(0, 256, 64):
            rows = torch.from_numpy(order[start : start + 64])
            images = few.show(rows, torch.from_numpy(views[start : start + 64]))
            with torch.no_grad():
                taught = teacher_network(images)
            batch = Batch(
                few.labels[rows], rows, Outputs({"logits": network.train()(images)}), Outputs({"logits": taught})
            )
            loss = Distill(T=4, lam=0.5)(batch)["loss"]
            naive.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            naive.step()
    for name, value in network.network.state_dict().items():
        torch.testing.assert_close(
            trained.state[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_epochs_differ_in_order_and_views(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []

    class Spy(Guide):
        def begin(self, samples: Any, views: Any, advance: Any) -> None:
            seen.append((samples.tobytes(), views.tobytes()))
            assert sorted(samples) == list(data.train)
            super().begin(samples, views, advance)

    teacher, network = teacher_of(data)
    train_stage(
        a_stage(data, guide=teacher),
        data=data,
        guides=[Spy(network, data, "fp32", "cpu")],
        device="cpu",
        watch=Silent(),
    )
    assert len({order for order, _ in seen}) == len({views for _, views in seen}) == 2


# what is kept -----------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Makes evaluate() return the scores in the order in which it is asked."""
    remaining = iter(scores)
    monkeypatch.setattr(training, "evaluate", lambda *args: next(remaining))


@pytest.mark.parametrize(
    ("select", "scores", "epoch"),
    [
        ("best_val", [50, 80, 80, 70, 42], 2),  # four validations, then the one look at the test set
        ("last", [50, 80, 80, 70, 42], 4),
        ("best_test", [50, 10, 60, 90, 70, 90, 80, 20, 42], 2),  # validation and test in turn
    ],
)
def test_selection(data: Data, monkeypatch: pytest.MonkeyPatch, select: str, scores: list[float], epoch: int) -> None:
    scripted(monkeypatch, scores)
    result = train(a_stage(data, epochs=4, select=select), data).result
    assert (result.selected_epoch, result.test_acc) == (epoch, 42)


def test_the_test_set_is_read_once(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(network: nn.Module, batches: Iterator[torch.Tensor], labels: torch.Tensor, *how: object) -> float:
        asked.append(next(batches).data_ptr() == data.test_images.data_ptr())
        return 1.0

    monkeypatch.setattr(training, "evaluate", counted)
    train(a_stage(data, epochs=3), data)
    assert sum(asked) == 1
    asked.clear()
    curve = train(a_stage(data, epochs=3, test_curve=True), data)
    assert sum(asked) == 4
    assert [row["test_acc"] for row in curve.metrics] == [1.0] * 3


def test_kept_weights_give_the_recorded_accuracy(data: Data) -> None:
    stage = a_stage(data, epochs=4, lr=0.05)
    trained = train(stage, data)
    network = make_network(stage, "cpu")
    network.network.load_state_dict(trained.state)
    assert evaluate(network, data.batches("val"), data.val_labels, "fp32") == trained.result.val_acc
    assert evaluate(network, data.batches("test"), data.test_labels, "fp32") == trained.result.test_acc


def test_accuracy_is_counted_over_samples_not_batches() -> None:
    labels = torch.zeros(1001, dtype=torch.int64)
    labels[-1] = 1  # alone in its batch
    network = Normalized(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (0.0,) * 3, (1.0,) * 3)
    images = torch.zeros(1001, 3, 4, 4, dtype=torch.uint8)
    images[:, 0] = 9
    assert evaluate(network, torch.split(images, 1000), labels, "fp32") == pytest.approx(100 * 1000 / 1001, abs=1e-4)


def test_metrics_hold_no_clock_and_add_up(data: Data) -> None:
    teacher, network = teacher_of(data)
    row = train(a_stage(data, guide=teacher, epochs=1), data, network).metrics[0]
    columns = {"epoch", "lr", "loss", "ce", "kl", "train_acc", "guide_acc", "guide_share", "val_acc"}
    assert row.keys() - {"alarms"} == columns
    assert row["loss"] == pytest.approx(0.5 * float(row["ce"] or 0) + 0.5 * 16 * float(row["kl"] or 0), abs=1e-5)


def test_a_loss_that_is_not_finite_stops_at_once(data: Data) -> None:
    watch = Silent()
    stage = a_stage(data, lr=1e30, schedule="constant")
    with pytest.raises(
        KnownError, match=r"student plane2: the loss is (nan|inf) at epoch 1, step \d, learning rate 1e\+30"
    ):
        train_stage(stage, data=data, device="cpu", watch=watch)
    assert watch.rows == []
    assert watch.images < len(data.train)


def test_weights_that_are_not_finite_are_not_kept(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of an epoch may make them non-finite, and no later loss shows it."""
    really = training.Loop._run_epoch

    def broken(self: training.Loop, epoch: int) -> dict[str, float]:
        means = really(self, epoch)
        next(self.step.network.parameters()).data[0] = torch.nan
        return means

    monkeypatch.setattr(training.Loop, "_run_epoch", broken)
    line = r"student plane2: \S+weight is not finite after epoch 1, learning rate 0.01; try a lower"
    with pytest.raises(NonFiniteError, match=line):
        train_stage(a_stage(data, epochs=1, schedule="constant"), data=data, device="cpu", watch=Silent())


# the guide --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_of_logits_depends_on_its_view_alone(data: Data, precision: str) -> None:
    _, network = teacher_of(data)
    guide = Guide(network, data, precision, "cpu")
    samples, views = np.arange(CHUNK + 50), np.arange(CHUNK + 50) % 162
    logits = guide.logits(samples, views, lambda n: None)
    shuffled = np.random.default_rng(0).permutation(len(samples))
    assert torch.equal(guide.logits(samples[shuffled], views[shuffled], lambda n: None), logits[shuffled])
    assert torch.equal(guide.logits(samples[:1], views[:1], lambda n: None), logits[:1])


@pytest.mark.parametrize("name", ["plane6", "resnet20"])
def test_folded_shifted_and_rounded_logits_are_the_networks(data: Data, name: str) -> None:
    stage = a_stage(data, model=name)
    network = make_network(stage, "cpu").train()
    samples, views = torch.arange(100), torch.full((100,), 80)
    with torch.no_grad():
        network(data.show(samples, views))
        raw = network.eval()(data.show(samples, views))
    exact = Guide(network, data, "fp32", "cpu").logits(samples.numpy(), views.numpy(), lambda n: None)
    torch.testing.assert_close(exact, raw - raw.amax(1, keepdim=True), rtol=1e-4, atol=1e-4)
    rounded = Guide(network, data, "bf16", "cpu").logits(samples.numpy(), views.numpy(), lambda n: None)
    assert rounded.dtype == torch.float16
    assert rounded.amax(1).eq(0).all()
    assert not torch.equal(rounded.float(), exact.half().float())  # computed in bf16, not only rounded


def test_a_guide_is_folded_and_its_logits_stay_finite(data: Data) -> None:
    _, network = teacher_of(data)
    with torch.no_grad():
        network.network.get_submodule("fc_layers.0").weight.mul_(1e6)  # type: ignore[union-attr, operator]
    guide = Guide(network, data, "bf16", "cpu")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in guide._folded.modules())
    assert torch.isfinite(guide.logits(np.arange(9), np.full(9, 80), lambda n: None)).all()


def test_a_guide_is_left_as_it_was(data: Data) -> None:
    teacher, network = teacher_of(data)
    guide = Guide(network, data, "fp32", "cpu")
    for watched in (network, guide._folded):
        before = {name: tensor.clone() for name, tensor in watched.state_dict().items()}
        train_stage(a_stage(data, guide=teacher), data=data, guides=[guide], device="cpu", watch=Silent())
        assert all(torch.equal(tensor, before[name]) for name, tensor in watched.state_dict().items())
        assert all(p.grad is None for p in watched.parameters())
        assert not any(module.training for module in watched.modules())


@pytest.mark.slow
def test_every_network_of_the_table_can_guide(data: Data) -> None:
    from kd.models import MODELS

    for name, entry in MODELS.items():
        if entry.family in ("plane", "cifar_resnet", "net", "mlp"):
            network = Normalized(build(name, num_classes=10, image_size=16), data.spec.mean, data.spec.std)
            logits = Guide(network, data, "fp32", "cpu").logits(np.arange(3), np.full(3, 80), lambda n: None)
            assert logits.shape == (3, 10), name
            assert torch.isfinite(logits).all()
        else:  # a chunk of 256 images would take seconds: that it folds is enough
            with torch.device("meta"):
                fuse(build(name, num_classes=10, image_size=16).eval())
