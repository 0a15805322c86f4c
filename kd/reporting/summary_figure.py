"""summary.png of a multirun: accuracy over each number that varies; if none varies, a line for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

from kd.core.statistics import spread
from kd.reporting.results import SELECTED

if TYPE_CHECKING:
    from kd.reporting.summary import Setting

_STUDENT, _TEACHER = "#0072b2", "#d55e00"
_MOST_CURVES, _MOST_POINTS = 8, 20  # more are not joined by lines, to keep the figure legible
_WIDTH = 44  # characters of a label


def draw_summary(
    path: Path, pool: Sequence[Setting], shared: Sequence[str], best: tuple[int, float] | None, chosen_by: str
) -> None:
    """Draw the test accuracy of each student of the settings, which have the overrides `shared` in common.

    `best`, a setting's index and the accuracy in percent that decided, is circled. It was chosen by validation or
    test: `chosen_by`. Means on validation that decided have marks of their own: the circle is around the highest.
    """
    from matplotlib.figure import Figure

    numbers = varying_numbers(pool)
    size = (1 + 5 * len(numbers), 4) if numbers else (7, 1.4 + 0.55 * len(pool))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, max(1, len(numbers)), squeeze=False, sharey=True)[0]
    look: dict[str, Any] = {"color": "black", "mfc": "none", "ms": 16, "label": f"best setting, by {chosen_by}"}
    for axes, (name, places) in zip(panels, numbers.items(), strict=False):
        drawn = _draw_curves(axes, name, places, pool, shared, chosen_by)
        if best is not None:
            axes.plot([drawn[best[0]]], [best[1]], "o", **look)
        if handles := dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)):
            axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, markerscale=0.6)
    if numbers:
        panels[0].set_ylabel(f"{_measured(pool, chosen_by)}\non {_conditions(pool)}")
    else:
        _draw_lines(panels[0], pool, shared, chosen_by)
        if best is not None:
            panels[0].plot([best[1]], [best[0]], "o", **look)
        handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    with catch_warnings():
        filterwarnings("ignore", "Glyph")  # a label in letters that matplotlib's font lacks: boxes
        figure.savefig(path, dpi=150)


def varying_numbers(pool: Sequence[Setting]) -> dict[str, list[float]]:
    """The numbers that differ between settings: by name, the value of each setting."""
    known = [dict(each.split("=", 1) for each in setting.overrides if "=" in each) for setting in pool]
    numbers: dict[str, list[float]] = {}
    for name in known[0]:
        try:
            values = [float(each[name]) for each in known]
        except (KeyError, ValueError):
            continue
        if len(set(values)) > 1:
            numbers[name] = values
    return numbers


def _literal(text: str) -> str:
    """A text that matplotlib draws as it is: without formulas between two dollars."""
    return text.replace("$", r"\$")


def _conditions(pool: Sequence[Setting]) -> str:
    found = dict.fromkeys(f"{result.dataset}, mode {result.mode}" for each in pool for result in each.results)
    return _literal("; ".join(found))


def _measured(pool: Sequence[Setting], chosen_by: str) -> str:
    """What the axis of accuracies has."""
    validated = chosen_by == "validation" and any(setting.val is not None for setting in pool)
    return f"test accuracy{' (×: on validation)' if validated else ''}, %"


def _validation(setting: Setting, chosen_by: str) -> list[float]:
    """The mean of a setting on validation, if that decided."""
    return [setting.val] if chosen_by == "validation" and setting.val is not None else []


def _draw_curves(
    axes: Any, name: str, places: Sequence[float], pool: Sequence[Setting], shared: Sequence[str], chosen_by: str
) -> list[float]:
    """A curve over the number `name` for each choice of the other overrides. Returns where each setting is drawn."""
    curves: dict[str, list[int]] = {}
    for index, setting in enumerate(pool):
        own = [each for each in setting.overrides if each.startswith(f"{name}=")]
        curves.setdefault(setting.label([*shared, *own]), []).append(index)
    joined = len(curves) <= _MOST_CURVES and all(1 < len(curve) <= _MOST_POINTS for curve in curves.values())
    apart = 0.012 * (max(places) - min(places)) if joined else 0.0  # so that equal accuracies stay visible
    drawn = list(places)
    for number, (label, curve) in enumerate(curves.items()):
        color = f"C{number}" if joined else "C0"
        for index in curve:
            drawn[index] += apart * (number - (len(curves) - 1) / 2)
            students = pool[index].test
            axes.plot([drawn[index]] * len(students), students, "o", color=color, alpha=0.5, ms=4)
            decided = _validation(pool[index], chosen_by)
            axes.plot([drawn[index]] * len(decided), decided, "x", color=color, ms=5)
        curve.sort(key=places.__getitem__)
        xs, means = [drawn[index] for index in curve], [pool[index].mean for index in curve]
        named = _literal(label) if joined and len(curves) > 1 else None
        axes.plot(xs, means, "_-" if joined else "_", color=color, ms=10, label=named)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
    return drawn


def _draw_lines(axes: Any, pool: Sequence[Setting], shared: Sequence[str], chosen_by: str) -> None:
    """A horizontal line for each setting: students as dots, their mean with its 95 % interval, and the teacher."""
    for row, setting in enumerate(pool):
        n = len(setting.test)
        apart = [row + min(0.12, 0.6 / n) * (i - (n - 1) / 2) for i in range(n)]  # equal ones stay visible
        axes.plot(setting.test, apart, "o", color=_STUDENT, alpha=0.7, label="a student", zorder=3)
        if n > 1:
            known = spread(setting.test)
            error = [[known.mean - known.ci95[0]], [known.ci95[1] - known.mean]]
            look: dict[str, Any] = {"fmt": "|", "color": "black", "ms": 14, "capsize": 3}
            axes.errorbar([known.mean], [row], xerr=error, label="mean, 95 % interval", **look)
        teachers = [outcome.test_acc for outcome in setting.results[0].chain if outcome.role == "teacher"]
        if teachers:
            axes.plot(teachers, [row], "D", color=_TEACHER, mfc="none", mew=2, label="its teacher", zorder=4)
        if decided := _validation(setting, chosen_by):
            axes.plot(decided, [row], "x", color="black", ms=6, mew=1.5, label="mean on validation", zorder=5)
    texts = [(each.label(shared), each.results[0].networks) for each in pool]
    labels = ["\n".join(fill(text, _WIDTH, break_long_words=False) for text in both) for both in texts]
    axes.set_yticks(range(len(pool)), [*map(_literal, labels)], fontsize=8)
    axes.set_ylim(len(pool) - 0.5, -0.5)
    axes.set_xlim(max(axes.get_xlim()[0], 0), min(axes.get_xlim()[1], 100.4))  # also for longer intervals
    selects = dict.fromkeys(SELECTED[outcome.select] for each in pool for run in each.results for outcome in run.chain)
    axes.set_xlabel(f"{_measured(pool, chosen_by)}, on {_conditions(pool)}\n({'; '.join(selects)})")
    axes.grid(axis="x", alpha=0.3)
