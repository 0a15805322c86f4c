"""The workplace of a run: its device, its images, networks that begin with weights of a file, guides with caches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from kd.core import hardware
from kd.core.spec import Frozen, PathText
from kd.core.stage import Source, Stage
from kd.datasets import load_data
from kd.store import Store
from kd.training.ranks import own_device, world

if TYPE_CHECKING:
    from kd.datasets.data import Images
    from kd.models.normalization import Normalized
    from kd.training.guide import Guide, LiveGuide
    from kd.training.probe import Probe, ProbedGuide


def _device(name: object) -> str:
    """A device as torch names it; `0` is cuda:0."""
    text = f"cuda:{name}" if re.fullmatch(r"[0-9]+", str(name)) else str(name).lower()
    if isinstance(name, (str, int)) and re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text):
        return text
    raise ValueError("should be auto, cpu, mps, cuda, or the number of a GPU; several GPUs: docs/cluster.md")


class RuntimeSpec(Frozen):
    """Where and how fast a stage is trained. This is not part of the experiment, so it is in no key."""

    device: Annotated[str, BeforeValidator(_device), Field(examples=["auto", "cpu", "cuda", "cuda:1"])] = "auto"
    threads: int | None = Field(None, ge=1, le=1024)  # null: all processors that this process may use
    workers: int | None = Field(None, ge=1, le=1024)  # decode photographs: threads (array) or processes (stream)
    store: PathText | None = None  # null: store/ in the repository
    data: PathText | None = None  # null: data/ in the repository
    checkpoint_every: int = Field(10, ge=1)  # epochs between two checkpoints of an unfinished stage
    compile: bool | Literal["auto"] = "auto"  # compile the training step; auto: if it saves time over the stage
    bank: bool = True  # cache the guides' logits on disk, for later epochs and runs
    bank_budget: float = Field(50, gt=0)  # GB of all caches together
    tables: bool = False  # a job of a sweep prints its table, and not one line
    live: bool = True  # in a terminal, a sweep shows a live table of its jobs
    retrain: bool = False
    trial: int | None = Field(None, ge=0)  # the number of this job's trial; set by the search
    processes: int | None = Field(None, ge=1, le=1024)  # that train students side by side; null: as many as is faster

    def threads_of(self, processors: int) -> int | None:
        """The threads of each process on these processors: as set, or an equal part; null where one has all."""
        if self.threads is not None or (self.processes or 1) == 1:
            return self.threads
        return max(1, processors // (self.processes or 1))

    def processes_for(self, students: int, processors: int, device: str, room: int | None) -> int:
        """How many processes train this many students; `room` is how many fit into the memory, None if it is unknown.

        One where `threads` is not set: with fewer threads, the last bits of results would change.
        """
        if self.processes is not None:
            return max(1, min(self.processes, students))
        if self.threads is None or device != "cpu":
            return 1
        return max(1, min(processors // self.threads, students, students if room is None else room))


@dataclass
class Workplace:
    """What the stages of a run share: store, data and device."""

    store: Store
    data_root: Path
    runtime: RuntimeSpec
    initial: Mapping[str, Path] = field(default_factory=dict, kw_only=True)  # files of initial weights, by sha256
    _loaded: Images | None = field(default=None, init=False)

    @cached_property
    def device(self) -> str:
        """The device, made deterministic. Raises KnownError if it does not exist."""
        device = own_device(hardware.resolve_device(self.runtime.device))
        hardware.make_deterministic(self.threads, device)
        hardware.announce(device, self.threads)
        return device

    @property
    def threads(self) -> int:
        """Threads that torch uses; by default this rank's share of the processors."""
        return self.runtime.threads or max(1, hardware.cpu_count() // world().local_size)

    def data(self, source: Source) -> Images:
        """The images of a source. They are loaded once, because the stages of a run share them."""
        if self._loaded is None or self._loaded.spec != source.dataset:
            self._loaded = load_data(source.dataset, self.data_root, self.device, self.runtime.workers)
        return self._loaded

    def beginning(self, stage: Stage) -> tuple[Images, Normalized | Probe | None]:
        """What a stage trains on, and the network that it trains; None for one that its seed initialises.

        For a probe these are features, and the classifier.
        """
        data = self.data(stage)
        if stage.init is None:
            return data, None
        from kd.training.probe import Features, Probe

        network = self.begun(stage)
        if stage.freeze is None:
            return data, network
        return Features.of(data, self._backbone(stage, network, data)), Probe(network, stage.model)

    def begun(self, stage: Stage) -> Normalized:
        """The network of a stage with its initial weights. Raises KnownError if the file does not fit."""
        from kd.training.step import make_network

        return make_network(stage, self.device, self.initial.get(str(stage.init)))

    def guides(self, stage: Stage) -> list[Guide | LiveGuide | ProbedGuide]:
        """The guides of a stage, with what is cached of them; empty for a stage without a guide."""
        return [self._guide(stage, guide) for guide in stage.guides]

    def _guide(self, stage: Stage, source: Source) -> Guide | LiveGuide | ProbedGuide:
        from kd.training.bank import open_bank
        from kd.training.guide import Guide, LiveGuide
        from kd.training.probe import ProbedGuide

        seeing, needs = (self.data(stage), stage.train.precision, self.device), stage.loss.needs
        network = self.store.network(source.key)
        if stage.loss.live:
            return LiveGuide(network, *seeing, needs)
        if isinstance(source, Stage) and source.freeze:
            read = source if self.store.retried(source.key) is None else source.in_fp32()  # as it was trained
            return ProbedGuide(self._backbone(read, network, seeing[0]), *seeing[1:])
        guide = Guide(network, *seeing, needs=needs)
        if self.runtime.bank:
            place = self.store.banks, source.key, self.store.fingerprint(source.key)
            if "logits" in needs:
                guide.cache("logits", open_bank(*place, *seeing, budget=self._budget))
            if "pooled" in needs:
                features = guide.learner.outputs.pooled.shape[1]
                guide.cache("pooled", open_bank(*place, *seeing, features=features, budget=self._budget))
        return guide

    def _backbone(self, probe: Stage, network: Normalized, data: Images) -> Guide:
        """The frozen backbone of a probe. Its features serve the probe itself and all its students."""
        from kd.training.bank import open_bank
        from kd.training.guide import Guide

        seeing = data, probe.train.precision, self.device
        guide = Guide(network, *seeing, needs=frozenset({"pooled"}))
        if self.runtime.bank:
            features = guide.learner.outputs.pooled.shape[1]
            place = self.store.banks, probe.backbone, str(probe.init)
            guide.cache("pooled", open_bank(*place, *seeing, features=features, budget=self._budget))
        return guide

    @property
    def _budget(self) -> float:
        return self.runtime.bank_budget * 1e9

    def elsewhere(self) -> Workplace:
        """The same with absolute paths, for another rank: its working directory may differ."""
        initial = {sha256: path.absolute() for sha256, path in self.initial.items()}
        return Workplace(Store(self.store.root.absolute()), self.data_root.absolute(), self.runtime, initial=initial)
