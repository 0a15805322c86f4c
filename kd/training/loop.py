"""The training loop of a stage: epochs and their plans, the choice of the weights to keep, metrics, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.core.hardware import widest_float
from kd.core.spec import NonFiniteError
from kd.core.stage import DROPOUT, ORDER, VIEW, Stage, random_stream
from kd.core.statistics import trim
from kd.datasets.data import Images
from kd.models.normalization import Normalized
from kd.reporting.console import Watch
from kd.store import Metrics, StageResult, TrainedStage
from kd.training.checkpoint import Checkpoint
from kd.training.evidence import alarms, hits
from kd.training.guide import Guide, LiveGuide
from kd.training.probe import Probe, ProbedGuide
from kd.training.ranks import ALONE, Team, batches, length, share_of
from kd.training.step import Step, evaluate, learning_rate

_GUIDE = "guide "  # and its number: the sum of its hits
_HELP = "try a lower train.lr, a train.warmup, or train.precision=fp32"


@dataclass(frozen=True)
class Share:
    """This rank's part of a batch: its position in the rank's samples, and the size of the whole batch."""

    where: slice
    batch: int

    @property
    def part(self) -> float:
        """The fraction of the batch."""
        return length(self.where) / self.batch


@dataclass(frozen=True)
class EpochPlan:
    """The plan of one rank for one epoch: its samples [sample] in order, a view of each, and its share of every batch.

    It depends only on the seed and the epoch, so an epoch can be replayed, and resumed at any batch.
    """

    samples: NDArray[np.int64]
    views: NDArray[np.int64]
    shares: list[Share]
    dropout: int  # seed of dropout's generators

    @classmethod
    def of(cls, stage: Stage, data: Images, epoch: int, team: Team) -> EpochPlan:
        """The plan of an epoch, counted from 0. Every training sample comes once, except what `batches` leaves out."""
        seed = stage.seed
        whole = batches(len(data.train), stage.train.batch_size, team.size)
        own = [share_of(batch, team.rank, team.size) for batch in whole]
        order = random_stream(seed, epoch, ORDER).permutation(data.train)
        views = data.draw_views(random_stream(seed, epoch, VIEW))[order]
        mine = np.r_[tuple(own)]
        ends = np.cumsum([length(each) for each in own]).tolist()
        places = [slice(end - length(each), end) for end, each in zip(ends, own, strict=True)]
        return cls(
            samples=order[mine],
            views=views[mine],
            shares=[Share(where, length(batch)) for where, batch in zip(places, whole, strict=True)],
            dropout=int(random_stream(seed, epoch, DROPOUT).integers(2**63, size=team.size)[team.rank]),
        )


@dataclass
class _Kept:
    """The weights to keep, their epoch and score."""

    epoch: int = 0
    score: float = -1.0
    state: dict[str, Tensor] = field(default_factory=dict)
    val_acc: float | None = None

    def offer(self, network: nn.Module, epoch: int, score: float, val_acc: float | None, last_of_equals: bool) -> None:
        if score > self.score or (last_of_equals and score == self.score):
            state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            self.epoch, self.score, self.state, self.val_acc = epoch, score, state, val_acc


@dataclass
class _Begun:
    """Progress in an epoch: steps and samples done, sums over these samples, and the state of dropout's generators."""

    steps: int = 0
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    generators: list[Tensor] = field(default_factory=list)
    share: float | None = None  # the guide's, of the gradient of the epoch's first batch

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, in float64 where the device has it."""
        if name not in self.sums:
            self.sums[name] = torch.zeros((), dtype=widest_float(value.device), device=value.device)
        self.sums[name] = self.sums[name] + value

    def means(self) -> dict[str, float]:
        """Means over the samples, the accuracy of the worst guide, and the guides' share of the gradient."""
        found = {name: trim(total.item() / self.samples) for name, total in self.sums.items()}
        guides = [found.pop(name) for name in [*found] if name.startswith(_GUIDE)]
        accuracy = {"guide_acc": min(guides)} if guides else {}
        return {**found, **accuracy, **({} if self.share is None else {"guide_share": self.share})}


