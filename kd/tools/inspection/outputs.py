"""The logits of finished stages on the test images of their data set, cached in the store."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd.core import files
from kd.core.spec import KnownError
from kd.core.stage import Source, Stage
from kd.training.workplace import Workplace


def outputs(workplace: Workplace, source: Source) -> NDArray[np.float32]:
    """The logits [sample, class] of a finished stage, or of a given network, on all test images.

    They are computed in the same way as the stage's test accuracy. Only with freeze=backbone the accuracy is that of
    the rounded features from the bank, and may differ in a few images. They are cached as
    `store/outputs/<key>-<hash of the weights>.npy` if that can be written. Raises KnownError if the stage or its images
    are missing, or if a logit is not finite.
    """
    store, key = workplace.store, source.key
    path = store.outputs / f"{key}-{store.fingerprint(key)[:16]}.npy"
    logits = _read(path, source.dataset.num_classes)
    if logits is None:
        logits = _compute(workplace, source)
        with suppress(OSError):
            files.make(path.parent)
            with files.replacing(path) as file:
                np.lib.format.write_array(file, logits, allow_pickle=False)
    if not np.isfinite(logits).all():
        raise KnownError(f"stage {key}: some of its logits on the test images are not finite")
    return logits


def _read(path: Path, classes: int) -> NDArray[np.float32] | None:
    """The cached logits; None if there is no file, or if it is not valid."""
    try:
        with path.open("rb") as file:
            logits: NDArray[np.float32] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return logits if logits.dtype == np.float32 and logits.shape[1:] == (classes,) else None


def _compute(workplace: Workplace, source: Source) -> NDArray[np.float32]:
    from torch import channels_last

    from kd.training.step import predict

    network, precision = workplace.store.network(source.key), workplace.store.precision(source.key)
    if isinstance(source, Stage):
        network = network.to(memory_format=channels_last)
    data = workplace.data(source)
    logits = predict(network.to(workplace.device), data.batches("test"), data.test_labels.device, precision)
    found: NDArray[np.float32] = logits.float().cpu().numpy()
    return found
