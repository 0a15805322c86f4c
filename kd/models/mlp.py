"""The multilayer perceptron of the Trained and Nasty Teacher's code."""

from typing import ClassVar

from torch import Tensor, nn

from kd.models.taps import Tap


class MLP(nn.Module):
    """Three linear layers over the pixels, two of 512 hidden units with ReLU, then the logits.

    The original has a ReLU on the logits too. That is a bug: a class with a negative logit has no gradient. Here there
    is no such ReLU, so logits of published weights differ where they are negative. Initialisation is torch's own. The
    only depth is 3. Takes images of any size: the first layer grows with their area (the original takes 32×32 only).
    """

    head: ClassVar[str] = "fc3"

    def __init__(self, depth: int, num_classes: int, image_size: int = 32, in_channels: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * image_size * image_size, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, num_classes)
        self.relu = nn.ReLU(inplace=True)

    def taps(self) -> dict[str, Tap]:
        """None: there are no maps."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(self.relu(self.fc2(x)))
        return logits
