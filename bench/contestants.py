"""The contestants of bench/gpu.py: epochs of ours, steps alone, k students in one step, and an airbench-style loop.

A contestant is called once a round and returns images a second. It keeps its weights from round to round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import pad

from bench.usual import loss_of
from bench.workloads import BATCH, FACTS, Clock, bank_of, guides_of
from kd.core.hardware import autocast, settings_kept
from kd.core.spec import KnownError
from kd.core.stage import Batch, Formula, Outputs, Stage
from kd.datasets import Arrays
from kd.datasets.data import Data
from kd.models import build
from kd.models.normalization import Normalized
from kd.training.bank import rounded_type
from kd.training.loop import Loop
from kd.training.step import Step, at_least_fp32, learning_rate, make_network, make_optimizer

Contestant = Callable[[], float]
Parts = tuple[Tensor, dict[str, Tensor]]  # what a step returns
Forward = Callable[..., Tensor]
_NO_GRAPHS = "CUDA graphs need a GPU"


def timed(work: Callable[[], object], images: int, device: str) -> float:
    """Images a second of work; the GPU has finished all of it."""
    gpu = device != "cpu"
    if gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return images / (time.perf_counter() - began)


@contextmanager
def unhindered() -> Iterator[None]:
    """A block in which torch may choose any algorithm, and the fastest: so other people's scripts run."""
    fastest = torch.backends.cudnn.benchmark
    with settings_kept():
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = fastest


def compiled(call: Forward, device: str, *, graphs: bool = False) -> Forward:
    """A call compiled for one shape; with `graphs`, as runtime.compile=true does on a GPU.

    Unlike compile_network() it keeps what was compiled before, because contestants take turns. Raises KnownError for
    graphs on a CPU.
    """
    if graphs and device == "cpu":
        raise KnownError(_NO_GRAPHS)
    return torch.compile(call, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)


class CompiledStep(Step):
    """A step whose forward and backward pass are compiled."""

    graphs = False

    def __init__(self, stage: Stage, *, device: str, **others: Any) -> None:
        super().__init__(stage, device=device, **others)
        self._compiled = compiled(self.network, device, graphs=self.graphs)


class CompiledGraphStep(CompiledStep):
    """What runtime.compile=true makes on a GPU: both passes are compiled, and each becomes a CUDA graph."""

    graphs = True


