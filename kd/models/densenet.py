"""The DenseNets of Huang et al. (2017), DenseNet-BC with a stem for small images, as pytorch-cifar100 has them."""

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

from kd.core.spec import KnownError
from kd.models.taps import Tap, named_taps

# Channels that each layer adds, and layers of each dense block.
_BLOCKS: dict[int, tuple[int, tuple[int, int, int, int]]] = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}


class _Layer(nn.Module):
    """BatchNorm, ReLU and a 1×1 convolution, then the same with a 3×3 one. The output is concatenated to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bottle_neck = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.bottle_neck(x)], 1)


class _Transition(nn.Module):
    """BatchNorm, a 1×1 convolution that halves the channels, and 2×2 average pooling; no ReLU, unlike the paper's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down_sample = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_sample(x)
        return result


class DenseNet(nn.Module):
    """A 3×3 stem, four dense blocks with transitions between, BatchNorm and ReLU, global average pooling, linear.

    The stem has twice as many channels as a layer adds. Initialisation is torch's own. Takes images of at least 8
    pixels.
    """

    head: ClassVar[str] = "linear"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        if image_size < 8:
            raise KnownError(
                f"densenet{depth} halves its input 3 times: images should be at least 8 pixels wide (got {image_size})"
            )
        growth, blocks = _BLOCKS[depth]
        channels = 2 * growth
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        features: OrderedDict[str, nn.Module] = OrderedDict()
        for i, layers in enumerate(blocks[:-1]):
            features[f"dense_block_layer_{i}"] = self._block(channels, growth, layers)
            channels += growth * layers
            features[f"transition_layer_{i}"] = _Transition(channels)
            channels //= 2
        features["dense_block3"] = self._block(channels, growth, blocks[-1])  # no "_layer_" in the released weights
        channels += growth * blocks[-1]
        features["bn"] = nn.BatchNorm2d(channels)
        features["relu"] = nn.ReLU(inplace=True)
        self.features = nn.Sequential(features)
        self.linear = nn.Linear(channels, num_classes)

    @staticmethod
    def _block(channels: int, growth: int, layers: int) -> nn.Sequential:
        return nn.Sequential(
            OrderedDict((f"bottle_neck_layer_{i}", _Layer(channels + growth * i, growth)) for i in range(layers))
        )

    def taps(self) -> dict[str, Tap]:
        """The dense blocks, and what the next BatchNorm makes of their outputs."""
        blocks = [*(f"dense_block_layer_{i}" for i in range(3)), "dense_block3"]
        norms = [*(f"transition_layer_{i}.down_sample.0" for i in range(3)), "bn"]
        return named_taps(*([Tap(f"features.{path}") for path in paths] for paths in (blocks, norms)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        logits: Tensor = self.linear(self.features(self.conv1(x)).mean((2, 3)))
        return logits
