"""torch.compile for a stage's steps: where it pays back, and how it is done so that a stage's bits stay its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal

from kd.spec import KnownError
from kd.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

# Images of 32×32 pixels after which compiling has paid twice, in bf16 on a CPU; measured by bench/compiled.py, whose
# results are in bench/README.md. The networks that are not here became no faster, or were not measured.
PAYS_AFTER = {"preresnet20": 600_000, "resnet8": 1_600_000}
_PIXELS = 32 * 32


def resolve_compile(setting: bool | Literal["auto"], stage: Stage, images: int, device: str) -> bool:
    """Whether the steps of a stage, which sees so many images an epoch, are compiled.

    `auto` compiles what pays back by `PAYS_AFTER`; on a GPU nothing was measured, and nothing is. Where torch cannot
    compile, `auto` is false with a line that says why, and True raises KnownError.
    """
    if stage.train.ranks > 1:
        if setting is True:
            raise KnownError("runtime.compile=true: what several ranks train is not compiled; auto and false are right")
        return False
    if setting == "auto":
        pays_after = PAYS_AFTER.get(stage.model)
        if device != "cpu" or stage.train.precision != "bf16" or pays_after is None:
            return False
        if stage.train.epochs * images * stage.dataset.image_size**2 < pays_after * _PIXELS:
            return False
    if setting is False or (problem := _problem(device)) is None:
        return bool(setting)
    if setting == "auto":
        print(f"{stage.role} {stage.model}: not compiled, which would be faster: {problem}", flush=True)
        return False
    raise KnownError(f"runtime.compile=true: torch cannot compile here: {problem}")


def compile_network(network: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    """The network with its training step compiled for one shape of batches; shares its weights.

    The caller gives it batches of that shape only. On a GPU the step becomes a CUDA graph.
    """
    import torch

    _quiet()
    # All networks share the limit of compilations of one function, past which torch falls back without a word.
    torch.compiler.reset()
    mode = None if device == "cpu" else "reduce-overhead"
    compiled: Callable[[Tensor], Tensor] = torch.compile(network, fullgraph=True, dynamic=False, mode=mode)
    return compiled


@cache
def _problem(device: str) -> str | None:
    """Why nothing can be compiled for the device here, found out by trying; None where it works."""
    import torch

    _quiet()
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(16, device=device))
    except Exception as error:  # no compiler, no headers, no room for its files: each has an exception of its own
        return str(error).strip().splitlines()[0]
    return None


def _quiet() -> None:
    """On a machine without a GPU, torch warns that CUDA is missing whenever it compiles for the CPU."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
