"""What a multirun came to: summary.csv, .md and .png in its folder, and the best setting with the command for it."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kd.pipeline import RunResult
from kd.records import Job
from kd.statistics import spread
from kd.tables import count, peeked, percent, short

# Overrides that tell jobs apart and decide no result.
_NO_SETTING = ("runtime.", "tracking.", "tracking=", "hydra", "sweep", "dry_run")
_SEED = "seed="
_MACHINE = ("tracking", "runtime.store", "runtime.data", "runtime.device", "runtime.threads", "runtime.compile")


@dataclass(frozen=True)
class Setting:
    """The finished jobs that differ in their student's seed alone; accuracies in percent."""

    overrides: tuple[str, ...]
    jobs: tuple[Job, ...]

    @cached_property
    def results(self) -> list[RunResult]:
        """The jobs' results."""
        return [job.result for job in self.jobs if job.result]

    @cached_property
    def test(self) -> list[float]:
        """The test accuracy of each student; one that two jobs have is one."""
        return list({key: acc for result in self.results for key, acc in result.students.items()}.values())

    @property
    def val(self) -> float | None:
        """Their mean validation accuracy; None without a validation split."""
        known = [(result.objective, len(result.students)) for result in self.results if result.objective is not None]
        return sum(value * n for value, n in known) / sum(n for _, n in known) if known else None

    @property
    def mean(self) -> float:
        """Their mean test accuracy."""
        return sum(self.test) / len(self.test)

    def score(self, objective: str) -> float:
        """What settings are compared by: mean accuracy on validation, or test, in percent."""
        return self.mean if objective == "test_acc" else self.val or 0.0

    def told(self, shared: Sequence[str]) -> str:
        """What it was told that not all settings were."""
        return " ".join(filter(None, (short(override) for override in self.overrides if override not in shared)))

    def cells(self, shared: Sequence[str]) -> list[str]:
        """As a row of the Markdown table."""
        own, n = self.told(shared) or "all", len(self.test)
        if n == 1:
            return [own, percent(self.val), percent(self.mean), "1", ""]
        apart = spread(self.test)
        low, high = max(apart.ci95[0], 0), min(apart.ci95[1], 100)
        return [own, percent(self.val), f"{apart.mean:.2f} ± {apart.std:.2f}", str(n), f"{low:.2f} to {high:.2f}"]


def settings(jobs: Sequence[Job]) -> list[Setting]:
    """Finished jobs by what they were told, seeds apart, in the order in which they came."""
    found: dict[tuple[str, ...], list[Job]] = {}
    known: dict[tuple[str, ...], set[str]] = {}
    for job in jobs:
        if job.result is not None:
            told = tuple(each for each in job.overrides if not each.startswith((*_NO_SETTING, _SEED)))
            keys = set(job.result.students)
            # A search may draw a setting twice; the same students in the store are no more students.
            if not keys <= known.setdefault(told, set()):
                found.setdefault(told, []).append(job)
                known[told] |= keys
    return [Setting(told, tuple(group)) for told, group in found.items()]


def best_of(found: Sequence[Setting], objective: str) -> Setting | None:
    """The setting of the highest mean validation accuracy; of test where `objective` says so.

    Of equals it is the first by name, so that the order of a grid decides nothing. Where one setting has no
    validation split, none can be preferred without the test set: None.
    """
    if not found or (objective == "val_acc" and any(setting.val is None for setting in found)):
        return None
    return min(found, key=lambda setting: (-setting.score(objective), setting.overrides))


def command(setting: Setting) -> str:
    """What trains the setting's students again, or loads them, as they are in the store."""
    told = list(setting.overrides)
    shared = set.intersection(*(set(job.overrides) for job in setting.jobs))
    told += [each for each in setting.jobs[0].overrides if each in shared and each.startswith(_MACHINE)]
    mode = setting.results[0].mode
    if mode != "paper" and not any(each.startswith("mode=") for each in told):
        told.append(f"mode={mode}")
    seeds = [each for job in setting.jobs for each in job.overrides if each.startswith(_SEED)]
    if len(seeds) > 1:
        told = ["-m", *told, _SEED + ",".join(each.removeprefix(_SEED) for each in seeds)]
    else:
        told += seeds
    return " ".join(["python", "run.py", *map(shlex.quote, told)])


def write(folder: Path, jobs: Sequence[Job], objective: str, missing: int = 0) -> list[str]:
    """Write the summary into the multirun's folder. Returns the lines that say what is best, for the screen.

    `objective` is val_acc, or test_acc where the search was told to maximise that. `missing` jobs left no folder.
    """
    # With hydra.output_subdir=null nobody knows what a job was told.
    pool = settings(jobs) if len(jobs) == 1 or all(job.overrides for job in jobs) else []
    # As the papers had it, the best is one lucky job; otherwise seeds are pooled.
    alone = [Setting(setting.overrides, (job,)) for setting in pool for job in setting.jobs]
    best = best_of(alone if objective == "test_acc" else pool, objective)
    shared = [each for each in pool[0].overrides if all(each in setting.overrides for setting in pool)] if pool else []
    for stale in ("best.sh", "summary.png"):
        (folder / stale).unlink(missing_ok=True)
    equals = [setting for setting in pool if best and setting.score(objective) == best.score(objective)]
    lines = _best_lines(best, len(equals), objective, shared) if len(pool) > 1 else []
    if missing:
        lines.append(f"{missing} of {count(len(jobs) + missing)} left nothing: killed, or never begun")
    table = rows(jobs)
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    (folder / "summary.md").write_text(_markdown(pool, jobs, shared, lines))
    if pool:
        _draw(folder / "summary.png", pool, best, objective)
    if best is not None:
        (folder / "best.sh").write_text(f"# the best setting of {folder.name}; make best runs it\n{command(best)}\n")
    return lines


