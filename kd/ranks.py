"""Processes that train a stage together, as torchrun starts them: rank 0 decides, the others follow."""

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
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from kd.spec import KnownError

if TYPE_CHECKING:
    from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

# How long the others wait for what rank 0 does alone, which may be to wait for another process's stage. It is not
# what a dead rank takes to be noticed: its connections close at once, and torchrun ends the others.
_PATIENCE = timedelta(days=30)

LOST = "a rank has died, or torchrun was ended: the same command goes on after finished stages and the last checkpoint"


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is; `local` ones are those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world() -> World:
    """What torchrun says of this process; one process alone without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def share(batch: slice, rank: int, size: int) -> slice:
    """The part of a batch that a rank trains on; parts differ by one sample at most."""
    samples = batch.stop - batch.start
    return slice(batch.start + samples * rank // size, batch.start + samples * (rank + 1) // size)


def batches(samples: int, size: int, ranks: int = 1) -> list[slice]:
    """Consecutive batches of an epoch; the last may be smaller, and is left out below two samples a rank.

    BatchNorm cannot normalise one value, which is what one sample on 1×1 maps is.
    """
    slices = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
    return slices[:-1] if len(slices) > 1 and length(slices[-1]) < min(2 * ranks, size) else slices


def length(batch: slice) -> int:
    """Its number of samples."""
    return int(batch.stop - batch.start)


class Team:
    """One process alone: what several agree upon, it has."""

    rank, size = 0, 1

    def first(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What rank 0 gets from the work, which it alone does, or the KnownError that it raises, on every rank."""
        return work(*args, **kwargs)

    def parallel(self, network: nn.Module, device: str) -> nn.Module:
        """The network, which shares its weights, with gradients that are means over the ranks."""
        return network

    def weigh(self, loss: Tensor, part: float) -> Tensor:
        """The loss of a rank that has this part of the batch, so that the mean over ranks is the batch's."""
        return loss

    def mean(self, values: dict[str, Tensor], part: float) -> dict[str, Tensor]:
        """The whole batch's means, from those of a rank that has this part of it."""
        return values

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        return value

    @contextmanager
    def together(self, errand: Any) -> Iterator[None]:
        """Rank 0's block around a training: the others do the same errand meanwhile."""
        yield

    def errands(self) -> Iterator[Any]:
        """What rank 0 wants to be done, for the others."""
        yield from ()

    def dismiss(self) -> None:
        """Rank 0 lets the other ranks end; all leave."""


ALONE = Team()


class Ranks(Team):
    """Several processes: small things travel by gloo, gradients by nccl where there are GPUs."""

    def __init__(self, where: World) -> None:
        import torch.distributed as dist

        self.rank, self.size = where.rank, where.size
        self._busy = False
        self._nccl: Any = None
        self._group: Any = None  # what gradients travel by; None is gloo
        dist.init_process_group("gloo", timeout=_PATIENCE)
        if self.rank == 0:
            signal.signal(signal.SIGTERM, _end)  # torchrun's way to say that a rank has ended

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

    def parallel(self, network: nn.Module, device: str) -> nn.Module:
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        if device != "cpu" and self._nccl is None:
            self._nccl = dist.new_group(backend="nccl")
        self._group = None if device == "cpu" else self._nccl
        # BatchNorm normalises each rank's share by itself; its running statistics are rank 0's.
        return DistributedDataParallel(network, process_group=self._group)

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
            raise KnownError("the other ranks are still at a stage that has failed on this one: start the run again")
        self._broadcast(errand)
        self._busy = True
        try:
            yield
        except KnownError:  # all ranks have it: either first() said so, or all saw the same loss
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
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # an orderly end would wait for what the others have not finished
        if self.rank == 0:
            with suppress(RuntimeError):  # whoever is gone needs no word
                self._broadcast(None)
        gc.collect()  # what a failed stage left in cycles ends before the group: after it the process would abort
        dist.destroy_process_group()

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@cache
def team() -> Team:
    """The processes of this run, brought together when first asked for."""
    where = world()
    return ALONE if where.size == 1 else Ranks(where)


def own_device(device: str) -> str:
    """The device of this rank. Raises KnownError where each cannot have a GPU of its own."""
    here = world()
    if here.size == 1 or device == "cpu":
        return device
    import torch

    gpus = torch.cuda.device_count()
    if device != "cuda" or gpus < here.local_size:
        raise KnownError(
            f"runtime.device: each of {here.local_size} ranks takes a GPU of its own, by its number, and torch sees "
            f"{gpus} here; should be auto, cuda or cpu (got {device!r})"
        )
    torch.cuda.set_device(here.local_rank)
    return f"cuda:{here.local_rank}"


def is_lost(error: RuntimeError) -> bool:
    """Whether the error says that another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _end(*signalled: Any) -> NoReturn:
    """End rank 0, with its one line."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
    print(LOST, file=sys.stderr, flush=True)
    raise SystemExit(1)
