"""The loss around a network, along directions of its weights (Li et al. 2018, "Visualizing the loss landscape")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kd.core.hardware import widest_float
from kd.models.normalization import Normalized

_BATCH = 250  # images: few enough that their features stay in a CPU's cache

Direction = dict[str, Tensor]  # by the parameters' names


def draw_direction(network: nn.Module, rng: np.random.Generator) -> Direction:
    """A random direction, filter-normalised (Li et al., section 4): each filter has the norm of the network's own.

    A filter is the weights of one output of a convolution or linear layer. Biases and BatchNorm's parameters get zero.
    """
    direction = {}
    for name, weight in network.named_parameters():
        drawn = torch.zeros_like(weight)
        if weight.dim() > 1:
            drawn.copy_(torch.from_numpy(rng.standard_normal(weight.shape)))
            drawn *= _lengths(weight) / _lengths(drawn)
        direction[name] = drawn.detach()
    return direction


def _lengths(weight: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    return lengths


def losses(
    network: nn.Module, directions: Sequence[Direction], axis: NDArray[np.float64], inputs: Tensor, labels: Tensor
) -> Iterator[list[float]]:
    """Mean cross-entropy at weights + x·first + y·second: a row over x for each y. x and y take the values of `axis`.

    `inputs` [sample, …] and `labels` [sample] are on the network's device. BatchNorm uses its stored statistics. The
    network stays in eval mode, and its weights do not change.
    """
    network.eval()
    first, second = directions
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    for y in axis.tolist():
        row = {name: weight + y * second[name] for name, weight in weights.items()}
        yield [
            _loss(network, {name: weight + x * first[name] for name, weight in row.items()}, inputs, labels)
            for x in axis.tolist()
        ]


def normalized(network: Normalized, images: Tensor) -> Tensor:
    """The network's inputs for uint8 images [sample, 3, height, width]: resized if it does that, and normalised.

    They are computed once for all points.
    """
    prepared = Normalized(nn.Identity(), *network.statistics, size=network.size, interpolation=network.interpolation)
    inputs: Tensor = prepared.to(network.mean)(images)
    return inputs


@torch.inference_mode()
def _loss(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> float:
    total = torch.zeros((), dtype=widest_float(labels.device), device=labels.device)
    for batch, right in zip(torch.split(inputs, _BATCH), torch.split(labels, _BATCH), strict=True):
        logits = functional_call(network, weights, (batch,))
        total += cross_entropy(logits, right, reduction="sum")
    return total.item() / len(labels)
