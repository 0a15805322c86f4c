"""What compiling a step costs and gains: python -m bench.compiled [network …]. Writes results/compiled.json.

Compiled and uncompiled steps alternate, 25 rounds of some .4 s each; figures are medians of the rounds. The seconds to
compile are those of the first step in an empty cache. What pays back, and after how many images, goes by hand from
here to PAYS_AFTER in kd/training/step.py.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.workloads import BATCH, FACTS, RESULTS, Workload, planned
from kd.core import hardware
from kd.core.hardware import autocast
from kd.training.step import compile_network, make_network, make_optimizer

NETWORKS = ("resnet8", "resnet20", "resnet56", "preresnet20", "plane2", "plane4", "plane10", "net")
_ROUNDS = 25


def compare(network: str) -> dict[str, float]:
    """Milliseconds of a step both ways, the ratio with its quartiles, seconds to compile, images until it pays back."""
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.randint(0, FACTS["cifar10"].num_classes, (BATCH,))
    stage = planned(Workload(network, None, 1, 1))

    def stepper(compiled: bool) -> Callable[[int], float]:
        built = make_network(stage, "cpu").train()
        optimizer = make_optimizer([*built.parameters()], stage.train)
        forward: Callable[[Tensor], Tensor] = compile_network(built, "cpu") if compiled else built

        def seconds(steps: int) -> float:
            began = time.perf_counter()
            for _ in range(steps):
                with autocast(stage.train.precision, "cpu"):
                    logits = forward(images)
                optimizer.zero_grad()
                cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            return (time.perf_counter() - began) / steps

        return seconds

    plain, compiled = stepper(False), stepper(True)
    compiling = compiled(1)
    plain(1)
    steps = max(1, int(0.4 / plain(1)))
    rounds = [(plain(steps), compiled(steps)) for _ in range(_ROUNDS)]
    before, after = (statistics.median(times) for times in zip(*rounds, strict=True))
    low, ratio, high = statistics.quantiles([a / b for a, b in rounds], n=4)
    saved = before * (1 - 1 / ratio) / BATCH
    return {
        "ms": round(1e3 * before, 1),
        "compiled_ms": round(1e3 * after, 1),
        "ratio": round(ratio, 3),
        "quartiles": [round(low, 2), round(high, 2)],
        "compile_seconds": round(compiling, 1),
        "pays_after_images": round(compiling / saved) if saved > 0 else None,
    }


def main() -> None:
    hardware.make_deterministic(None)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for network in sys.argv[1:] or NETWORKS:
            found[network] = compare(network)
            print(network, found[network], flush=True)
    where = {"processors": hardware.cpu_count(), "torch": torch.__version__}
    (RESULTS / "compiled.json").write_text(json.dumps({**found, **where}, indent=1))


if __name__ == "__main__":
    main()
