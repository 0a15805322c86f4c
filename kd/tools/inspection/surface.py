"""`python -m kd.inspection.surface`: the loss surface around finished networks, as numbers and as a figure."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator
from rich.console import Console
from rich.progress import track

from kd.core import files
from kd.core.spec import Frozen, KnownError, explain
from kd.core.stage import DIRECTION, Seed, Source, Stage, random_stream
from kd.reporting.console import console, duration
from kd.reporting.tracking import run_name
from kd.store import Store, place
from kd.training.workplace import RuntimeSpec, Workplace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure


_LINE_EVERY = 10.0  # seconds between two plain lines
_INSIDE = 0.9  # of the span: contours are labelled only inside this
METHOD = (
    "mean cross-entropy at weights + x*first + y*second, in the precision of the stored weights, without autocast; "
    "two Gaussian directions drawn from the seed, each filter scaled to the length of the network's own (Li et al. "
    "2018, section 4), zero for biases and BatchNorm's parameters; BatchNorm's statistics as stored"
)


class Grid(Frozen):
    """The grid of the loss: points × points weights around the network's, and the number of test images."""

    span: float = Field(gt=0)  # both axes run from -span to span, in norms of the filters
    points: int = Field(ge=3)
    images: int = Field(ge=1)
    seed: Seed

    @field_validator("points")
    @classmethod
    def _has_a_centre(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError("should be odd, so that one point is the network itself")
        return points

    @property
    def axis(self) -> NDArray[np.float64]:
        """The values of an axis. They are symmetric around zero to the bit."""
        steps = np.arange(self.points) - self.points // 2
        return self.span * steps / (self.points // 2)


class Landscape(Frozen):
    """The loss around one network, in nats."""

    key: str
    name: str
    losses: tuple[tuple[float, ...], ...]  # [y, x]; the network's own loss is in the middle

    @property
    def loss(self) -> float:
        """The loss at the network's own weights."""
        middle = len(self.losses) // 2
        return self.losses[middle][middle]


class Surface(Frozen):
    """surface.json: the loss around several networks, on the same test images of all classes."""

    method: str = METHOD
    dataset: str
    content: str | None
    images: int
    span: float
    seed: int
    axis: tuple[float, ...]  # the values of x and of y, in norms of the filters
    networks: tuple[Landscape, ...]
    made_with: dict[str, str | int]


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.inspection.surface", description=__doc__)
    parser.add_argument("keys", nargs="+", metavar="KEY", help="a stage's key, or a beginning of it that is unique")
    parser.add_argument("--out", required=True, help="folder for surface.json, surface.svg and surface.png")
    parser.add_argument("--span", type=float, default=1.0, help="largest distance, in norms of the filters; default: 1")
    parser.add_argument("--points", type=int, default=21, help="points of each axis; default: 21")
    parser.add_argument("--images", type=int, default=2000, help="number of test images; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="seed of the two directions; default: 0")
    parser.add_argument("--store", help="folder of the store; default: $KD_STORE, or store/ in the repository")
    parser.add_argument("--data", help="folder of the data sets; default: $KD_DATA, or data/ in the repository")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit code."""
    arguments = _arguments(given)
    try:
        grid = Grid(**{name: getattr(arguments, name) for name in Grid.model_fields})
    except ValidationError as error:
        raise KnownError("\n".join(f"--{problem}" for problem in explain(error))) from error
    store = Store.at(arguments.store)
    sources = [store.source(key) for key in dict.fromkeys(map(store.complete, arguments.keys))]
    _check_data(sources)
    out = Path(arguments.out).expanduser()
    with _writing(out):
        files.make(out)
    workplace = Workplace(
        store, place(arguments.data or os.environ.get("KD_DATA"), "data"), RuntimeSpec.model_validate({})
    )
    surface = compute(workplace, sources, grid)
    with _writing(out):
        write_surface(surface, out)
    print(f"written: {out}/surface.json, surface.svg and surface.png")
    return 0


def _check_data(sources: Sequence[Source]) -> None:
    seen = {(source.dataset.name, source.dataset.content): source for source in sources}
    if len(seen) > 1:
        told = (f"{s.key} those of {s.dataset.name} {s.dataset.content or ''}".rstrip() for s in seen.values())
        raise KnownError(f"the stages should have been trained on the same images ({', '.join(told)})")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KnownError(f"--out: cannot write to {out}: {error}") from error


def compute(workplace: Workplace, sources: Sequence[Source], grid: Grid) -> Surface:
    """The loss around the networks of stages with the same data, each along its own two directions.

    All networks use the same random numbers; the directions are scaled to each network's own filters. Raises KnownError
    if a loss is not finite.
    """
    shown, networks = console(), []
    chosen = spread_over_classes(workplace.data(sources[0]).test_labels.numpy(force=True), grid.images)
    for number, source in enumerate(sources, 1):
        rows = _losses(workplace, source, chosen, grid)
        name = f"{number} of {len(sources)}: {source.role} {source.model} {source.key}"
        losses = np.array(list(_followed(rows, grid.points, name, shown)))
        if not np.isfinite(losses).all():
            raise KnownError(f"stage {source.key}: a loss on the grid is not finite; try a smaller --span")
        label = run_name([source]) if isinstance(source, Stage) else f"{source.model}, given weights"
        networks.append(Landscape(key=source.key, name=label, losses=tuple(map(tuple, losses.round(6).tolist()))))
    return Surface(
        dataset=sources[0].dataset.name,
        content=sources[0].dataset.content,
        images=len(chosen),
        span=grid.span,
        seed=grid.seed,
        axis=tuple(grid.axis.tolist()),
        networks=tuple(networks),
        made_with={"torch": version("torch"), "device": workplace.device, "threads": workplace.threads},
    )


def spread_over_classes(labels: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """Positions of this many samples, or of all if there are fewer: evenly over the classes, and always the same."""
    order = np.argsort(labels, kind="stable")
    number = min(images, len(order))
    return order[np.arange(number) * len(order) // number]


def _losses(workplace: Workplace, source: Source, chosen: NDArray[np.int64], grid: Grid) -> Iterator[list[float]]:
    from torch import channels_last

    from kd.tools.inspection.landscape import draw_direction, losses, normalized

    network = workplace.store.network(source.key).to(memory_format=channels_last).to(workplace.device)
    data = workplace.data(source)  # of the same photographs, each stage may have squares of its own size
    inputs = normalized(network, data.plain("test", chosen))
    rng = random_stream(grid.seed, 0, DIRECTION)
    first, second = (draw_direction(network.network, rng) for _ in range(2))
    return losses(network.network, (first, second), grid.axis, inputs, data.test_labels[chosen])


def _followed(rows: Iterable[list[float]], total: int, name: str, shown: Console) -> Iterator[list[float]]:
    """The rows of a grid as they are computed, with a bar on a terminal, otherwise with plain lines."""
    began = told = time.monotonic()
    bar = track(rows, name, total, console=shown, transient=True, disable=not shown.is_terminal)
    for number, row in enumerate(bar, 1):
        now = time.monotonic()
        if number == 1 or (now - told > _LINE_EVERY and not shown.is_terminal):
            left = duration((now - began) / number * (total - number))
            shown.print(f"{name}: row {number} of {total}, about {left} left", highlight=False)
            told = now
        yield row


def write_surface(surface: Surface, folder: Path) -> None:
    """Write surface.json, .svg and .png into a folder, each atomically. Raises OSError."""
    from matplotlib import rc_context

    files.write(folder / "surface.json", surface.model_dump_json(indent=1))
    with rc_context({"svg.hashsalt": "kd"}):  # equal numbers give equal bytes
        figure = _draw(surface)
        for form, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            with files.replacing(folder / f"surface.{form}") as file:
                figure.savefig(file, format=form, **options)


def levels(surface: Surface, number: int = 16) -> NDArray[np.float64]:
    """The losses of the contours, with equal ratios, from the smallest to the largest of all panels."""
    grids = np.array([network.losses for network in surface.networks])
    low, high = max(grids.min(), 1e-6), max(grids.max(), 2e-6)
    return np.geomspace(low, high * (1 + 1e-9), number)


def _draw(surface: Surface) -> Figure:
    from matplotlib.figure import Figure

    count, shared = len(surface.networks), levels(surface)
    figure = Figure(figsize=(3.6 * count + 1, 4.3), layout="constrained")
    (panels,) = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)
    for axes, network in zip(panels, surface.networks, strict=True):
        filled = _panel(axes, surface, network, shared)
    panels[0].set_ylabel("along the second direction")
    bar = figure.colorbar(filled, ax=panels.tolist(), label="cross-entropy, nats", shrink=0.8)
    bar.set_ticks(shared[::3].tolist(), labels=[f"{level:.2g}" for level in shared[::3]])
    images = f"{surface.images:,} test images of {surface.dataset} {surface.content or ''}".rstrip()
    figure.suptitle(
        f"Loss around each network (+) on {images}\n"
        f"Gaussian directions of seed {surface.seed}; a distance of 1 is the norm of each filter",
        fontsize=8,
    )
    return figure


def _panel(axes: Axes, surface: Surface, network: Landscape, shared: NDArray[np.float64]) -> QuadContourSet:
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    values = surface.axis, surface.axis, np.clip(network.losses, shared[0], shared[-1])
    # One hue from light to dark, so that it can be read in grey; never so dark that lines become invisible.
    norm = LogNorm(shared[0], shared[-1] * 3)
    filled = axes.contourf(*values, shared, cmap="Blues", norm=norm)
    lines = axes.contour(*values, shared[1:-1:2], colors="black", linewidths=0.7)
    for text in axes.clabel(lines, inline=False, fmt="%.2g", fontsize=7):
        if max(map(abs, text.get_position())) > _INSIDE * surface.span:  # the label is cut off at the edge
            text.remove()
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.plot(0, 0, "+", color="black", markersize=9)
    axes.set_title(f"{network.name}\n{network.key}, loss {network.loss:.3f}", fontsize=8)
    axes.set_xlabel("along the first direction")
    axes.set_aspect("equal")
    return filled
