"""The plane networks of TAKD: plain stacks of 3×3 convolutions, named by their number of convolutions."""

from itertools import pairwise

from torch import Tensor, nn

from kd.core.spec import KnownError
from kd.models.taps import Tap, named_taps

_POOL = 0

# Channels of each convolution, _POOL for 2×2 max-pooling; then the widths of hidden linear layers.
_UP_TO_10_CLASSES: dict[int, tuple[list[int], list[int]]] = {
    2: ([16, _POOL, 16, _POOL], []),
    4: ([16, 16, _POOL, 32, 32, _POOL], []),
    6: ([16, 16, _POOL, 32, 32, _POOL, 64, 64, _POOL], []),
    8: ([16, 16, _POOL, 32, 32, _POOL, 64, 64, _POOL, 128, 128, _POOL], [64]),
    10: ([32, 32, _POOL, 64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, 256, _POOL], [128]),
}
_ABOVE_10_CLASSES: dict[int, tuple[list[int], list[int]]] = {
    2: ([32, _POOL, 32, _POOL], []),
    4: ([32, 32, _POOL, 64, 64, _POOL], []),
    6: ([32, 32, _POOL, 64, 64, _POOL, 128, 128], []),  # no last pooling, as in the released code
    8: ([32, 32, _POOL, 64, 64, _POOL, 128, 128, _POOL, 256, 256, _POOL], [64]),
    10: ([32, 32, _POOL, 64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, 256, _POOL], [512]),
}


class Plane(nn.Module):
    """TAKD's vanilla CNN: (3×3 convolution with bias, BatchNorm, ReLU) with 2×2 max-pooling, then linear layers.

    It has two shapes, CIFAR-10's for up to ten classes and CIFAR-100's above. Initialisation is torch's own.
    Takes any image that still has a pixel after all pooling; the first linear layer grows with its area.
    """

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        convolutions, hidden = (_UP_TO_10_CLASSES if num_classes <= 10 else _ABOVE_10_CLASSES)[depth]
        pools = convolutions.count(_POOL)
        side = image_size >> pools
        if side == 0:
            raise KnownError(
                f"plane{depth} halves its input {pools} times: images should be at least {2**pools} pixels wide "
                f"(got {image_size})"
            )
        layers: list[nn.Module] = []
        channels = in_channels
        for width in convolutions:
            if width == _POOL:
                # Pooling before the ReLU gives the same values and gradients to the bit, for a quarter of its work.
                layers.insert(-1, nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.conv_layers = nn.Sequential(*layers)
        widths = [channels * side * side, *hidden, num_classes]
        linear: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for before, after in pairwise(widths[1:]):
            linear += [nn.ReLU(inplace=True), nn.Linear(before, after)]
        self.fc_layers = nn.Sequential(*linear)

    @property
    def head(self) -> str:
        """The path of the last layer."""
        return f"fc_layers.{len(self.fc_layers) - 1}"

    def taps(self) -> dict[str, Tap]:
        """The ReLUs that end in a pooling (which stands before the ReLU here), and the last one."""
        last = len(self.conv_layers) - 1
        pools = [i for i, layer in enumerate(self.conv_layers) if isinstance(layer, nn.MaxPool2d)]
        relus = [f"conv_layers.{i}" for i in sorted({*(pool + 1 for pool in pools), last})]
        return named_taps(map(Tap, relus), [Tap(relu, "input") for relu in relus])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        logits: Tensor = self.fc_layers(self.conv_layers(x).flatten(1))
        return logits
