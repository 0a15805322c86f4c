"""The comparison of a multirun's results, as Markdown and as a figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kd.pipeline import ReplicatedResult, RunResult
from kd.records import jobs
from kd.spec import KnownError
from kd.tables import SELECTED, count, interval_of, setting, test_of


def compare(folder: Path) -> None:
    """Write comparison.{md,png} into a multirun's folder: the students of its finished jobs side by side.

    Raises KnownError where there are none.
    """
    found = jobs(folder)
    results = [job.result for job in found if job.result]
    if not results:
        raise KnownError(f"{folder} has no finished jobs (no result.json in it)")
    failed = sum(job.failed for job in found)
    (folder / "comparison.md").write_text(_markdown(results, failed))
    _draw(results, folder / "comparison.png")
    print(f"{folder / 'comparison.md'} and {folder / 'comparison.png'} are written")


def _markdown(results: Sequence[RunResult], failed: int) -> str:
    lines = [
        "| dataset | mode | method | chain | student | test % (mean ± std) | n | 95 % interval | epoch | stages |",
        "|---" * 10 + "|",
    ]
    for result in results:
        chain = " → ".join(outcome.model for outcome in result.chain)
        interval = interval_of(result) if isinstance(result, ReplicatedResult) else "n/a (one seed)"
        keys = " ".join(f"`{outcome.key}`" for outcome in result.chain)
        select = ", ".join(dict.fromkeys(SELECTED[outcome.select] for outcome in result.chain))
        student = setting(result), *test_of(result), interval, select
        cells = (result.dataset, result.mode, result.method, chain, *student, keys)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "What varies is the student's seed, over one chain. The interval is Student's t.",
    ]
    if failed:
        lines += ["", f"{count(failed)} failed and not in the table."]
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
        students = list(result.students.values())
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
    labels = [f"{r.method}: {c}\n{setting(r).replace(', ', chr(10))}" for r, c in zip(results, chains, strict=True)]
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(max(axes.get_xlim()[0], 0), min(axes.get_xlim()[1], 100.4))  # whatever an interval says
    datasets = dict.fromkeys(f"{result.dataset}, mode {result.mode}" for result in results)
    selects = dict.fromkeys(SELECTED[outcome.select] for result in results for outcome in result.chain)
    axes.set_xlabel(f"test accuracy on {'; '.join(datasets)}, %\n({'; '.join(selects)})")
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
