"""The CIFAR ResNeXt of Xie et al. (2017) with 8 groups of 64 channels, as in ResNeXt.pytorch."""

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap, residual_taps

_GROUPS = 8


class _Bottleneck(nn.Module):
    """1×1, grouped 3×3 (with the stride) and 1×1 convolutions, and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        width = _GROUPS * out // 4  # 64 channels a group in the first stage, twice as many in each one after it
        self.conv_reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(width, width, 3, stride, padding=1, groups=_GROUPS, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, out, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if channels != out:
            self.shortcut.add_module("shortcut_conv", nn.Conv2d(channels, out, 1, stride, bias=False))
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn_reduce(self.conv_reduce(x)))
        out = self.bn_expand(self.conv_expand(self.relu(self.bn(self.conv_conv(out)))))
        result: Tensor = self.relu(out + self.shortcut(x))
        return result


class ResNeXt(nn.Module):
    """A 3×3 stem of 64 channels, three stages of 256, 512 and 1,024, global average pooling and a linear layer.

    depth = 9n + 2, with n bottlenecks in each stage. Initial weights are Kaiming normal: by fan-out for convolutions,
    by fan-in for the linear layer. Its biases start from 0. Takes images of any size.
    """

    head: ClassVar[str] = "classifier"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 9
        self.conv_1_3x3 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        self.stage_1 = self._stage(1, 64, 256, blocks, stride=1)
        self.stage_2 = self._stage(2, 256, 512, blocks, stride=2)
        self.stage_3 = self._stage(3, 512, 1024, blocks, stride=2)
        self.classifier = nn.Linear(1024, num_classes)
        self.relu = nn.ReLU(inplace=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @staticmethod
    def _stage(number: int, channels: int, out: int, blocks: int, stride: int) -> nn.Sequential:
        stack = [_Bottleneck(channels, out, stride), *(_Bottleneck(out, out, 1) for _ in range(blocks - 1))]
        return nn.Sequential(OrderedDict((f"stage_{number}_bottleneck_{i}", block) for i, block in enumerate(stack)))

    def taps(self) -> dict[str, Tap]:
        """The ends of the stages."""
        return residual_taps(self, "stage_1", "stage_2", "stage_3")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
