"""The pre-activation ResNets of He et al. (2016, "Identity mappings"), as pytorch-classification has them for CIFAR."""

from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, named_taps


def _downsample(channels: int, out: int, stride: int) -> nn.Sequential | None:
    """A 1×1 convolution without BatchNorm, if the shape changes."""
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False))


class _Basic(nn.Module):
    """Twice BatchNorm, ReLU and a 3×3 convolution, and a shortcut around them."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.downsample = _downsample(channels, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.conv1(self.relu(self.bn1(x)))
        result: Tensor = self.conv2(self.relu(self.bn2(out))) + shortcut
        return result


class _Bottleneck(nn.Module):
    """The same with a 1×1, a 3×3 and another 1×1 convolution, the last four times as wide."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.downsample = _downsample(channels, 4 * width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        result: Tensor = self.conv3(self.relu(self.bn3(out))) + shortcut
        return result


class PreResNet(nn.Module):
    """A 3×3 stem of 16 channels, three stages of 16, 32 and 64, BatchNorm and ReLU, global average pooling, linear.

    Each stage has n = (depth - 2) / 6 blocks: basic blocks below depth 44, bottlenecks from 44 on. A bottleneck has a
    third convolution that the name does not count: preresnet110 has 164 layers. Convolutions start from
    N(0, sqrt(2/(k·k·out))). Takes images of any size (the original pools 8×8 maps, so it takes 32×32 only).
    """

    head: ClassVar[str] = "fc"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        block: type[_Basic] | type[_Bottleneck] = _Basic if depth < 44 else _Bottleneck
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = self._stage(block, 16, 16, blocks, stride=1)
        self.layer2 = self._stage(block, 16 * block.expansion, 32, blocks, stride=2)
        self.layer3 = self._stage(block, 32 * block.expansion, 64, blocks, stride=2)
        self.bn = nn.BatchNorm2d(64 * block.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(64 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, sqrt(2 / fan))

    @staticmethod
    def _stage(
        block: type[_Basic] | type[_Bottleneck], channels: int, width: int, blocks: int, stride: int
    ) -> nn.Sequential:
        rest = [block(width * block.expansion, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(block(channels, width, stride), *rest)

    def taps(self) -> dict[str, Tap]:
        """The sums at the ends of the stages, and what the next BatchNorm makes of them."""
        pre = [Tap("layer2.0.bn1"), Tap("layer3.0.bn1"), Tap("bn")]
        return named_taps([Tap("layer1"), Tap("layer2"), Tap("layer3")], pre)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(self.relu(self.bn(x)).mean((2, 3)))
        return logits
