"""One stage's training: everything that moves a weight, on one page."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kd.compilation import compile_network
from kd.datasets.data import Data
from kd.evaluation import evaluate
from kd.guide import Guide
from kd.hardware import autocast
from kd.models import build
from kd.models.normalized import Normalized
from kd.optimization import learning_rate, make_optimizer
from kd.partial import Partial
from kd.progress import Watch
from kd.ranks import ALONE, Team, batches, length, share
from kd.spec import NonFiniteError
from kd.stage import Stage
from kd.store import Metrics, StageResult, Trained
from kd.streams import DROPOUT, INIT, ORDER, VIEW, random_stream


@dataclass
class _Kept:
    """The weights to keep, and whose they are."""

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
    """How far an epoch is: steps and samples done, sums over these samples, and the state of dropout's generators."""

    steps: int = 0
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    generators: list[Tensor] = field(default_factory=list)


def make_network(stage: Stage, device: str) -> Normalized:
    """The stage's network as its seed initialises it; the global generator is left as it was."""
    data = stage.dataset
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_stream(stage.seed, 0, INIT).integers(2**63)))
        network = build(stage.model, num_classes=data.num_classes, image_size=data.image_size)
    dtype = torch.float64 if stage.train.precision == "fp64" else torch.float32
    return Normalized(network, data.mean, data.std).to(memory_format=torch.channels_last).to(device, dtype)


def train_stage(
    stage: Stage,
    data: Data,
    guide: Guide | None,
    device: str,
    watch: Watch,
    partial: Partial | None = None,
    compiled: bool = False,
    team: Team = ALONE,
) -> Trained:
    """Train a stage from its seed, or from its checkpoint in `partial`, to its kept weights.

    Every rank of a `team` trains its share of each batch and returns the same; rank 0 alone has `partial`.

    A signal that asks for an end is heard at the next step: the state goes into `partial`, down to the step, then the
    signal to whoever would have got it.

    Raises NonFiniteError, with epoch, step and learning rate, for a loss that is not finite: at once on a CPU, at the
    end of its epoch on a GPU, which would have to be waited for in every step. Weights are looked at every epoch.
    """
    training = _Training(stage, data, guide, device, watch, partial, compiled, team)
    if (state := team.first(lambda: partial.load() if partial is not None else None)) is not None:
        training.restore(state)
    return training.run()


