"""Seconds of a sweep's job whose stages are all in the store: what is left of a job when nothing is to be trained."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from bench.workloads import ROOT

_JOBS = 10
# The smallest stages there are; what tells jobs apart is in no key, so all of them are in the store after the first.
_COMMON = ("-m", "method=scratch", "model=plane2", "train.epochs=1", "tracking.mode=offline")


def seconds_of_a_job(tracking: str) -> float:
    """Eleven jobs less one, over ten, each sweep in a process of its own, with W&B offline or tracking=none."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KD_STORE": folder, "WANDB_DIR": folder, "WANDB_SILENT": "true"}

        def sweep(jobs: int) -> float:
            groups = ",".join(f"g{number}" for number in range(jobs))
            arguments = [
                *_COMMON,
                f"tracking={tracking}",
                f"tracking.group={groups}",
                f"hydra.sweep.dir={folder}/{jobs}",
            ]
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "run.py", *arguments], cwd=ROOT, env=environment, check=True, capture_output=True
            )
            return time.perf_counter() - began

        sweep(1)
        return (sweep(1 + _JOBS) - sweep(1)) / _JOBS
