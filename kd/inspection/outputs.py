"""The logits of finished stages on the test images of their data set, kept in the store."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd import files
from kd.pipeline import RETRIED
from kd.spec import KnownError
from kd.stage import Source, Stage
from kd.workplace import Workplace


def outputs(workplace: Workplace, source: Source) -> NDArray[np.float32]:
    """The logits [sample, class] of a finished stage, or of somebody's network, on all test images.

    They are computed as its test accuracy was, and kept as `store/outputs/<key>-<of the weights' hash>.npy`, where
    that can be written. Raises KnownError where the stage or its images are not there, or a logit is not finite.
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
        raise KnownError(f"stage {key}: its logits on the test images should be finite, and are not all")
    return logits


def _read(path: Path, classes: int) -> NDArray[np.float32] | None:
    """None where no file is there, or not one of ours."""
    try:
        with path.open("rb") as file:
            logits: NDArray[np.float32] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return logits if logits.dtype == np.float32 and logits.shape[1:] == (classes,) else None


def _compute(workplace: Workplace, source: Source) -> NDArray[np.float32]:
    from torch import channels_last

    from kd.evaluation import predict

    network, precision = workplace.store.network(source.key), "fp32"
    if isinstance(source, Stage):
        network = network.to(memory_format=channels_last)
        if RETRIED not in workplace.store.record(source.key)["made_with"]:
            precision = source.train.precision
    data = workplace.data(source)
    logits = predict(network.to(workplace.device), data.test_images, data.test_labels.device, precision)
    found: NDArray[np.float32] = logits.float().cpu().numpy()
    return found
