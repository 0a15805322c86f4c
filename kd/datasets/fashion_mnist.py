"""fashion_mnist (Xiao et al. 2017): 28×28 grey pictures of clothes, in torchvision's files."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.datasets import Arrays, grey_to_rgb
from kd.datasets.download import fetch


def read(data_root: Path, content: str | None) -> Arrays:
    """60,000 training and 10,000 test images, padded with black to 32×32, grey repeated to three channels."""
    from torchvision.datasets import FashionMNIST

    files = "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte (unpacked)"
    train, test = fetch(FashionMNIST, data_root, files)
    return Arrays(_images(train), train.targets.numpy(), _images(test), test.targets.numpy())


def _images(split: Any) -> NDArray[np.uint8]:
    return grey_to_rgb(np.pad(split.data.numpy(), ((0, 0), (2, 2), (2, 2))))
