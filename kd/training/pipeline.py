"""A run: loads or trains every stage of its chain in order, with its device, images and guides."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd.core import hardware
from kd.core.files import commit
from kd.core.settings import OnNaN
from kd.core.spec import KnownError, LostImageError, NonFiniteError
from kd.core.stage import Given, Source, Stage
from kd.core.statistics import near_chance, spread, trim
from kd.reporting.baseline import compare_alone
from kd.reporting.console import StageProgress, Unwatched, count
from kd.reporting.results import Baseline, Evidence, Outcome, Replicate, ReplicatedResult, RunResult, what_varied
from kd.reporting.tracking import Tracker, Untracked
from kd.store import RETRIED, TAUGHT_BY, Metrics, StageResult, TrainedStage, alarms_in
from kd.store.foreign import load_network
from kd.training.checkpoint import Checkpoint, Deferred
from kd.training.checks import check_students
from kd.training.ranks import ALONE, Team, is_lost, leave, team
from kd.training.workplace import Workplace


def follow() -> int:
    """Train this rank's share of each stage, on every rank except rank 0. Prints only failures of this rank.

    Returns the exit code.
    """
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
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
        try:
            train_stage(stage, data=data, network=network, **common)
        except LostImageError as error:  # of this rank's share alone
            print(error, file=sys.stderr)
            leave()
        except KnownError:  # rank 0 has the same error, and prints it
            pass
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
    _done: set[str] = field(default_factory=set)  # the keys of the stages that this run has made
    _checked: set[str] = field(default_factory=set)  # and of those whose guides it has looked at
    _unread: set[str] = field(default_factory=set)  # those of them whose epochs are not in the records yet

    def run_chain(self, last: Stage) -> list[Outcome]:
        """Load or train each stage, in order. Raises KnownError for a teacher below `min_acc`."""
        return [self._accept(self._load_or_make(source)) for source in last.chain]

    def train_apart(self, students: Sequence[Stage]) -> None:
        """Train the students in processes of their own, if that is faster or asked for. run_chain() then finds them.

        What several of them need is trained first, here.
        """
        left = [student for student in students if not self._reusable(student)]
        if (processes := self._processes(left)) == 1:
            return
        needed = Counter(source.key for student in left for source in student.chain)
        for source in {source.key: source for student in left for source in student.chain}.values():
            if needed[source.key] > 1:
                self._accept(self._load_or_make(source))
        from kd.training.children import train_beside

        child = replace(self, tracker=Untracked(self.tracker.status), prune=None)
        self._unread = train_beside(child, [student for student in left if student.key not in self._done], processes)
        self._done |= self._unread
        self.tracker.status.close()

    def _processes(self, students: Sequence[Stage]) -> int:
        """How many processes train the students. A line says it, unless each choice would be one."""
        if len(students) < 2 or self.team.size > 1:
            return 1
        told = len(students), hardware.cpu_count(), self.device
        if (most := self.runtime.processes_for(*told, None)) == 1:
            return 1
        from kd.training.forecast import room_for

        number = self.runtime.processes_for(*told, room_for(students))
        less = "" if number == most else f": the memory has no room for {most}"
        own = f"{number} process{'es' if number > 1 else ''} of {count(self.threads, 'thread')}"
        print(f"{own} train{'' if number > 1 else 's'} the {len(students)} students{less}", flush=True)
        return number

    def made_for(self, student: Stage) -> set[str]:
        """In a process of its own: train what is missing of the student's chain. Returns the keys of these stages."""
        before = {*self._done}
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            assert self.device  # the run's own process has said which
        self.run_chain(student)
        return self._done - before

    def _load_or_make(self, source: Source) -> Outcome:
        if not self._reusable(source):
            with self.store.lock(source.key):
                if not self._reusable(source):  # another process may have finished it meanwhile
                    if isinstance(source, Given):
                        self._take(source)
                    else:
                        self._train(source)
        elif isinstance(source, Stage) and source.key in self._unread:
            self._unread.discard(source.key)
            for row in self.store.metrics(source.key):
                self._log(source, row)
        result = self.store.result(source.key)
        retried = self.store.retried(source.key)
        if retried and self.on_nan == "stop":
            raise KnownError(
                f"stage {source.key} was trained in fp32 after {retried}; train.on_nan=retry_fp32 accepts it"
            )
        if isinstance(source, Stage) and source.guides and source.key not in self._done | self._checked:
            self._check_guides(source)
        alarms = self._alarms(source, result)
        reached = {"val_acc": result.val_acc, "test_acc": result.test_acc}
        self.tracker.finished(source, {**reached, **({"alarms": "; ".join(alarms)} if alarms else {})})
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
            reused=source.key not in self._done,
            evidence=self._evidence(stage) if stage and stage.guides else None,
            alarms=alarms,
            **result.model_dump(exclude={"selected_epoch"}),
        )

    def _check_guides(self, stage: Stage) -> None:
        """Say, once, if a finished stage was taught by other weights of a guide than those in the store."""
        self._checked.add(stage.key)
        before = self.store.record(stage.key)["made_with"].get(TAUGHT_BY)
        if before is None:  # of an earlier version
            return
        both = zip(stage.guides, before.split(), self.store.weights_of_guides(stage).split(), strict=True)
        for guide in (guide for guide, then, now in both if then != now):
            print(
                f"{stage.role} {stage.model} ({stage.key}) was taught by earlier weights of {guide.model}, which was "
                "trained again later; python -m kd.store rm removes it, and then it is trained again too",
                flush=True,
            )

    def _evidence(self, stage: Stage) -> Evidence:
        """How the stage's guide taught; empty for stages that were trained before it was measured."""
        last = self.store.metrics(stage.key)[-1]
        return Evidence(**{name: last.get(name) for name in Evidence.model_fields})

    def _alarms(self, source: Source, result: StageResult) -> tuple[str, ...]:
        """What looks wrong with given weights, or looked wrong when the stage was trained, in this run or earlier."""
        if isinstance(source, Given):
            doubt = _doubt(source, result)
            return (
                (f"{source.role} {source.model} has {result.test_acc:.2f} % on the test set: {doubt}",) if doubt else ()
            )
        return alarms_in(self.store.metrics(source.key)) if source.guides else ()

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
        if doubt := _doubt(given, result):
            print(f"  {doubt}")

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
                self.tracker.begin_again(stage)
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
        taught_by = self.store.weights_of_guides(stage)
        checkpoint = Checkpoint(folder, stage, runtime, self.runtime.checkpoint_every, signals, taught_by)
        errand = stage, self.elsewhere()
        progress = StageProgress(planned, len(data.train), self._log, self.tracker.status)
        with progress as watch, self.team.together(errand):
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
        return trained, {"compiled": compiled, **({TAUGHT_BY: taught_by} if taught_by else {})}

    def _log(self, stage: Stage, metrics: Metrics) -> None:
        self.tracker.log(stage, metrics)
        if self.prune is not None and stage.role == "student":
            self.prune(metrics)

    def _keep(self, source: Source, trained: TrainedStage, origin: dict[str, Any]) -> None:
        code = {"python": platform.python_version(), "commit": commit()}
        made_with = {**self._runtime(), **code, "machine": hardware.describe(), **origin}
        self.store.save(source, trained, made_with)
        self._done.add(source.key)

    def _runtime(self) -> dict[str, Any]:
        """What is not in the key and still changes the last bits of a result."""
        kind = self.device.partition(":")[0]  # without the number of the GPU
        processor = hardware.processor(self.device)
        return {"torch": version("torch"), "device": kind, "processor": processor, "threads": self.threads}


