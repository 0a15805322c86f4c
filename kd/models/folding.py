"""Folding: a finished network with its BatchNorm inside its convolutions, which saves time in every forward pass."""

from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

# The part of the largest logit that folding may change. In fp32 it changes 1e-6 or so, and a wrong fold about 1.
_ROUNDING = 1e-3


class _Tracer(fx.Tracer):
    """Keeps convolutions and linear layers as modules, also those that timm derives from torch's: hooks find them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear)) or super().is_leaf_module(m, module_qualified_name)


def fold(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy in eval mode and channels_last that gives the same logits [image, class], up to rounding.

    BatchNorm is folded into torch's own convolutions. Where torch.fx cannot trace the network, since it computes
    something from the size of its input, for example, the copy is as the network is. So it is where the folded copy
    gives other logits for `example`, images [image, channel, height, width] on the CPU: one convolution may be called
    twice with a BatchNorm each, or forward() may look whether an argument is None.
    """
    copy = deepcopy(network).eval().to(memory_format=torch.channels_last)
    if not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules()):
        return copy
    try:
        traced = fx.GraphModule(copy, _Tracer().trace(copy))
        folded: nn.Module = fuse(traced, no_trace=True)
        folded = folded.to(memory_format=torch.channels_last)  # constants of five dimensions are refused here
        return folded if _agree(copy, folded, example) else copy
    except Exception:  # tracing runs the network's own code on stand-ins for tensors, which may raise anything
        return copy


def _agree(network: nn.Module, folded: nn.Module, example: Tensor) -> bool:
    """Whether both give the same logits for the example, up to rounding."""
    # Without TF32 and bf16, which round more than folding does: on the CPU, and outside autocast.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        example = example.to(next(network.parameters()).dtype)
        expected, found = (deepcopy(each).cpu()(example) for each in (network, folded))
        return bool((found - expected).abs().max() <= _ROUNDING * expected.abs().max())
