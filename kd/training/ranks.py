"""Processes (ranks) that train a stage together under torchrun: rank 0 decides, the others follow."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from kd.core.spec import KnownError, LostImageError

if TYPE_CHECKING:
    from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

# How long the other ranks wait while rank 0 works alone, e.g. while it waits for a stage of another run. A dead rank is
# noticed without this limit: its connections close at once, and torchrun ends the others.
_PATIENCE = timedelta(days=30)

LOST = "a rank has died, or torchrun was ended: start the same command again to resume from the last checkpoint"


@dataclass(frozen=True)
class World:
    """The number of processes of a run, and this one's rank; `local` means among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world() -> World:
    """This process's rank and size, as torchrun set them; a single process without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def share_of(batch: slice, rank: int, size: int) -> slice:
    """The part of a batch that a rank trains on; parts differ by one sample at most."""
    samples = batch.stop - batch.start
    return slice(batch.start + samples * rank // size, batch.start + samples * (rank + 1) // size)


def batches(samples: int, size: int, ranks: int = 1) -> list[slice]:
    """Consecutive batches of an epoch. The last may be smaller; it is left out if a rank gets fewer than two samples.

    BatchNorm cannot normalise a single value, and one sample with 1×1 maps is a single value.
    """
    slices = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
    return slices[:-1] if len(slices) > 1 and length(slices[-1]) < min(2 * ranks, size) else slices


def length(batch: slice) -> int:
    """The number of samples of a batch."""
    return int(batch.stop - batch.start)


class Team:
    """The processes that train together. This class is for one process, so it has nothing to communicate."""

    rank, size = 0, 1

    def first(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work on rank 0 only. Every rank returns its result, or raises its KnownError."""
        return work(*args, **kwargs)

    def parallel(self, module: nn.Module, device: str, buffers: bool = True) -> nn.Module:
        """The same module, with gradients averaged over the ranks; with `buffers`, those of rank 0 are sent to all."""
        return module

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, without gradients. Ranks may have different numbers of them."""
        return rows

    def weigh(self, loss: Tensor, part: float) -> Tensor:
        """Scale a rank's loss by its part of the batch, so that the mean over ranks is the loss of the batch."""
        return loss

    def mean(self, values: dict[str, Tensor], part: float) -> dict[str, Tensor]:
        """The means over the whole batch, from this rank's means over its part."""
        return values

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        return value

    @contextmanager
    def together(self, errand: Any) -> Iterator[None]:
        """On rank 0, a block around a training. The other ranks get the errand, and do it at the same time."""
        yield

    def errands(self) -> Iterator[Any]:
        """On the other ranks, the errands that rank 0 sends."""
        yield from ()

    def dismiss(self) -> None:
        """End the team: rank 0 sends no more errands, and all ranks leave the process group."""


ALONE = Team()


class Ranks(Team):
    """Several processes. Small objects are sent by gloo; gradients by nccl on GPUs, by gloo on CPUs."""

    def __init__(self, where: World) -> None:
        import torch.distributed as dist

        self.rank, self.size = where.rank, where.size
        self._busy = False
        self._nccl: Any = None
        self._group: Any = None  # the process group for gradients; None is gloo
        dist.init_process_group("gloo", timeout=_PATIENCE)
        if self.rank == 0:
            signal.signal(signal.SIGTERM, _end)  # torchrun sends it when a rank has ended

    def first(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self.rank:
            result, problem = self._broadcast(None)
            if problem is not None:
                raise problem
            return result  # type: ignore[no-any-return]
        try:
            result = work(*args, **kwargs)
        except (KnownError, OSError) as error:
            problem = error if isinstance(error, KnownError) else KnownError(str(error))
            self._broadcast((None, problem))
            raise problem from error
        self._broadcast((result, None))
        return result

    def parallel(self, module: nn.Module, device: str, buffers: bool = True) -> nn.Module:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        if device != "cpu" and self._nccl is None:
            self._nccl = dist.new_group(backend="nccl")
        self._group = None if device == "cpu" else self._nccl
        # BatchNorm normalises each rank's share by itself; its running statistics are rank 0's.
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        known = signature(DistributedDataParallel).parameters  # newer versions of torch have renamed the option
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {} if buffers else {option: False}
        return DistributedDataParallel(module, process_group=self._group, **options)

    def gather(self, rows: Tensor) -> Tensor:
        import torch
        import torch.distributed as dist

        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=self._group)
        most = max(int(count) for count in counts)
        padded = torch.cat([rows.detach(), rows.new_zeros(most - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def weigh(self, loss: Tensor, part: float) -> Tensor:
        return loss * (self.size * part)

    def mean(self, values: dict[str, Tensor], part: float) -> dict[str, Tensor]:
        import torch

        sums = self.total(torch.stack([value.double() * part for value in values.values()]))
        return dict(zip(values, sums.unbind(), strict=True))

    def total(self, value: Tensor) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(value, group=self._group)
        return value

    @contextmanager
    def together(self, errand: Any) -> Iterator[None]:
        if self._busy:
            raise KnownError("a stage failed on rank 0, and the other ranks still train it: start the run again")
        self._broadcast(errand)
        self._busy = True
        try:
            yield
        except LostImageError:  # the other ranks are still training
            raise
        except KnownError:  # all ranks raise it: first() sends it, or all have the same loss
            self._busy = False
            raise
        except RuntimeError as error:
            if is_lost(error):
                _end()
            raise
        self._busy = False

    def errands(self) -> Iterator[Any]:
        while (errand := self._broadcast(None)) is not None:
            yield errand

    def dismiss(self) -> None:
        import torch.distributed as dist

        if self._busy:
            leave()
        if self.rank == 0:
            with suppress(RuntimeError):  # the other ranks may have ended already
                self._broadcast(None)
        gc.collect()  # frees what a failed stage left in cycles; freed after the group, it aborts the process
        dist.destroy_process_group()

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def leave() -> NoReturn:
    """End this process while others wait for it. Their connections close, and they end, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # a normal exit waits for the other ranks


@cache
def team() -> Team:
    """The processes of this run. The first call connects them."""
    where = world()
    return ALONE if where.size == 1 else Ranks(where)


def own_device(device: str) -> str:
    """The device of this rank. Raises KnownError if there is no GPU for each rank."""
    here = world()
    if here.size == 1 or device == "cpu":
        return device
    import torch

    gpus = torch.cuda.device_count()
    if device != "cuda" or gpus < here.local_size:
        raise KnownError(
            f"runtime.device: each of {here.local_size} ranks needs its own GPU, and torch sees {gpus} here; "
            f"should be cpu, or auto or cuda with enough GPUs (got {device!r})"
        )
    torch.cuda.set_device(here.local_rank)
    return f"cuda:{here.local_rank}"


def is_lost(error: RuntimeError) -> bool:
    """Whether the error says that another rank has ended."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _end(*signalled: Any) -> NoReturn:
    """Print why, and end rank 0."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that the line is printed once
    print(LOST, file=sys.stderr, flush=True)
    raise SystemExit(1)
