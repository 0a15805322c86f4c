"""The ShuffleNetV2 ×1 of Ma et al. (2018) for small images, as in pytorch-cifar100."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kd.models.taps import Tap, named_taps


def _pointwise(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels), nn.BatchNorm2d(channels)]


class _Unit(nn.Module):
    """Half of the channels pass three convolutions, and half stay as they are. Then the channels are shuffled.

    With stride 2 both branches get all channels, and the shortcut has two convolutions.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        inner, half = (channels, out // 2) if stride == 2 else (channels // 2, channels // 2)
        self.residual = nn.Sequential(*_pointwise(inner, inner), *_depthwise(inner, stride), *_pointwise(inner, half))
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut = nn.Sequential(*_depthwise(channels, stride), *_pointwise(channels, half))
        self._splits = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        shortcut, residual = x, x
        if self._splits:
            halves = x.chunk(2, 1)
            shortcut, residual = halves[0], halves[1]
        return torch.stack([self.shortcut(shortcut), self.residual(residual)], 2).flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """A 3×3 stem of 24 channels, three stages of 116, 232 and 464, 1,024 channels, global average pooling, linear.

    As in the original, the stem has stride 1 and BatchNorm, no ReLU and no pooling. Every convolution has a bias.
    Initialisation is torch's own. The only depth is 51. Takes images of any size.
    """

    head: ClassVar[str] = "fc"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(in_channels, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.stage2 = self._stage(24, 116, units=4)
        self.stage3 = self._stage(116, 232, units=8)
        self.stage4 = self._stage(232, 464, units=4)
        self.conv5 = nn.Sequential(*_pointwise(464, 1024))
        self.fc = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(channels: int, out: int, units: int) -> nn.Sequential:
        return nn.Sequential(_Unit(channels, out, 2), *(_Unit(out, out, 1) for _ in range(units - 1)))

    def taps(self) -> dict[str, Tap]:
        """The ends of the stages. Each branch has its own last ReLU, so there is no map before it."""
        ends = [Tap("stage2"), Tap("stage3"), Tap("stage4")]
        return named_taps(ends, ends)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.stage4(self.stage3(self.stage2(self.pre(x))))
        logits: Tensor = self.fc(self.conv5(x).mean((2, 3)))
        return logits
