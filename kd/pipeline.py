"""A run: every stage of its chain loaded or trained in order, and the result written down."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd import hardware
from kd.datasets import load
from kd.losses import Loss
from kd.partial import Partial
from kd.progress import StageProgress
from kd.spec import Frozen
from kd.stage import DatasetSpec, Role, RuntimeSpec, Select, Stage
from kd.statistics import spread
from kd.store import Store
from kd.tracking import Tracker

if TYPE_CHECKING:
    from kd.datasets.data import Data


class Outcome(Frozen):
    """What became of one stage in a run; accuracies in percent."""

    role: Role
    model: str
    key: str
    seed: int
    loss: Loss
    params: int
    val_acc: float | None
    test_acc: float
    epochs: int
    seconds: float  # that its training took, whenever that was
    select: Select  # how its epoch was chosen
    reused: bool


class Replicate(Frozen):
    """One of several students that differ in their seed alone; accuracies in percent."""

    seed: int
    key: str
    val_acc: float | None
    test_acc: float


class RunResult(Frozen):
    """result.json of a run, which scripts read."""

    chain: tuple[Outcome, ...]  # oldest first; the student is that of the first seed
    objective: float | None  # mean validation accuracy of the students; null without a validation split
    mode: str
    method: str
    dataset: str  # its name in tables


class ReplicatedResult(RunResult):
    """result.json of a run of several students; mean, std and ci95 are of their test accuracies."""

    replicates: tuple[Replicate, ...]
    mean: float
    std: float
    n: int
    ci95: tuple[float, float]  # what varies is the student's seed; the chain above it is one


@dataclass
class Pipeline:
    """What the stages of a run share."""

    store: Store
    data_root: Path
    dataset: DatasetSpec
    runtime: RuntimeSpec
    tracker: Tracker
    _trained: set[str] = field(default_factory=set)

    def run_chain(self, last: Stage) -> list[Outcome]:
        """Load or train each stage, oldest first."""
        if any(not self._reusable(stage) for stage in last.chain):
            self._check_networks(last)
        return [self._load_or_train(stage) for stage in last.chain]

    def _load_or_train(self, stage: Stage) -> Outcome:
        reused = self._reusable(stage)
        if not reused:
            with self.store.lock(stage.key):
                reused = self._reusable(stage)  # by now another process may have finished it
                if not reused:
                    self._train(stage)
        result = self.store.result(stage.key)
        self.tracker.finished(stage, {"val_acc": result.val_acc, "test_acc": result.test_acc})
        return Outcome(
            role=stage.role,
            model=stage.model,
            key=stage.key,
            seed=stage.seed,
            loss=stage.loss,
            select=stage.train.select,
            reused=reused,
            **result.model_dump(exclude={"selected_epoch"}),
        )

    def _reusable(self, stage: Stage) -> bool:
        return self.store.has(stage.key) and (not self.runtime.retrain or stage.key in self._trained)

    def _train(self, stage: Stage) -> None:
        from kd.guide import Guide
        from kd.train import train_stage

        guide = None
        if stage.guide is not None:
            guide = Guide(self.store.network(stage.guide.key), self._data, stage.train.precision, self._device)
        runtime = self._runtime()
        partial = Partial(self.store.partial(stage.key), stage, runtime, self.runtime.checkpoint_every)
        if self.runtime.retrain:
            partial.remove()
        with StageProgress(stage, len(self._data.train), self.tracker.log) as watch:
            trained = train_stage(stage, self._data, guide, self._device, watch, partial)
        made_with = {**runtime, "python": platform.python_version(), "machine": hardware.describe()}
        self.store.save(stage, trained, made_with)
        partial.remove()
        self._trained.add(stage.key)

    @cached_property
    def _device(self) -> str:
        hardware.prepare(self.runtime.threads)
        return hardware.resolve_device(self.runtime.device)

    @cached_property
    def _data(self) -> Data:
        return load(self.dataset, self.data_root, self._device)

    def _check_networks(self, last: Stage) -> None:
        """Build every network without memory: one that cannot take the images says so now, not after hours."""
        import torch

        from kd.models import build

        with torch.device("meta"):
            for stage in last.chain:
                build(stage.model, num_classes=self.dataset.num_classes, image_size=self.dataset.image_size)

    def _runtime(self) -> dict[str, Any]:
        """What is no part of the key and still moves the last bits of a result."""
        threads = self.runtime.threads or hardware.cpu_count()
        return {"torch": version("torch"), "device": self._device, "threads": threads}


def run(pipeline: Pipeline, students: Sequence[Stage], labels: dict[str, str]) -> RunResult:
    """Train or load every student and the chain below it. `labels` are mode, method and dataset as tables name them."""
    chains = [pipeline.run_chain(student) for student in students]
    outcomes = [chain[-1] for chain in chains]
    validated = [outcome.val_acc for outcome in outcomes if outcome.val_acc is not None]
    common = {
        "chain": chains[0],
        "objective": round(sum(validated) / len(validated), 4) if validated else None,
        **labels,
    }
    if len(students) == 1:
        return RunResult.model_validate(common)
    replicates = [
        Replicate(seed=student.seed, key=outcome.key, val_acc=outcome.val_acc, test_acc=outcome.test_acc)
        for student, outcome in zip(students, outcomes, strict=True)
    ]
    statistics = spread([outcome.test_acc for outcome in outcomes]).model_dump()
    return ReplicatedResult.model_validate({**common, "replicates": replicates, **statistics})


def write_result(result: RunResult, folder: Path) -> None:
    """result.json, there whole or not at all."""
    partial = folder / f".result.{os.getpid()}"
    partial.write_text(result.model_dump_json(indent=2, by_alias=True))
    partial.replace(folder / "result.json")
