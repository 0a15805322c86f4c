"""`python -m kd.predict`: prints the classes of pictures and how sure a network is of them.

The network is a finished stage of the store, or an exported one, which needs neither store nor data set. Pictures are
prepared as the network's test images were. Where these were squares of one size, other pictures become such squares.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd.core import hardware
from kd.core.spec import KnownError, printable
from kd.core.stage import Source
from kd.datasets.layouts import PassedOver, pictures_below
from kd.datasets.pictures import PictureError
from kd.datasets.resized import in_order
from kd.store import Store
from kd.tools.export.contract import Contract
from kd.tools.export.formats import Run, run_of
from kd.tools.export.reader import open_export

if TYPE_CHECKING:
    from torch import Tensor

_BATCH, _PIXELS = 256, 8 * 224 * 224  # images of a forward pass, at most


@dataclass(frozen=True)
class Prediction:
    """The classes of a picture, the most probable first; or the reason why it cannot be read."""

    file: Path
    problem: str | None = None
    labels: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()  # of the labels: their softmax, in percent


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.predict", description=__doc__)
    parser.add_argument("network", help="a stage's key or a unique beginning of it, or the path of an export")
    parser.add_argument("pictures", nargs="+", type=Path, help="files, or folders that are searched for pictures")
    parser.add_argument("--top", type=_positive, default=3, metavar="N", help="classes of each picture; default: 3")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--store", help="folder of the store; default: $KD_STORE, or store/ in the repository")
    return parser.parse_args(given)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1 (got {text})")
    return int(text)


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns 1 if a picture cannot be read, or a folder has none; otherwise 0."""
    arguments = _arguments(given)
    hardware.make_deterministic(hardware.cpu_count())
    contract, run = _network(arguments.network, Store.at(arguments.store))
    if contract.resize is None:
        _note(
            f"{contract.dataset} has squares of {contract.image_size} pixels{contract.made}. "
            f"Other pictures are made so: {contract.preprocessing}"
        )
    failed = False
    files = list(_pictures(arguments.pictures))
    for found in predictions(contract, run, files, arguments.top):
        if found.problem is None:
            print(_as_json(found, contract) if arguments.json else _as_line(found, contract), flush=True)
        else:
            _note(f"{found.file}: {found.problem}")
            failed = True
    return int(failed)


def predictions(contract: Contract, run: Run, files: Sequence[Path], top: int) -> Iterator[Prediction]:
    """The `top` most probable classes of each picture, in order. Few pictures are in memory at a time."""
    size = max(1, min(_BATCH, _PIXELS // contract.image_size**2))
    waiting: list[tuple[Path, Tensor | str]] = []
    images = in_order(files, partial(_image_of, contract), hardware.cpu_count())
    for pair in zip(files, images, strict=True):
        waiting.append(pair)
        if sum(not isinstance(image, str) for _, image in waiting) == size:
            yield from _classified(run, waiting, top)
            waiting = []
    yield from _classified(run, waiting, top)


def _network(name: str, store: Store) -> tuple[Contract, Run]:
    """The network that a key or a path names. Raises KnownError if it is neither, or could be both."""
    path = Path(name).expanduser()
    if name and path.exists():
        if os.sep not in name and any(key.startswith(name) for key in store):
            raise KnownError(f"{name} is the beginning of a stage's key, and a path too: write ./{name} for the path")
        return open_export(path)
    if os.sep in name or path.suffix:
        raise KnownError(f"{name} does not exist: it should be a stage's key, or the path of an export")
    key = store.complete(name)
    return Contract.of(store.source(key)), run_of(store.network(key))


def _pictures(given: Sequence[Path]) -> Iterator[Path]:
    """The files that are given, and those in given folders. A line says what is passed over in a folder."""
    for path in given:
        if not path.is_dir():
            yield path
            continue
        passed = PassedOver()
        found = pictures_below(path, "", passed)
        for line in passed.lines(path):
            _note(line)
        if not found:
            yield path  # said in its turn, as a picture that cannot be read
        yield from (path / name for name in found)


def batch_of(source: Source, files: Sequence[Path]) -> Tensor:
    """Pictures prepared as the test images of a stage were: uint8 [picture, 3, height, width]. Raises KnownError."""
    import torch

    contract = Contract.of(source)
    found = [*in_order(files, partial(_image_of, contract), hardware.cpu_count())]
    if problems := [f"{file}: {said}" for file, said in zip(files, found, strict=True) if isinstance(said, str)]:
        raise KnownError("\n".join(problems))
    images, size = [image for image in found if not isinstance(image, str)], contract.image_size
    return torch.stack(images).movedim(-1, 1) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _image_of(contract: Contract, file: Path) -> Tensor:
    """A picture as the network takes it. Raises PictureError, also where the system cannot read the file."""
    if not file.exists():
        raise PictureError("does not exist")
    if file.is_dir():
        raise PictureError("has no pictures")
    try:
        return contract.image_of(file)
    except OSError as error:
        raise PictureError(error.strerror or str(error)) from error


def _classified(run: Run, pictures: Sequence[tuple[Path, Tensor | str]], top: int) -> Iterator[Prediction]:
    """The classes of images uint8 [height, width, 3], in one forward pass. A text is why a file cannot be read."""
    images = [image.numpy() for _, image in pictures if not isinstance(image, str)]
    rows = iter(_confidences(run, images)) if images else iter([])
    for file, image in pictures:
        if isinstance(image, str):
            yield Prediction(file, image)
            continue
        confidences = next(rows)
        labels = np.argsort(-confidences, kind="stable")[:top]  # of equal ones the first, as accuracies count them
        yield Prediction(file, None, tuple(labels.tolist()), tuple(confidences[labels].tolist()))


def _confidences(run: Run, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """The softmax of the logits of images [height, width, 3], in percent: [image, class]."""
    pixels = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255
    logits = run(np.ascontiguousarray(pixels)).astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    confidences: NDArray[np.float64] = 100 * powers / powers.sum(1, keepdims=True)
    return confidences


def _as_line(found: Prediction, contract: Contract) -> str:
    pairs = zip(found.labels, found.confidences, strict=True)
    classes = ", ".join(f"{contract.named(label)} ({confidence:.2f} %)" for label, confidence in pairs)
    return printable(f"{found.file}: {classes}")


def _as_json(found: Prediction, contract: Contract) -> str:
    classes: list[dict[str, Any]] = [
        {"class": contract.named(label), "label": label, "confidence": round(confidence, 4)}
        for label, confidence in zip(found.labels, found.confidences, strict=True)
    ]
    return json.dumps({"file": str(found.file), **classes[0], "next": classes[1:]})


def _note(line: str) -> None:
    """A line for people: what is read by programs has the standard output to itself."""
    print(printable(line), file=sys.stderr, flush=True)
