"""Results as people read them: the table of a run, the comparison of several, and a figure of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kd.losses import Loss
from kd.pipeline import Outcome, ReplicatedResult, RunResult
from kd.progress import console
from kd.spec import KnownError
from kd.stage import Stage, TrainSpec
from kd.store import Store

_SELECTED = {
    "best_val": "epoch chosen on validation accuracy",
    "last": "last epoch",
    "best_test": "EPOCH CHOSEN ON THE TEST SET, as the papers did",
}


class Job(NamedTuple):
    """One job of a multirun: its number, overrides, and its result or why there is none."""

    number: str
    overrides: list[str]
    result: RunResult | None
    reason: str


JOB_MARKS = (".hydra/config.yaml", "result.json", "error.json")


def job_folders(folder: Path) -> set[Path]:
    """The folders of a multirun's jobs, however deep; a store that lies among them has results of its own."""
    places = {place.parents[mark.count("/")] for mark in JOB_MARKS for place in folder.rglob(mark)}
    return {place for place in places if not (place / "stage.json").exists()}


def job_order(number: str) -> tuple[int, str]:
    """Sorts the names of jobs' folders: 2 before 10."""
    return len(number), number


def read_result(path: Path) -> RunResult:
    """A run's result.json. Raises KnownError where there is none."""
    try:
        tree = json.loads(path.read_text())
        return (ReplicatedResult if "replicates" in tree else RunResult).model_validate(tree)
    except (OSError, ValueError, TypeError) as error:  # ValueError is pydantic's and json's too
        raise KnownError(f"{path} is no result of a run ({str(error).splitlines()[0]})") from error


def percent(value: float | None) -> str:
    """An accuracy, or a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def print_run(result: RunResult) -> None:
    """The table of one run, and the line that loads its student."""
    out, student = console(), result.chain[-1]
    out.print(_title(f"{result.method} on {result.dataset}, mode {result.mode}: {_SELECTED[student.select]}"))
    table = _table("role", "network", "parameters>", "stage", "val %>", "test %>", "epochs>", "s>", "")
    for outcome in result.chain:
        table.add_row(*_cells(outcome))
    out.print(table)
    for outcome in result.chain[:-1]:
        if outcome.select != student.select:
            out.print(f"{outcome.role} {outcome.model}: {_SELECTED[outcome.select]}", highlight=False)
    if isinstance(result, ReplicatedResult):
        each = ", ".join(f"{replicate.test_acc:.2f}" for replicate in result.replicates)
        seeds = f"seeds {result.replicates[0].seed}–{result.replicates[-1].seed}"
        above = " over one chain" if len(result.chain) > 1 else ""
        out.print(f"{result.n} students{above}, {seeds}: test {each}", highlight=False)
        out.print(f"mean {result.mean:.2f} ± {result.std:.2f} %, 95 % interval {_interval(result)}", highlight=False)
    out.print(f'the student: kd.load("{student.key}")', highlight=False)


def _count(jobs: int) -> str:
    return "1 job" if jobs == 1 else f"{jobs} jobs"


def _interval(result: ReplicatedResult) -> str:
    """The 95 % interval, cut to what an accuracy can be."""
    low, high = result.ci95
    return f"{max(low, 0):.2f} to {min(high, 100):.2f}"


def _setting(result: RunResult) -> str:
    """What tells a job from others of its networks: the parameters of its chain's losses, and its students' seeds."""
    above = [
        f"{outcome.role} {_parameters(outcome.loss)}" for outcome in result.chain[:-1] if _parameters(outcome.loss)
    ]
    seeds = f"seed={result.chain[-1].seed}"
    if isinstance(result, ReplicatedResult):
        seeds += f"–{result.replicates[-1].seed}"
    return ", ".join([*above, f"{_parameters(result.chain[-1].loss)} {seeds}".strip()])


def _parameters(loss: Loss) -> str:
    return " ".join(f"{name}={value:g}" for name, value in loss.dump().items() if isinstance(value, float))


def _training(train: TrainSpec) -> str:
    milestones = f" at {list(train.milestones)} ×{train.gamma:g}" if train.schedule == "step" else ""
    extras = (f", warmup {train.warmup}" if train.warmup else "") + (", test_curve" if train.test_curve else "")
    momentum = f" momentum {train.momentum:g}{' (Nesterov)' if train.nesterov else ''}" if train.momentum else ""
    return (
        f"{train.optimizer}{momentum}, lr {train.lr:g} {train.schedule}{milestones}, weight decay "
        f"{train.weight_decay:g}, batch {train.batch_size}, {train.precision}, {train.select}{extras}"
    )


def _table(*headings: str) -> Table:
    """A table narrow enough for 80 columns; a heading that ends in > is a column of numbers, keys never break."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for heading in headings:
        name = heading.removesuffix(">")
        justify: Literal["right", "left"] = "right" if heading != name else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "stage")
    return table


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _cells(outcome: Outcome) -> list[str]:
    done = "reused" if outcome.reused else "trained"
    accuracies = percent(outcome.val_acc), percent(outcome.test_acc)
    return [
        outcome.role,
        outcome.model,
        f"{outcome.params:,}",
        outcome.key,
        *accuracies,
        str(outcome.epochs),
        f"{outcome.seconds:.0f}",
        done,
    ]


