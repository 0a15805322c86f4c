"""The CIFAR ResNets of He et al. (2016), in the variant that TAKD and RepDistiller train."""

from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, residual_taps


class _Block(nn.Module):
    """Two 3×3 convolutions and a shortcut. If the shape changes, the shortcut is a 1×1 convolution with BatchNorm."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(out + shortcut)
        return result


class CifarResNet(nn.Module):
    """A 3×3 stem of 16 channels, three stages of 16, 32 and 64, global average pooling and a linear layer.

    depth = 6n + 2, with n basic blocks a stage. Convolutions start from N(0, sqrt(2/(k·k·out))). Takes images
    of any size.
    """

    head: ClassVar[str] = "fc"
    widths: ClassVar[tuple[int, int, int, int]] = (16, 16, 32, 64)  # of the stem and the stages

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, first, second, third = self.widths
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(stem, first, blocks, stride=1)
        self.layer2 = self._stage(first, second, blocks, stride=2)
        self.layer3 = self._stage(second, third, blocks, stride=2)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, sqrt(2 / fan))

    @staticmethod
    def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(channels, width, stride), *rest)

    def taps(self) -> dict[str, Tap]:
        """The ends of the stages."""
        return residual_taps(self, "layer1", "layer2", "layer3")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class CifarResNetX4(CifarResNet):
    """The same with a stem of 32 channels and stages of 64, 128 and 256, as RepDistiller's resnet8x4 and resnet32x4."""

    widths = (32, 64, 128, 256)
