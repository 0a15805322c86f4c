"""What a sweep costs: computed for the usual length from measured speeds, and a short one run job by job."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from bench.workloads import BATCH, WORKLOADS, Clock, guides_of, images, planned
from kd.datasets.data import Data
from kd.training.loop import train_stage

VIEWS = 162  # of crop_flip
IMAGES, EPOCHS = 45_000, 160
SETTINGS, SEEDS = 18, 3  # of T and lambda, times seeds: 54 jobs
SHORT = WORKLOADS["kd plane10 → plane2"]
SHORT_JOBS = [(seed, T) for seed in (20, 31) for T in (1, 5, 20)]
_SHORT_EPOCHS = 3


def views_met(epochs: int) -> float:
    """Views of a sample that the guide has met after so many epochs of distinct seeds, in the mean.

    Each epoch draws one of 162 for each sample: 162·(1 − (1 − 1/162)^epochs).
    """
    return VIEWS * (1 - (1 - 1 / VIEWS) ** epochs)


def cost(jobs: int, speeds: dict[str, float], job_seconds: float) -> tuple[float, float]:
    """Hours of the usual script and of ours for so many jobs of a kd sweep, the trained teacher given.

    Jobs are settings of one seed first, then of the next. `speeds` are images a second, of `usual`, `cold` and `warm`
    epochs. Ours is every image of every job at `warm`, each new (sample, view) once more at what `cold` costs above
    that, and `job_seconds` of everything else a job.
    """
    seeds = -(-jobs // SETTINGS)
    guided = 1 / speeds["cold"] - 1 / speeds["warm"]
    usual = jobs * EPOCHS * IMAGES / speeds["usual"]
    ours = jobs * (EPOCHS * IMAGES / speeds["warm"] + job_seconds) + IMAGES * views_met(EPOCHS * seeds) * guided
    return usual / 3600, ours / 3600


def run_short() -> list[float]:
    """Seconds of each job of a short sweep, one after the other, with one bank: a new seed brings new views."""
    seconds = []
    with tempfile.TemporaryDirectory() as place:
        for seed, T in SHORT_JOBS:
            stage = planned(SHORT, f"train.epochs={_SHORT_EPOCHS}", f"seed={seed}", f"method.T={T}")
            data = Data.of(stage.dataset, images(round(BATCH * SHORT.steps / 0.9)), "cpu")
            began = time.perf_counter()
            train_stage(stage, data=data, guides=guides_of(stage, data, Path(place)), device="cpu", watch=Clock())
            seconds.append(round(time.perf_counter() - began, 2))
    return seconds


def usual_seconds(images_per_second: float) -> float:
    """What the usual script needs for each job of the short sweep."""
    return _SHORT_EPOCHS * BATCH * SHORT.steps / images_per_second
