"""What processes of one thread are worth: python -m bench.apart.

Two things, each one after another with all threads, and side by side with one thread each: four students of a run
(`replicates=4`), and six jobs of a sweep whose bank is empty (`hydra/launcher=joblib`). Rounds alternate. Images are
random, of CIFAR-10's shape. The teacher is in the store before the clock starts. Each time it is a command with a new
store, so the start of every process counts. Writes results/apart.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.workloads import RESULTS, ROOT
from kd.core import hardware

IMAGES = {"train": 8_540, "test": 500}
CLASSES = 10
_STUDENT = ("model=plane2", "teacher=plane10", "teacher.train.epochs=1", "method=kd")
_JOBS = ("-m", *_STUDENT, "train.epochs=3", "seed=20,31", "method.T=1,5,20", "hydra.sweep.dir=jobs")
_FOUR = ("model=resnet8", "method=scratch", "train.epochs=8", "replicates=4", "hydra.run.dir=run")
CASES = {
    "four students of a run": (_FOUR, (*_FOUR, "runtime.threads=1")),
    "six jobs of a sweep": (_JOBS, (*_JOBS, "hydra/launcher=joblib")),
}


def draw(root: Path) -> None:
    """Random images in a folder a class."""
    rng = np.random.default_rng(0)
    for part, count in IMAGES.items():
        for number in range(count):
            path = root / part / str(number % CLASSES) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path, compress_level=0)


def run(place: Path, *arguments: str) -> float:
    """The seconds of one command, in a store that has the teacher alone."""
    shutil.rmtree(place / "store", ignore_errors=True)
    if (place / "teacher").exists():
        shutil.copytree(place / "teacher", place / "store")
    own = ("dataset=folder", f"dataset.root={place / 'images'}", "train=cifar10", "tracking=none")
    where = (f"runtime.store={place / 'store'}", f"runtime.data={place / 'data'}")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / "run.py"), *arguments, *own, *where]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return round(time.perf_counter() - began, 2)


def measure(place: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by case, one after another and side by side."""
    draw(place / "images")
    run(place, *_STUDENT, "train.epochs=1", "runtime.bank=false", "hydra.run.dir=first")
    (place / "store").rename(place / "teacher")
    found: dict[str, dict[str, list[float]]] = {case: {"serial": [], "parallel": []} for case in CASES}
    for number in range(rounds):
        for case, commands in CASES.items():
            for name, arguments in zip(found[case], commands, strict=True):
                found[case][name].append(run(place, *arguments))
        last = {case: [each[-1] for each in both.values()] for case, both in found.items()}
        print(f"round {number + 1}: {last}, load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def summary(measured: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Medians of seconds, and of each round's ratio."""
    return {
        case: {
            **{name: statistics.median(each) for name, each in both.items()},
            "ratio": round(
                statistics.median(one / two for one, two in zip(both["serial"], both["parallel"], strict=True)), 2
            ),
        }
        for case, both in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), given.rounds)
    print(json.dumps(summary(measured), indent=1), flush=True)
    where = {"platform": platform.machine(), "processors": hardware.cpu_count(), "torch": torch.__version__}
    (RESULTS / "apart.json").write_text(json.dumps({**summary(measured), "measured": measured, **where}, indent=1))


if __name__ == "__main__":
    main()
