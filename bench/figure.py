"""results/speed.svg: speeds beside the usual script's, and what a sweep costs as it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

_COLORS = {"usual": "#999999", "cold": "#56b4e9", "warm": "#0072b2"}
_LABELS = {"usual": "the usual script", "cold": "ours, each view new to the guide", "warm": "ours"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the figure of a summary."""
    mpl.rcParams["svg.hashsalt"] = "kd"
    figure, (speed, growth, short) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    _speeds(speed, found["workloads"])
    hours = found["sweep"]["hours"]
    jobs = range(1, len(hours["ours"]) + 1)
    for kind, color in (("usual", _COLORS["usual"]), ("ours", _COLORS["warm"])):
        growth.plot(jobs, hours[kind], color=color, label="the usual script" if kind == "usual" else "ours")
    growth.set(xlabel="jobs", ylabel="hours", yscale="log", title="a sweep of resnet110 → resnet8 (computed)")
    growth.legend(frameon=False)
    parts = found["sweep"]["short"]
    numbers = range(1, len(parts["ours"]) + 1)
    short.bar([n - 0.2 for n in numbers], [parts["usual"]] * len(numbers), 0.4, color=_COLORS["usual"])
    bars = short.bar([n + 0.2 for n in numbers], parts["ours"], 0.4, color=_COLORS["warm"])
    short.bar_label(bars, fontsize=8)
    short.set(xlabel="job (the 4th brings a new seed)", ylabel="seconds", title="a short sweep of plane10 → plane2")
    for axes in (speed, growth, short):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _speeds(axes: Axes, workloads: dict[str, Any]) -> None:
    names = list(workloads)[::-1]
    for shift, kind in zip((0.27, 0, -0.27), _COLORS, strict=True):
        rows = [(row, workloads[name]) for row, name in enumerate(names) if kind in workloads[name]["ratio"]]
        speeds = [work["images_per_second"][kind] for _, work in rows]
        bars = axes.barh([row + shift for row, _ in rows], speeds, 0.25, color=_COLORS[kind], label=_LABELS[kind])
        if kind != "usual":
            axes.bar_label(bars, [f"{work['ratio'][kind]:.1f}×" for _, work in rows], padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlabel="images a second", title="a training epoch on two cores")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
