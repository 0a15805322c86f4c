"""Training speed on a GPU, measured in alternation: python -m bench.gpu [student …], or make bench-gpu.

For every student, in each round every contestant of `cases` runs once, one after the other, in this process. Figures
are medians of the rounds, ratios are medians of each round's. Images are random and of CIFAR-10's shape. Before the
rounds each contestant runs once uncounted: it compiles, records its graphs and fills its bank. What fails is a row with
its reason. Writes results/gpu.json after every student, with the card that measured it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.contestants import (
    Airbench,
    CompiledGraphStep,
    CompiledStep,
    Contestant,
    Epochs,
    GraphStep,
    PackedStep,
    Replay,
    Steps,
    single,
    unhindered,
)
from bench.workloads import BATCH, RESULTS, Workload, images, planned, usual_script
from kd.core import hardware
from kd.core.stage import Stage
from kd.datasets.data import Data
from kd.training.step import Step

TEACHERS = {
    "resnet8": "resnet110",
    "resnet20": "resnet110",
    "resnet110": "resnet110",
    "plane2": "plane10",
    "plane10": "plane10",
}
KINDS: dict[str, type[Step]] = {
    "eager": Step,
    "compiled": CompiledStep,
    "compiled, in graphs": CompiledGraphStep,
    "one graph": GraphStep,
}
PACKS = (1, 3, 8)  # students in one step
STEPS = {"resnet110": 40}  # of 128 images, a round
_STEPS, _USUAL_STEPS = 200, 30  # of the other students; of the usual script
_TINY_STEPS = 3  # an epoch's first step, one that is replayed, and a smaller last one
NO_GPU = "bench-gpu: torch sees no GPU here; --tiny runs every contestant on the CPU, and writes nothing"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a row measures.

    `guide`: none; live, run at every step; cold or warm, with an empty or a filled bank; memory, its logits at hand.
    """

    contestant: str
    guide: str
    mode: str
    students: int = 1

    def __str__(self) -> str:
        packed = f" of {self.students}" if self.contestant == "packed" else ""
        return f"{self.contestant}{packed}, guide {self.guide}, {self.mode}"


Cases = dict[Case, Callable[[], Contestant]]


def cases(student: str, device: str, steps: int, place: Path) -> Cases:
    """Every contestant of a student, and what makes it; ours train `steps` batches of 128 a round."""
    arrays = images(round(BATCH * steps / 0.9))
    found: Cases = {}
    for teacher in (None, TEACHERS[student]):
        work = Workload(student, teacher, min(_USUAL_STEPS, steps), steps)
        stage = planned(work, "train.epochs=1", f"runtime.device={device}")
        data, precision = Data.of(stage.dataset, arrays, device), stage.train.precision
        guide = "live" if teacher else "none"
        found[Case("usual script", guide, "eager")] = partial(_usual, work, device)
        for mode, graphs in (("eager", False), ("compiled, in graphs", True)):
            others = partial(Airbench, student, teacher, arrays, precision, device, graphs=graphs)
            found[Case("airbench-style", guide, mode)] = others
        for name in ("cold", "warm") if teacher else ("none",):
            for mode, kind in KINDS.items():
                ours = partial(Epochs, kind, stage, data, device, place / name / mode, cold=name == "cold")
                found[Case("epochs", name, mode)] = ours
        if teacher:
            found |= _steps(stage, data, device)
    return found


def _usual(work: Workload, device: str) -> Contestant:
    def run() -> float:
        with unhindered():
            return usual_script(work, device)["usual"]

    return run


def _steps(stage: Stage, data: Data, device: str) -> Cases:
    """Steps alone, of one student and of several in one step."""

    def one(kind: type[Step]) -> Contestant:
        return Steps(single(kind(stage, data=data, device=device)), stage, data, device)

    def packed(students: int, compiles: bool, graph: bool) -> Contestant:
        step = PackedStep(stage, device, students, compiles)
        return Steps(Replay(step) if graph else step, stage, data, device, students)

    found: Cases = {Case("step", "memory", mode): partial(one, kind) for mode, kind in KINDS.items()}
    for students in PACKS:
        for mode, compiles, graph in (("eager", False, False), ("compiled", True, False), ("one graph", False, True)):
            found[Case("packed", "memory", mode, students)] = partial(packed, students, compiles, graph)
    return found


