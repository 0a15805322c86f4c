"""What this machine can do at most, and so how fast a step could be: the floors beside which speeds are read."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd.models import build

_MAPS = 64 << 20  # bytes: about what a step of resnet8 keeps for its backward, past the caches of most machines

# How often a step moves a whole map of its layer to or from memory, (of its input, of its output): a convolution reads
# its input and writes its output forward; backward it reads both again, the output's gradient twice, and writes the
# input's. BatchNorm reads its input twice each way; ReLU works in place forward.
_TRIPS: dict[type[nn.Module], tuple[int, int]] = {
    nn.Conv2d: (3, 3),
    nn.BatchNorm2d: (5, 3),
    nn.ReLU: (2, 3),
    nn.MaxPool2d: (2, 2),
}


def matrix_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two 4096×4096 matrices: the best of ten."""
    a = torch.rand(4096, 4096).to(dtype)
    return 2 * 4096**3 / _best(lambda: a @ a, 10) / 1e9


def bandwidth() -> float:
    """GB/s, read and written, of copies of 64 MiB: the best of thirty."""
    a, b = torch.rand(_MAPS // 4), torch.rand(_MAPS // 4)
    return 2 * a.nbytes / _best(lambda: b.copy_(a), 30) / 1e9


def _best(work: Callable[[], Tensor], times: int) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def step_cost(network: str) -> tuple[float, float]:
    """An image's training step: GFLOP of convolutions and matrix products, GB of maps moved in bf16 (by `_TRIPS`)."""
    batch = 8
    moved = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        of_input, of_output = _TRIPS[type(module)]
        moved += 2 * (of_input * inputs[0].numel() + of_output * output.numel())

    built = build(network, num_classes=10)
    for module in built.modules():
        if type(module) in _TRIPS:
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        built(torch.rand(batch, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / batch / 1e9, moved / batch / 1e9
