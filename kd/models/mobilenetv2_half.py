"""The MobileNetV2 of half the width, in the variant for 32×32 images that RepDistiller trains."""

from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, named_taps

# Expansion, channels at full width, number of blocks, and stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _activated(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size of the map, but for its stride; BatchNorm and ReLU."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


class _Block(nn.Module):
    """A 1×1 expansion, a 3×3 depthwise convolution, a 1×1 projection; and a shortcut if the shape is unchanged."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels * expansion
        self.conv = nn.Sequential(
            *_activated(channels, width, 1),
            *_activated(width, width, 3, stride, groups=width),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self._adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out + x if self._adds else out


class MobileNetV2Half(nn.Module):
    """A 3×3 stem of 16 channels with stride 2, seven stages, 1,280 channels, global average pooling and a linear layer.

    It has ReLU where the paper has ReLU6, and its first block has an expansion convolution. Convolutions start from
    N(0, sqrt(2/(k·k·out))), the linear layer from N(0, 0.01) and biases of 0. The only depth is 54. Takes images of any
    size.
    """

    head: ClassVar[str] = "classifier.0"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Sequential(*_activated(in_channels, channels, 3, stride=2))
        stages: list[nn.Module] = []
        for expansion, full, blocks, stride in _STAGES:
            stages.append(self._stage(channels, full // 2, blocks, stride, expansion))
            channels = full // 2
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(*_activated(channels, 1280, 1))
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, sqrt(2 / fan))
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)

    @staticmethod
    def _stage(channels: int, out: int, blocks: int, stride: int, expansion: int) -> nn.Sequential:
        rest = [_Block(out, out, 1, expansion) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(channels, out, stride, expansion), *rest)

    def taps(self) -> dict[str, Tap]:
        """The last blocks of each size of map. They have no activation at their ends."""
        ends = [Tap(f"blocks.{i}") for i in (1, 2, 4, 6)]
        return named_taps(ends, ends)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.conv2(self.blocks(self.conv1(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