def _doubt(given: Given, result: StageResult) -> str:
    if near_chance(result.test_acc, given.dataset.num_classes):
        return f"that is near chance: check the file, and teacher.normalize (it is {given.normalize})"
    return ""


def run_students(
    pipeline: Pipeline, students: Sequence[Stage], labels: dict[str, str], alone: Sequence[Stage] = ()
) -> RunResult:
    """Load or train every student and its chain, then the students `alone` with which they are compared, if any.

    `labels` are the names of mode, method and data set in tables.
    """
    check_students(pipeline, [*students, *alone], pipeline.checkpoint)
    pipeline.train_apart(students)
    chains = [pipeline.run_chain(student) for student in students]
    outcomes = [chain[-1] for chain in chains]
    validated = [outcome.val_acc for outcome in outcomes if outcome.val_acc is not None]
    common = {
        "chain": chains[0],
        "objective": trim(sum(validated) / len(validated)) if validated else None,
        "classes": students[0].dataset.classes,
        "baseline": _baseline(pipeline, chains, alone) if alone else None,
        **labels,
    }
    if len(students) == 1:
        return RunResult.model_validate(common)
    replicates = [Replicate.of(chain) for chain in chains]
    statistics = spread([outcome.test_acc for outcome in outcomes]).model_dump()
    varied = what_varied([[each.key for each in chain] for chain in chains])
    return ReplicatedResult.model_validate({**common, "replicates": replicates, "varied": varied, **statistics})


def _baseline(pipeline: Pipeline, chains: Sequence[Sequence[Outcome]], alone: Sequence[Stage]) -> Baseline:
    """Load or train the students alone, and compare."""
    if not all(pipeline.store.whole(student.key) for student in alone) or pipeline.runtime.retrain:
        print(f"baseline: the student alone, {count(len(alone), 'seed')}", flush=True)
    pipeline.train_apart(alone)
    return compare_alone(chains, [pipeline.run_chain(student)[-1] for student in alone])