def _best_lines(best: Setting | None, equals: int, objective: str, shared: Sequence[str]) -> list[str]:
    if best is None:
        return ["no best setting is named: without a validation split only the test set could choose it"]
    chosen = "CHOSEN ON THE TEST SET, as the paper had it" if objective == "test_acc" else "chosen on validation"
    said = f"validation {percent(best.val)} %, test {best.mean:.2f} %, {count(len(best.test), 'student')}"
    tie = f"; {equals} settings are equal there, and it is the first of them by name" if equals > 1 else ""
    return [f"best setting, {chosen}: {best.told(shared)}: {said}{tie}", f"again: {command(best)}"]


def rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """A row a job: what it was told, its accuracies in percent, or why it has none."""
    told = [dict(override.split("=", 1) for override in job.overrides if "=" in override) for job in jobs]
    names = dict.fromkeys(name for each in told for name in each)
    found = []
    for job, each in zip(jobs, told, strict=True):
        test = list(job.result.students.values()) if job.result else []
        numbers = {
            "val_acc": job.result.objective if job.result else None,
            "test_acc": sum(test) / len(test) if test else None,
            "std": spread(test).std if len(test) > 1 else None,
            "n": len(test),
            "student": job.result.chain[-1].key if job.result else None,
            "mode": job.result.mode if job.result else None,
            "epoch chosen": " and ".join(peeked(job.result)) or "without the test set" if job.result else None,
            "failure": job.reason,
        }
        found.append({"job": job.number, **{name: each.get(name) for name in names}, **numbers})
    return found


def _markdown(pool: Sequence[Setting], jobs: Sequence[Job], shared: Sequence[str], best: Sequence[str]) -> str:
    lines = [f"All with `{' '.join(shared)}`.", ""] if shared else []
    modes = dict.fromkeys(job.result.mode for job in jobs if job.result)
    marks = dict.fromkeys(mark for job in jobs if job.result for mark in peeked(job.result))
    if modes:
        lines += ["; ".join((f"Mode {' and '.join(modes)}", *marks)) + ".", ""]
    if pool:
        lines += ["| setting | validation % | test % (mean ± std) | n | 95 % interval |", "|---" * 5 + "|"]
    for setting in pool:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in setting.cells(shared)) + " |")
    if pool:
        lines += ["", "Students that differ in their seed alone are one line; the interval is Student's t.", ""]
    lines += [f"{line}\n" for line in best]
    lines += [f"- job {job.number} ({' '.join(job.overrides)}): {job.reason}" for job in jobs if job.result is None]
    return "\n".join(lines) + "\n"


def varied(pool: Sequence[Setting]) -> dict[str, list[float]]:
    """The numbers that differ between settings: by name, the value of each setting."""
    told = [dict(each.split("=", 1) for each in setting.overrides if "=" in each) for setting in pool]
    found: dict[str, list[float]] = {}
    for name in told[0]:
        try:
            values = [float(each[name]) for each in told]
        except (KeyError, ValueError):
            continue
        if len(set(values)) > 1:
            found[name] = values
    return found


def _draw(path: Path, pool: Sequence[Setting], best: Setting | None, objective: str) -> None:
    """Test accuracy over each number that varies, or by setting where none does; each student a dot.

    The best setting is circled, which need not be the one of the highest test accuracy.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    numbers = varied(pool)
    wide = max(1, len(numbers))
    figure, panels = pyplot.subplots(
        1, wide, figsize=(1 + 5 * wide, 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, name in zip(panels[0], numbers or [""], strict=True):
        others = [other for other in numbers if other != name]
        _panel(axes, name, pool, numbers, others[0] if len(others) == 1 else None)
        if best is not None:
            index = next(i for i, setting in enumerate(pool) if setting.overrides == best.overrides)
            place = numbers[name][index] if name else index
            circled = f"best setting, by {'test' if objective == 'test_acc' else 'validation'}"
            axes.plot([place], [best.mean], "o", color="black", mfc="none", markersize=16, label=circled)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(
    axes: Any,
    name: str,
    pool: Sequence[Setting],
    numbers: dict[str, list[float]],
    other: str | None,
) -> None:
    places: Sequence[float] = numbers[name] if name else range(len(pool))
    lines: dict[float | None, list[tuple[float, Setting]]] = {}
    for index, (place, setting) in enumerate(zip(places, pool, strict=True)):
        lines.setdefault(numbers[other][index] if other else None, []).append((place, setting))
    joined = bool(name) and len(lines) <= 8 and all(1 < len(line) <= 20 for line in lines.values())
    apart = 0.012 * (max(places) - min(places)) if joined else 0.0  # so that equal accuracies stay visible
    for number, (value, line) in enumerate(sorted(lines.items(), key=lambda item: item[0] or 0)):
        line.sort(key=lambda pair: pair[0])
        color = f"C{number}" if joined else "C0"
        label = f"{other}={value:g}" if joined and value is not None else None
        shift = apart * (number - (len(lines) - 1) / 2)
        for x, setting in line:
            axes.plot([x + shift] * len(setting.test), setting.test, "o", color=color, alpha=0.5, markersize=4)
        means = [setting.mean for _, setting in line]
        axes.plot([x + shift for x, _ in line], means, "_-" if joined else "_", color=color, markersize=10, label=label)
    if name:
        axes.set_xlabel(name)
    else:
        common = set.intersection(*(set(setting.overrides) for setting in pool))
        axes.set_xticks(places, [setting.told(tuple(common)) for setting in pool], rotation=30, ha="right", fontsize=8)
    axes.grid(alpha=0.3)
