"""Results and plans as people read them on a screen: the tables of a run, of a multirun, and of a dry run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kd.losses import Loss
from kd.pipeline import Outcome, ReplicatedResult, RunResult
from kd.progress import console
from kd.records import Job
from kd.stage import Given, Normalization, Select, Source, Stage, TrainSpec
from kd.store import Store

SELECTED: dict[Select | None, str] = {
    "best_val": "epoch chosen on validation accuracy",
    "last": "last epoch",
    "best_test": "EPOCH CHOSEN ON THE TEST SET, as the papers did",
    "best_test_batches": "EPOCH CHOSEN ON THE TEST SET, by the mean of its batches' accuracies, as Trained Teacher did",
    None: "given weights",
}


def percent(value: float | None) -> str:
    """An accuracy, or a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def print_run(result: RunResult) -> None:
    """The table of one run, and the line that loads its student."""
    out, student = console(), result.chain[-1]
    out.print(_title(f"{result.method} on {result.dataset}, mode {result.mode}: {SELECTED[student.select]}"))
    table = _table("role", "network", "parameters>", "stage", "val %>", "test %>", "epochs>", "s>", "")
    for outcome in result.chain:
        table.add_row(*_cells(outcome))
    out.print(table)
    for outcome in result.chain[:-1]:
        if outcome.select != student.select:
            seen = f", which see images by {outcome.normalize}" if outcome.normalize else ""
            out.print(f"{outcome.role} {outcome.model}: {SELECTED[outcome.select]}{seen}", highlight=False)
    if isinstance(result, ReplicatedResult):
        each = ", ".join(f"{replicate.test_acc:.2f}" for replicate in result.replicates)
        seeds = f"seeds {result.replicates[0].seed}–{result.replicates[-1].seed}"
        above = " over one chain" if len(result.chain) > 1 else ""
        out.print(f"{result.n} students{above}, {seeds}: test {each}", highlight=False)
        out.print(f"mean {result.mean:.2f} ± {result.std:.2f} %, 95 % interval {interval_of(result)}", highlight=False)
    out.print(f'the student: kd.load("{student.key}")', highlight=False)


