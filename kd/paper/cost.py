"""What a graph will cost before it is trained: operations counted on no memory, and hours from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from statistics import median

from kd.datasets import DATASETS
from kd.stage import DatasetSpec, Source, Stage
from kd.workplace import Workplace

# Images for training and for testing, of data sets that are not decoded here.
_IMAGES = {
    "digits": (1_437, 360),
    "fashion_mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
_VIEWS = {"none": 1, "crop_flip": 162, "rotate_flip": 82}  # as kd/datasets/views.py counts them, which imports torch
_BACKWARD = 2  # times the forward: the gradients of activations and of weights
_TIMED = 0.3  # seconds of measured steps, or one step, after two in which kernels are made
_PROBE = 1e10  # operations of a measured step on a CPU, at the most: a fraction of a second


@dataclass(frozen=True)
class Cost:
    """A stage's: images forward and backward, forward alone, and through its guide; operations of all.

    Seconds are what is still to be spent.
    """

    stage: Stage
    stored: bool
    trained: float
    tested: float
    guided: float  # that the bank will not have
    flops: float
    seconds: float


def forward_flops(model: str, num_classes: int, image_size: int) -> int:
    """Floating-point operations of one image's forward; a multiplication with its addition counts as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kd.models import build

    with torch.device("meta"):
        network = build(model, num_classes=num_classes, image_size=image_size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


def images(spec: DatasetSpec, data_root: Path) -> tuple[int, int]:
    """How many images a data set has, for training and for testing; nothing is downloaded for it."""
    if spec.content is None:
        return _IMAGES[spec.name]
    arrays = resolve_name(DATASETS[spec.name].read)(data_root, spec.content)
    return len(arrays.labels), len(arrays.test_labels)


@dataclass
class _Seen:
    """The epochs whose views a guide has been asked for, by the seed that drew them: equal seeds draw equal views."""

    epochs: dict[int, int] = field(default_factory=dict)

    def more(self, stage: Stage, samples: float) -> float:
        """How many (sample, view) pairs the stage is the first to ask for, in expectation."""
        views = stage.dataset.views or _VIEWS[stage.dataset.augment]
        missed = 1 - 1 / views  # the part of all pairs that one epoch leaves out
        before = missed ** sum(self.epochs.values())
        self.epochs[stage.seed] = max(stage.train.epochs, self.epochs.get(stage.seed, 0))
        return samples * views * (before - missed ** sum(self.epochs.values()))


class Estimator:
    """Counts and measures, each network once, on the device and by the threads that will train it."""

    def __init__(self, place: Workplace) -> None:
        self._place = place
        self._flops = cache(forward_flops)
        self._measured: dict[tuple[str, DatasetSpec, int, str], float] = {}
        self._images = cache(lambda spec: images(spec, place.data_root))

    def estimate(self, stages: Sequence[Stage], stored: set[str]) -> list[Cost]:
        """The cost of each stage, in order; nothing is measured for the `stored` keys, whose seconds are spent."""
        asked: dict[tuple[str, str], _Seen] = {}
        costs = []
        for stage in stages:
            training, testing = self._images(stage.dataset)
            samples, epochs = training * (1 - stage.dataset.val_fraction), stage.train.epochs
            guided = 0.0
            if stage.guide is not None:
                bank = stage.guide.key, stage.train.precision
                guided = asked.setdefault(bank, _Seen()).more(stage, samples)
                guided = guided if self._place.runtime.bank else samples * epochs
            each_epoch = training - samples + (testing if stage.train.test_curve else 0)
            costs.append(self._sum(stage, stage.key in stored, samples * epochs, each_epoch * epochs + testing, guided))
        return costs

    def flops(self, stages: Sequence[Stage]) -> float:
        """The operations that training some stages takes, if nothing of them is there."""
        return sum(cost.flops for cost in self.estimate(stages, {stage.key for stage in stages}))

    def _sum(self, stage: Stage, stored: bool, trained: float, tested: float, guided: float) -> Cost:
        step, forward = 1 + _BACKWARD, 1 / (1 + _BACKWARD)  # in forwards, and in steps
        images, guide = trained + tested * forward, stage.guide
        operations = images * step * self._forward(stage, stage)
        seconds = 0.0 if stored else images * self._seconds(stage)
        if guide is not None:
            operations += guided * self._forward(guide, stage)
            if not stored:  # given weights are no stage whose steps are measured: by their operations
                larger = 1.0 if isinstance(guide, Stage) else self._forward(guide, stage) / self._forward(stage, stage)
                seconds += guided * forward * larger * self._seconds(guide if isinstance(guide, Stage) else stage)
        return Cost(stage, stored, trained, tested, guided, operations, seconds)

    def _forward(self, source: Source, stage: Stage) -> int:
        return self._flops(source.model, stage.dataset.num_classes, stage.dataset.image_size)

    def _seconds(self, stage: Stage) -> float:
        """Of a training step, an image; measured once a network and batch size."""
        train = stage.train
        known = stage.model, stage.dataset, train.batch_size, train.precision
        if known not in self._measured:
            batch = train.batch_size
            if self._place.device == "cpu":
                batch = min(batch, max(2, int(_PROBE / (1 + _BACKWARD) / self._forward(stage, stage))))
            self._measured[known] = _step(stage, self._place.device, batch) / batch
        return self._measured[known]


def _step(stage: Stage, device: str, batch: int) -> float:
    """Seconds of a step of a fresh network, not compiled, on images of noise."""
    import torch
    from torch.nn.functional import cross_entropy

    from kd.hardware import autocast
    from kd.optimization import make_optimizer
    from kd.train import make_network

    network = make_network(stage, device).train()
    optimizer = make_optimizer(network, stage.train)
    size = stage.dataset.image_size
    noise = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    noise = noise.contiguous(memory_format=torch.channels_last)
    times = list[float]()
    while len(times) < 3 or sum(times[2:]) < _TIMED:
        began = _now(device)
        with autocast(stage.train.precision, device):
            logits = network(noise)
        optimizer.zero_grad()
        cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        times.append(_now(device) - began)
    return median(times[2:])


def _now(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
