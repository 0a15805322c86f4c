"""Seconds that a command takes: --help, a dry run, a training of one epoch: python -m bench.start [CHECKOUT].

With another checkout, both are measured in turn, round by round. Each time it is a process with one thread and
an empty store.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.workloads import ROOT

_SHORT = (
    "model=plane2",
    "method=scratch",
    "train.epochs=1",
    "train.precision=fp32",
    "tracking=none",
    "runtime.threads=1",
)
CASES = {"help": ("--help",), "dry run": (*_SHORT, "dry_run=true"), "one epoch": _SHORT}


def seconds(checkout: Path, arguments: tuple[str, ...]) -> float:
    """The time of one process, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        where = {"KD_STORE": f"{folder}/store", "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        subprocess.run(
            [
                sys.executable,
                str(checkout / "run.py"),
                *arguments,
                *([] if "--help" in arguments else ["hydra.run.dir=out"]),
            ],
            cwd=folder,
            env={**os.environ, **where},
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    checkouts = [ROOT, *([asked.checkout.absolute()] if asked.checkout else [])]
    for case, arguments in CASES.items():
        rounds = [[seconds(checkout, arguments) for checkout in checkouts] for _ in range(asked.rounds)]
        middle = [f"{statistics.median(column):.2f} s" for column in zip(*rounds, strict=True)]
        shorter = statistics.median(each[0] - each[-1] for each in rounds)
        print(f"{case}: {middle[0]}" + (f", {middle[1]} there; {shorter:+.2f} s" if asked.checkout else ""), flush=True)


if __name__ == "__main__":
    main()
