"""A run: every stage of its chain loaded or trained in order, and the result written down."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from kd import files, hardware
from kd.compilation import resolve_compile
from kd.given import load_network
from kd.losses import Loss
from kd.partial import Partial
from kd.progress import StageProgress
from kd.ranks import ALONE, Team
from kd.revision import commit
from kd.signals import Deferred
from kd.spec import Frozen, KnownError, NonFiniteError
from kd.stage import Given, Normalization, Objective, OnNaN, Role, Select, Source, Stage
from kd.statistics import spread
from kd.store import Metrics, StageResult, Trained
from kd.tracking import Tracker
from kd.workplace import Workplace

_NEAR_CHANCE = 2  # times chance
RETRIED = "in fp32 after"  # of a stage's record: what its own precision came to


class Outcome(Frozen):
    """What became of one stage in a run; accuracies in percent. Of somebody's weights, training is not known."""

    role: Role
    model: str
    key: str
    seed: int | None
    loss: Loss | None
    params: int
    val_acc: float | None
    test_acc: float
    epochs: int
    seconds: float  # that its training took, whenever that was
    select: Select | None  # how its epoch was chosen
    normalize: Normalization | None = None  # of somebody's weights: how they see images
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

    @property
    def columns(self) -> dict[str, Any]:
        """What a table of runs shows beside the accuracies of the stages; `test_acc` is the student's."""
        common = self.model_dump(include={"objective", "mode", "method", "dataset"})
        return {**common, "test_acc": self.chain[-1].test_acc}

    @property
    def students(self) -> dict[str, float]:
        """The test accuracy of each student, by key."""
        return {self.chain[-1].key: self.chain[-1].test_acc}

    def value(self, objective: Objective) -> float | None:
        """What a search is told: the mean accuracy of the students, on validation or, as the papers had it, on test."""
        return self.objective if objective == "val_acc" else self.chain[-1].test_acc


class ReplicatedResult(RunResult):
    """result.json of a run of several students; mean, std and ci95 are of their test accuracies."""

    replicates: tuple[Replicate, ...]
    mean: float
    std: float
    n: int
    ci95: tuple[float, float]  # what varies is the student's seed; the chain above it is one

    @property
    def columns(self) -> dict[str, Any]:
        """Each student's test accuracy has a column too; `test_acc` is their mean."""
        each = {f"test_acc/s{replicate.seed}": replicate.test_acc for replicate in self.replicates}
        low, high = self.ci95
        spread = {"std": self.std, "n": self.n, "ci95_low": low, "ci95_high": high}
        named = {f"test_acc/{name}": value for name, value in spread.items()}
        return {**super().columns, "test_acc": self.mean, **each, **named}

    @property
    def students(self) -> dict[str, float]:
        """Those of all replicates."""
        return {replicate.key: replicate.test_acc for replicate in self.replicates}

    def value(self, objective: Objective) -> float | None:
        """As of one student, the mean of all."""
        return self.objective if objective == "val_acc" else self.mean


class Pruned(Exception):  # noqa: N818, it is no error
    """A search ended the training of a student early; `value` is its validation accuracy in percent."""

    def __init__(self, epoch: int, epochs: int, value: float) -> None:
        super().__init__(f"pruned after epoch {epoch} of {epochs}, at {value:.2f} % on validation")
        self.epoch, self.value = epoch, value