def train_stage(
    stage: Stage,
    *,
    data: Images,
    guides: Sequence[Guide | LiveGuide | ProbedGuide] = (),
    device: str,
    watch: Watch,
    checkpoint: Checkpoint | None = None,
    compiled: bool = False,
    team: Team = ALONE,
    network: Normalized | Probe | None = None,
) -> TrainedStage:
    """Train a stage from its seed or from a `network` with initial weights, or resume it from its `checkpoint`.

    Every rank of a `team` trains its share of each batch and returns the same. Only rank 0 has a checkpoint.

    If a signal asks for an end, the next step writes a checkpoint, and then calls the signal's handler.

    Raises NonFiniteError, with epoch, step and learning rate, if a loss is not finite. On a CPU every step is checked
    at once; on a GPU the check comes at the end of the epoch, so that no step waits for it. Weights are checked at the
    end of every epoch.
    """
    step = Step(stage, data=data, guides=guides, device=device, compiled=compiled, team=team, network=network)
    loop = Loop(step, data=data, guides=guides, watch=watch, checkpoint=checkpoint)
    if (state := team.first(lambda: checkpoint.load() if checkpoint is not None else None)) is not None:
        loop.restore(state)
    return loop.run()


class Loop:
    """The epochs of one training."""

    def __init__(
        self,
        step: Step,
        *,
        data: Images,
        guides: Sequence[Guide | LiveGuide | ProbedGuide],
        watch: Watch,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.step, self.stage, self.train, self.team = step, step.stage, step.stage.train, step.team
        self.data, self.guides, self.watch, self.checkpoint = data, guides, watch, checkpoint
        self._classifiers: dict[int, nn.Module | None] = {}
        self.device = data.labels.device
        self.kept, self.history, self.begun = _Kept(), list[Metrics](), _Begun()
        self.began = time.perf_counter()

    def run(self) -> TrainedStage:
        """Train the epochs that are left."""
        for epoch in range(len(self.history), self.train.epochs):
            means = self._run_epoch(epoch)
            self.team.first(self._end_epoch, epoch, means)
        return self.team.first(self._finish)

    def _run_epoch(self, epoch: int) -> dict[str, float]:
        """One optimiser step per batch. Returns means over all samples: the loss, its parts, train_acc in percent."""
        plan = EpochPlan.of(self.stage, self.data, epoch, self.team)
        self.data.begin(plan.samples, plan.views, self._guided)
        for guide in self.guides:
            guide.begin(plan.samples, plan.views, self._guided)
        samples, views = (torch.from_numpy(each).to(self.data.home) for each in (plan.samples, plan.views))
        numbers = samples.to(self.device)
        labels = self.data.labels[numbers]
        self.step.begin_epoch(epoch)
        begun, first, losses = self.begun, self.begun.steps, list[Tensor]()
        begun.sums = {name: total.to(self.device) for name, total in begun.sums.items()}
        with self._dropout(plan.dropout):
            shares = plan.shares[first:]
            batches = self.data.shown(samples, views, [share.where for share in shares])
            for share, images in zip(shares, batches, strict=True):
                if self._asked():
                    self._check(losses, epoch, first)
                    begun.generators = self._generators()
                    self._pause()
                right = labels[share.where]
                guided = [guide.outputs(share.where, images) for guide in self.guides]
                first_batch = begun.steps == 0
                logits, parts = self.step(images, right, numbers[share.where], guided, share.part, measure=first_batch)
                if first_batch:
                    begun.share = self.step.guide_share
                losses.append(parts["loss"])
                if self.device.type == "cpu":
                    self._check(losses[-1:], epoch, begun.steps)
                for name, value in parts.items():
                    begun.add(name, value * share.batch)
                begun.add("train_acc", 100 * (logits.argmax(1) == right).sum())
                for number, said in enumerate(guided):
                    if (right_or_not := hits(said, right, partial(self._classifier, number))) is not None:
                        begun.add(f"{_GUIDE}{number}", 100 * right_or_not.sum())
                begun.steps, begun.samples = begun.steps + 1, begun.samples + share.batch
                self.watch.stepped(share.batch)
        self._check(losses, epoch, first)
        for name in begun.sums:
            if name == "train_acc" or name.startswith(_GUIDE):
                begun.sums[name] = self.team.total(begun.sums[name])
        self.begun = _Begun()
        return begun.means()

    def _classifier(self, number: int) -> nn.Module | None:
        """The last layer of a guide, on the device: a copy, because to() moves a module in place."""
        if number not in self._classifiers:
            last = self.guides[number].learner.head
            self._classifiers[number] = None if last is None else deepcopy(last).to(self.device)
        return self._classifiers[number]

    def _end_epoch(self, epoch: int, means: dict[str, float]) -> None:
        """After the steps of an epoch: compute accuracies, choose weights, record metrics, write a checkpoint."""
        self._check_weights(epoch)
        row: Metrics = {
            "epoch": epoch + 1,
            "lr": learning_rate(self.train, epoch),
            **means,
            "val_acc": self._validate(),
        }
        if self.train.test_curve or self.train.select.startswith("best_test"):
            row["test_acc"] = self._test()
        last_of_equals = self.train.select == "best_test_batches"  # as in Trained Teacher's code
        self.kept.offer(self.step.network.network, epoch + 1, self._score(row), row["val_acc"], last_of_equals)
        self.history.append(row)
        self._warn()
        checkpoint = self.checkpoint
        try:
            self.watch.epoch_ended(row)
        except BaseException:  # e.g. pruned: the training may be resumed later
            if checkpoint is not None:
                checkpoint.save(self.state())
            raise
        if checkpoint is not None and (epoch + 1) % checkpoint.every == 0 and epoch + 1 < self.train.epochs:
            checkpoint.save(self.state())

    def _finish(self) -> TrainedStage:
        self.step.network.network.load_state_dict(self.kept.state)
        result = StageResult(
            params=sum(p.numel() for p in self.step.network.parameters()),
            val_acc=self.kept.val_acc,
            test_acc=self._test(),
            epochs=self.train.epochs,
            selected_epoch=self.kept.epoch,
            seconds=round(time.perf_counter() - self.began, 3),
        )
        return TrainedStage({name: tensor.cpu() for name, tensor in self.kept.state.items()}, self.history, result)

    def _warn(self) -> None:
        """Print the alarms after the last epoch, each kind once, and keep them in the epoch's row."""
        said = {alarm.kind for end in range(1, len(self.history)) for alarm in alarms(self.stage, self.history[:end])}
        if new := [alarm.text for alarm in alarms(self.stage, self.history) if alarm.kind not in said]:
            self.history[-1]["alarms"] = new
            print("\n".join(new), flush=True)

    def _score(self, row: Metrics) -> float:
        score: float | None = row[{"best_val": "val_acc", "last": "epoch"}.get(self.train.select, "test_acc")]
        assert score is not None  # Stage and Data refuse best_val without a validation split
        return score

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. Order and views are not in it: they follow from seed and epoch."""
        return {
            "begun": vars(self.begun),
            "history": self.history,
            **self.step.state(),
            "kept": vars(self.kept),
            "seconds": time.perf_counter() - self.began,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what state() returned."""
        self.step.restore(state)
        self.kept, self.history, self.begun = _Kept(**state["kept"]), state["history"], _Begun(**state["begun"])
        self.began = time.perf_counter() - state["seconds"]
        self.watch.resumed(self.history, self.begun.samples)

    def _guided(self, images: int) -> None:
        self.watch.guided(images * self.team.size)  # the other ranks have computed as many
        if self._asked():
            self._pause()

    def _asked(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.signals.asked

    def _pause(self) -> None:
        """Write a checkpoint, then call the handler of the signal that asks for an end."""
        assert self.checkpoint is not None  # _asked() was true
        self.checkpoint.save(self.state())
        self.checkpoint.signals.deliver()

    @contextmanager
    def _dropout(self, seed: int) -> Iterator[None]:
        """Random numbers for dropout, continued if the epoch is resumed. Its global generators do not change."""
        kind = self.device.type
        with torch.random.fork_rng(devices=[] if kind == "cpu" else [self.device], device_type=kind):
            torch.default_generator.manual_seed(seed) if kind == "cpu" else torch.manual_seed(seed)
            for number, state in enumerate(self.begun.generators):
                getattr(torch, kind).set_rng_state(state, self.device) if number else torch.set_rng_state(state)
            yield

    def _generators(self) -> list[Tensor]:
        kind = self.device.type
        return [torch.get_rng_state(), *([] if kind == "cpu" else [getattr(torch, kind).get_rng_state(self.device)])]

    def _check(self, losses: list[Tensor], epoch: int, first: int) -> None:
        """Raise NonFiniteError if a loss is not finite. The losses are of consecutive steps, from `first` on."""
        if losses and not (finite := torch.isfinite(torch.stack(losses))).all():
            step = int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"{self.stage.role} {self.stage.model}: the loss is {losses[step].item()} at epoch {epoch + 1}, "
                f"step {first + step + 1}, learning rate {learning_rate(self.train, epoch):g}; {_HELP}"
            )

    def _check_weights(self, epoch: int) -> None:
        for name, tensor in self.step.network.network.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{self.stage.role} {self.stage.model}: {name} is not finite after epoch {epoch + 1}, learning "
                    f"rate {learning_rate(self.train, epoch):g}; {_HELP}"
                )

    def _validate(self) -> float | None:
        if not len(self.data.val):
            return None
        return evaluate(self.step.network, self.data.batches("val"), self.data.val_labels, self.train.precision)

    def _test(self) -> float:
        size = self.train.batch_size if self.train.select == "best_test_batches" else None
        return evaluate(self.step.network, self.data.batches("test"), self.data.test_labels, self.train.precision, size)
