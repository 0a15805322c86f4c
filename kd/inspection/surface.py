"""`python -m kd.inspection.surface`: the loss around finished networks, as numbers and as a figure on one scale."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from kd import files
from kd.hardware import bring
from kd.inspection.figure import write
from kd.inspection.grid import Grid, Landscape, Surface
from kd.problems import explain
from kd.progress import console, duration
from kd.spec import KnownError
from kd.stage import RuntimeSpec, Source, Stage
from kd.store import Store, place
from kd.streams import DIRECTION, random_stream
from kd.tracking.names import run_name
from kd.workplace import Workplace

if TYPE_CHECKING:
    from kd.datasets.data import Data

_LINE_EVERY = 10.0  # seconds between two plain lines


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.inspection.surface", description=__doc__)
    parser.add_argument("keys", nargs="+", metavar="KEY", help="a stage's, or as much of its beginning as no other has")
    parser.add_argument("--out", required=True, help="a folder for surface.json, surface.svg and surface.png")
    parser.add_argument("--span", type=float, default=1.0, help="how far to go, in lengths of the filters: 1")
    parser.add_argument("--points", type=int, default=21, help="of each axis: 21")
    parser.add_argument("--images", type=int, default=2000, help="of the test set, at most: 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the two directions: 0")
    parser.add_argument("--store", help="its folder; by default $KD_STORE, or store/ in the repository")
    parser.add_argument("--data", help="where data sets lie; by default $KD_DATA, or data/ in the repository")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit code."""
    arguments = _arguments(given)
    try:
        grid = Grid(**{name: getattr(arguments, name) for name in Grid.model_fields})
    except ValidationError as error:
        raise KnownError("\n".join(f"--{problem}" for problem in explain(error))) from error
    store = Store(place(arguments.store or os.environ.get("KD_STORE"), "store"))
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
        write(surface, out)
    print(f"{out}/surface.json, .svg and .png are written")
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
    """The loss around the networks of stages that see the same images, each along its own two directions.

    At equal seeds the directions are drawn alike; each network's are as long as its own filters. Raises KnownError
    where a loss is not finite.
    """
    data, shown = workplace.data(sources[0]), console()
    chosen = spread_over_classes(data.test_labels.numpy(force=True), grid.images)
    networks = []
    for number, source in enumerate(sources, 1):
        rows = _losses(workplace, source, data, chosen, grid)
        name = f"{number} of {len(sources)}: {source.role} {source.model} {source.key}"
        losses = np.array(list(_followed(rows, grid.points, name, shown)))
        if not np.isfinite(losses).all():
            raise KnownError(f"stage {source.key}: a loss on the grid is not finite; a smaller --span may help")
        label = run_name([source]) if isinstance(source, Stage) else f"{source.model}, given weights"
        networks.append(Landscape(key=source.key, name=label, losses=tuple(map(tuple, losses.round(6).tolist()))))
    return Surface(
        dataset=data.spec.name,
        content=data.spec.content,
        images=len(chosen),
        span=grid.span,
        seed=grid.seed,
        axis=tuple(grid.axis.tolist()),
        networks=tuple(networks),
        made_with={"torch": version("torch"), "device": workplace.device, "threads": workplace.threads},
    )


def spread_over_classes(labels: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """Positions of so many samples, or of all if there are fewer: evenly over the classes, and always the same."""
    order = np.argsort(labels, kind="stable")
    number = min(images, len(order))
    return order[np.arange(number) * len(order) // number]


def _losses(
    workplace: Workplace, source: Source, data: Data, chosen: NDArray[np.int64], grid: Grid
) -> Iterator[list[float]]:
    from torch import channels_last

    from kd.inspection.landscape import draw_direction, losses, normalized

    network = workplace.store.network(source.key).to(memory_format=channels_last).to(workplace.device)
    inputs = normalized(network, bring(data.test_images[chosen], data.test_labels.device))
    rng = random_stream(grid.seed, 0, DIRECTION)
    first, second = (draw_direction(network.network, rng) for _ in range(2))
    return losses(network.network, (first, second), grid.axis, inputs, data.test_labels[chosen])


def _followed(rows: Iterable[list[float]], total: int, name: str, shown: Console) -> Iterator[list[float]]:
    """The rows of a grid, as they are computed: with a bar on a terminal, lines elsewhere."""
    began = told = time.monotonic()
    bar = track(rows, name, total, console=shown, transient=True, disable=not shown.is_terminal)
    for number, row in enumerate(bar, 1):
        now = time.monotonic()
        if number == 1 or (now - told > _LINE_EVERY and not shown.is_terminal):
            left = duration((now - began) / number * (total - number))
            shown.print(f"{name}: row {number} of {total}, about {left} left", highlight=False)
            told = now
        yield row


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KnownError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
