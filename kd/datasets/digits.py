"""digits: scikit-learn's 1,797 scans of handwritten digits, which come with the library."""

from pathlib import Path

import numpy as np

from kd.datasets import Arrays, grey_to_rgb

_TEST = 360  # the last scans are by other writers than the rest


def read(data_root: Path, content: str | None) -> Arrays:
    """The 8×8 scans doubled to 16×16, grey repeated to three channels; the last 360 are the test set."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    grey = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = grey_to_rgb(grey.repeat(2, axis=1).repeat(2, axis=2))
    labels = labels.astype(np.int64)
    return Arrays(images[:-_TEST], labels[:-_TEST], images[-_TEST:], labels[-_TEST:])
