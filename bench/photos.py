"""Distillation on photographs beside timm's own train.py: python -m bench.photos --timm-train T --root R --init I.

The same two networks, photographs, batches, crops, loss, precision and threads. Theirs is a process of train.py
(https://raw.githubusercontent.com/huggingface/pytorch-image-models/main/train.py), whose teacher runs at every step.
Its speed is what it prints. Ours is a stage as run.py plans it. What the teacher says about 16 views of each photograph
is in the bank. Rounds alternate, and the first epoch of each training does not count. A study of three seeds and three
temperatures is run with one epoch, ours from nothing. What it takes with a recipe's epochs is computed from that and
from the speeds of warm epochs. Writes results/photos.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from bench.workloads import RESULTS, ROOT, Clock
from kd.app.config import initial_files, plan
from kd.app.options import register
from kd.app.parsing import parse
from kd.core import hardware
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.store import Store
from kd.training.loop import train_stage
from kd.training.workplace import Workplace

PRECISIONS = ("bf16", "fp32")
SEEDS, TEMPERATURES = (0, 1, 2), (1, 4, 8)
JOBS = len(SEEDS) * len(TEMPERATURES)
EPOCHS = 60  # of a student by train=photos on so few photographs
_VIEWS = 16
_LAST = re.compile(r"Train: \d+ \[.*\(100%\)\].* ([\d.]+)/s\)")  # a line about an epoch's last step: its mean speed


@dataclass(frozen=True)
class Pair:
    """What both train: photographs in `root`/train and `root`/val, and the teacher's weights in `init`."""

    script: Path  # timm's train.py
    root: Path
    init: Path
    place: Path  # a temporary folder
    precision: str = "bf16"
    teacher: str = "tf_efficientnet_lite0"
    student: str = "mobilenetv3_small_050"
    batch: int = 32
    size: int = 224
    threads: int = hardware.cpu_count()

    def ours(self, epochs: int) -> list[str]:
        """The overrides of run.py."""
        return [
            *("dataset=folder", f"dataset.root={self.root}", f"dataset.views={_VIEWS}", "dataset.val_fraction=0"),
            *("teacher=timm", f"teacher.arch={self.teacher}", f"teacher.init={self.init}", "teacher.freeze=backbone"),
            *("model=timm", f"model.arch={self.student}", f"dataset.image_size={self.size}", "method=kd"),
            *(f"train.batch_size={self.batch}", f"train.precision={self.precision}", f"model.train.epochs={epochs}"),
            *(f"runtime.threads={self.threads}", f"runtime.store={self.place / 'store'}"),
            *(f"runtime.data={self.place / 'data'}", "tracking=none", "model.train.warmup=0"),
        ]

    def theirs(self, epochs: int) -> list[str]:
        """The arguments of train.py. It validates and writes a checkpoint at the end only, as ours does."""
        amp = ["--amp", "--amp-dtype", "bfloat16"] if self.precision == "bf16" else []
        return [
            *("--data-dir", str(self.root), "--model", self.student, "--num-classes", str(len(self.classes))),
            *("--kd-model-name", f"local-dir:{self.place / 'teacher'}", "--kd-distill-type", "logit"),
            *("--kd-temperature", "4", "--task-loss-weight", ".5", "--distill-loss-weight", ".5"),
            *("--device", "cpu", *amp, "--channels-last", "-b", str(self.batch), "-j", str(self.threads)),
            *("--opt", "adamw", "--lr", "1e-3", "--weight-decay", ".05", "--sched", "cosine", "--warmup-epochs", "0"),
            *("--color-jitter", "0", "--smoothing", "0", "--train-interpolation", "bilinear"),
            *("--input-size", "3", str(self.size), str(self.size), "--epochs", str(epochs)),
            *("--val-interval", "100000", "--log-interval", "100000", "--output", str(self.place / "timm")),
        ]

    @property
    def their_images(self) -> int:
        """Images of an epoch of train.py, which leaves out what is no full batch."""
        count = sum(len(list((self.root / "train" / name).iterdir())) for name in self.classes)
        return count // self.batch * self.batch

    @property
    def classes(self) -> list[str]:
        """The names of the folders below train."""
        return sorted(path.name for path in (self.root / "train").iterdir() if path.is_dir())


def serve_teacher(pair: Pair) -> None:
    """A folder that train.py takes for a teacher: it has no option for a file, and otherwise downloads the weights.

    timm makes a classifier for other classes anew and never trains it. That changes no speed.
    """
    import timm

    folder = pair.place / "teacher"
    folder.mkdir()
    published = timm.get_pretrained_cfg(pair.teacher)
    assert published is not None
    described = published.to_dict(remove_source=True)  # type: ignore[no-untyped-call]
    (folder / "config.json").write_text(json.dumps({"architecture": pair.teacher, "pretrained_cfg": described}))
    (folder / "model.safetensors").symlink_to(pair.init.absolute())


