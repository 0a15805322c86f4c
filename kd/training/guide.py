"""The guide: a frozen network with one fixed forward pass, whose outputs the bank caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.core.hardware import autocast
from kd.core.stage import Learner, Need, Outputs
from kd.datasets.data import Images, Part
from kd.models.folding import fold
from kd.models.normalization import Normalized
from kd.models.taps import Tapped, head
from kd.training.bank import SAID, Bank, chunk_of, rounded_type

_BLOCK = 16  # chunks computed between two writes to the bank: a killed process loses at most these
LOGITS: frozenset[Need] = frozenset({"logits"})
PLAIN: frozenset[Need] = frozenset({"logits", "pooled"})  # what can be cached


class Guide:
    """A finished network as a guide: in eval mode, without gradients, with BatchNorm folded into its convolutions.

    It says logits, pooled features or both, whatever the loss `needs`. The maximum of each row is subtracted from
    logits, which changes no softmax. All values are rounded to float16 (float32 or float64 if the student computes in
    fp32 or fp64). So cached and computed values are the same.
    """

    def __init__(
        self,
        network: Normalized,
        data: Images,
        precision: str,
        device: str,
        bank: Bank | None = None,
        *,
        needs: frozenset[Need] = LOGITS,
    ) -> None:
        self.network, self._data = network.eval(), data
        self._precision, self._device = precision, device
        self._names: list[str] = [name for name in SAID if name in needs]
        self._banks: dict[str, Bank | None] = {"logits": bank, "pooled": None}
        self._epoch: dict[str, Tensor] = {}
        self._chunk = chunk_of(data.spec.image_size)

    def cache(self, name: str, bank: Bank | None) -> None:
        """Use a bank for `logits` or `pooled`."""
        self._banks[name] = bank

    def begin(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> None:
        """Look at the views of an epoch's samples [sample]. `advance` gets each finished chunk's size."""
        self._epoch = self.recall(samples, views, advance)

    def outputs(self, where: slice, images: Tensor) -> Outputs:
        """What the guide says about a part of the epoch's samples. These are their images, which it has seen."""
        return Outputs({name: values[where] for name, values in self._epoch.items()})

    def logits(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> Tensor:
        """The logits [sample, class] of views of samples, on the device."""
        return self.recall(samples, views, advance)["logits"]

    def recall(
        self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """What the guide says about views of samples, by name [sample, class or feature], on the device."""
        banks = {name: self._banks[name] for name in self._names}
        if not any(banks.values()):
            return {name: each.to(self._device) for name, each in self._compute(samples, views, advance).items()}
        found = {name: torch.empty(len(samples), self._width(name), dtype=self._type) for name in banks}
        missing = self._read(found, np.arange(len(samples)), samples, views)
        advance(len(samples) - len(missing))
        for block in _in_own_order(missing, _BLOCK * self._chunk):
            left = self._read(found, block, samples, views)  # without what other processes have filled meanwhile
            advance(len(block) - len(left))
            if not len(left):
                continue
            for name, fresh in self._compute(samples[left], views[left], advance).items():
                found[name][torch.from_numpy(left)] = fresh.cpu()
                self._remember(name, samples[left], views[left], fresh.cpu())
        return {name: values.to(self._device) for name, values in found.items()}

    def _read(
        self,
        found: dict[str, Tensor],
        rows: NDArray[np.int64],
        samples: NDArray[np.int64],
        views: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Read those of the rows [row] that the banks have into `found`. Returns the others."""
        filled = np.full(len(rows), True)
        for name in self._names:
            with self._caching(name) as bank:
                filled &= bank.filled(samples[rows], views[rows]) if bank is not None else False
        there = rows[filled]
        for name in self._names:
            with self._caching(name) as bank:
                if bank is not None and len(there):
                    found[name][torch.from_numpy(there)] = torch.from_numpy(bank.read(samples[there], views[there]))
        if not all(self._banks[name] for name in self._names):
            return rows
        others: NDArray[np.int64] = rows[~filled]
        return others

    @property
    def _type(self) -> torch.dtype:
        return rounded_type(self._precision)

    def _width(self, name: str) -> int:
        if name == "logits":
            return self._data.spec.num_classes
        return self.learner.outputs.pooled.shape[1]

    @cached_property
    def learner(self) -> Learner:
        """The network, and what it says about one image."""
        return learner(self.network, PLAIN, self._data.spec.image_size)

    def _remember(self, name: str, samples: NDArray[np.int64], views: NDArray[np.int64], values: Tensor) -> None:
        with self._caching(name) as bank:
            if bank is not None:
                bank.write(samples, views, values.numpy())

    @contextmanager
    def _caching(self, name: str) -> Iterator[Bank | None]:
        """The bank, which is left if its files fail: a full disk, or somebody has deleted it."""
        try:
            yield self._banks[name]
        except OSError as error:
            print(f"the guide's {SAID[name]} are not cached from here on: {error}", flush=True)
            self._banks[name] = None

    def _compute(
        self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        device, home, count = self._device, self._data.home, len(samples)
        chunk = self._chunk
        padding = -count % chunk
        index, view = (torch.from_numpy(np.pad(a, (0, padding), mode="edge")).to(home) for a in (samples, views))
        network, tapped = self._folded, self._tapped
        # Allocated outside inference_mode: autograd cannot save an inference tensor for the backward pass.
        found = {name: torch.empty(count, self._width(name), dtype=self._type, device=device) for name in self._names}
        with torch.inference_mode(), autocast(self._precision, device):
            starts = range(0, count, chunk)
            chunks = self._data.shown(index, view, [slice(start, start + chunk) for start in starts])
            for start, images in zip(starts, chunks, strict=True):
                end = min(start + chunk, count)
                logits = network(images)
                said = {"logits": logits} if tapped is None else {"logits": logits, "pooled": tapped.take()[1]}
                for name, rows in found.items():
                    rows[start:end].copy_(_rounded(name, said[name], self._type)[: end - start])
                advance(end - start)
        return found

    def of_plain(self, part: Part) -> dict[str, Tensor]:
        """What the guide says about the images of a part without augmentation, by name [sample, …], on the device."""
        network, tapped, found = self._folded, self._tapped, list[dict[str, Tensor]]()
        with torch.inference_mode(), autocast(self._precision, self._device):
            for images in self._data.batches(part):
                logits = network(images)
                said = {"logits": logits} if tapped is None else {"logits": logits, "pooled": tapped.take()[1]}
                found.append({name: _rounded(name, said[name], self._type) for name in self._names})
        return {name: torch.cat([each[name] for each in found]).to(self._type) for name in self._names}

    @cached_property
    def _folded(self) -> Normalized:
        """The network that is run. It is made when a row is missing."""
        exact = self._precision == "fp64"
        module = deepcopy(self.network.network).double() if exact else self.network.network
        own = self.network
        example = _example(own, self._data.spec.image_size)
        folded = Normalized(fold(module, example), *own.statistics, size=own.size, interpolation=own.interpolation)
        dtype = torch.float64 if exact else torch.float32
        folded = folded.to(memory_format=torch.channels_last).to(self._device, dtype).eval()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._precision)
        for part in folded.modules():
            if low is not None and isinstance(part, (nn.Conv2d, nn.Linear)):
                part.to(low)  # autocast does this for every chunk
        return folded

    @cached_property
    def _tapped(self) -> Tapped | None:
        """The tap of the folded network's pooled features, if they are asked for."""
        if "pooled" not in self._names:
            return None
        return Tapped(self._folded.network, stages=False, pre=False, pooled=True, of=self.network.network)


class LiveGuide:
    """A finished network as a guide that runs at every step: its maps are too large to be cached.

    It is in eval mode, without gradients, and as it was trained: nothing is folded or rounded.
    """

    def __init__(self, network: Normalized, data: Images, precision: str, device: str, needs: frozenset[Need]) -> None:
        dtype = torch.float64 if precision == "fp64" else torch.float32
        network = network.to(memory_format=torch.channels_last).to(device, dtype).eval().requires_grad_(False)
        self.network, self._precision, self._device = network, precision, device
        self.learner = learner(network, needs, data.spec.image_size)
        self._tapped = tap(network, needs)

    def begin(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> None:
        """Nothing is computed before the steps of an epoch."""

    def outputs(self, where: slice, images: Tensor) -> Outputs:
        """What the guide says about these images, uint8 [sample, 3, height, width]."""
        with torch.no_grad(), autocast(self._precision, self._device):
            logits = self.network(images)
        return said(logits, self._tapped)


def _in_own_order(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The rows in blocks, in an order of this process: processes that fill one bank at once share the work."""
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    Random(os.getpid()).shuffle(blocks)
    return blocks


def _rounded(name: str, values: Tensor, to: torch.dtype) -> Tensor:
    """Values within the range of a type. The maximum of each row of logits becomes 0."""
    values = values.to(torch.promote_types(to, torch.float32))
    if name == "logits":
        values = values - values.amax(1, keepdim=True)
    limit = torch.finfo(to)
    return values.clamp(limit.min, limit.max)


def _example(network: Normalized, image_size: int) -> Tensor:
    """A random image [1, channel, size, size] as the network inside gets it. No other draw of torch changes."""
    size, draws = network.size or image_size, torch.Generator().manual_seed(0)
    return torch.randn(1, network.mean.shape[1], size, size, generator=draws)


def rounded_logits(logits: Tensor, precision: str) -> Tensor:
    """Logits [sample, class] as a guide says them to a student of this precision."""
    to = rounded_type(precision)
    return _rounded("logits", logits, to).to(to)


def tap(network: Normalized, needs: frozenset[Need], *, training_only: bool = False) -> Tapped | None:
    """The hooks that a loss with these needs asks of a network; None if it reads logits only.

    Those of a network in training are `training_only`: they keep nothing while it is evaluated.
    """
    if needs <= LOGITS:
        return None
    asked = "stages" in needs, "pre" in needs, "pooled" in needs
    return Tapped(network.network, *asked, training_only=training_only)


def said(logits: Tensor, tapped: Tapped | None) -> Outputs:
    """What a network says in its last forward pass."""
    if tapped is None:
        return Outputs({"logits": logits})
    maps, pooled = tapped.take()
    return Outputs({"logits": logits, **({} if pooled is None else {"pooled": pooled}), **maps})


def probe(network: Normalized, needs: frozenset[Need], image_size: int) -> Outputs:
    """What a network says about one black image; for the shapes. Its mode and its statistics do not change."""
    training, tapped = network.training, tap(network, needs)
    image = torch.zeros(1, network.mean.shape[1], image_size, image_size, dtype=torch.uint8, device=network.mean.device)
    with torch.no_grad():
        outputs = said(network.eval()(image), tapped)
    network.train(training)
    if tapped is not None:
        tapped.close()
    return outputs


def learner(network: Normalized, needs: frozenset[Need], image_size: int) -> Learner:
    """The network as a loss with these needs is built for it."""
    last = network.network.get_submodule(head(network.network)) if "pooled" in needs else None
    return Learner(network.network, probe(network, needs, image_size), last)
