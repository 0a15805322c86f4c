"""`python -m kd.export`: writes a finished network for deployment, compares it with the original and describes it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kd import hardware
from kd.datasets import load
from kd.export import folder
from kd.export.base import FORMATS, open_format
from kd.export.card import HEADINGS, Member, cells, write_card
from kd.progress import console
from kd.spec import KnownError
from kd.stage import Source
from kd.store import Store, place

if TYPE_CHECKING:
    from kd.export.measures import Bench


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.export", description=__doc__)
    parser.add_argument("key", help="the stage's, or as much of its beginning as no other has")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", help="a folder to be made; by default exports/<network>-<key>-<format>")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--store", help="its folder; by default $KD_STORE, or store/ in the repository")
    parser.add_argument("--data", help="where data sets lie; by default $KD_DATA, or data/ in the repository")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit code."""
    arguments = _arguments(given)
    store = Store(place(arguments.store or os.environ.get("KD_STORE"), "store"))
    source = store.source(store.complete(arguments.key))
    out = Path(arguments.out or f"exports/{source.model}-{source.key}-{arguments.format}").expanduser()
    folder.check(out, arguments.force)
    data_root = place(arguments.data or os.environ.get("KD_DATA"), "data")
    folder.write(out, _export(store, source, arguments.format, data_root), arguments.force)
    print(f"written to {out}")
    return 0


def _export(store: Store, source: Source, name: str, data_root: Path) -> dict[str, bytes]:
    """The files of an export. Raises KnownError where they are not the network that is in the store."""
    form, threads = open_format(name), hardware.cpu_count()
    from kd.export.measures import Bench, compare

    hardware.prepare(threads)
    network, result = store.network(source.key), store.result(source.key)
    data = load(source.dataset, data_root, "cpu")
    packed = form.pack(network, source)
    comparison = compare(network, form.unpack(packed, threads), data.test_images, data.test_labels)
    print(
        f"{name} beside the original on {comparison.images} of {comparison.of} test images: logits differ by "
        f"{comparison.difference:.2g} at most (the largest is {comparison.scale:.3g}), the same class for "
        f"{comparison.agreement:.2f} %; test {comparison.exported:.2f} % and {comparison.original:.2f} %"
    )
    bench = Bench(form, data.test_images, threads)
    chain = [_guide(store, guide, bench) for guide in source.chain[:-1]]
    chain.append(Member(source, result, len(packed[form.weights]), bench.latencies(packed)))
    measured = f"Latencies are medians in {form.runtime} on {hardware.describe()}; threads: {threads}."
    _print(chain, measured)
    command = f"python -m kd.export {source.key} --format {name}"
    card = write_card(chain, form, comparison, store.record(source.key)["made_with"], measured, command)
    return {**packed, "README.md": card.encode()}


def _guide(store: Store, guide: Source, bench: Bench) -> Member:
    """A network that the exported one learned from, measured in the same format; if it is still in the store."""
    if not store.whole(guide.key):
        return Member(guide)
    print(f"measuring {guide.role} {guide.model}", flush=True)
    packed = bench.form.pack(store.network(guide.key), guide)
    return Member(guide, store.result(guide.key), len(packed[bench.form.weights]), bench.latencies(packed))


def _print(chain: Sequence[Member], measured: str) -> None:
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 3 else "right", overflow="fold", no_wrap=heading == "stage")
    for member in chain:
        table.add_row(*cells(member))
    console().print(table)
    print(measured)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KnownError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
