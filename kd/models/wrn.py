"""The wide ResNets of Zagoruyko and Komodakis (2016), as RepDistiller trains them."""

from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, named_taps


class _Unit(nn.Module):
    """Twice BatchNorm, ReLU and a 3×3 convolution, and a shortcut around them.

    If the width changes, the shortcut is a 1×1 convolution, and it starts after the first ReLU.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.convShortcut: nn.Module | None = None
        if channels != width:
            self.convShortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        result: Tensor = shortcut + self.conv2(self.relu(self.bn2(self.conv1(active))))
        return result


class _Block(nn.Module):
    """A stage of units. In the released weights they are in its part `layer`."""

    def __init__(self, channels: int, width: int, units: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(_Unit(channels, width, stride), *(_Unit(width, width, 1) for _ in range(units - 1)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


class WideResNet(nn.Module):
    """A 3×3 stem of 16 channels, three stages of 16, 32 and 64, BatchNorm and ReLU, global average pooling, linear.

    depth = 6n + 4, with n units a stage. Each stage is `widening` times as wide. Convolutions start from
    N(0, sqrt(2/(k·k·out))), the biases of the linear layer from 0. Takes images of any size.
    """

    head: ClassVar[str] = "fc"
    widening: ClassVar[int] = 1

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        units = (depth - 4) // 6
        first, second, third = (self.widening * width for width in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.block1 = _Block(16, first, units, stride=1)
        self.block2 = _Block(first, second, units, stride=2)
        self.block3 = _Block(second, third, units, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, sqrt(2 / fan))
        nn.init.zeros_(self.fc.bias)

    def taps(self) -> dict[str, Tap]:
        """The sums at the ends of the stages, and what the next BatchNorm makes of them."""
        pre = [Tap("block2.layer.0.bn1"), Tap("block3.layer.0.bn1"), Tap("bn1")]
        return named_taps([Tap("block1"), Tap("block2"), Tap("block3")], pre)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(self.relu(self.bn1(x)).mean((2, 3)))
        return logits


class WideResNet2(WideResNet):
    """The same, twice as wide."""

    widening = 2
