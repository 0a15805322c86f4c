"""The loss around networks: surface.json, and the figure of it, all panels on one scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kd import files
from kd.spec import Frozen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure

METHOD = (
    "mean cross-entropy at weights + x*first + y*second, in the precision of the stored weights, without autocast; "
    "two Gaussian directions drawn from the seed, each filter scaled to the length of the network's own (Li et al. "
    "2018, section 4), zero for biases and BatchNorm's parameters; BatchNorm's statistics as stored"
)

_INSIDE = 0.9  # of the span: where a contour may be labelled


class Landscape(Frozen):
    """The loss around one network, in nats."""

    key: str
    name: str
    losses: tuple[tuple[float, ...], ...]  # [y, x]; the network's own is in the middle

    @property
    def loss(self) -> float:
        """At the network's own weights."""
        middle = len(self.losses) // 2
        return self.losses[middle][middle]


class Surface(Frozen):
    """surface.json: the loss around networks, on the same test images, spread over the classes."""

    method: str = METHOD
    dataset: str
    content: str | None
    images: int
    span: float
    seed: int
    axis: tuple[float, ...]  # of x and y alike, in lengths of the filters
    networks: tuple[Landscape, ...]
    made_with: dict[str, str | int]


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
    images = f"{surface.images:,} test images ({' '.join(filter(None, (surface.dataset, surface.content)))})"
    figure.suptitle(
        f"Cross-entropy around each network, +, on {images}\n"
        f"Gaussian directions of seed {surface.seed}; 1 is as far as each filter is long",
        fontsize=9,
    )
    return figure


def _panel(axes: Axes, surface: Surface, network: Landscape, shared: NDArray[np.float64]) -> QuadContourSet:
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    values = surface.axis, surface.axis, np.array(network.losses)
    # One hue from light to dark, so that the order survives greyscale, and never so dark that a line is lost.
    norm = LogNorm(shared[0], shared[-1] * 3)
    filled = axes.contourf(*values, shared, cmap="Blues", norm=norm)
    lines = axes.contour(*values, shared[1:-1:2], colors="black", linewidths=0.7)
    for text in axes.clabel(lines, fmt="%.2g", fontsize=7):
        if max(map(abs, text.get_position())) > _INSIDE * surface.span:  # it would be cut off
            text.remove()
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axes.plot(0, 0, "+", color="black", markersize=9)
    axes.set_title(f"{network.name}\n{network.key}, loss {network.loss:.3f}", fontsize=8)
    axes.set_xlabel("along the first direction")
    axes.set_aspect("equal")
    return filled
