"""Results as people read them: the table of a run, the comparison of several, and a figure of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.pipeline import Outcome, ReplicatedResult, RunResult
from kd.progress import console
from kd.spec import KnownError
from kd.stage import Stage
from kd.store import Store

_SELECTED = {
    "best_val": "epoch chosen on validation accuracy",
    "last": "last epoch",
    "best_test": "EPOCH CHOSEN ON THE TEST SET, as the papers did",
}


def read_result(path: Path) -> RunResult:
    """A run's result.json. Raises KnownError where there is none."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise KnownError(f"{path} is no result of a run ({error})") from error
    return (ReplicatedResult if "replicates" in tree else RunResult).model_validate(tree)


def percent(value: float | None) -> str:
    """An accuracy, or a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def print_run(result: RunResult) -> None:
    """The table of one run, and the line that loads its student."""
    out = console()
    table = Table(title=f"{result.method} on {escape(result.dataset)}, mode {result.mode}: {_SELECTED[result.select]}", title_justify="left")
    for heading in ("role", "network"):
        table.add_column(heading)
    table.add_column("parameters", justify="right")
    table.add_column("stage")
    for heading in ("val %", "test %", "epochs", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for outcome in result.chain:
        table.add_row(*_cells(outcome))
    out.print(table)
    if isinstance(result, ReplicatedResult):
        low, high = result.ci95
        out.print(
            f"{result.n} students, seeds {result.replicates[0].seed}–{result.replicates[-1].seed}, one chain above them: test "
            f"{result.mean:.2f} ± {result.std:.2f} %, 95 % interval {low:.2f} to {high:.2f}",
            highlight=False,
        )
    out.print(f'the student: kd.load("{result.chain[-1].key}")', highlight=False)


def _cells(outcome: Outcome) -> list[str]:
    done = "reused" if outcome.reused else "trained"
    return [
        outcome.role,
        outcome.model,
        f"{outcome.params:,}",
        outcome.key,
        percent(outcome.val_acc),
        percent(outcome.test_acc),
        str(outcome.epochs),
        f"{outcome.seconds:.1f}",
        done,
    ]


def print_jobs(jobs: Sequence[tuple[str, str, RunResult | None, str]]) -> None:
    """The table of a multirun: (number, overrides, result, reason) a job; failed and unfinished ones are named below."""
    out = console()
    table = Table(title=f"{len(jobs)} jobs", title_justify="left")
    for heading in ("job", "overrides", "method", "chain"):
        table.add_column(heading)
    for heading in ("val %", "test %", "n"):
        table.add_column(heading, justify="right")
    for number, overrides, result, _ in jobs:
        if result is not None:
            table.add_row(number, escape(overrides), *_summary(result))
    out.print(table)
    for number, overrides, result, reason in jobs:
        if result is None:
            out.print(f"job {number} ({overrides}): {reason}", style="red", highlight=False, markup=False)


def _summary(result: RunResult) -> list[str]:
    chain = " → ".join(outcome.model for outcome in result.chain)
    test, n = percent(result.chain[-1].test_acc), "1"
    if isinstance(result, ReplicatedResult):
        test, n = f"{result.mean:.2f} ± {result.std:.2f}", str(result.n)
    return [result.method, chain, percent(result.objective), test, n]


def print_plan(students: Sequence[Stage], store: Store) -> None:
    """What a run would do, for dry_run: each stage, its key, and whether it is in the store."""
    table = Table(title=f"planned; finished stages are in {escape(str(store.root))}", title_justify="left")
    for heading in ("role", "network", "seed", "loss", "epochs", "precision", "stage", ""):
        table.add_column(heading)
    stages = {stage.key: stage for student in students for stage in student.chain}
    for stage in stages.values():
        loss = ", ".join(f"{k}={v:g}" for k, v in stage.loss.dump().items() if isinstance(v, float))
        state = "in the store" if store.has(stage.key) else "to train"
        row = (stage.role, stage.model, stage.seed, f"{stage.loss.name} {loss}", stage.train.epochs, stage.train.precision)
        table.add_row(*map(str, row), stage.key, state)
    console().print(table)
    out = Console(width=console().width)
    missing = sum(not store.has(key) for key in stages)
    out.print(f"{missing} of {len(stages)} stages to train", highlight=False)
