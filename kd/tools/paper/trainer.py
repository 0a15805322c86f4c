"""Trains the missing stages of a graph one by one, each after its guide, by the pipeline of run.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd.app.config import initial_files
from kd.app.jobs import known_reason
from kd.core.stage import Stage
from kd.reporting.console import duration
from kd.reporting.tracking import track
from kd.store import Store
from kd.tools.paper.cost import Cost
from kd.tools.paper.graph import PlannedJob
from kd.training.checks import check_students
from kd.training.pipeline import Pipeline


def train(
    stages: Mapping[str, tuple[Stage, PlannedJob]], costs: Sequence[Cost], store: Store, folder: Path
) -> dict[str, str]:
    """Train every stage that is not in the store. Unfinished stages are resumed.

    If a stage fails for a known reason, this is printed, and the stages that depend on it are skipped. Returns the
    reasons, by key.
    """
    missing = [cost for cost in costs if not cost.stored]
    failures: dict[str, str] = {}
    expected, spent = 0.0, 0.0  # seconds of the stages that are done
    for number, cost in enumerate(missing, 1):
        stage, job = stages[cost.stage.key]
        if below := next((source for source in stage.chain if source.key in failures), None):
            failures[stage.key] = f"depends on {below.role} {below.model} ({below.key}), which failed"
            continue
        pace = spent / expected if expected else 1.0
        left = pace * sum(cost.seconds for cost in missing[number - 1 :])
        print(f"stage {number} of {len(missing)}: {stage_line(stage)}; about {duration(left)} left", flush=True)
        try:
            _train(stage, job, store, folder / "stages" / stage.key)
        except Exception as error:
            if (reason := known_reason(error)) is None:
                raise
            print(reason, file=sys.stderr, flush=True)
            failures[stage.key] = reason
        else:
            expected, spent = expected + cost.seconds, spent + store.result(stage.key).seconds
    return failures


def stage_line(stage: Stage) -> str:
    """A stage in a few words: "student resnet20 by dkd from resnet56, seed 0 (<key>)". Usual losses have no name."""
    by = "" if stage.loss.usual else f" by {stage.loss.name}"
    above = f" from {' + '.join(guide.model for guide in stage.guides)}" if stage.guides else ""
    return f"{stage.role} {stage.model}{by}{above}, seed {stage.seed} ({stage.key})"


def _train(stage: Stage, job: PlannedJob, store: Store, folder: Path) -> None:
    """Train one stage. Its guides are in the store already."""
    config = job.config
    os.makedirs(folder, exist_ok=True)
    with track(config.tracking, folder, [stage], job.tree, store) as tracker:
        pipeline = Pipeline(
            store=store,
            data_root=config.data_root,
            runtime=config.runtime,
            tracker=tracker,
            checkpoint=config.teacher.file,
            initial=initial_files(config),
            on_nan=config.train.on_nan,
            min_acc=config.teacher.min_acc,
        )
        check_students(pipeline, [stage], pipeline.checkpoint)
        pipeline.run_chain(stage)
