"""The small CNN of the Trained and Nasty Teacher's code, there called net or cnn."""

from typing import ClassVar

from torch import Tensor, nn

from kd.core.spec import KnownError
from kd.models.taps import Tap, named_taps


class Net(nn.Module):
    """Three times (3×3 convolution with bias, BatchNorm, 2×2 max-pooling, ReLU), then two linear layers.

    32, 64 and 128 channels; 128 hidden units with BatchNorm. The original's dropout has rate 0 in every experiment,
    so there is none here. Initialisation is torch's own. The only depth is 5. Takes images of at least 8 pixels: the
    first linear layer grows with their area (the original takes 32×32 only).
    """

    head: ClassVar[str] = "fc2"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        side = image_size >> 3
        if side == 0:
            raise KnownError(
                f"net halves its input 3 times: images should be at least 8 pixels wide (got {image_size})"
            )
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(128)
        self.fc1 = nn.Linear(128 * side * side, 128)
        self.fcbn1 = nn.BatchNorm1d(128)
        self.fc2 = nn.Linear(128, num_classes)
        self.pool = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.relu3 = nn.ReLU(inplace=True)
        self.relu = nn.ReLU(inplace=True)

    def taps(self) -> dict[str, Tap]:
        """The three convolutions, after their pooling."""
        relus = [f"relu{i}" for i in (1, 2, 3)]
        return named_taps(map(Tap, relus), [Tap(relu, "input") for relu in relus])

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu1(self.pool(self.bn1(self.conv1(x))))
        x = self.relu2(self.pool(self.bn2(self.conv2(x))))
        x = self.relu3(self.pool(self.bn3(self.conv3(x))))
        x = self.relu(self.fcbn1(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(x)
        return logits