def record(work: Callable[[], None], device: str) -> Callable[[], None]:
    """Work recorded as one CUDA graph, after three runs of it aside, as torch's documentation asks.

    Raises KnownError on a CPU. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    if device == "cpu":
        raise KnownError(_NO_GRAPHS)
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Replay:
    """A call on tensors of fixed shapes that is recorded at its first use, and replayed on other values."""

    def __init__(self, call: Callable[..., tuple[Tensor, ...]]) -> None:
        self._call = call
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in tensors]
            self._replay = record(self._work, tensors[0].device.type)
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._replay()
        return tuple(output.clone() for output in self._outputs)  # the next replay writes into the same memory

    def _work(self) -> None:
        self._outputs = self._call(*self._inputs)


class GraphStep(Step):
    """The whole step, with loss and update, in one CUDA graph: nothing is compiled, and one launch does it all.

    The learning rate is recorded with it, so this serves epochs of one learning rate.
    """

    def __init__(self, stage: Stage, *, device: str, **others: Any) -> None:
        super().__init__(stage, device=device, **others)
        self._replay, self._names = Replay(self._recorded), list[str]()

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        samples: Tensor,
        guided: Sequence[Outputs],
        part: float = 1.0,
        *,
        measure: bool = False,
    ) -> Parts:
        """As Step's. An epoch's first batch, which is measured, and a smaller last one are not replayed."""
        if measure or len(images) < self.stage.train.batch_size:
            return super().__call__(images, labels, samples, guided, part, measure=measure)
        logits, *values = self._replay(images, labels, samples, *(guide.logits for guide in guided))
        return logits, dict(zip(self._names, values, strict=True))

    def _recorded(self, images: Tensor, labels: Tensor, samples: Tensor, *guided: Tensor) -> tuple[Tensor, ...]:
        said = [Outputs({"logits": logits}) for logits in guided]
        logits, parts = super().__call__(images, labels, samples, said)
        self._names = [*parts]
        return (logits, *parts.values())


class Epochs:
    """Whole epochs of ours, as bench/speed.py counts them: order, views, logits, steps, validation."""

    def __init__(self, kind: type[Step], stage: Stage, data: Data, device: str, place: Path, cold: bool) -> None:
        """With `cold`, the bank is empty at the start of every epoch."""
        self._data, self._stage, self._device, self._place, self._cold = data, stage, device, place, cold
        place.mkdir(parents=True)
        self._guides = guides_of(stage, data, place / "kept", device)
        if self._guides and not [*place.glob("kept/*/filled.bin")]:
            raise KnownError("no bank could be made")
        self._step = kind(stage, data=data, guides=self._guides, device=device)

    def __call__(self) -> float:
        with tempfile.TemporaryDirectory(dir=self._place) as empty:
            for guide in self._guides if self._cold else ():
                guide.cache("logits", bank_of(self._stage, self._data, Path(empty), self._device))
            clock = Clock()
            with redirect_stdout(StringIO()):  # it says that a guide of random weights knows nothing
                Loop(self._step, data=self._data, guides=self._guides, watch=clock).run()
        return len(self._data.train) / (clock.epochs[1] - clock.epochs[0])


class Steps:
    """Steps alone: views shown, random logits of a guide in memory, and the step. No plan, bank or validation."""

    def __init__(self, call: Callable[..., object], stage: Stage, data: Data, device: str, students: int = 1) -> None:
        """`call` trains `students` on a batch each: on images, labels, samples and logits [students · batch, …]."""
        self._call, self._data, self._device, self._rows = call, data, device, BATCH * students
        self._count = max(1, len(data.train) // self._rows)
        samples = torch.from_numpy(np.resize(data.train, self._count * self._rows))
        views = torch.from_numpy(np.resize(data.draw_views(np.random.default_rng(0)), len(samples)))
        self._index, self._views, self._samples = samples.to(data.home), views.to(data.home), samples.to(device)
        self._logits = torch.randn(len(samples), stage.dataset.num_classes, device=device)
        self._logits = self._logits.to(rounded_type(stage.train.precision))

    def __call__(self) -> float:
        return timed(self._work, self._count * self._rows, self._device)

    def _work(self) -> None:
        for start in range(0, self._count * self._rows, self._rows):
            where = slice(start, start + self._rows)
            images, samples = self._data.show(self._index[where], self._views[where]), self._samples[where]
            self._call(images, self._data.labels[samples], samples, self._logits[where])


def single(step: Step) -> Callable[..., Parts]:
    """A step as `Steps` calls it."""
    step.begin_epoch(0)
    return lambda images, labels, samples, *guided: step(
        images, labels, samples, [Outputs({"logits": logits}) for logits in guided]
    )


class PackedStep:
    """k students of one stage that differ in their seed, trained by one step: each on a batch of its own.

    Their weights are stacked, and torch.func.vmap runs forward pass and loss for all of them. The sum of the losses
    gives each student its own gradient, and the optimiser works on each element alone. One student is not vmapped, and
    so makes the same bits as Step; under vmap other operators run, and round otherwise. The learning rate stays that of
    the first epoch.
    """

    def __init__(self, stage: Stage, device: str, students: int, compiles: bool = False) -> None:
        if not isinstance(stage.loss, Formula):
            raise KnownError(f"loss={stage.loss.name} has parameters: only formulas are packed")
        self._stage, self._device, self._students, self._loss = stage, device, students, stage.loss
        seeds = [stage.model_copy(update={"seed": stage.seed + number}) for number in range(students)]
        networks = [make_network(each, device).network.train() for each in seeds]
        self._network = deepcopy(networks[0])
        stacked, self.buffers = stack_module_state(networks)
        self.parameters: dict[str, Any] = {name: _channels_last(each) for name, each in stacked.items()}
        # Outside of vmap, which knows no memory formats.
        dtype = networks[0].get_parameter(next(iter(self.parameters))).dtype
        self._prepared = Normalized.of(nn.Identity(), stage.normalize).to(device, dtype)
        losses = vmap(self._of_one) if students > 1 else self._unstacked
        self._losses = compiled(losses, device) if compiles else losses
        self._optimizer = make_optimizer([*self.parameters.values()], stage.train)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(stage.train, 0)

    def __call__(self, images: Tensor, labels: Tensor, samples: Tensor, *guided: Tensor) -> tuple[Tensor]:
        """Train on images uint8 [students · batch, 3, height, width] and what belongs to them: losses [student]."""
        shown = self._prepared(images)
        rows = [each.unflatten(0, (self._students, -1)) for each in (shown, labels, samples, *guided)]
        losses = self._losses(self.parameters, self.buffers, *rows)
        self._optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return (losses.detach(),)

    def _of_one(self, parameters: Any, buffers: Any, images: Tensor, labels: Tensor, *others: Tensor) -> Tensor:
        samples, *guided = others
        with autocast(self._stage.train.precision, self._device):
            logits = functional_call(self._network, (parameters, buffers), (images,))
        net = at_least_fp32(Outputs({"logits": logits}))
        guide = at_least_fp32(Outputs({"logits": guided[0]} if guided else {}))
        return self._loss(Batch(labels, samples, net, guide))["loss"]

    def _unstacked(self, parameters: Any, buffers: Any, *rows: Tensor) -> Tensor:
        own, kept = ({name: each.squeeze(0) for name, each in stacked.items()} for stacked in (parameters, buffers))
        return self._of_one(own, kept, *(each.squeeze(0) for each in rows))[None]


def _channels_last(stacked: Tensor) -> Tensor:
    """The same leaf; of weights of convolutions [student, …], each student's is in channels_last order."""
    if stacked.dim() != 5:
        return stacked
    return stacked.detach().movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()


