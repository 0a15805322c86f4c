"""The figure of a loss surface: a panel a network, all on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd import files
from kd.inspection.grid import Landscape, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure

_INSIDE = 0.9  # of the span: where a contour may be labelled


def write(surface: Surface, folder: Path) -> None:
    """surface.json, .svg and .png into a folder, each there whole or not at all. Raises OSError."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    files.write(folder / "surface.json", surface.model_dump_json(indent=1))
    with mpl.rc_context({"svg.hashsalt": "kd"}):  # the same bytes for the same numbers
        figure = _draw(surface)
        for form, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            with files.replacing(folder / f"surface.{form}") as file:
                figure.savefig(file, format=form, **options)
        pyplot.close(figure)


def levels(surface: Surface, number: int = 16) -> NDArray[np.float64]:
    """Losses of the contours, in equal ratios from the least of all panels to the largest."""
    grids = np.array([network.losses for network in surface.networks])
    low, high = max(grids.min(), 1e-6), max(grids.max(), 2e-6)
    return np.geomspace(low, high * (1 + 1e-9), number)


def _draw(surface: Surface) -> Figure:
    from matplotlib import pyplot

    count, shared = len(surface.networks), levels(surface)
    figure, (panels,) = pyplot.subplots(
        1, count, figsize=(3.6 * count + 1, 4.3), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, network in zip(panels, surface.networks, strict=True):
        filled = _panel(axes, surface, network, shared)
    panels[0].set_ylabel("along the second direction")
    bar = figure.colorbar(filled, ax=panels.tolist(), label="cross-entropy, nats", shrink=0.8)
    bar.set_ticks(shared[::3].tolist(), labels=[f"{level:.2g}" for level in shared[::3]])
    images = f"{surface.images:,} test images of {surface.dataset} {surface.content or ''}".rstrip()
    figure.suptitle(
        f"Loss around each network (+) on {images}\n"
        f"Gaussian directions of seed {surface.seed}; 1 is as far as each filter is long",
        fontsize=8,
    )
    return figure


def _panel(axes: Axes, surface: Surface, network: Landscape, shared: NDArray[np.float64]) -> QuadContourSet:
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    values = surface.axis, surface.axis, np.clip(network.losses, shared[0], shared[-1])
    # One hue from light to dark, so that the order survives greyscale, and never so dark that a line is lost.
    norm = LogNorm(shared[0], shared[-1] * 3)
    filled = axes.contourf(*values, shared, cmap="Blues", norm=norm)
    lines = axes.contour(*values, shared[1:-1:2], colors="black", linewidths=0.7)
    for text in axes.clabel(lines, inline=False, fmt="%.2g", fontsize=7):
        if max(map(abs, text.get_position())) > _INSIDE * surface.span:  # it would be cut off
            text.remove()
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.plot(0, 0, "+", color="black", markersize=9)
    axes.set_title(f"{network.name}\n{network.key}, loss {network.loss:.3f}", fontsize=8)
    axes.set_xlabel("along the first direction")
    axes.set_aspect("equal")
    return filled
