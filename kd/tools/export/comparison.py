"""The comparison of the exported network with the original: logits and accuracy on the test images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.core.spec import KnownError
from kd.core.statistics import trim
from kd.datasets.data import Images
from kd.models.normalization import Normalized
from kd.tools.export.formats import Logits, Pixels, Run

# Relative to the largest logit. Fused and reordered sums in float32 differ a hundred times less. A missing
# normalisation or another epsilon differs more.
TOLERANCE = 1e-4

_SAMPLE = 10_000  # images at most: the whole test set, except for large folders
_AT_ONCE = 500


@dataclass(frozen=True)
class Comparison:
    """The exported network and the original on test images; accuracies in percent."""

    images: int
    of: int  # the number of all test images
    difference: float  # the largest difference of two logits
    scale: float  # the largest absolute logit of the original
    dtype: str  # of the exported network's logits
    agreement: float  # how often both choose the same class, in percent
    original: float  # computed in the precision of the stored weights, without autocast
    exported: float


def compare_logits(network: Normalized, run: Run, data: Images) -> Comparison:
    """Both networks on the test images of a data set.

    Raises KnownError if a logit differs by more than TOLERANCE times the largest.
    """
    labels = data.test_labels
    chosen = torch.linspace(0, len(labels) - 1, min(len(labels), _SAMPLE)).long()  # folders are sorted by class
    parts = torch.split(chosen, min(_AT_ONCE, data.eval_batch))
    pairs = [_both(network, run, data.plain("test", part.numpy())) for part in parts]
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
    if not found.difference <= TOLERANCE * found.scale:  # also true for NaN
        raise KnownError(
            f"the exported network differs from the original: logits by {found.difference:.2g}, allowed are "
            f"{TOLERANCE * found.scale:.2g}; nothing was written"
        )
    return found


def _both(network: Normalized, run: Run, batch: Tensor) -> tuple[Logits, Logits]:
    with torch.inference_mode():
        original: Logits = network(batch).numpy()
    fed: Pixels = (batch.float() / 255).contiguous().numpy()
    return original, run(fed)


def _percent(hits: NDArray[np.bool_]) -> float:
    return trim(100 * float(hits.mean()))
