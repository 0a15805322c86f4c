"""The ShuffleNet of Zhang et al. (2018) with 3 groups, in the variant for 32×32 images that RepDistiller trains."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kd.models.taps import Tap, residual_taps

_GROUPS = 3


class _Unit(nn.Module):
    """A grouped 1×1, a 3×3 depthwise and a grouped 1×1 convolution; channels are shuffled after the first of them.

    With stride 2 the input is average-pooled and concatenated; otherwise it is added. Behind the stem of 24 channels
    the first convolution has no groups.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        added = out - channels if stride == 2 else out
        inner = added // 4
        self._groups = 1 if channels == 24 else _GROUPS
        self._concatenates = stride == 2
        self.conv1 = nn.Conv2d(channels, inner, 1, groups=self._groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, added, 1, groups=_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.shortcut = nn.Sequential(nn.AvgPool2d(3, 2, padding=1)) if stride == 2 else nn.Sequential()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = out.unflatten(1, (self._groups, -1)).transpose(1, 2).flatten(1, 2)
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        shortcut = self.shortcut(x)
        result: Tensor = self.relu(torch.cat([out, shortcut], 1) if self._concatenates else out + shortcut)
        return result


class ShuffleNetV1(nn.Module):
    """A 1×1 stem of 24 channels, three stages of 240, 480 and 960, global average pooling and a linear layer.

    The stages have 4, 8 and 4 units. Initialisation is torch's own. The only depth is 50. Takes images of any size.
    """

    head: ClassVar[str] = "linear"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 240, units=4)
        self.layer2 = self._stage(240, 480, units=8)
        self.layer3 = self._stage(480, 960, units=4)
        self.linear = nn.Linear(960, num_classes)
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _stage(channels: int, out: int, units: int) -> nn.Sequential:
        return nn.Sequential(_Unit(channels, out, 2), *(_Unit(out, out, 1) for _ in range(units - 1)))

    def taps(self) -> dict[str, Tap]:
        """The ends of the stages."""
        return residual_taps(self, "layer1", "layer2", "layer3")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
