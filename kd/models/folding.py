"""Folding: a finished network with its BatchNorm inside its convolutions, which saves time in every forward pass."""

from copy import deepcopy

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse


class _Tracer(fx.Tracer):
    """Keeps convolutions and linear layers as modules, also those that timm derives from torch's: hooks find them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(m, module_qualified_name)


def fold(network: nn.Module) -> nn.Module:
    """A copy in eval mode and channels_last that gives the same logits [image, class], up to rounding.

    BatchNorm is folded into torch's own convolutions. Where torch.fx cannot trace the network, since it computes
    something from the size of its input, for example, the copy is as the network is.
    """
    copy = deepcopy(network).eval().to(memory_format=torch.channels_last)
    if not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules()):
        return copy
    try:
        traced = fx.GraphModule(copy, _Tracer().trace(copy))
        folded: nn.Module = fuse(traced, no_trace=True)
        return folded.to(memory_format=torch.channels_last)  # constants of five dimensions are refused here
    except Exception:  # tracing runs the network's own code on stand-ins for tensors, which may raise anything
        return copy
