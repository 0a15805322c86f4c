"""Where a training step's time goes: python -m bench.profile [workload …], or make profile.

torch's profiler over an epoch of steps with a warm bank. Operators are summed by kind; of compiled steps, the fused
loops are one kind.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from bench.workloads import BATCH, WORKLOADS, Clock, guides_of, images, planned
from kd.core import hardware
from kd.datasets.data import Data
from kd.training.loop import train_stage

_STEPS = 60
# The first kind whose word is in an operator's name has its time.
_KINDS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "conv2d", "aten::_convolution"),
    "BatchNorm, both ways": ("batch_norm",),
    "ReLU and pooling, both ways": ("threshold", "clamp_min", "relu", "pool", "fill_", "aten::zero_"),
    "views and normalisation": ("index", "aten::sub", "aten::div"),
    "casts and copies": ("copy", "aten::to", "clone", "cat"),
    "matrix products": ("addmm", "aten::mm"),
    "optimiser": ("optimizer", "fused_sgd", "fused_adam"),
    "additions": ("aten::add", "aten::sum", "aten::mean"),
}


def breakdown(name: str) -> tuple[float, Counter[str]]:
    """Images a second of the profiled epoch's steps, and seconds by kind."""
    work = WORKLOADS[name]
    stage = planned(work, "train.epochs=1")
    data = Data.of(stage.dataset, images(round(BATCH * _STEPS / 0.9)), "cpu")
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        train_stage(
            stage, data=data, guides=guides_of(stage, data, Path(place)), device="cpu", watch=Clock()
        )  # fills the bank
        clock = Clock()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            train_stage(stage, data=data, guides=guides_of(stage, data, Path(place)), device="cpu", watch=clock)
    for event in found.key_averages():
        lowered = event.key.lower()
        kind = next((kind for kind, words in _KINDS.items() if any(word in lowered for word in words)), "the rest")
        kinds[kind] += event.self_cpu_time_total / 1e6
    return clock.images_per_second_of_steps, kinds


def main() -> None:
    hardware.make_deterministic(None)
    for name in sys.argv[1:] or ["scratch resnet8", "scratch plane2"]:
        speed, kinds = breakdown(name)
        print(f"\n{name}: {speed:,.0f} images a second under the profiler, {_STEPS} steps of {BATCH}")
        for kind, seconds in kinds.most_common():
            print(f"  {kind:28} {100 * seconds / kinds.total():5.1f} %  {1e3 * seconds / _STEPS:6.2f} ms a step")


if __name__ == "__main__":
    main()