class _Training:
    def __init__(
        self,
        stage: Stage,
        data: Data,
        guide: Guide | None,
        device: str,
        watch: Watch,
        partial: Partial | None,
        compiled: bool,
        team: Team,
    ) -> None:
        self.stage, self.train = stage, stage.train
        self.data, self.guide = data, guide
        self.device, self.watch, self.partial, self.team = device, watch, partial, team
        self.network = make_network(stage, device)
        self.parallel = team.parallel(self.network, device)
        self.compiled = compile_network(self.network, device) if compiled else None
        self.optimizer = make_optimizer(self.network, self.train)
        self.scaler = torch.amp.GradScaler(device.partition(":")[0], enabled=self.train.precision == "fp16")
        self.kept, self.history, self.begun = _Kept(), list[Metrics](), _Begun()
        self.began = time.perf_counter()

    def run(self) -> Trained:
        for epoch in range(len(self.history), self.train.epochs):
            means = self._steps(epoch)
            self.team.first(self._end_epoch, epoch, means)
        return self.team.first(self._finish)

    def _end_epoch(self, epoch: int, means: dict[str, float]) -> None:
        """What follows an epoch's steps: accuracies, the weights to keep, the record, a checkpoint."""
        lr, partial = learning_rate(self.train, epoch), self.partial
        self._check_weights(epoch)
        row: Metrics = {"epoch": epoch + 1, "lr": lr, **means, "val_acc": self._validate()}
        if self.train.test_curve or self.train.select.startswith("best_test"):
            row["test_acc"] = self._test()
        last_of_equals = self.train.select == "best_test_batches"  # as Trained Teacher's code has it
        self.kept.offer(self.network.network, epoch + 1, self._score(row), row["val_acc"], last_of_equals)
        self.history.append(row)
        try:
            self.watch.epoch_ended(row)
        except BaseException:  # pruned, say: the training may still be gone on with
            if partial is not None:
                partial.save(self.state())
            raise
        if partial is not None and (epoch + 1) % partial.every == 0 and epoch + 1 < self.train.epochs:
            partial.save(self.state())

    def _finish(self) -> Trained:
        self.network.network.load_state_dict(self.kept.state)
        result = StageResult(
            params=sum(p.numel() for p in self.network.parameters()),
            val_acc=self.kept.val_acc,
            test_acc=self._test(),
            epochs=self.train.epochs,
            selected_epoch=self.kept.epoch,
            seconds=round(time.perf_counter() - self.began, 3),
        )
        return Trained({name: tensor.cpu() for name, tensor in self.kept.state.items()}, self.history, result)

    def _score(self, row: Metrics) -> float:
        score = row[{"best_val": "val_acc", "last": "epoch"}.get(self.train.select, "test_acc")]
        assert score is not None  # Stage and Data see to it that best_val has a validation split
        return score

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; order and views are none of it, being named by seed and epoch."""
        return {
            "begun": vars(self.begun),
            "history": self.history,
            "network": self.network.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "kept": vars(self.kept),
            "seconds": time.perf_counter() - self.began,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what state() gave."""
        self.network.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.kept, self.history, self.begun = _Kept(**state["kept"]), state["history"], _Begun(**state["begun"])
        self.began = time.perf_counter() - state["seconds"]
        self.watch.resumed(self.history, self.begun.samples)

    def _steps(self, epoch: int) -> dict[str, float]:
        """One optimiser step a batch, every training sample once, of each batch this rank's share.

        Returns means over all samples: the loss, its parts, train_acc in percent.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, epoch)
        device, seed = self.data.labels.device, self.stage.seed
        whole = batches(len(self.data.train), self.train.batch_size, self.team.size)
        own = [share(batch, self.team.rank, self.team.size) for batch in whole]
        order = random_stream(seed, epoch, ORDER).permutation(self.data.train)
        views = self.data.draw_views(random_stream(seed, epoch, VIEW))[order]
        order, views = (array[np.r_[tuple(own)]] for array in (order, views))
        guide_logits = self.guide.logits(order, views, self._guided) if self.guide else None
        samples, view = (torch.from_numpy(array).to(self.data.home) for array in (order, views))
        labels = self.data.labels[samples.to(device)]
        begun, first, losses, end = self.begun, self.begun.steps, list[Tensor](), 0
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = begun.sums = {name: total.to(device) for name, total in begun.sums.items()}
        self.network.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            dropout = random_stream(seed, epoch, DROPOUT).integers(2**63, size=self.team.size)
            torch.manual_seed(int(dropout[self.team.rank]))
            self._set_generators()
            for step, (size, part) in enumerate(zip(map(length, whole), map(length, own), strict=True)):
                batch, end = slice(end, end + part), end + part
                if step < first:
                    continue
                if self._asked():
                    self._check(losses, epoch, first)
                    begun.generators = self._generators()
                    self._pause()
                images, right = self.data.show(samples[batch], view[batch]), labels[batch]
                guided = None if guide_logits is None else guide_logits[batch]
                logits, parts = self._step(images, right, guided, part / size)
                losses.append(parts["loss"])
                if device.type == "cpu":
                    self._check(losses[-1:], epoch, step)
                for name, value in parts.items():
                    sums[name] = sums.get(name, zero) + value * size
                sums["train_acc"] = sums.get("train_acc", zero) + 100 * (logits.argmax(1) == right).sum()
                begun.steps, begun.samples = step + 1, begun.samples + size
                self.watch.stepped(size)
        self._check(losses, epoch, first)
        sums["train_acc"] = self.team.total(sums["train_acc"])
        self.begun = _Begun()
        return {name: round(total.item() / begun.samples, 6) for name, total in sums.items()}

    def _guided(self, images: int) -> None:
        self.watch.guided(images * self.team.size)  # the other ranks' guides are as far
        if self._asked():
            self._pause()

    def _asked(self) -> bool:
        return self.partial is not None and self.partial.signals.asked

    def _pause(self) -> None:
        """Keep the state, then let the signal that asks for an end have its way."""
        assert self.partial is not None  # as _asked() says
        self.partial.save(self.state())
        self.partial.signals.deliver()

    def _generators(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.startswith("cuda") else []
        return [torch.get_rng_state(), *cuda]

    def _set_generators(self) -> None:
        """As they were when the epoch was left, if it was."""
        for number, state in enumerate(self.begun.generators):
            torch.cuda.set_rng_state(state, self.device) if number else torch.set_rng_state(state)

    def _step(
        self, images: Tensor, labels: Tensor, guide_logits: Tensor | None, part: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step on this rank's part of a batch. Returns its logits, and the whole batch's losses."""
        # One shape is compiled; an epoch's last batch may have another.
        forward = self.parallel if self.compiled is None or len(images) < self.train.batch_size else self.compiled
        with autocast(self.train.precision, self.device):
            logits = forward(images)
        # The loss is computed in fp32 whatever the network computes in, but for fp64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if guide_logits is not None:
            guide_logits = guide_logits.to(logits.dtype)
        # Stage sees to it that a loss which reads a guide has one.
        parts = self.stage.loss(logits, labels, cast(Tensor, guide_logits))
        self.optimizer.zero_grad()
        self.scaler.scale(self.team.weigh(parts["loss"], part)).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return logits.detach(), self.team.mean({name: value.detach() for name, value in parts.items()}, part)

    def _check(self, losses: list[Tensor], epoch: int, first: int) -> None:
        """Raise for a loss that is not finite, of consecutive steps from `first` on."""
        if losses and not (finite := torch.isfinite(torch.stack(losses))).all():
            step = int((~finite).nonzero()[0])
            lr = learning_rate(self.train, epoch)
            raise NonFiniteError(
                f"{self.stage.role} {self.stage.model}: the loss is {losses[step].item()} at epoch {epoch + 1}, "
                f"step {first + step + 1}, learning rate {lr:g}; a lower train.lr, train.warmup or "
                "train.precision=fp32 may help"
            )

    def _check_weights(self, epoch: int) -> None:
        for name, tensor in self.network.network.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{self.stage.role} {self.stage.model}: {name} is not finite after epoch {epoch + 1}, learning "
                    f"rate {learning_rate(self.train, epoch):g}; a lower train.lr, train.warmup or "
                    "train.precision=fp32 may help"
                )

    def _validate(self) -> float | None:
        if not len(self.data.val):
            return None
        return evaluate(self.network, self.data.val_images, self.data.val_labels, self.train.precision)

    def _test(self) -> float:
        size = self.train.batch_size if self.train.select == "best_test_batches" else None
        return evaluate(self.network, self.data.test_images, self.data.test_labels, self.train.precision, size)
