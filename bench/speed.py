"""Training speed beside the usual script's, measured in alternation: python -m bench.speed [--rounds 5].

Images are random and of CIFAR-10's shape, since speed does not depend on what they show. In each round every
contestant runs once, one after the other, in this process; figures are medians over the rounds, of whole epochs of
ours (order, views, logits, steps, validation) and of steps of the usual script. Writes results/speed.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from bench import usual
from kd import hardware
from kd.config import plan
from kd.datasets import specify
from kd.datasets.base import Arrays, Facts
from kd.datasets.data import Data
from kd.guide import Guide, open_bank
from kd.models import build
from kd.parsing import parse
from kd.stage import Stage
from kd.store import Metrics
from kd.train import make_network, train_stage

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "speed.json"
FACTS = Facts(10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RESNET8_GFLOP = 6 * 12.5e6 / 1e9  # an image's step: two operations a MAC, forward and twice that backward


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
class Clock:
    """Watches a training and notes when its epochs end."""

    ends: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def resumed(self, history: list[Metrics]) -> None:
        pass

    def guided(self, images: int) -> None:
        pass

    def stepped(self, images: int) -> None:
        pass

    def epoch_ended(self, metrics: Metrics) -> None:
        self.ends.append(time.perf_counter())


def images(count: int) -> Arrays:
    """Random ones."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, count)
    return Arrays(pixels, labels, pixels[:1000], labels[:1000])


def student_stage(work: Workload, epochs: int) -> Stage:
    """As `run.py` would plan it, but for its length."""
    method = "method=kd" if work.teacher else "method=scratch"
    overrides = [f"model={work.student}", f"teacher={work.teacher or 'resnet20'}", method, f"train.epochs={epochs}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", ["dataset=cifar10", *overrides]))
    return plan(config, specify(config.dataset, FACTS))[0]


def ours(work: Workload, folder: Path) -> dict[str, float]:
    """Images a second of whole epochs: with a cold bank, with a warm one, and without a guide the only kind."""
    stage = student_stage(work, 2)
    data = Data.of(stage.dataset, images(round(128 * work.steps / 0.9)), "cpu")
    guide = None
    if isinstance(stage.guide, Stage):
        network = make_network(stage.guide, "cpu")
        bank = open_bank(folder, stage.guide.key, "random", data, stage.train.precision, "cpu")
        guide = Guide(network, data, stage.train.precision, "cpu", bank)
    speeds = {}
    for temperature in ("cold", "warm") if guide else ("warm",):
        clock = Clock()
        train_stage(stage, data, guide, "cpu", clock)
        began, first, second = clock.ends
        # Cold counts the first epoch, which builds the network too; warm the second.
        speeds[temperature] = len(data.train) / (first - began if temperature == "cold" else second - first)
    return speeds


def usual_script(work: Workload) -> dict[str, float]:
    """Images a second of its steps."""
    arrays = images(128 * (work.usual_steps + 3))
    teacher = build(work.teacher, num_classes=10) if work.teacher else None
    student = build(work.student, num_classes=10)
    return {"usual": usual.images_per_second(student, teacher, arrays.images, arrays.labels, work.usual_steps)}


def matrix_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two 4096×4096 matrices: the best of ten."""
    a = torch.rand(4096, 4096).to(dtype)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 4096**3 / min(seconds) / 1e9


def measure(rounds: int) -> dict[str, Any]:
    """Every contestant of every workload, once a round."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in WORKLOADS}
    peaks: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for number in range(rounds):
        peaks["fp32"].append(matrix_peak(torch.float32))
        peaks["bf16"].append(matrix_peak(torch.bfloat16))
        for name, work in WORKLOADS.items():
            with tempfile.TemporaryDirectory() as folder:
                speeds = {**usual_script(work), **ours(work, Path(folder))}
            for kind, speed in speeds.items():
                found[name].setdefault(kind, []).append(round(speed, 1))
            print(f"round {number + 1}: {name}: {speeds}", flush=True)
    return {"peaks": peaks, "speeds": found}


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and the ratios that matter."""
    median: Callable[[list[float]], float] = statistics.median
    table = {
        name: {kind: median(values) for kind, values in kinds.items()} for name, kinds in measured["speeds"].items()
    }
    ratios = {
        name: {
            kind: round(median([a / b for a, b in zip(values, kinds["usual"], strict=True)]), 1)
            for kind, values in kinds.items()
            if kind != "usual"
        }
        for name, kinds in measured["speeds"].items()
    }
    peak = median(measured["peaks"]["bf16"])
    share = table["scratch resnet8"]["warm"] * RESNET8_GFLOP / peak
    return {"images_per_second": table, "ratios": ratios, "share_of_bf16_peak_resnet8": round(share, 3)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    hardware.prepare(None)
    measured = measure(arguments.rounds)
    machine = {"machine": platform.machine(), "processors": hardware.cpu_count(), "torch": torch.__version__}
    result = {**summary(measured), **measured, **machine, "rounds": arguments.rounds}
    RESULT.write_text(json.dumps(result, indent=2))
    print(json.dumps(summary(measured), indent=2))
