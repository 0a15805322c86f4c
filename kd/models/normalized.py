"""A network with its data set's statistics in front of it, so that it takes images as they are stored."""

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """Takes images [batch, 3, height, width], uint8 in 0…255 or floating in [0, 1]; gives logits [batch, class].

    Raises ValueError for another number of dimensions or channels, or for integers that are no uint8.

    Each network of a chain brings its own statistics, so that a guide trained under others still sees its own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        # The statistics belong to the data set and are no weights: not saved.
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
        # Spread over the image first: in channels_last, vectors of three are a third as fast.
        shape, order = (1, *x.shape[1:]), torch.channels_last
        mean, std = (each.expand(shape).contiguous(memory_format=order) for each in (self.mean, self.std))
        logits: Tensor = self.network((x - mean) / std)
        return logits
