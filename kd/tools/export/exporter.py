"""`python -m kd.export`: writes a finished network for deployment, compares it with the original and describes it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from kd.core import hardware
from kd.core.stage import Source
from kd.datasets import load_data
from kd.store import Store, place
from kd.tools.export import destination
from kd.tools.export.card import Member, write_card
from kd.tools.export.contract import Contract
from kd.tools.export.formats import FORMATS, open_format


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.export", description=__doc__)
    parser.add_argument("key", help="the stage's key, or a beginning of it that is unique")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", help="folder of the export; default: exports/<network>-<key>-<format>")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--store", help="folder of the store; default: $KD_STORE, or store/ in the repository")
    parser.add_argument("--data", help="folder of the data sets; default: $KD_DATA, or data/ in the repository")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit code."""
    arguments = _arguments(given)
    store = Store.at(arguments.store)
    source = store.source(store.complete(arguments.key))
    folder = f"exports/{folder_name(source.model)}-{source.key}-{arguments.format}"
    out = Path(arguments.out or folder).expanduser()
    destination.check(out, arguments.force)
    data_root = place(arguments.data or os.environ.get("KD_DATA"), "data")
    destination.publish_export(out, _export(store, source, arguments.format, data_root), arguments.force)
    print(f"written to {out}")
    return 0


def folder_name(network: str) -> str:
    """The name of a network without what file names cannot have or shells read: timm-resnet18-drop_rate-0.1."""
    return re.sub(r"[^\w.]+", "-", network).strip("-.")[:100]


def _export(store: Store, source: Source, name: str, data_root: Path) -> dict[str, bytes]:
    """The files of an export. Raises KnownError if they do not compute the same as the network in the store."""
    form = open_format(name)
    from kd.tools.export.comparison import compare_logits

    hardware.make_deterministic(hardware.cpu_count())
    network = store.network(source.key)
    data = load_data(source.dataset, data_root, "cpu")
    packed = form.pack(network, source)
    comparison = compare_logits(network, form.unpack(packed), data)
    print(
        f"{name} and the original on {comparison.images} of {comparison.of} test images: logits differ by at most "
        f"{comparison.difference:.2g} (the largest logit is {comparison.scale:.3g}), same class for "
        f"{comparison.agreement:.2f} %; test {comparison.exported:.2f} % and {comparison.original:.2f} %"
    )
    chain = [_member(store, each) for each in source.chain]
    card = write_card(
        chain,
        form,
        comparison,
        size=len(packed[form.weights]),
        made_with=store.record(source.key)["made_with"],
        command=f"python -m kd.export {source.key} --format {name}",
    )
    labels = Contract.of(source).labels
    named = {"labels.txt": labels.encode()} if labels else {}
    return {**packed, **named, "README.md": card.encode()}


def _member(store: Store, source: Source) -> Member:
    """A network of the chain, with its result if it is still in the store."""
    if not store.whole(source.key):
        return Member(source)
    size = (store.root / source.key / "model.safetensors").stat().st_size
    return Member(source, store.result(source.key), store.precision(source.key), size)
