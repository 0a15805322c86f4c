"""cifar10 and cifar100 (Krizhevsky 2009), in torchvision's files."""

from pathlib import Path
from typing import Any

import numpy as np

from kd.datasets import Arrays
from kd.datasets.download import fetch


def read_cifar10(data_root: Path, content: str | None) -> Arrays:
    """50,000 training and 10,000 test images of ten classes."""
    from torchvision.datasets import CIFAR10

    return _arrays(*fetch(CIFAR10, data_root, "cifar-10-batches-py/ (from cifar-10-python.tar.gz)"))


def read_cifar100(data_root: Path, content: str | None) -> Arrays:
    """50,000 training and 10,000 test images of a hundred classes."""
    from torchvision.datasets import CIFAR100

    return _arrays(*fetch(CIFAR100, data_root, "cifar-100-python/ (from cifar-100-python.tar.gz)"))


def _arrays(train: Any, test: Any) -> Arrays:
    return Arrays(train.data, np.array(train.targets, np.int64), test.data, np.array(test.targets, np.int64))
