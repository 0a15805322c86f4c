"""What a stage will cost: memory from tensors that are never allocated, and time from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kd.core.hardware import memory_left
from kd.core.spec import KnownError
from kd.core.stage import Source, Stage
from kd.datasets import in_memory
from kd.losses import CrossEntropy
from kd.reporting.console import count, duration, in_bytes

if TYPE_CHECKING:
    import torch

_WARM = 2  # calls that are not timed
_LEAST, _TIMED = 3, 0.3  # calls and seconds that are timed at least
_LONG = 3.0  # seconds after which one timed call is enough
_STEP = 8  # images of a measured step at most
_BACKWARD = 2  # times the forward pass
_PROCESS = 600_000_000  # bytes of a process that has loaded torch
_BESIDE = 640_000_000  # bytes that a whole command had at its peak above the forecast, at most: bench/README.md
_WORKING = 1.3  # times the activations: gradients and copies that live for a moment


@dataclass(frozen=True)
class Forecast:
    """The expected memory of a stage in bytes, and the seconds that it trains."""

    stage: Stage
    memory: int
    seconds: float

    def __str__(self) -> str:
        train, images = self.stage.train, self.stage.dataset.train_images or 0
        return (
            f"about {in_bytes(self.memory)} of memory and {duration(self.seconds)} "
            f"({count(train.epochs, 'epoch')} of {count(images, 'image')})"
        )


def forecasts(stages: Sequence[Stage], device: str) -> Iterator[Forecast]:
    """The forecast of each stage with photographs. Raises KnownError for one that does not fit into the memory."""
    seen = set[tuple[str, str]]()
    for stage in stages:
        memory = memory_of(stage)
        free = free_memory(device)
        if free is not None and memory > free:
            raise KnownError(
                f"{stage.role} {stage.model}: needs about {in_bytes(memory)} of memory for batches of "
                f"{stage.train.batch_size} images of {stage.input_size}×{stage.input_size}, and {in_bytes(free)} are "
                "free; try a smaller train.batch_size or dataset.image_size"
            )
        yield Forecast(stage, memory, _seconds(stage, device, seen))


def memory_of(stage: Stage) -> int:
    """The expected memory of a training process in bytes: activations of a batch, weights, gradients and moments."""
    each, weights = activations(stage.model, stage.dataset.num_classes, stage.input_size)
    if stage.freeze:
        return int(_PROCESS + weights + _WORKING * each * 8)  # no gradients: few activations live at once
    width = 0.5 if stage.train.precision in ("bf16", "fp16") else 2.0 if stage.train.precision == "fp64" else 1.0
    batch = min(stage.train.batch_size, stage.dataset.train_images or stage.train.batch_size)
    return int(_PROCESS + 4 * weights + _WORKING * width * each * batch)


@cache
def activations(model: str, num_classes: int, size: int) -> tuple[int, int]:
    """Bytes in fp32 that the backward pass of one image needs of its forward pass; and bytes of the weights."""
    import torch

    from kd.models import build

    with torch.device("meta"):
        network = build(model, num_classes=num_classes, image_size=size).train()
        images = torch.empty(2, 3, size, size)
    kept: list[torch.Tensor] = []  # alive, so that no storage takes the address of another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(images)
    own = _storages([*network.parameters()])
    found = {address: size for address, size in _storages(kept).items() if address not in own}
    return sum(found.values()) // 2, sum(own.values())


def _storages(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """The bytes of each storage of tensors, which may share some, by its address: without memory it has no other."""
    return {(storage := each.untyped_storage())._cdata: storage.nbytes() for each in tensors}


def free_memory(device: str) -> int | None:
    """Bytes that are free for this process, on the device; None if the system does not say."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*free, *memory_left()], default=None)


def room_for(stages: Sequence[Stage]) -> int | None:
    """How many processes fit into the memory, each with the largest of these stages; None if the system is silent."""
    most = max(1, *map(_whole, stages))  # before the free memory is asked for: this imports torch
    free = free_memory("cpu")
    return None if free is None else free // most


def _whole(stage: Stage) -> int:
    """The expected peak of a process that trains a stage; 0 for a network that cannot be built, which its job says."""
    try:
        return memory_of(stage) + _image_bytes(stage) + _BESIDE
    except Exception:  # whatever a library's network raises
        return 0


def _image_bytes(stage: Stage) -> int:
    """Bytes of the images, where they are kept in memory."""
    data = stage.dataset
    return sum(data.images or ()) * 3 * data.image_size**2 if in_memory(data) else 0


def _seconds(stage: Stage, device: str, seen: set[tuple[str, str]]) -> float:
    """Seconds of a stage. `seen`: guides and backbones, by key and precision, whose views are cached by then."""
    images, spec = stage.dataset.train_images or 0, stage.dataset
    total = float(images * stage.train.epochs)
    shown = total if spec.shown_views is None else min(total, float(images * spec.shown_views))

    def passes(source: Source) -> float:
        """Seconds of forward passes over the views that are new to a network."""
        known = source.key, stage.train.precision
        if isinstance(source, Stage) and source.freeze and not stage.loss.live:
            known = source.backbone, source.train.precision
        if known in seen:
            return 0.0
        if spec.view_count is not None and not stage.loss.live:
            seen.add(known)
        one = _step_time(source, stage, device) / (1 + _BACKWARD)
        return one * (total if stage.loss.live else shown)

    own = passes(stage) if stage.freeze else total * _step_time(stage, stage, device)
    return own + sum(map(passes, stage.guides))


def _step_time(source: Source, stage: Stage, device: str) -> float:
    """Seconds of a network's training step per image, if it were trained as this stage is."""
    like = Stage(
        role="student",
        model=source.model,
        loss=CrossEntropy(),
        dataset=stage.dataset,
        train=stage.train,
        seed=0,
        preprocessing=source.normalize,
    )
    return _measured(like, device)


@cache
def _measured(like: Stage, device: str) -> float:
    """Seconds of a step per image. A sweep's jobs ask again, and are told what was measured."""
    batch = min(like.train.batch_size, _STEP)
    return step_seconds(like, device, batch) / batch


def step_seconds(stage: Stage, device: str, batch: int) -> float:
    """Seconds of a training step of a new network, not compiled, on random images."""
    import torch
    from torch.nn.functional import cross_entropy

    from kd.core.hardware import autocast
    from kd.training.step import make_network, make_optimizer

    network = make_network(stage.model_copy(update={"init": None, "freeze": None}), device).train()
    optimizer = make_optimizer([*network.parameters()], stage.train)
    size = stage.dataset.image_size
    noise = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    noise = noise.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with autocast(stage.train.precision, device):
            logits = network(noise)
        optimizer.zero_grad()
        cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return fastest(step, device)


def fastest(step: Callable[[], None], device: str) -> float:
    """Seconds of the fastest of several calls. On a busy machine single calls take many times as long."""
    times = list[float]()
    while not _enough(times):
        began = _now(device)
        step()
        times.append(_now(device) - began)
    return min(times[_WARM:])


def _enough(times: list[float]) -> bool:
    timed = times[_WARM:]
    return bool(timed) and (sum(times) > _LONG or (len(timed) >= _LEAST and sum(timed) >= _TIMED))


def _now(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
