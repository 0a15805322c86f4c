"""What the benchmarks run: trainings of ours as run.py plans them, and the usual script's beside them."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir

from bench import usual
from kd.app.config import plan
from kd.app.options import register
from kd.app.parsing import parse
from kd.core.stage import Stage
from kd.datasets import Arrays, Facts, specify
from kd.datasets.data import Data
from kd.models import build
from kd.reporting.console import Watch
from kd.store import Metrics
from kd.training.bank import Bank, open_bank
from kd.training.guide import Guide
from kd.training.loop import train_stage
from kd.training.step import PAYS_AFTER, make_network

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BATCH = 128
FACTS = {  # of CIFAR's images
    "cifar10": Facts(10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Facts(100, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(frozen=True)
class Workload:
    """A student, its teacher if any, and the steps that a measurement takes of the usual script and of ours."""

    student: str
    teacher: str | None
    usual_steps: int
    steps: int


WORKLOADS = {
    "kd resnet110 → resnet8": Workload("resnet8", "resnet110", 6, 30),
    "kd plane10 → plane2": Workload("plane2", "plane10", 20, 100),
    "scratch resnet8": Workload("resnet8", None, 30, 60),
    "scratch plane2": Workload("plane2", None, 60, 200),
}


@dataclass
class Clock(Watch):
    """Watches a training: when its epochs and its steps of full batches end."""

    epochs: list[float] = field(default_factory=lambda: [time.perf_counter()])
    steps: list[float] = field(default_factory=list)

    def resumed(self, history: list[Metrics], images: int) -> None:
        pass

    def guided(self, images: int) -> None:
        pass

    def stepped(self, images: int) -> None:
        if images == BATCH:
            self.steps.append(time.perf_counter())

    def epoch_ended(self, metrics: Metrics) -> None:
        self.epochs.append(time.perf_counter())

    @property
    def images_per_second_of_steps(self) -> float:
        """By the median step."""
        return BATCH / statistics.median(after - before for before, after in pairwise(self.steps))


def images(count: int, dataset: str = "cifar10") -> Arrays:
    """Random ones of CIFAR's shape."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, FACTS[dataset].num_classes, count)
    return Arrays(pixels, labels, pixels[:1000], labels[:1000])


def planned(work: Workload, *overrides: str, dataset: str = "cifar10") -> Stage:
    """The student's stage as `run.py` would plan it."""
    method = "method=kd" if work.teacher else "method=scratch"
    chosen = [f"model={work.student}", f"teacher={work.teacher or 'resnet20'}", method, *overrides]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", [f"dataset={dataset}", *chosen]))
    return plan(config, specify(config.dataset, FACTS[dataset]))[0]


def guides_of(stage: Stage, data: Data, place: Path, device: str = "cpu") -> list[Guide]:
    """The stage's guide with random weights and a bank at `place`; empty where it learns from none."""
    if not isinstance(stage.guide, Stage):
        return []
    bank = bank_of(stage, data, place, device)
    return [Guide(make_network(stage.guide, device), data, stage.train.precision, device, bank)]


def bank_of(stage: Stage, data: Data, place: Path, device: str) -> Bank | None:
    """The bank at `place` for the logits of the stage's guide; None, and a line, if it cannot be made."""
    assert stage.guide is not None
    return open_bank(place, stage.guide.key, "random", data, stage.train.precision, device)


def ours(work: Workload, place: Path) -> dict[str, float]:
    """Images a second of our training, compiled where a stage of the recipe's length would be.

    `cold` is an epoch whose views the guide has not met, `warm` one whose logits are all in the bank, or that learns
    from none; `step` is of the warm run's steps alone, without drawing, bank and validation. Compiling is done
    before.
    """
    stage, compiled = planned(work, "train.epochs=2"), work.student in PAYS_AFTER
    data = Data.of(stage.dataset, images(round(BATCH * work.steps / 0.9)), "cpu")
    warm = Clock()
    if stage.guide is None:
        train_stage(stage, data=data, device="cpu", watch=warm, compiled=compiled)
        return _speeds(len(data.train), warm)
    cold = Clock()  # both of its epochs are, each drawing views of its own
    train_stage(stage, data=data, guides=guides_of(stage, data, place), device="cpu", watch=cold, compiled=compiled)
    train_stage(stage, data=data, guides=guides_of(stage, data, place), device="cpu", watch=warm, compiled=compiled)
    return {"cold": len(data.train) / (cold.epochs[2] - cold.epochs[1]), **_speeds(len(data.train), warm)}


def _speeds(images: int, clock: Clock) -> dict[str, float]:
    # The second epoch, since whatever happens once happens in the first.
    return {
        "warm": images / (clock.epochs[2] - clock.epochs[1]),
        "step": clock.images_per_second_of_steps,
    }


def usual_script(work: Workload, device: str = "cpu") -> dict[str, float]:
    """Images a second of the usual script's steps."""
    arrays = images(BATCH * (work.usual_steps + 3))
    teacher = build(work.teacher, num_classes=10) if work.teacher else None
    student = build(work.student, num_classes=10)
    given = arrays.images, arrays.labels, work.usual_steps
    return {"usual": usual.images_per_second(student, teacher, *given, device)}
