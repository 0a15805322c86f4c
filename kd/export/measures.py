"""What an exported network is measured by: its logits beside the original's, and how long they take."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.export.base import Format, Images, Logits, Run
from kd.models.normalized import Normalized
from kd.spec import KnownError

# Of the largest logit's size. Fused and reordered sums in float32 stay a hundred times below; a forgotten
# normalisation or another epsilon does not.
TOLERANCE = 1e-4
BATCHES = 1, 128  # images, of the latencies

_SAMPLE = 10_000  # images at most: the whole test set, but of large folders
_AT_ONCE = 500
_RUNS, _SECONDS = 5, 0.3  # a latency's: at least


@dataclass(frozen=True)
class Comparison:
    """The exported network beside the original, on test images; accuracies in percent of them."""

    images: int
    of: int  # test images that there are
    difference: float  # of logits, the largest
    scale: float  # of the original's logits, the largest in size
    dtype: str  # of the exported network's logits
    agreement: float  # how often both choose the same class, in percent
    original: float  # computed in the precision of the stored weights, without autocast
    exported: float


def compare(network: Normalized, run: Run, images: Tensor, labels: Tensor) -> Comparison:
    """Both networks on test images uint8 [sample, height, width, 3] with labels [sample].

    Raises KnownError where a logit differs by more than TOLERANCE of the largest.
    """
    chosen = torch.linspace(0, len(labels) - 1, min(len(labels), _SAMPLE)).long()  # folders are sorted by class
    pairs = [_both(network, run, images[part]) for part in torch.split(chosen, _AT_ONCE)]
    original, exported = (np.concatenate(logits) for logits in zip(*pairs, strict=True))
    truth, ours, theirs = labels[chosen].numpy(), original.argmax(1), exported.argmax(1)
    found = Comparison(
        images=len(chosen),
        of=len(labels),
        difference=float(np.abs(original - exported).max()),
        scale=float(np.abs(original).max()),
        dtype=exported.dtype.name,
        agreement=_percent(ours == theirs),
        original=_percent(ours == truth),
        exported=_percent(theirs == truth),
    )
    if not found.difference <= TOLERANCE * found.scale:  # NaN is not
        raise KnownError(
            f"the exported network is not the original: logits differ by {found.difference:.2g}, and should by "
            f"{TOLERANCE * found.scale:.2g} at most; nothing was written"
        )
    return found


def _both(network: Normalized, run: Run, images: Tensor) -> tuple[Logits, Logits]:
    batch = images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        original: Logits = network(batch).numpy()
    return original, run(as_fed(images))


def as_fed(images: Tensor) -> Images:
    """Images uint8 [sample, height, width, 3] as a runtime is fed: float32 [sample, 3, height, width] in [0, 1]."""
    fed: Images = (images.permute(0, 3, 1, 2).float() / 255).contiguous().numpy()
    return fed


def _percent(hits: NDArray[np.bool_]) -> float:
    return round(100 * float(hits.mean()), 4)


class Bench:
    """Where the networks of a chain are timed: a format's runtime, on the same images."""

    def __init__(self, form: Format, images: Tensor, threads: int) -> None:
        self.form, self._threads = form, threads
        fed = as_fed(images[: max(BATCHES)])
        self._images: Images = np.resize(fed, (max(BATCHES), *fed.shape[1:]))  # repeats what is less

    def latencies(self, packed: dict[str, bytes]) -> tuple[float, ...]:
        """Milliseconds that a batch of each of BATCHES takes: medians of at least five runs after one to warm up."""
        run = self.form.unpack(packed, self._threads)
        return tuple(_median(run, self._images[:batch]) for batch in BATCHES)


def _median(run: Run, images: Images) -> float:
    run(images)
    seconds: list[float] = []
    while len(seconds) < _RUNS or sum(seconds) < _SECONDS:
        began = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)
