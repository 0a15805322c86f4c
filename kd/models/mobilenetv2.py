"""The MobileNetV2 of Sandler et al. (2018) for small images, as in pytorch-cifar100."""

from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, named_taps


class _Block(nn.Module):
    """A 1×1 expansion, a 3×3 depthwise convolution, a 1×1 projection; and a shortcut if the shape is unchanged."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels * expansion
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, out, 1),
            nn.BatchNorm2d(out),
        )
        self._adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.residual(x)
        return out + x if self._adds else out


class MobileNetV2(nn.Module):
    """A stem of 32 channels, seven stages of inverted residuals, 1,280 channels, global average pooling, a 1×1 head.

    As in the original, the stem is a 1×1 convolution with padding 1, so 32×32 images give maps of 34, 17, 9 and 5.
    Every convolution has a bias. The first block has an expansion convolution although its expansion is 1.
    Initialisation is torch's own. The only depth is 54. Takes images of any size.
    """

    head: ClassVar[str] = "conv2"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(in_channels, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6(inplace=True))
        self.stage1 = _Block(32, 16, stride=1, expansion=1)
        self.stage2 = self._stage(16, 24, 2, stride=2)
        self.stage3 = self._stage(24, 32, 3, stride=2)
        self.stage4 = self._stage(32, 64, 4, stride=2)
        self.stage5 = self._stage(64, 96, 3, stride=1)
        self.stage6 = self._stage(96, 160, 3, stride=1)
        self.stage7 = _Block(160, 320, stride=1, expansion=6)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True))
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    @staticmethod
    def _stage(channels: int, out: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_Block(out, out, 1, expansion=6) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(channels, out, stride, expansion=6), *rest)

    def taps(self) -> dict[str, Tap]:
        """The last blocks of each size of map. They have no activation at their ends."""
        ends = [Tap("stage1"), Tap("stage2"), Tap("stage3"), Tap("stage7")]
        return named_taps(ends, ends)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.pre(x)))))
        x = self.conv1(self.stage7(self.stage6(self.stage5(x))))
        logits: Tensor = self.conv2(x.mean((2, 3), keepdim=True)).flatten(1)
        return logits