def run_theirs(pair: Pair, epochs: int) -> tuple[list[float], float]:
    """Images a second of each epoch, as train.py prints them; and the seconds of its process beside these epochs."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(pair.threads)}
    began = time.perf_counter()
    command = [sys.executable, str(pair.script), *pair.theirs(epochs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    speeds = [float(found[1]) for found in map(_LAST.search, done.stderr.splitlines()) if found]
    if done.returncode or len(speeds) != epochs:
        raise SystemExit(f"{pair.script} ended with {done.returncode}: {done.stderr[-2000:]}")
    return speeds, seconds - sum(pair.their_images / speed for speed in speeds)


def run_study(pair: Pair) -> float:
    """Seconds of all jobs of a study with run.py, one epoch each, where nothing is in the store."""
    jobs = "-m", f"seed={_listed(SEEDS)}", f"method.T={_listed(TEMPERATURES)}"
    began = time.perf_counter()
    command = [sys.executable, "run.py", *jobs, *pair.ours(1), f"hydra.sweep.dir={pair.place / 'jobs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"run.py ended with {done.returncode}: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    return time.perf_counter() - began


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


class Ours:
    """The student's stage, with the study's teacher, and a bank of all views."""

    def __init__(self, pair: Pair, epochs: int) -> None:
        self._stage, self._place = planned(pair, epochs)
        self.train = self._place.data(self._stage).train
        for guide in self._place.guides(self._stage):
            guide.begin(np.repeat(self.train, _VIEWS), np.tile(np.arange(_VIEWS), len(self.train)), lambda _: None)

    def epochs(self) -> list[float]:
        """Images a second of each epoch but the first. Nothing is asked of the teacher."""
        clock = Clock()
        data, network = self._place.beginning(self._stage)
        guides = self._place.guides(self._stage)
        train_stage(self._stage, data=data, guides=guides, device="cpu", watch=clock, network=network)
        return [round(len(self.train) / (after - before), 2) for before, after in pairwise(clock.epochs[1:])]


def guide_speed(pair: Pair) -> float:
    """Images a second of our teacher without a bank."""
    stage, place = planned(pair, 1, "runtime.bank=false")
    seen = place.data(stage).train[: 4 * pair.batch]
    (guide,) = place.guides(stage)
    seconds = []
    for view in range(3):
        began = time.perf_counter()
        guide.begin(seen, np.full_like(seen, view), lambda _: None)
        seconds.append(time.perf_counter() - began)
    return len(seen) / min(seconds)


def planned(pair: Pair, epochs: int, *overrides: str) -> tuple[Stage, Workplace]:
    """The student's stage as run.py would plan it, and its workplace."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", [*pair.ours(epochs), *overrides]))
    dataset = resolve(config.dataset, config.data_root, config.workers, config.image_size)
    place = Workplace(Store(config.store_root), config.data_root, config.runtime, initial=initial_files(config))
    return plan(config, dataset)[0], place


def measure(pair: Pair, rounds: int, epochs: int) -> dict[str, Any]:
    """Our study of one epoch; then images a second of warm epochs, theirs and ours in turn."""
    seconds = run_study(pair)
    print(f"{pair.precision}: {JOBS} jobs of an epoch in {seconds:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    ours, starts = Ours(pair, epochs + 1), list[float]()
    speeds: dict[str, list[list[float]]] = {"timm": [], "ours": []}
    for number in range(rounds):
        printed, start = run_theirs(pair, epochs + 1)
        speeds["timm"].append(printed[1:])
        speeds["ours"].append(ours.epochs())
        starts.append(round(start, 2))
        last = {name: each[-1] for name, each in speeds.items()}
        print(f"{pair.precision} round {number + 1}: {last}, load {os.getloadavg()[0]:.1f}", flush=True)
    return {
        "images_per_second": speeds,
        "guide_images_per_second": round(guide_speed(pair), 2),
        "images": {"timm": pair.their_images, "ours": len(ours.train)},
        "timm_start_seconds": starts,
        "our_study_seconds": round(seconds, 1),
    }


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians of speeds, and their ratio; and the seconds of the study with one epoch and with EPOCHS.

    Ours is the measured study, and the epochs that it lacks at the median speed. Theirs is for each job the median of
    what a process takes beside its epochs, and all its epochs at the median speed.
    """
    rounds, images = measured["images_per_second"], measured["images"]
    speed = {name: statistics.median(chain.from_iterable(each)) for name, each in rounds.items()}
    pairs = zip(rounds["ours"], rounds["timm"], strict=True)
    epoch = {name: images[name] / speed[name] for name in speed}
    start, study = statistics.median(measured["timm_start_seconds"]), list[dict[str, float]]()
    for epochs in (1, EPOCHS):
        theirs = JOBS * (start + epochs * epoch["timm"])
        ours = measured["our_study_seconds"] + JOBS * (epochs - 1) * epoch["ours"]
        study.append({"epochs": epochs, "timm": round(theirs), "ours": round(ours), "ratio": round(theirs / ours, 2)})
    return {
        "images_per_second": {**speed, "guide": measured["guide_images_per_second"]},
        "ratio": round(statistics.median(statistics.median(our) / statistics.median(their) for our, their in pairs), 2),
        "study_seconds": study,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--timm-train", type=Path, required=True, help="train.py of timm's repository, near its version"
    )
    parser.add_argument("--root", type=Path, required=True, help="photographs: train/<class>, val/<class>")
    parser.add_argument("--init", type=Path, required=True, help="tf_efficientnet_lite0_in1k.safetensors")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="counted epochs of each round")
    given = parser.parse_args()
    load, found = os.getloadavg(), dict[str, Any]()
    hardware.make_deterministic(None)
    for precision in given.precision:
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(given.timm_train, given.root.absolute(), given.init.absolute(), Path(folder), precision)
            serve_teacher(pair)
            measured = measure(pair, given.rounds, given.epochs)
        found[precision] = {**summary(measured), "measured": measured}
        print(json.dumps(summary(measured), indent=1), flush=True)
    where = {"platform": platform.machine(), "processors": hardware.cpu_count(), "load": [load, os.getloadavg()]}
    record = {**found, **where, "torch": torch.__version__, "timm": version("timm")}
    (RESULTS / "photos.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
