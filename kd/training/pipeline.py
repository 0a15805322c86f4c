"""A run: loads or trains every stage of its chain in order, with its device, images and guides."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.core import hardware
from kd.core.files import commit
from kd.core.settings import OnNaN
from kd.core.spec import KnownError, NonFiniteError
from kd.core.stage import Given, Source, Stage
from kd.core.statistics import spread
from kd.reporting.console import StageProgress, Unwatched
from kd.reporting.results import Outcome, Replicate, ReplicatedResult, RunResult
from kd.reporting.tracking import Tracker
from kd.store import Metrics, StageResult, TrainedStage
from kd.store.foreign import load_network
from kd.training.checkpoint import Checkpoint, Deferred
from kd.training.ranks import ALONE, Team, is_lost, team
from kd.training.workplace import Workplace

if TYPE_CHECKING:
    pass

_NEAR_CHANCE = 2  # times chance
RETRIED = "in fp32 after"  # a key of stage.json: the error in the stage's own precision


def follow() -> int:
    """Train this rank's share of each stage, on every rank except rank 0. Prints only failures of this rank.

    Returns the exit code.
    """
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            _follow()
    except (KnownError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not is_lost(error):
            raise
        return 1  # rank 0 prints the message
    except KeyboardInterrupt:
        return 130
    return 0


def _follow() -> None:
    from kd.training.loop import train_stage

    for stage, place in (ranks := team()).errands():
        (data, network), guides = place.beginning(stage), place.guides(stage)
        common = {"guides": guides, "device": place.device, "watch": Unwatched(), "team": ranks}
        with suppress(KnownError):  # rank 0 has the same error, and prints it
            train_stage(stage, data=data, network=network, **common)
    ranks.dismiss()


@dataclass
class Pipeline(Workplace):
    """Loads or trains the stages of a run."""

    tracker: Tracker
    checkpoint: Path | None = None  # the file of a given teacher
    on_nan: OnNaN = "stop"
    min_acc: float | None = None  # the lowest test accuracy of a teacher, in percent; a worse one is refused
    team: Team = ALONE  # the processes that train each stage together
    prune: Callable[[Metrics], None] | None = None  # called after each epoch of a student; may raise Pruned
    _done: set[str] = field(default_factory=set)
    _told: set[str] = field(default_factory=set)  # lines that are said once

    def run_chain(self, last: Stage) -> list[Outcome]:
        """Load or train each stage, in order. Raises KnownError for a teacher below `min_acc`."""
        if any(not self._reusable(source) for source in last.chain):
            self._check_networks(last)
        return [self._accept(self._load_or_make(source)) for source in last.chain]

    def _load_or_make(self, source: Source) -> Outcome:
        reused = self._reusable(source)
        if not reused:
            with self.store.lock(source.key):
                reused = self._reusable(source)  # another process may have finished it meanwhile
                if not reused:
                    if isinstance(source, Given):
                        self._take(source)
                    else:
                        self._train(source)
        result = self.store.result(source.key)
        retried = self.store.record(source.key)["made_with"].get(RETRIED)
        if retried and self.on_nan == "stop":
            raise KnownError(
                f"stage {source.key} was trained in fp32 after {retried}; train.on_nan=retry_fp32 accepts it"
            )
        self.tracker.finished(source, {"val_acc": result.val_acc, "test_acc": result.test_acc})
        stage = source if isinstance(source, Stage) else None
        return Outcome(
            role=source.role,
            model=source.model,
            key=source.key,
            seed=stage.seed if stage else None,
            loss=stage.loss if stage else None,
            guides=tuple(guide.key for guide in stage.guides) if stage else (),
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
                + (f"; teacher.normalize is {outcome.normalize}" if outcome.normalize else "")
            )
        return outcome

    def _reusable(self, source: Source) -> bool:
        return (not self.runtime.retrain or source.key in self._done) and self.store.whole(source.key)

    def _take(self, given: Given) -> None:
        """Put a given network into the store like a stage, with its accuracy on the test set."""
        from kd.models.normalization import Normalized
        from kd.training.step import evaluate

        assert self.checkpoint is not None  # every Given comes from it
        began = time.perf_counter()
        network = load_network(self.checkpoint, given)
        seeing = Normalized.of(network, given.normalize).to(self.device)
        data = self.data(given)
        result = StageResult(
            params=sum(p.numel() for p in network.parameters()),
            val_acc=None,  # it may have been trained on these images
            test_acc=evaluate(seeing, data.batches("test"), data.test_labels, "fp32"),
            epochs=0,
            selected_epoch=0,
            seconds=round(time.perf_counter() - began, 3),
        )
        self._keep(given, TrainedStage(network.state_dict(), [], result), {"file": self.checkpoint.name})
        print(f"{given.role} {given.model}: {self.checkpoint.name} has {result.test_acc:.2f} % on the test set")
        if result.test_acc < _NEAR_CHANCE * 100 / given.dataset.num_classes:
            print(f"  that is near chance: check the file, and teacher.normalize (it is {given.normalize})")

    def _train(self, stage: Stage) -> None:
        """Train the stage and save it. If values are not finite, `on_nan` decides whether to train it again in fp32."""
        folder = self.store.partial(stage.key)
        # torchrun ends all ranks at once, so they cannot stop at the same step.
        with Deferred(active=self.team.size == 1) as signals:
            try:
                trained, origin = self._attempt(stage, stage, folder, signals)
            except NonFiniteError as error:
                if self.on_nan == "stop" or stage.train.precision in ("fp32", "fp64"):
                    raise
                print(f"{error}; train.on_nan=retry_fp32: training it again in fp32", flush=True)
                trained, origin = self._attempt(stage, stage.in_fp32(), folder / "fp32", signals)
                origin[RETRIED] = str(error)
            self._keep(stage, trained, origin)
            shutil.rmtree(folder, ignore_errors=True)  # if the process dies before, kd.store gc removes it

    def _attempt(
        self, planned: Stage, stage: Stage, folder: Path, signals: Deferred
    ) -> tuple[TrainedStage, dict[str, Any]]:
        """Train `stage`, which is the `planned` stage, perhaps in another precision."""
        from kd.training.loop import train_stage
        from kd.training.probe import Probe
        from kd.training.step import resolve_compile

        (data, network), guides = self.beginning(stage), self.guides(stage)
        compiled = resolve_compile(self.runtime.compile, stage, len(data.train), self.device)
        runtime = {**self._runtime(), "compiled": compiled}
        checkpoint = Checkpoint(folder, stage, runtime, self.runtime.checkpoint_every, signals)
        errand = stage, self.elsewhere()
        with StageProgress(planned, len(data.train), self._log) as watch, self.team.together(errand):
            trained = train_stage(
                stage,
                data=data,
                guides=guides,
                device=self.device,
                watch=watch,
                checkpoint=checkpoint,
                compiled=compiled,
                team=self.team,
                network=network,
            )
        if isinstance(network, Probe):
            trained = network.completed(trained, self.begun(stage))
        return trained, {"compiled": compiled}

    def _log(self, stage: Stage, metrics: Metrics) -> None:
        self.tracker.log(stage, metrics)
        if self.prune is not None and stage.role == "student":
            self.prune(metrics)

    def _keep(self, source: Source, trained: TrainedStage, origin: dict[str, Any]) -> None:
        code = {"python": platform.python_version(), "commit": commit()}
        made_with = {**self._runtime(), **code, "machine": hardware.describe(), **origin}
        self.store.save(source, trained, made_with)
        self._done.add(source.key)

    def _check_networks(self, last: Stage) -> None:
        """Build every network without memory, so that one that cannot take the images fails now and not after hours."""
        import torch

        from kd.models import build

        networks = {}
        with torch.device("meta"):
            for stage in last.chain:
                data = stage.dataset
                networks[stage.key] = build(stage.model, num_classes=data.num_classes, image_size=stage.input_size)
        self._check_initial(last)
        sizes = {key: sum(each.numel() for each in network.parameters()) for key, network in networks.items()}
        check_losses(last)
        for guide, stage in pairwise(last.chain):
            if stage.role == "assistant" and sizes[stage.key] > sizes[guide.key]:
                told = f"{stage.model} ({sizes[stage.key]:,} parameters)", f"{guide.model} ({sizes[guide.key]:,})"
                print(f"{stage.role} {told[0]} is larger than its guide, {guide.role} {told[1]}", flush=True)

    def _check_initial(self, last: Stage) -> None:
        """Read every file of initial weights, and say which classifier is new. Raises KnownError if one is wrong."""
        from kd.training.step import load_initial

        for stage in last.chain:
            if isinstance(stage, Stage) and stage.init is not None and not self._reusable(stage):
                _, line = load_initial(stage, self.initial.get(stage.init))
                if line is not None and line not in self._told:
                    print(f"{stage.role} {line}", flush=True)
                    self._told.add(line)

    def _runtime(self) -> dict[str, Any]:
        """What is not in the key and still changes the last bits of a result."""
        kind = self.device.partition(":")[0]  # without the number of the GPU
        processor = hardware.processor(self.device)
        return {"torch": version("torch"), "device": kind, "processor": processor, "threads": self.threads}


def check_losses(last: Stage) -> None:
    """Build the losses of a chain that read features. Raises KnownError for one that does not fit its networks."""
    for stage in last.chain:
        if isinstance(stage, Stage) and stage.loss.needs - {"guide"}:
            _check_loss(stage)


def _check_loss(stage: Stage) -> None:
    """Build the stage's loss for untrained networks. Raises KnownError if one of them does not have what it reads."""
    import torch

    from kd.core.stage import LossContext
    from kd.models import build
    from kd.models.normalization import Normalized
    from kd.training.guide import learner

    data, classes, found = stage.dataset, torch.arange(stage.dataset.num_classes), []
    with torch.random.fork_rng(devices=[]):
        try:
            for source in (stage, *stage.guides):
                network = build(source.model, num_classes=data.num_classes, image_size=source.input_size)
                found.append(learner(Normalized.of(network, source.normalize), stage.loss.needs, data.image_size))
            for guide in found[1:]:
                stage.loss.build(LossContext(found[0], guide, classes, classes))
        except KnownError as error:
            loss = stage.loss.option or stage.loss.name
            raise KnownError(f"{stage.role} {stage.model}: loss={loss}: {error}") from error


def run_students(pipeline: Pipeline, students: Sequence[Stage], labels: dict[str, str]) -> RunResult:
    """Load or train every student and its chain. `labels` are the names of mode, method and data set in tables."""
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