@dataclass
class Pipeline(Workplace):
    """The stages of a run, and what they share."""

    tracker: Tracker
    checkpoint: Path | None = None  # the file of a Given
    on_nan: OnNaN = "stop"
    min_acc: float | None = None  # of a teacher, in percent of the test set; below it nothing is trained on it
    team: Team = ALONE  # the processes that train each stage together
    prune: Callable[[Metrics], None] | None = None  # hears of each epoch of a student; raises Pruned
    _done: set[str] = field(default_factory=set)

    def run_chain(self, last: Stage) -> list[Outcome]:
        """Load or train each stage, oldest first. Raises KnownError for a teacher below `min_acc`."""
        if any(not self._reusable(source) for source in last.chain):
            self._check_networks(last)
        return [self._accept(self._load_or_make(source)) for source in last.chain]

    def _load_or_make(self, source: Source) -> Outcome:
        reused = self._reusable(source)
        if not reused:
            with self.store.lock(source.key):
                reused = self._reusable(source)  # by now another process may have finished it
                if not reused:
                    if isinstance(source, Given):
                        self._take(source)
                    else:
                        self._train(source)
        result = self.store.result(source.key)
        retried = self.store.record(source.key)["made_with"].get(RETRIED)
        if retried and self.on_nan == "stop":
            raise KnownError(
                f"stage {source.key} was trained in fp32 after {retried}; train.on_nan=retry_fp32 takes it"
            )
        self.tracker.finished(source, {"val_acc": result.val_acc, "test_acc": result.test_acc})
        stage = source if isinstance(source, Stage) else None
        return Outcome(
            role=source.role,
            model=source.model,
            key=source.key,
            seed=stage.seed if stage else None,
            loss=stage.loss if stage else None,
            select=stage.train.select if stage else None,
            normalize=None if stage else source.normalize,
            reused=reused,
            **result.model_dump(exclude={"selected_epoch"}),
        )

    def _accept(self, outcome: Outcome) -> Outcome:
        if outcome.role == "teacher" and self.min_acc is not None and outcome.test_acc < self.min_acc:
            raise KnownError(
                f"teacher {outcome.model} ({outcome.key}) has {outcome.test_acc:.2f} % on the test set, less than "
                f"teacher.min_acc={self.min_acc:g}: nothing is trained on it"
                + (f"; it sees images by {outcome.normalize}" if outcome.normalize else "")
            )
        return outcome

    def _reusable(self, source: Source) -> bool:
        return (not self.runtime.retrain or source.key in self._done) and self.store.whole(source.key)

    def _take(self, given: Given) -> None:
        """Somebody's weights into the store, where a stage's would be, with their accuracy on the test set."""
        from kd.evaluation import evaluate
        from kd.models.normalized import Normalized

        assert self.checkpoint is not None  # a Given is planned from it
        began = time.perf_counter()
        network = load_network(self.checkpoint, given)
        seeing = Normalized(network, given.normalize.mean, given.normalize.std).to(self.device)
        data = self.data(given)
        result = StageResult(
            params=sum(p.numel() for p in network.parameters()),
            val_acc=None,  # nobody knows whether it was trained on these images
            test_acc=evaluate(seeing, data.test_images, data.test_labels, "fp32"),
            epochs=0,
            selected_epoch=0,
            seconds=round(time.perf_counter() - began, 3),
        )
        self._keep(given, Trained(network.state_dict(), [], result), {"file": self.checkpoint.name})
        print(f"{given.role} {given.model}: {self.checkpoint.name} has {result.test_acc:.2f} % on the test set")
        if result.test_acc < _NEAR_CHANCE * 100 / given.dataset.num_classes:
            print(f"  that is near chance: is it the right file, and does it see images by {given.normalize}?")

    def _train(self, stage: Stage) -> None:
        """Train the stage and keep it, in fp32 where its own precision came to no finite end and `on_nan` says so."""
        folder = self.store.partial(stage.key)
        # Ranks are ended by torchrun, all at once: together they cannot stop at one step.
        with Deferred(active=self.team.size == 1) as signals:
            try:
                trained, origin = self._attempt(stage, stage, folder, signals)
            except NonFiniteError as error:
                if self.on_nan == "stop" or stage.train.precision in ("fp32", "fp64"):
                    raise
                print(f"{error}; train.on_nan=retry_fp32: once more in fp32", flush=True)
                trained, origin = self._attempt(stage, stage.in_fp32(), folder / "fp32", signals)
                origin[RETRIED] = str(error)
            self._keep(stage, trained, origin)
            shutil.rmtree(folder, ignore_errors=True)  # if the process dies before, kd.store gc does

    def _attempt(self, planned: Stage, stage: Stage, folder: Path, signals: Deferred) -> tuple[Trained, dict[str, Any]]:
        """Train what was planned as `stage`, which is the same but for its precision."""
        from kd.train import train_stage

        data, guide = self.data(stage), self.guide(stage)
        compiled = resolve_compile(self.runtime.compile, stage, len(data.train), self.device)
        runtime = {**self._runtime(), "compiled": compiled}
        partial = Partial(folder, stage, runtime, self.runtime.checkpoint_every, signals)
        errand = stage, self.elsewhere()
        with StageProgress(planned, len(data.train), self._log) as watch, self.team.together(errand):
            trained = train_stage(stage, data, guide, self.device, watch, partial, compiled, self.team)
        return trained, {"compiled": compiled}

    def _log(self, stage: Stage, metrics: Metrics) -> None:
        self.tracker.log(stage, metrics)
        if self.prune is not None and stage.role == "student":
            self.prune(metrics)

    def _keep(self, source: Source, trained: Trained, origin: dict[str, Any]) -> None:
        code = {"python": platform.python_version(), "commit": commit()}
        made_with = {**self._runtime(), **code, "machine": hardware.describe(), **origin}
        self.store.save(source, trained, made_with)
        self._done.add(source.key)

    def _check_networks(self, last: Stage) -> None:
        """Build every network without memory: one that cannot take the images says so now, not after hours."""
        import torch

        from kd.models import build

        sizes = {}
        with torch.device("meta"):
            for stage in last.chain:
                data = stage.dataset
                network = build(stage.model, num_classes=data.num_classes, image_size=data.image_size)
                sizes[stage.key] = sum(parameter.numel() for parameter in network.parameters())
        for guide, stage in pairwise(last.chain):
            if stage.role == "assistant" and sizes[stage.key] > sizes[guide.key]:
                told = f"{stage.model} ({sizes[stage.key]:,} parameters)", f"{guide.model} ({sizes[guide.key]:,})"
                print(f"{stage.role} {told[0]} is larger than {guide.role} {told[1]}, which guides it", flush=True)

    def _runtime(self) -> dict[str, Any]:
        """What is no part of the key and still moves the last bits of a result."""
        kind = self.device.partition(":")[0]  # whichever of the GPUs
        processor = hardware.processor(self.device)
        return {"torch": version("torch"), "device": kind, "processor": processor, "threads": self.threads}


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
    files.write(folder / "result.json", result.model_dump_json(indent=2, by_alias=True))