def print_jobs(jobs: Sequence[Job]) -> None:
    """The table of a multirun: what differs between its jobs, and what came of it; failures are named below it."""
    out = console()
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    common = " ".join(override for override in jobs[0].overrides if override in shared)
    out.print(_title(f"{_count(len(jobs))}{', all with ' if common else ''}{common}"))
    table = _table("job", "", "val %>", "test %>", "n>")
    for job in jobs:
        if job.result is not None:
            own = " ".join(override for override in job.overrides if override not in shared)
            table.add_row(job.number, escape(own), percent(job.result.objective), *_test(job.result))
    if table.row_count:
        out.print(table)
    peeked = [job.number for job in jobs if job.result and any(o.select == "best_test" for o in job.result.chain)]
    if peeked:
        out.print(f"jobs {', '.join(peeked)}: {_SELECTED['best_test']}", highlight=False)
    for job in jobs:
        if job.result is None:
            line = f"job {job.number} ({' '.join(job.overrides)}): {job.reason}"
            out.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def _test(result: RunResult) -> tuple[str, str]:
    """Test accuracy, with its spread if there is one, and the number of students."""
    if isinstance(result, ReplicatedResult):
        return f"{result.mean:.2f} ± {result.std:.2f}", str(result.n)
    return percent(result.chain[-1].test_acc), "1"


def print_plan(students: Sequence[Stage], store: Store, retrain: bool) -> None:
    """What a run would do, for dry_run: each stage, its key, and whether it is there already."""
    out = console()
    out.print(_title(f"planned; finished stages are in {store.root}"))
    table = _table("role", "network", "seed>", "loss", "epochs>", "stage", "")
    stages = {stage.key: stage for student in students for stage in student.chain}
    there = {key for key in stages if store.has(key) and not retrain}
    for stage in stages.values():
        loss = f"{stage.loss.name} {_parameters(stage.loss)}"
        row = (stage.role, stage.model, stage.seed, loss, stage.train.epochs, stage.key)
        table.add_row(*map(str, row), "stored" if stage.key in there else "to train")
    out.print(table)
    trainings: dict[str, list[str]] = {}
    for stage in stages.values():
        trainings.setdefault(_training(stage.train), []).append(f"{stage.role} {stage.model}")
    for training, networks in trainings.items():
        out.print(f"{', '.join(dict.fromkeys(networks))}: {training}", highlight=False, markup=False)
    out.print(f"{len(stages) - len(there)} of {len(stages)} stages to train", highlight=False)


def compare(folder: Path) -> None:
    """Write comparison.{md,png} into a multirun's folder: the students of its finished jobs side by side.

    Raises KnownError where there are none.
    """
    places = sorted(job_folders(folder), key=lambda place: job_order(str(place.relative_to(folder))))
    results = [read_result(place / "result.json") for place in places if (place / "result.json").exists()]
    if not results:
        raise KnownError(f"{folder} has no finished jobs (no result.json in it)")
    failed = len(
        [place for place in places if not (place / "result.json").exists() and (place / "error.json").exists()]
    )
    (folder / "comparison.md").write_text(_markdown(results, failed))
    _draw(results, folder / "comparison.png")
    print(f"{folder / 'comparison.md'} and {folder / 'comparison.png'} are written")


def _students(result: RunResult) -> list[float]:
    if isinstance(result, ReplicatedResult):
        return [replicate.test_acc for replicate in result.replicates]
    return [result.chain[-1].test_acc]


def _markdown(results: Sequence[RunResult], failed: int) -> str:
    lines = [
        "| dataset | method | chain | student | test % (mean ± std) | n | 95 % interval | epoch | stages |",
        "|---" * 9 + "|",
    ]
    for result in results:
        chain = " → ".join(outcome.model for outcome in result.chain)
        interval = _interval(result) if isinstance(result, ReplicatedResult) else "n/a (one seed)"
        keys = " ".join(f"`{outcome.key}`" for outcome in result.chain)
        select = ", ".join(dict.fromkeys(_SELECTED[outcome.select] for outcome in result.chain))
        cells = (result.dataset, result.method, chain, _setting(result), *_test(result), interval, select, keys)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "What varies is the student's seed; the networks above it are trained once. The interval is Student's t.",
    ]
    if failed:
        lines += ["", f"{_count(failed)} failed and not in the table."]
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
        apart = [row + 0.12 * (i - (len(students) - 1) / 2) for i in range(len(students))]  # equal ones stay visible
        axes.plot(students, apart, "o", color="#0072b2", alpha=0.7, label="a student", zorder=3)
        if isinstance(result, ReplicatedResult):
            error = [[result.mean - result.ci95[0]], [result.ci95[1] - result.mean]]
            axes.errorbar(
                [result.mean], [row], xerr=error, fmt="|", color="black", markersize=14, capsize=3, label=_INTERVAL
            )
        for outcome in result.chain:
            if outcome.role == "teacher":
                axes.plot(
                    [outcome.test_acc], [row], "D", color="#d55e00", mfc="none", mew=2, label="its teacher", zorder=4
                )
    chains = [" → ".join(outcome.model for outcome in result.chain) for result in results]
    labels = [f"{r.method}: {c}\n{_setting(r).replace(', ', chr(10))}" for r, c in zip(results, chains, strict=True)]
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(max(axes.get_xlim()[0], 0), min(axes.get_xlim()[1], 100.4))  # whatever an interval says
    datasets = dict.fromkeys(result.dataset for result in results)
    selects = dict.fromkeys(_SELECTED[outcome.select] for result in results for outcome in result.chain)
    axes.set_xlabel(f"test accuracy on {', '.join(datasets)}, %\n({'; '.join(selects)})")
    axes.grid(axis="x", alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m kd.report <folder of a multirun>")
    try:
        compare(Path(sys.argv[1]))
    except KnownError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
