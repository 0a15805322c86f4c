"""Results as people read them: the table of a run, the comparison of several, and a figure of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class Job(NamedTuple):
    """One job of a multirun: its number, overrides, and its result or why there is none."""

    number: str
    overrides: str
    result: RunResult | None
    reason: str


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
    title = f"{result.method} on {escape(result.dataset)}, mode {result.mode}: {_SELECTED[result.select]}"
    table = Table(title=title, title_justify="left")
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
            f"{result.n} students, seeds {result.replicates[0].seed}–{result.replicates[-1].seed}, one chain above "
            f"them: test {result.mean:.2f} ± {result.std:.2f} %, 95 % interval {low:.2f} to {high:.2f}",
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


def print_jobs(jobs: Sequence[Job]) -> None:
    """The table of a multirun; jobs without a result are named below it, with their reason."""
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
            out.print(
                f"job {number} ({overrides}): {reason}", style="red", highlight=False, markup=False, soft_wrap=True
            )


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
        row = (
            stage.role,
            stage.model,
            stage.seed,
            f"{stage.loss.name} {loss}",
            stage.train.epochs,
            stage.train.precision,
        )
        table.add_row(*map(str, row), stage.key, state)
    console().print(table)
    out = Console(width=console().width)
    missing = sum(not store.has(key) for key in stages)
    out.print(f"{missing} of {len(stages)} stages to train", highlight=False)


def compare(folder: Path) -> None:
    """Write comparison.{md,png} into a multirun's folder: the students of its finished jobs side by side.

    Raises KnownError where there are none.
    """
    results = [read_result(path) for path in sorted(folder.glob("*/result.json"))]
    if not results:
        raise KnownError(f"{folder} has no finished jobs (no */result.json)")
    (folder / "comparison.md").write_text(_markdown(results))
    _draw(results, folder / "comparison.png")
    print(f"{folder / 'comparison.md'} and {folder / 'comparison.png'} are written")


def _students(result: RunResult) -> list[float]:
    if isinstance(result, ReplicatedResult):
        return [replicate.test_acc for replicate in result.replicates]
    return [result.chain[-1].test_acc]


def _markdown(results: Sequence[RunResult]) -> str:
    lines = [
        "| dataset | method | chain | test % (mean ± std) | n | 95 % interval | epoch | stages |",
        "|---" * 8 + "|",
    ]
    for result in results:
        method, chain, _, test, n = _summary(result)
        low, high = result.ci95 if isinstance(result, ReplicatedResult) else (None, None)
        interval = f"{low:.2f} to {high:.2f}" if low is not None else "n/a (one seed)"
        keys = " ".join(f"`{outcome.key}`" for outcome in result.chain)
        cells = (result.dataset, method, chain, test, n, interval, _SELECTED[result.select], keys)
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "What varies is the student's seed; the networks above it are trained once. The interval is Student's t.",
    ]
    return "\n".join(lines) + "\n"


_INTERVAL = "mean, 95 % interval"


def _draw(results: Sequence[RunResult], path: Path) -> None:
    """Each student's test accuracy as a dot, with mean and 95 % interval, over the teacher's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.55 * len(results)), layout="constrained")
    rows = range(len(results))
    for row, result in zip(rows, results, strict=True):
        students = _students(result)
        axes.plot(students, [row] * len(students), "o", color="#0072b2", alpha=0.6, label="a student", zorder=3)
        if isinstance(result, ReplicatedResult):
            error = [[result.mean - result.ci95[0]], [result.ci95[1] - result.mean]]
            axes.errorbar(
                [result.mean], [row], xerr=error, fmt="|", color="black", markersize=14, capsize=3, label=_INTERVAL
            )
        for outcome in result.chain:
            if outcome.role == "teacher":
                axes.plot([outcome.test_acc], [row], "D", color="#d55e00", markersize=6, label="its teacher")
    axes.set_yticks(rows, [f"{r.method}\n{' → '.join(o.model for o in r.chain)}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=min(axes.get_xlim()[1], 100.4))  # no accuracy is higher, whatever the interval says
    axes.set_xlabel(f"test accuracy on {results[0].dataset}, %")
    axes.grid(axis="x", alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kd.report <folder of a multirun>")
    try:
        compare(Path(sys.argv[1]))
    except KnownError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
