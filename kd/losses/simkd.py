"""Knowledge distillation with the reused teacher classifier: Chen et al. (CVPR 2022), arXiv 2203.14001."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from kd.core.spec import KnownError
from kd.core.stage import Batch, Learner, LossContext, Need
from kd.losses.maps import FeatureSpec


class SimKD(FeatureSpec):
    """weight·MSE(P(net's pooled features), guide's) + ce·CE; the net keeps the guide's classifier behind P.

    P is linear, x → P·x + p. So the guide's classifier W, b behind it is one linear layer, W·P and W·p + b. The net's
    own classifier is set to it and not trained: the saved network has its usual names and no further parameters.

    The paper's P is three convolutions on the maps before pooling, and stays in the network. Ours reads pooled
    features, which can be cached: the guide runs once, and not at every step. With ce above 0 the gradient of CE
    reaches the net's features, but not P.
    """

    name: Literal["simkd"] = "simkd"
    needs: ClassVar[frozenset[Need]] = frozenset({"pooled"})
    ce: float = Field(0.0, ge=0)
    weight: float = Field(1.0, gt=0)

    def build(self, context: LossContext) -> nn.Module:
        layer = _classifier(context.net)
        if layer.bias is None:
            raise KnownError(f"the classifier of {type(context.net.network).__name__} should have a bias")
        if not layer.weight.requires_grad:
            raise KnownError("a network keeps one classifier, so it can have one guide only")
        widths = context.net.outputs.pooled.shape[1], context.guide.outputs.pooled.shape[1]
        projected = _Projected(self, *widths, _classifier(context.guide))
        projected.follow(layer)
        return projected


def _classifier(learner: Learner) -> nn.Linear | nn.Conv2d:
    """The last layer, which has to be linear, and to take the pooled features."""
    layer = learner.head
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight[0, 0].numel() != 1:
        raise KnownError(f"{type(learner.network).__name__} should end in a linear layer or a 1×1 convolution")
    width, taken = learner.outputs.pooled.shape[1], layer.weight.shape[1]
    if width != taken:
        kind = type(learner.network).__name__
        raise KnownError(f"{kind} should pool its maps before its classifier: that takes {taken} of {width} features")
    return layer


class _Projected(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, spec: SimKD, width: int, wanted: int, head: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.spec, self.projector = spec, nn.Linear(width, wanted)
        weight = head.weight.detach().flatten(1)
        bias = torch.zeros_like(weight[:, 0]) if head.bias is None else head.bias.detach()
        self.register_buffer("weight", weight.clone(), persistent=False)
        self.register_buffer("bias", bias.clone(), persistent=False)
        self._loaded = False  # the layer has weights from a file, of which P may know nothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.spec.total(batch, mse_loss(self.projector(batch.net.pooled), batch.guide.pooled))

    def follow(self, layer: nn.Linear | nn.Conv2d) -> None:
        """From now on the layer is the guide's classifier behind P, whenever it is called or saved."""
        layer.requires_grad_(False)
        hooked: Any = layer
        hooked.register_forward_pre_hook(lambda called, _: self._compose(called, training=called.training))
        hooked.register_state_dict_pre_hook(lambda saved, *_: self._compose(saved))
        hooked.register_load_state_dict_post_hook(self._keep)

    def _keep(self, *_: Any) -> None:
        # The weights of the best epoch are loaded in the end, and P is that of the last epoch.
        self._loaded = True

    @torch.no_grad()
    def _compose(self, layer: nn.Linear | nn.Conv2d, training: bool = False) -> None:
        self._loaded = self._loaded and not training
        if not self._loaded and layer.bias is not None:
            with torch.autocast(self.weight.device.type, enabled=False):  # it would round the saved weights
                layer.weight.copy_((self.weight @ self.projector.weight).view_as(layer.weight))
                layer.bias.copy_(self.weight @ self.projector.bias + self.bias)
