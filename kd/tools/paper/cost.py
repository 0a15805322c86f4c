"""The expected cost of a graph: operations counted on meta tensors, and hours from a few measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

from kd.core.spec import KnownError
from kd.core.stage import VIEWS, Batch, DatasetSpec, LossContext, LossSpec, Need, Outputs, Source, Stage
from kd.datasets import DATASETS
from kd.training.forecast import fastest, step_seconds
from kd.training.workplace import Workplace

_BACKWARD = 2  # times the forward pass: the gradients of activations and of weights
_PROBE = 1e10  # operations of a measured step on a CPU at most: a fraction of a second


@dataclass(frozen=True)
class Cost:
    """The cost of a stage: images trained, images tested, images through its guide, and operations of all.

    `seconds` is the time that training it still needs.
    """

    stage: Stage
    stored: bool
    trained: float
    tested: float
    guided: float  # without those in the bank
    flops: float
    seconds: float


def forward_flops(model: str, num_classes: int, image_size: int) -> int:
    """Floating-point operations of one image's forward pass; a multiply-add counts as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kd.models import build

    with torch.device("meta"):
        network = build(model, num_classes=num_classes, image_size=image_size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


def count_images(spec: DatasetSpec, data_root: Path) -> tuple[int, int]:
    """How many images a data set has, for training and for testing. Known data sets are not downloaded for it."""
    if spec.images is not None:
        return spec.images
    entry = DATASETS[spec.name]
    if entry.facts is not None and entry.facts.images is not None:
        return entry.facts.images
    arrays = resolve_name(entry.read)(data_root, spec.content)
    return len(arrays.labels), len(arrays.test_labels)


@dataclass
class _Seen:
    """The number of epochs of views that a guide's cache has, by seed: equal seeds draw equal views."""

    epochs: dict[int, int] = field(default_factory=dict)

    def more(self, stage: Stage, samples: float) -> float:
        """The expected number of (sample, view) pairs that the stage needs and no earlier one has needed."""
        views = stage.dataset.views or VIEWS[stage.dataset.augment]
        missed = 1 - 1 / views  # the fraction of all pairs that one epoch does not contain
        before = missed ** sum(self.epochs.values())
        self.epochs[stage.seed] = max(stage.train.epochs, self.epochs.get(stage.seed, 0))
        return samples * views * (before - missed ** sum(self.epochs.values()))


class Estimator:
    """Counts operations and measures steps, once per network, on the device and with the threads of the training.

    A loss on features is measured apart from its networks. Its operations are not counted. Losses on logits cost next
    to nothing, and are not measured.
    """

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self._flops = cache(forward_flops)
        self._measured: dict[tuple[str, DatasetSpec, int, str], float] = {}
        self._losses: dict[tuple[LossSpec, tuple[str, ...], DatasetSpec, int, str], float] = {}
        self._images = cache(lambda spec: count_images(spec, place.data_root))

    def estimate(self, stages: Sequence[Stage], stored: set[str]) -> list[Cost]:
        """The cost of each stage, in order. Stages in `stored` need no seconds and are not measured."""
        asked: dict[tuple[str, str, Need], _Seen] = {}
        costs = []
        for stage in stages:
            training, testing = self._images(stage.dataset)
            held = stage.dataset.val_images + stage.dataset.val_fraction * training
            samples, epochs = training - held, stage.train.epochs
            guided = {guide.key: samples * epochs for guide in stage.guides}
            if self._place.runtime.bank and not stage.loss.live:
                for guide in stage.guides:  # logits and pooled features have a cache each
                    caches = [
                        asked.setdefault((guide.key, stage.train.precision, need), _Seen()) for need in stage.loss.needs
                    ]
                    guided[guide.key] = max(seen.more(stage, samples) for seen in caches)
            each_epoch = training - samples + (testing if stage.train.test_curve else 0)
            costs.append(self._sum(stage, stage.key in stored, samples * epochs, each_epoch * epochs + testing, guided))
        return costs

    def flops(self, stages: Sequence[Stage]) -> float:
        """The operations that training these stages takes, if none of them is stored."""
        return sum(cost.flops for cost in self.estimate(stages, {stage.key for stage in stages}))

    def _sum(self, stage: Stage, stored: bool, trained: float, tested: float, guided: dict[str, float]) -> Cost:
        step, forward = 1 + _BACKWARD, 1 / (1 + _BACKWARD)  # a step in forward passes, and a forward pass in steps
        images = trained + tested * forward
        operations = images * step * self._forward(stage, stage)
        seconds = 0.0 if stored else images * self._seconds(stage) + trained * self._loss_seconds(stage)
        for guide in stage.guides:
            asked = guided[guide.key]
            operations += asked * self._forward(guide, stage)
            if not stored:  # steps of given weights are not measured: scaled by their operations
                larger = 1.0 if isinstance(guide, Stage) else self._forward(guide, stage) / self._forward(stage, stage)
                seconds += asked * forward * larger * self._seconds(guide if isinstance(guide, Stage) else stage)
        return Cost(stage, stored, trained, tested, sum(guided.values()), operations, seconds)

    def _forward(self, source: Source, stage: Stage) -> int:
        return self._flops(source.model, stage.dataset.num_classes, source.input_size)

    def _seconds(self, stage: Stage) -> float:
        """Seconds of a training step per image, measured once per network and batch size."""
        train = stage.train
        known = stage.model, stage.dataset, train.batch_size, train.precision
        if known not in self._measured:
            batch = train.batch_size
            if self._place.device == "cpu":
                batch = min(batch, max(2, int(_PROBE / (1 + _BACKWARD) / self._forward(stage, stage))))
            self._measured[known] = step_seconds(stage, self._place.device, batch) / batch
        return self._measured[known]

    def _loss_seconds(self, stage: Stage) -> float:
        """Seconds of a loss on features per image, measured once per loss, networks and batch size."""
        if not stage.loss.needs - {"logits"}:
            return 0.0
        train, batch = stage.train, stage.train.batch_size
        networks = stage.model, *(guide.model for guide in stage.guides)
        known = stage.loss, networks, stage.dataset, batch, train.precision
        if known not in self._losses:
            samples, _ = self._images(stage.dataset)
            self._losses[known] = _loss_step(stage, self._place.device, samples) / batch
        return self._losses[known]


def _loss_step(stage: Stage, device: str, samples: int) -> float:
    """Seconds of a stage's loss and its gradients for a batch of random features, among so many training samples.

    0 for a loss that cannot be built: the training will say why.
    """
    import torch

    from kd.training.guide import learner
    from kd.training.step import make_network

    size, needs = stage.dataset.image_size, stage.loss.needs
    numbers = torch.arange(samples, device=device)
    labels = numbers % stage.dataset.num_classes
    alike = [stage.model_copy(update={"model": source.model, "init": None}) for source in (stage, *stage.guides)]
    try:
        net, *guides = [learner(make_network(each, device), needs, size) for each in alike]
        losses = [stage.loss.build(LossContext(net, guide, labels, numbers)) for guide in guides]
    except KnownError:
        return 0.0
    dtype = net.outputs.logits.dtype
    losses = [each.to(device, dtype) if isinstance(each, torch.nn.Module) else each for each in losses]
    chosen = numbers[: stage.train.batch_size]
    own = _features(net.outputs, len(chosen), learning=True)
    batches = [Batch(labels[chosen], chosen, own, _features(guide.outputs, len(chosen))) for guide in guides]

    def step() -> None:
        for loss, batch in zip(losses, batches, strict=True):
            loss(batch)["loss"].backward()  # type: ignore[no-untyped-call]

    return fastest(step, device)


def _features(one: Outputs, batch: int, *, learning: bool = False) -> Outputs:
    """Random values for a batch, in the shapes and memory formats of one image's."""
    import torch

    repeated = {name: torch.cat([each] * batch) for name, each in one.tensors.items()}
    return Outputs({name: torch.rand_like(each, requires_grad=learning) for name, each in repeated.items()})