def measure(student: str, device: str, steps: int, rounds: int) -> list[Row]:
    """The rows of a student: every contestant, once a round."""
    torch.compiler.reset()
    rows: dict[Case, Row] = {}
    running: dict[Case, Contestant] = {}
    with tempfile.TemporaryDirectory() as place:
        for case, make in cases(student, device, steps, Path(place)).items():
            rows[case] = _begun(case, make, running, device)
        for number in range(rounds):
            for case, contestant in [*running.items()]:
                try:
                    rows[case]["rounds"].append(round(contestant(), 1))
                except Exception as error:  # as below
                    del running[case], contestant
                    rows[case] = _failed(error)
            print(f"{student}: round {number + 1} of {rounds}", flush=True)
    return [{**asdict(case), **_summary(case, rows)} for case in rows]


def _begun(case: Case, make: Callable[[], Contestant], running: dict[Case, Contestant], device: str) -> Row:
    """Make a contestant and run it once, uncounted. It is one of those that run unless it fails."""
    gpu = device != "cpu"
    before = 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        contestant = make()
        contestant()
    except Exception as error:  # no compiler, no memory, an operator that a card does not have: each has its own type
        return _failed(error)
    running[case] = contestant
    peak = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3) if gpu else None
    return {"peak_memory_gb": peak, "rounds": []}


def _failed(error: Exception) -> Row:
    reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if torch.cuda.is_available():
        gc.collect()  # what failed leaves no memory behind
        torch.cuda.empty_cache()
    return {"failed": reason}


def _summary(case: Case, rows: dict[Case, Row]) -> Row:
    """The row with its median, its ratio to the usual script, and, of packed students, to the step of one."""
    row = rows[case]
    if "failed" in row:
        return row
    usual = rows[Case("usual script", "none" if case.guide == "none" else "live", "eager")]
    gain = {"gain": _ratio(row, rows[Case("step", case.guide, case.mode)])} if case.contestant == "packed" else {}
    return {"images_per_second": statistics.median(row["rounds"]), "ratio": _ratio(row, usual), **gain, **row}


def _ratio(row: Row, other: Row) -> float | None:
    if "failed" in other:
        return None
    ratios: list[float] = [a / b for a, b in zip(row["rounds"], other["rounds"], strict=True)]
    return round(statistics.median(ratios), 2)


def machine() -> dict[str, Any]:
    """The card, and the versions of what runs on it."""
    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "processors": hardware.cpu_count(),
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where its tool is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def save(path: Path, student: str, record: dict[str, Any]) -> None:
    """Put a student's record into the file. What was measured of other students stays."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, student: record}, indent=1, ensure_ascii=False))


def show(student: str, rows: list[Row]) -> None:
    """Print a line for each row."""
    for row in rows:
        case = Case(*(row[name] for name in ("contestant", "guide", "mode", "students")))
        if "failed" in row:
            print(f"{student}: {case}: failed: {row['failed']}")
            continue
        ratios = "".join(
            f"   × {name} {row[key]}" for key, name in (("ratio", "usual"), ("gain", "one")) if row.get(key)
        )
        memory = f"   {row['peak_memory_gb']} GB" if row["peak_memory_gb"] is not None else ""
        print(f"{student}: {case!s:44} {row['images_per_second']:12,.0f} images/s{ratios}{memory}", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("students", nargs="*", help=f"some of {', '.join(TEACHERS)}; by default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a check: three steps (plane2), nothing written")
    arguments = parser.parse_args(given)
    if unknown := {*arguments.students} - {*TEACHERS}:
        parser.error(f"students should be some of {', '.join(TEACHERS)} (got {', '.join(sorted(unknown))})")
    device = hardware.resolve_device("auto")
    if device == "cpu" and not arguments.tiny:
        print(NO_GPU, file=sys.stderr)
        return 2
    hardware.make_deterministic(None, device)
    for student in arguments.students or (["plane2"] if arguments.tiny else TEACHERS):
        steps, rounds = (_TINY_STEPS, 1) if arguments.tiny else (STEPS.get(student, _STEPS), arguments.rounds)
        rows = measure(student, device, steps, rounds)
        show(student, rows)
        if not arguments.tiny:
            save(RESULTS / "gpu.json", student, {**machine(), "steps": steps, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
