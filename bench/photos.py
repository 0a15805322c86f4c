"""Distillation on photographs beside timm's own train.py: python -m bench.photos --timm-train T --root R --init I.

The same two networks, photographs, batches, crops, loss and processors. Theirs are processes of train.py
(https://raw.githubusercontent.com/huggingface/pytorch-image-models/main/train.py), whose teacher runs at every step, in
fp32 and in bf16, one after another with all threads, or as many at a time as there are processors. Their speed is what
they print. Ours is a stage as run.py plans it, in fp32, its default on a CPU. What the teacher says about 16 views of
each photograph is in the bank. Rounds alternate, and the first epoch of each training does not count.

A study of three seeds and three temperatures is run whole with run.py, from nothing, its jobs side by side. What it
would take with train.py is computed from the speeds of its epochs. Writes results/photos.json.
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
from itertools import chain, pairwise, product
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
            *(f"train.batch_size={self.batch}", "train.precision=fp32", f"model.train.epochs={epochs}"),
            *("model.train.warmup=0", "tracking=none"),
            *(f"runtime.store={self.place / 'store'}", f"runtime.data={self.place / 'data'}"),
        ]

    def theirs(self, epochs: int, precision: str, threads: int) -> list[str]:
        """The arguments of train.py. It validates and writes a checkpoint at the end only, as ours does."""
        amp = ["--amp", "--amp-dtype", "bfloat16"] if precision == "bf16" else []
        return [
            *("--data-dir", str(self.root), "--model", self.student, "--num-classes", str(len(self.classes))),
            *("--kd-model-name", f"local-dir:{self.place / 'teacher'}", "--kd-distill-type", "logit"),
            *("--kd-temperature", "4", "--task-loss-weight", ".5", "--distill-loss-weight", ".5"),
            *("--device", "cpu", *amp, "--channels-last", "-b", str(self.batch), "-j", str(threads)),
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


def run_theirs(pair: Pair, epochs: int, precision: str, processes: int) -> tuple[list[float], float]:
    """Images a second of each epoch, as train.py prints them; and the seconds of a process beside these epochs.

    Of several processes at a time, each with its share of the threads, it is the sum of their speeds.
    """
    threads = max(1, pair.threads // processes)
    command = [sys.executable, str(pair.script), *pair.theirs(epochs, precision, threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            [*command, "--experiment", str(number)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    printed = [process.communicate()[1] for process in running]
    seconds = time.perf_counter() - began
    speeds = [[float(found[1]) for found in map(_LAST.search, said.splitlines()) if found] for said in printed]
    for process, said, each in zip(running, printed, speeds, strict=True):
        if process.returncode or len(each) != epochs:
            raise SystemExit(f"{pair.script} ended with {process.returncode}: {said[-2000:]}")
    together = [round(sum(each), 2) for each in zip(*speeds, strict=True)]
    return together, seconds - sum(pair.their_images * processes / speed for speed in together)


def run_study(pair: Pair, epochs: int) -> float:
    """Seconds of all jobs of a study with run.py, side by side, where nothing is in the store."""
    jobs = "-m", "hydra/launcher=joblib", f"seed={_listed(SEEDS)}", f"method.T={_listed(TEMPERATURES)}"
    began = time.perf_counter()
    command = [sys.executable, "run.py", *jobs, *pair.ours(epochs), f"hydra.sweep.dir={pair.place / 'jobs'}"]
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
        config = parse(compose("config", [*pair.ours(epochs), f"runtime.threads={pair.threads}", *overrides]))
    dataset = resolve(config.dataset, config.data_root, config.workers, config.image_size)
    place = Workplace(Store(config.store_root), config.data_root, config.runtime, initial=initial_files(config))
    return plan(config, dataset)[0], place


def measure(pair: Pair, rounds: int, epochs: int, study_epochs: int = EPOCHS) -> dict[str, Any]:
    """Our study; then images a second of warm epochs, ours and theirs in turn."""
    seconds = run_study(pair, study_epochs)
    print(f"{JOBS} jobs of {study_epochs} epochs in {seconds:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    ours = Ours(pair, epochs + 1)
    contestants = list(product(PRECISIONS, sorted({1, pair.threads})))
    speeds: dict[str, list[list[float]]] = {"ours": [], **{_name(*each): [] for each in contestants}}
    starts: dict[str, list[float]] = {_name(*each): [] for each in contestants}
    for number in range(rounds):
        speeds["ours"].append(ours.epochs())
        for precision, processes in contestants:
            printed, start = run_theirs(pair, epochs + 1, precision, processes)
            speeds[_name(precision, processes)].append(printed[1:])
            starts[_name(precision, processes)].append(round(start, 2))
        last = {name: each[-1] for name, each in speeds.items()}
        print(f"round {number + 1}: {last}, load {os.getloadavg()[0]:.1f}", flush=True)
    return {
        "images_per_second": speeds,
        "guide_images_per_second": round(guide_speed(pair), 2),
        "images": {"timm": pair.their_images, "ours": len(ours.train)},
        "timm_start_seconds": starts,
        "our_study_seconds": round(seconds, 1),
        "study_epochs": study_epochs,
    }


def _name(precision: str, processes: int) -> str:
    return f"timm {precision}" + (f", {processes} at a time" if processes > 1 else "")


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians of speeds, what theirs are of ours, and the seconds of the study.

    Ours is the measured study. Theirs is for each job the median of what a process takes beside its epochs, and all its
    epochs at the median speed. Several at a time take the time of one.
    """
    rounds, images = measured["images_per_second"], measured["images"]
    speed = {name: statistics.median(chain.from_iterable(each)) for name, each in rounds.items()}
    ours = measured["our_study_seconds"]
    found: dict[str, Any] = {"ours": {"images_per_second": speed["ours"], "study_seconds": round(ours)}}
    for name, starts in measured["timm_start_seconds"].items():
        processes = int(name.split()[2]) if "at a time" in name else 1
        epochs = measured["study_epochs"] * images["timm"] / speed[name]  # seconds, with the speed of all together
        study = JOBS * (statistics.median(starts) / processes + epochs)
        pairs = zip(rounds["ours"], rounds[name], strict=True)
        found[name] = {
            "images_per_second": speed[name],
            "ratio": round(statistics.median(statistics.median(our) / statistics.median(its) for our, its in pairs), 2),
            "study_seconds": round(study),
            "study_ratio": round(study / ours, 2),
        }
    return {**found, "guide_images_per_second": measured["guide_images_per_second"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--timm-train", type=Path, required=True, help="train.py of timm's repository, near its version"
    )
    parser.add_argument("--root", type=Path, required=True, help="photographs: train/<class>, val/<class>")
    parser.add_argument("--init", type=Path, required=True, help="tf_efficientnet_lite0_in1k.safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="counted epochs of each round")
    given = parser.parse_args()
    load = os.getloadavg()
    hardware.make_deterministic(None)
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(given.timm_train, given.root.absolute(), given.init.absolute(), Path(folder))
        serve_teacher(pair)
        measured = measure(pair, given.rounds, given.epochs)
    print(json.dumps(summary(measured), indent=1), flush=True)
    where = {"platform": platform.machine(), "processors": hardware.cpu_count(), "load": [load, os.getloadavg()]}
    record = {**summary(measured), "measured": measured, **where, "torch": torch.__version__, "timm": version("timm")}
    (RESULTS / "photos.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
