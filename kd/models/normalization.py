"""A network with its normalisation inside, so that it takes images as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from kd.core.stage import Interpolation, Normalization


class Normalized(nn.Module):
    """Takes images [batch, 3, height, width], uint8 in 0…255 or floating in [0, 1]; gives logits [batch, class].

    Raises ValueError for another number of dimensions or channels, and for integer types other than uint8.

    Each network of a chain has its own normalisation, so a guide gets images normalised as in its own training. With
    `size` images of another height or width are first resized to [size, size], by `interpolation`, with antialiasing.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        size: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        self.network, self.size, self.interpolation = network, size, interpolation
        self.statistics = mean, std
        # Not saved with the weights, because they belong to the data set.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Normalized:
        """What `to()` and `double()` call: mean and std are rounded anew, to the type that the network has now."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for buffer, values in zip((self.mean, self.std), self.statistics, strict=True):
            buffer.copy_(torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1))
        return self

    @classmethod
    def of(cls, network: nn.Module, normalization: Normalization) -> Normalized:
        """A network that prepares its images in this way."""
        how = normalization
        return cls(network, how.mean, how.std, size=how.size, interpolation=how.interpolation)

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
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode=self.interpolation, antialias=True)
            x = x.clamp(0, 1)  # bicubic overshoots at edges
        # Expanded to the image's size first: in channels_last, broadcasting three values is three times as slow.
        shape, order = (1, *x.shape[1:]), torch.channels_last
        mean, std = (each.expand(shape).contiguous(memory_format=order) for each in (self.mean, self.std))
        logits: Tensor = self.network((x - mean) / std)
        return logits
