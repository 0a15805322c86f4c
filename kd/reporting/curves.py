"""curves.png of a run: loss and its parts, accuracies, and the guide's share of the gradient, over the epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

from kd.reporting.results import RunResult

_ACCURACIES = {"val_acc": "validation", "train_acc": "training views", "guide_acc": "its guide", "test_acc": "test"}
# All other metrics of an epoch are parts of the loss.
_NO_PARTS = {"role", "model", "key", "epoch", "lr", "guide_share", "alarms", *_ACCURACIES}
_HEIGHT, _HEAD, _MOST = 2.4, 0.5, 8  # inches of a network's row and of the rest; rows

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl, an epoch each


def draw_curves(folder: Path, result: RunResult) -> None:
    """Draw the epochs in metrics.jsonl, which this run has trained; students of several seeds share their panels.

    A run that only loads stages has no epochs: then there is no figure, and nothing is imported. A figure that cannot
    be written is one line, because the result is there.
    """
    path = folder / "curves.png"
    path.unlink(missing_ok=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    networks = _networks([json.loads(line) for line in lines], result)
    if not networks:
        return
    from matplotlib.figure import Figure

    height = _HEAD + _HEIGHT * len(networks)
    # Fixed margins: a layout that measures every text takes as long as the drawing.
    margins = {"left": 0.07, "right": 0.99, "bottom": _HEAD / height, "top": 1 - 0.3 / height}
    figure = Figure(figsize=(10, height))
    panels = figure.subplots(len(networks), 3, squeeze=False, gridspec_kw={**margins, "hspace": 0.3, "wspace": 0.16})
    for (name, stages), (loss, accuracy, share) in zip(networks.items(), panels, strict=True):
        _draw_loss(loss, stages)
        _draw_accuracies(accuracy, stages)
        _draw_share(share, stages)
        loss.set_ylabel(name)
    for axes in panels[-1]:
        axes.set_xlabel("epoch")
    with catch_warnings():
        filterwarnings("ignore", "Glyph")  # a name in letters that matplotlib's font lacks: boxes
        try:
            figure.savefig(path, dpi=100)
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror})", flush=True)


def _networks(rows: Rows, result: RunResult) -> dict[str, list[Rows]]:
    """The epochs of each stage, by role and network; the last networks if there are many.

    Empty if no stage has two epochs: a point is no curve.
    """
    models = {outcome.key: outcome.model for outcome in result.chain}
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["key"], []).append(row)
    found: dict[str, list[Rows]] = {}
    for key, own in stages.items():
        model = own[0].get("model") or models.get(key, result.chain[-1].model)  # earlier versions did not write it
        found.setdefault(f"{own[0]['role']} {model}", []).append(own)
    if not any(len(own) > 1 for own in stages.values()):
        return {}
    return dict([*found.items()][-_MOST:])


def _draw_loss(axes: Any, stages: Sequence[Rows]) -> None:
    names = [name for name in stages[0][0] if name not in _NO_PARTS]
    for number, name in enumerate(names):
        look = {"color": "black", "lw": 1.6} if name == "loss" else {"color": f"C{number}", "lw": 1.2, "ls": "--"}
        _draw(axes, stages, name, name, look)
    axes.set_title("loss and its parts", fontsize=9)
    _finish(axes)


def _draw_accuracies(axes: Any, stages: Sequence[Rows]) -> None:
    for number, (name, label) in enumerate(_ACCURACIES.items()):
        _draw(axes, stages, name, label, {"color": f"C{number}", "lw": 1.6 if name == "val_acc" else 1})
    axes.set_title("accuracy, %", fontsize=9)
    _finish(axes)


def _draw_share(axes: Any, stages: Sequence[Rows]) -> None:
    if not any("guide_share" in row for rows in stages for row in rows):
        axes.set_axis_off()  # no guide teaches this network
        return
    _draw(axes, stages, "guide_share", "", {"color": "C3", "lw": 1.4})
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("the guide's share of the gradient, 0 to 1", fontsize=9)
    _finish(axes)


def _draw(axes: Any, stages: Sequence[Rows], name: str, label: str, look: Mapping[str, Any]) -> None:
    """A line for each stage that has the metric; a point where there is one epoch."""
    for number, rows in enumerate(stages):
        known = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
        if known:
            marker = "." if len(known) < 20 else ""
            axes.plot(*zip(*known, strict=True), marker=marker, ms=4, label="" if number else label, **look)


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)