def count(number: int, thing: str = "job") -> str:
    """A number of things, in words."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def interval_of(result: ReplicatedResult) -> str:
    """The 95 % interval, cut to what an accuracy can be."""
    low, high = result.ci95
    return f"{max(low, 0):.2f} to {min(high, 100):.2f}"


def setting(result: RunResult) -> str:
    """What tells a job from others of its networks: the parameters of its chain's losses, and its students' seeds."""
    above = [f"{outcome.role} {parameters(outcome.loss)}" for outcome in result.chain[:-1] if parameters(outcome.loss)]
    seeds = f"seed={result.chain[-1].seed}"
    if isinstance(result, ReplicatedResult):
        seeds += f"–{result.replicates[-1].seed}"
    return ", ".join([*above, f"{parameters(result.chain[-1].loss)} {seeds}".strip()])


def parameters(loss: Loss | None) -> str:
    """What a loss is set to: "T=4 lambda=0.5"; "" for one without numbers."""
    values = loss.dump() if loss else {}
    by_classes = " KL/(batch·classes)" if values.get("reduction") == "mean" else ""
    return " ".join(f"{name}={value:g}" for name, value in values.items() if isinstance(value, float)) + by_classes


def training(train: TrainSpec) -> str:
    """A training in a line, but for its epochs."""
    milestones = f" at {list(train.milestones)} ×{train.gamma:g}" if train.schedule == "step" else ""
    extras = (f", warmup {train.warmup}" if train.warmup else "") + (", test_curve" if train.test_curve else "")
    extras += f", {train.ranks} ranks" if train.ranks > 1 else ""
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
    done = "given" if outcome.loss is None else "reused" if outcome.reused else "trained"
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
    modes = sorted({job.result.mode for job in jobs if job.result})
    named = f", mode {' and '.join(modes)}" if modes else ""
    out.print(_title(f"{count(len(jobs))}{named}{', all with ' if common else ''}{common}"))
    table = _table("job", "", "val %>", "test %>", "n>")
    for job in jobs:
        if job.result is not None:
            table.add_row(job.number, escape(_own(job, shared)), percent(job.result.objective), *test_of(job.result))
    if table.row_count:
        out.print(table)
    marks: dict[str, list[str]] = {}
    for job in jobs:
        for mark in peeked(job.result) if job.result else ():
            marks.setdefault(mark, []).append(job.number)
    for mark, numbers in marks.items():
        out.print(f"jobs {', '.join(numbers)}: {mark}", highlight=False)
    for job in sorted(jobs, key=lambda job: job.failed):
        if job.result is None:
            line = f"job {job.number} ({_own(job, shared)}): {job.reason}"
            out.print(line, style="red" if job.failed else "dim", highlight=False, markup=False, soft_wrap=True)


def peeked(result: RunResult) -> list[str]:
    """How the test set had a say in the choice of epochs, if it had."""
    selects = dict.fromkeys(outcome.select for outcome in result.chain)
    return [SELECTED[select] for select in selects if select in ("best_test", "best_test_batches")]


def _own(job: Job, shared: Collection[str]) -> str:
    """What a job was told that not all jobs were."""
    return " ".join(filter(None, (short(override) for override in job.overrides if override not in shared)))


def short(override: str) -> str:
    """An override as tables show it: numbers to four digits; "" for what a search tells its jobs for itself."""
    name, _, value = override.partition("=")
    if name in ("runtime.trial", "sweep.join"):
        return ""
    try:
        return f"{name}={float(value):.4g}" if len(value) > 6 else override
    except ValueError:
        return override


def test_of(result: RunResult) -> tuple[str, str]:
    """Test accuracy, with its spread if there is one, and the number of students."""
    if isinstance(result, ReplicatedResult):
        return f"{result.mean:.2f} ± {result.std:.2f}", str(result.n)
    return percent(result.chain[-1].test_acc), "1"


def print_plan(mode: str, students: Sequence[Stage], store: Store, retrain: bool) -> None:
    """What a run would do, for dry_run: each stage, its key, and whether it is there already."""
    out = console()
    out.print(_title(f"planned in mode {mode}; finished stages are in {store.root}"))
    table = _table("role", "network", "seed>", "loss", "epochs>", "stage", "")
    sources = {source.key: source for student in students for source in student.chain}
    stages = {key: source for key, source in sources.items() if isinstance(source, Stage)}
    there = {key for key in stages if not retrain and store.whole(key)}
    for source in sources.values():
        table.add_row(
            *_planned(source), "given" if source.key not in stages else "stored" if source.key in there else "to train"
        )
    out.print(table)
    trainings: dict[str, list[str]] = {}
    for stage in stages.values():
        trainings.setdefault(training(stage.train), []).append(f"{stage.role} {stage.model}")
    for source in sources.values():
        if isinstance(source, Given):
            unread = f"{source.role} {source.model}: given, and not opened by a dry run"
            out.print(f"{unread}; it sees images by {source.normalize}", highlight=False)
    data = next(iter(sources.values())).dataset
    for settings, networks in trainings.items():
        out.print(f"{', '.join(dict.fromkeys(networks))}: {settings}", highlight=False, markup=False)
    shown = f"images: augment {data.augment}, {Normalization(mean=data.mean, std=data.std)}"
    kept = f"{100 * data.val_fraction:g} % of them are for validation" if data.val_fraction else "all of them train"
    out.print(f"{shown}; {kept}", highlight=False)
    out.print(f"{len(stages) - len(there)} of {len(stages)} stages to train", highlight=False)


def _planned(source: Source) -> tuple[str, ...]:
    if not isinstance(source, Stage):
        return source.role, source.model, "", "", "", source.key
    loss = f"{source.loss.name} {parameters(source.loss)}"
    return source.role, source.model, str(source.seed), loss, str(source.train.epochs), source.key
