"""The VGGs of Simonyan and Zisserman (2015) with BatchNorm and one linear layer, as RepDistiller trains them."""

from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from kd.core.spec import KnownError
from kd.models.taps import Tap, named_taps

_WIDTHS = (64, 128, 256, 512, 512)
# Convolutions of each block.
_CONVOLUTIONS: dict[int, tuple[int, int, int, int, int]] = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five blocks of (3×3 convolution with bias, BatchNorm, ReLU), global average pooling and a linear layer.

    2×2 max-pooling follows the first three blocks, and the fourth for images of 64 pixels or more. The last ReLU of a
    block is beside it. The depth counts the paper's three linear layers. Convolutions start from
    N(0, sqrt(2/(k·k·out))), the linear layer from N(0, 0.01), biases from 0. Takes images of at least 8 pixels.
    """

    head: ClassVar[str] = "classifier"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        if image_size < 8:
            raise KnownError(
                f"vgg{depth} halves its input 3 times: images should be at least 8 pixels wide (got {image_size})"
            )
        channels = (in_channels, *_WIDTHS)
        for i, convolutions in enumerate(_CONVOLUTIONS[depth]):
            self.add_module(f"block{i}", self._block(channels[i], channels[i + 1], convolutions))
            self.add_module(f"relu{i}", nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        self._pooled = (0, 1, 2, 3) if image_size >= 64 else (0, 1, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, sqrt(2 / fan))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    @staticmethod
    def _block(channels: int, width: int, convolutions: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        return nn.Sequential(*layers[:-1])

    def taps(self) -> dict[str, Tap]:
        """The ReLUs of all blocks but the first, which is the stem."""
        blocks = (1, 2, 3, 4)
        return named_taps([Tap(f"relu{i}") for i in blocks], [Tap(f"block{i}") for i in blocks])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        for i in range(len(_WIDTHS)):
            x = self.get_submodule(f"relu{i}")(self.get_submodule(f"block{i}")(x))
            if i in self._pooled:
                x = self.pool(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
