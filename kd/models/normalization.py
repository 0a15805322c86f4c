"""A network with its normalisation inside, so that it takes images as they are stored."""

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """Takes images [batch, 3, height, width], uint8 in 0…255 or floating in [0, 1]; gives logits [batch, class].

    Raises ValueError for another number of dimensions or channels, and for integer types other than uint8.

    Each network of a chain has its own normalisation, so a guide gets images normalised as in its own training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        # Not saved with the weights, because they belong to the data set.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.mean.shape[1]:
            raise ValueError(
                f"images should be [batch, {self.mean.shape[1]}, height, width] (got {list(images.shape)})"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images should be uint8 in 0…255 or floating in [0, 1] (got {images.dtype})")
        x = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            x = x / 255
        # Expanded to the image's size first: in channels_last, broadcasting three values is three times as slow.
        shape, order = (1, *x.shape[1:]), torch.channels_last
        mean, std = (each.expand(shape).contiguous(memory_format=order) for each in (self.mean, self.std))
        logits: Tensor = self.network((x - mean) / std)
        return logits
