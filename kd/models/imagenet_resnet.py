"""The ResNets of He et al. (2016) as they are for ImageNet, and TAKD's ResNet14 and ResNet20 of the same style."""

from torch import Tensor, nn

from kd.models.resnet import ResNet


class ImageNetResNet(ResNet):
    """A 7×7 stem with stride 2 and max pooling, then as ResNet. Convolutions are initialised as by He et al. (2015).

    TAKD's paper does not say how its ResNet14 and ResNet20 are built. These are ResNet18 with two blocks less, and with
    one more: basic blocks, which the first stages get first, as in pytorchcv. Takes images of any size.
    """

    def __init__(self, depth: int, num_classes: int, image_size: int = 224, in_channels: int = 3) -> None:
        super().__init__(depth, num_classes, image_size, in_channels)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, height, width]."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
