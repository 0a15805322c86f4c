"""Peak memory of one process that trains kd resnet110 → resnet8 on 50,000 images: python -m bench.memory.

One epoch with an empty bank and its validation, compiled: the guide, the step and the compiler have all been there.
Prints GB, as the system counts them (maximum resident set).
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.workloads import ROOT, WORKLOADS, Clock, guides_of, images, planned
from kd.core import hardware
from kd.datasets.data import Data
from kd.training.loop import train_stage


def measured_apart() -> float:
    """The peak in GB of a process of its own."""
    command = [sys.executable, "-m", "bench.memory"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def main() -> None:
    hardware.make_deterministic(None)
    stage = planned(WORKLOADS["kd resnet110 → resnet8"], "train.epochs=1")
    data = Data.of(stage.dataset, images(50_000), "cpu")
    with tempfile.TemporaryDirectory() as place:
        train_stage(
            stage, data=data, guides=guides_of(stage, data, Path(place)), device="cpu", watch=Clock(), compiled=True
        )
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9)


if __name__ == "__main__":
    main()
