"""What a step with each loss costs, beside plain training's: python -m bench.losses [--rounds 25].

Two pairs of the benchmark on CIFAR-100, batch 64, random images, random weights. In each round every loss makes one
step (views, what the guide says, forward, loss, backward, update), one after the other. A ratio is the median over the
rounds of each round's. Logits and pooled features of the guide are cached, as in a run's later epochs. A guide whose
maps are read runs at every step. Writes results/losses.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from bench.workloads import RESULTS, Workload, images, planned
from kd.core import hardware
from kd.core.stage import Stage
from kd.datasets.data import Data
from kd.losses import LOSSES
from kd.training.guide import Guide, LiveGuide
from kd.training.step import Step, make_network

PAIRS = {"resnet56 → resnet20": ("resnet56", "resnet20"), "resnet32x4 → resnet8x4": ("resnet32x4", "resnet8x4")}
BATCH, BATCHES, IMAGES = 64, 4, 50_000
_OPTIONS = {"distill": "kd"}  # conf/loss has another name for it
_PLAIN = "cross_entropy"


def stages(pair: tuple[str, str]) -> dict[str, Stage]:
    """The student's stage with each loss, by the loss's option. The first is plain training."""
    teacher, student = pair
    alone, taught = Workload(student, None, 0, 0), Workload(student, teacher, 0, 0)
    found = {_PLAIN: planned(alone, "train=cifar100_benchmark", dataset="cifar100")}
    for name in LOSSES:
        if name not in (_PLAIN, "teachable_teacher"):  # that one is a teacher's
            work, option = taught if LOSSES[name].needs else alone, _OPTIONS.get(name, name)
            found[option] = planned(work, f"loss={option}", "train=cifar100_benchmark", dataset="cifar100")
    return found


class Contestant:
    """The steps of one stage, and what its guide says about a few batches."""

    def __init__(self, stage: Stage, data: Data) -> None:
        self._data, self._guides = data, list[Guide | LiveGuide]()
        self._samples = data.train[: BATCH * BATCHES].astype(np.int64)
        self._views = np.zeros_like(self._samples)
        if isinstance(stage.guide, Stage):
            kind, network = LiveGuide if stage.loss.live else Guide, make_network(stage.guide, "cpu")
            self._guides.append(kind(network, data, stage.train.precision, "cpu", needs=stage.loss.needs))
        for guide in self._guides:
            guide.begin(self._samples, self._views, lambda images: None)
        self._step = Step(stage, data=data, guides=self._guides, device="cpu")
        self._step.begin_epoch(0)
        self.guide = "live" if stage.loss.live else "cached" if stage.loss.guided else "none"

    def seconds(self, number: int) -> float:
        """The time of a step on batch `number`, counted from 0."""
        where = slice(BATCH * number, BATCH * (number + 1))
        index, views = (torch.from_numpy(rows[where]) for rows in (self._samples, self._views))
        began = time.perf_counter()
        shown = self._data.show(index, views)
        said = [guide.outputs(where, shown) for guide in self._guides]
        self._step(shown, self._data.labels[index], index, said)
        return time.perf_counter() - began


def measure(pair: tuple[str, str], rounds: int) -> dict[str, Any]:
    """Seconds of a step with each loss [round], and the ratios to plain training and to KD."""
    planned_stages = stages(pair)
    data = Data.of(planned_stages[_PLAIN].dataset, images(IMAGES, "cifar100"), "cpu")
    contestants = {name: Contestant(stage, data) for name, stage in planned_stages.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-2, rounds):  # the first two do not count
        for name, contestant in contestants.items():
            took = contestant.seconds(number % BATCHES)
            if number >= 0:
                seconds[name].append(round(took, 5))
    table = {
        name: {
            "ms": round(1000 * statistics.median(took), 1),
            "plain": round(_ratio(took, seconds[_PLAIN]), 3),
            "kd": round(_ratio(took, seconds["kd"]), 3),
            "guide": contestants[name].guide,
        }
        for name, took in seconds.items()
    }
    for name, row in table.items():
        ratios = f"× plain {row['plain']:6.3f}   × kd {row['kd']:6.3f}"
        print(f"{name:16} {row['ms']:8.1f} ms   {ratios}   guide {row['guide']}", flush=True)
    return {"table": table, "seconds": seconds}


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    hardware.make_deterministic(None)
    found = {}
    for name, pair in PAIRS.items():
        print(f"\n{name}, batch {BATCH}, {rounds} rounds", flush=True)
        found[name] = measure(pair, rounds)
    where = {"processors": hardware.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    (RESULTS / "losses.json").write_text(json.dumps({"rounds": rounds, **where, "pairs": found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
