"""The ImageNet ResNets of He et al. (2016) with a stem for small images, as in pytorch-cifar."""

from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, residual_taps


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    """The identity, or a 1×1 convolution with BatchNorm if the shape changes."""
    if stride == 1 and channels == out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class _Basic(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(out + self.shortcut(x))
        return result


class _Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions, the last four times as wide; and a shortcut."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(channels, 4 * width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        result: Tensor = self.relu(out + self.shortcut(x))
        return result


# The type of block, and the number of blocks in each stage.
_STAGES: dict[int, tuple[type[_Basic] | type[_Bottleneck], tuple[int, int, int, int]]] = {
    14: (_Basic, (2, 2, 1, 1)),
    18: (_Basic, (2, 2, 2, 2)),
    20: (_Basic, (3, 2, 2, 2)),
    34: (_Basic, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
    101: (_Bottleneck, (3, 4, 23, 3)),
    152: (_Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A 3×3 stem of 64 channels without pooling, four stages of 64 to 512, global average pooling, a linear layer.

    Basic blocks up to depth 34, bottlenecks from 50 on. Initialisation is torch's own. Takes images of any size.
    """

    head: ClassVar[str] = "linear"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        block, blocks = _STAGES[depth]
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = self._stage(block, 64 * block.expansion, 128, blocks[1], stride=2)
        self.layer3 = self._stage(block, 128 * block.expansion, 256, blocks[2], stride=2)
        self.layer4 = self._stage(block, 256 * block.expansion, 512, blocks[3], stride=2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _stage(
        block: type[_Basic] | type[_Bottleneck], channels: int, width: int, blocks: int, stride: int
    ) -> nn.Sequential:
        rest = [block(width * block.expansion, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(block(channels, width, stride), *rest)

    def taps(self) -> dict[str, Tap]:
        """The ends of the stages."""
        return residual_taps(self, "layer1", "layer2", "layer3", "layer4")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
