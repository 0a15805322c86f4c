"""Training speed beside the usual script's, measured in alternation: python -m bench.speed [--rounds 5].

Images are random and of CIFAR-10's shape, since speed does not depend on what they show. In each round every
contestant runs once, one after the other, in this process; figures are medians over the rounds, of whole epochs of
ours (order, views, logits, steps, validation) and of steps of the usual script, and ratios and shares are medians of
each round's. Writes results/speed.json and results/speed.svg.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import figure, machine, memory, stored, sweep
from bench.workloads import RESULTS, WORKLOADS, ours, usual_script
from kd.core import hardware

Rounds = list[float]


def measure(rounds: int) -> dict[str, Any]:
    """Every contestant of every workload, once a round."""
    peaks: dict[str, Rounds] = {"fp32": [], "bf16": [], "bandwidth": []}
    speeds: dict[str, dict[str, Rounds]] = {name: {} for name in WORKLOADS}
    short: list[Rounds] = []
    for number in range(rounds):
        peaks["fp32"].append(machine.matrix_peak(torch.float32))
        peaks["bf16"].append(machine.matrix_peak(torch.bfloat16))
        peaks["bandwidth"].append(machine.bandwidth())
        for name, work in WORKLOADS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = {**usual_script(work), **ours(work, Path(folder))}
            for kind, speed in found.items():
                speeds[name].setdefault(kind, []).append(round(speed, 1))
            print(f"round {number + 1}: {name}: " + ", ".join(f"{k} {v:,.0f}" for k, v in found.items()), flush=True)
        short.append(sweep.run_short())
        print(f"round {number + 1}: jobs of a short sweep: {short[-1]} s", flush=True)
    return {"peaks": peaks, "speeds": speeds, "short_sweep_seconds": short}


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """The table: medians, ratios to the usual script, and shares of the machine's peaks."""
    peaks = measured["peaks"]
    table = {}
    for name, kinds in measured["speeds"].items():
        gflop, gb = machine.step_cost(WORKLOADS[name].student)
        table[name] = {
            "images_per_second": {kind: statistics.median(rounds) for kind, rounds in kinds.items()},
            "ratio": {kind: round(_ratio(rounds, kinds["usual"]), 1) for kind, rounds in kinds.items()},
            "share_of_bf16_peak": round(_ratio([speed * gflop for speed in kinds["step"]], peaks["bf16"]), 3),
            "share_of_fp32_peak": round(_ratio([speed * gflop for speed in kinds["step"]], peaks["fp32"]), 3),
            "floor_images_per_second": {
                "arithmetic": round(statistics.median(peaks["bf16"]) / gflop),
                "memory": round(statistics.median(peaks["bandwidth"]) / gb),
            },
        }
    medians = {name: round(statistics.median(rounds), 1) for name, rounds in peaks.items()}
    return {"machine": medians, "workloads": table}


def _ratio(ours: Rounds, others: Rounds) -> float:
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))


def sweep_cost(table: dict[str, Any], short: list[Rounds], job_seconds: float) -> dict[str, Any]:
    """What a sweep costs for its number of jobs: computed at full length, measured at a short one."""
    speeds = table["kd resnet110 → resnet8"]["images_per_second"]
    jobs = sweep.SETTINGS * sweep.SEEDS
    hours = [sweep.cost(number, speeds, job_seconds) for number in range(1, jobs + 1)]
    usual = sweep.usual_seconds(table["kd plane10 → plane2"]["images_per_second"]["usual"])
    return {
        "hours": {"usual": [round(a, 2) for a, _ in hours], "ours": [round(b, 2) for _, b in hours]},
        "ratio": round(hours[-1][0] / hours[-1][1], 1),
        "short": {
            "usual": round(usual, 1),
            "ours": [round(statistics.median(job), 2) for job in zip(*short, strict=True)],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    hardware.make_deterministic(None)
    measured = measure(arguments.rounds)
    found = summary(measured)
    jobs = {
        name: [round(stored.seconds_of_a_job(name), 3) for _ in range(arguments.rounds)] for name in ("none", "wandb")
    }
    found["stored_job_seconds"] = {name: statistics.median(rounds) for name, rounds in jobs.items()}
    found["sweep"] = sweep_cost(
        found["workloads"], measured["short_sweep_seconds"], found["stored_job_seconds"]["wandb"]
    )
    found["peak_memory_gb"] = round(memory.measured_apart(), 2)
    where = {"platform": platform.machine(), "processors": hardware.cpu_count(), "torch": torch.__version__}
    record = {**found, "rounds": {**measured, "stored_job_seconds": jobs}, **where}
    (RESULTS / "speed.json").write_text(json.dumps(record, indent=1, ensure_ascii=False))
    figure.draw(found, RESULTS / "speed.svg")
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