class Airbench:
    """Training in the manner of airbench: images on the device, normalised once; an epoch is augmented in one go.

    The network computes in bf16 without autocast (in fp32 where ours does), its BatchNorm in fp32. Reflected borders,
    flips of half the images, Nesterov's SGD; no loss is read. A teacher runs at every step. Deterministic algorithms
    are off. https://github.com/KellerJordan/cifar10-airbench
    """

    def __init__(
        self, student: str, teacher: str | None, arrays: Arrays, precision: str, device: str, *, graphs: bool
    ) -> None:
        self._device, dtype = device, torch.bfloat16 if precision == "bf16" else torch.float32
        facts = FACTS["cifar10"]
        mean, std = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (facts.mean, facts.std))
        images = torch.from_numpy(arrays.images).to(device).permute(0, 3, 1, 2)
        padded = pad((images / 255 - mean) / std, (4, 4, 4, 4), mode="reflect")
        self.padded = padded.permute(0, 2, 3, 1).to(dtype).contiguous()
        self._labels = torch.from_numpy(arrays.labels).to(device)

        def network(name: str) -> nn.Module:
            made = build(name, num_classes=10).to(device).to(memory_format=torch.channels_last)
            for module in made.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(dtype)
            return made

        self._student, taught = network(student).train(), network(teacher).eval() if teacher else None
        self._teacher: Forward | None = taught
        self._optimizer = torch.optim.SGD(
            self._student.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True, fused=True
        )
        self._forward: Forward = self._student
        if graphs:
            self._forward = compiled(self._student, device, graphs=True)
            self._teacher = compiled(taught, device, graphs=True) if taught is not None else None

    def __call__(self) -> float:
        with unhindered():
            return timed(self._epoch, len(self.padded) // BATCH * BATCH, self._device)

    def _epoch(self) -> None:
        shown, whole = self.augmented(), len(self.padded) // BATCH * BATCH
        order = torch.randperm(len(self.padded), device=self._device)[:whole]
        for chosen in order.view(-1, BATCH):
            self._train(shown[chosen].permute(0, 3, 1, 2), self._labels[chosen])

    def augmented(self) -> Tensor:
        """A random crop of every image, perhaps flipped: [sample, 32, 32, 3]."""
        count, along = len(self.padded), torch.arange(32, device=self._device)
        top, left = (along + torch.randint(9, (count, 1), device=self._device) for _ in range(2))
        numbers = torch.arange(count, device=self._device)[:, None, None]
        crops = self.padded[numbers, top[:, :, None], left[:, None, :]]
        flipped = torch.rand(count, 1, 1, 1, device=self._device) < 0.5
        return torch.where(flipped, crops.flip(2), crops)

    def _train(self, images: Tensor, labels: Tensor) -> None:
        taught = None
        if self._teacher is not None:
            with torch.no_grad():
                taught = self._teacher(images).float().clone()  # the student's graph may use the same memory
        loss = loss_of(self._forward(images).float(), taught, labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
