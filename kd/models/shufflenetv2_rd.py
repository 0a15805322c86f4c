"""The ShuffleNetV2 ×1 of Ma et al. (2018), in the variant for 32×32 images that RepDistiller trains."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kd.models.taps import Tap, residual_taps


def _pointwise(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 1, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class _Down(nn.Module):
    """Two branches with stride 2, of two and of three convolutions. Their channels are interleaved."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        half = out // 2
        self.conv1, self.bn1 = _depthwise(channels, 2), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _pointwise(channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        out = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x)))))
        out = self.bn5(self.conv5(out))
        result: Tensor = self.relu(torch.stack([short, out], 2).flatten(1, 2))
        return result


class _Basic(nn.Module):
    """Half of the channels stay as they are, half pass three convolutions. Then the two are interleaved.

    The last ReLU is after that. It changes nothing in the half that stays, because that has had a ReLU before.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        halves = x.chunk(2, 1)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(halves[1])))))
        out = self.bn3(self.conv3(out))
        result: Tensor = self.relu(torch.stack([halves[0], out], 2).flatten(1, 2))
        return result


class ShuffleNetV2RD(nn.Module):
    """A 1×1 stem of 24 channels, stages of 116, 232 and 464, 1,024 channels, global average pooling and a linear layer.

    Each stage halves its input and has 3, 7 and 3 more blocks. The depth counts the longer branch. Initialisation is
    torch's own. The only depth is 51. Takes images of any size.
    """

    head: ClassVar[str] = "linear"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _pointwise(in_channels, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 116, blocks=3)
        self.layer2 = self._stage(116, 232, blocks=7)
        self.layer3 = self._stage(232, 464, blocks=3)
        self.conv2 = _pointwise(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _stage(channels: int, out: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(_Down(channels, out), *(_Basic(out) for _ in range(blocks)))

    def taps(self) -> dict[str, Tap]:
        """The ends of the stages."""
        return residual_taps(self, "layer1", "layer2", "layer3")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
