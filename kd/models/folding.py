"""Folding: a finished network with its BatchNorm inside its convolutions, which saves time in every forward pass."""

from copy import deepcopy

from torch import nn
from torch.fx.experimental.optimization import fuse


def fold(network: nn.Module) -> nn.Module:
    """A copy in eval mode that gives the same logits [image, class], up to rounding.

    BatchNorm is folded where torch.fx can trace the network. It cannot if, for example, padding is computed from the
    input's size: then the copy is as the network is.
    """
    copy = deepcopy(network).eval()
    try:
        folded: nn.Module = fuse(copy, inplace=True)
    except Exception:  # tracing runs the network's own code on stand-ins for tensors, which may raise anything
        return deepcopy(network).eval()
    return folded
