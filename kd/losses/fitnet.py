"""FitNets, hints for thin deep nets: Romero et al. (ICLR 2015), arXiv 1412.6550."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from kd.core.spec import KnownError
from kd.core.stage import Batch, LossContext, Need
from kd.losses.maps import FeatureSpec, resized, stage_pairs


class FitNet(FeatureSpec):
    """ce·CE + weight·MSE(R(net's map), guide's map), at the end of one stage.

    R is a regressor that is trained with the net: a convolution to the guide's shape, BatchNorm and ReLU. The paper
    trains the net's first half with the hint alone, and then the whole net by KD. This is the form of RepDistiller and
    mdistiller: one training with both terms. The mean is over all elements.
    """

    name: Literal["fitnet"] = "fitnet"
    needs: ClassVar[frozenset[Need]] = frozenset({"stages"})
    weight: float = Field(100.0, gt=0)
    stage: int = Field(2, ge=1)  # of the network with fewer stages
    relu: bool = True

    def build(self, context: LossContext) -> nn.Module:
        pairs = stage_pairs(context.net.outputs.stages, context.guide.outputs.stages)
        if self.stage > len(pairs):
            raise KnownError(f"stage: should be at most {len(pairs)}, the networks' stages (got {self.stage})")
        return _Hint(self, *pairs[self.stage - 1])


class _Hint(nn.Module):
    def __init__(self, spec: FitNet, net: Tensor, guide: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.regressor = nn.Sequential(resizing_convolution(net, guide), nn.BatchNorm2d(guide.shape[1]))
        # A ReLU cannot reach the negative values of a map that was taken before an activation.
        if spec.relu:
            self.regressor.append(nn.ReLU())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        net, guide = stage_pairs(batch.net.stages, batch.guide.stages)[self.spec.stage - 1]
        return self.spec.total(batch, mse_loss(self.regressor(net), guide))


def resizing_convolution(net: Tensor, guide: Tensor) -> nn.Module:
    """A convolution from maps of one shape [sample, channel, height, width] to maps of the other."""
    (inner, height), (outer, wanted) = net.shape[1:3], guide.shape[1:3]
    if height == 2 * wanted:
        return nn.Conv2d(inner, outer, 3, stride=2, padding=1)
    if 2 * height == wanted:
        return nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1)
    if height >= wanted:
        return nn.Conv2d(inner, outer, 1 + height - wanted)
    return nn.Sequential(_Resized(wanted), nn.Conv2d(inner, outer, 1))


class _Resized(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        return resized(maps, self.size)
