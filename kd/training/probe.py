"""Probes: the classifier alone is trained, on features of a backbone that keeps its initial weights.

A view of an image passes the backbone once. Its features are cached as a guide's logits are, and serve every epoch,
every seed of the classifier, and every student of the finished network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kd.core.hardware import autocast
from kd.core.spec import KnownError
from kd.core.stage import Learner, Outputs
from kd.datasets.data import Images, Part
from kd.models.normalization import Normalized
from kd.models.taps import head
from kd.store import TrainedStage
from kd.training.guide import Guide, rounded_logits


class Probe(nn.Module):
    """A classifier as the network of a stage: it takes features [batch, feature] and gives logits [batch, class]."""

    def __init__(self, whole: Normalized, model: str) -> None:
        """Raises KnownError if the network does not end in one linear layer."""
        super().__init__()
        try:
            self.path = head(whole.network)
        except KnownError as error:
            raise KnownError(f"{model}: freeze=backbone: {error}") from error
        last = whole.network.get_submodule(self.path)
        if not isinstance(last, nn.Linear):
            kind = type(last).__name__
            raise KnownError(f"{model}: freeze=backbone needs a network that ends in nn.Linear (this one: {kind})")
        self.network = last

    @property
    def mean(self) -> Tensor:
        """A tensor in the type in which the network computes, as Normalized has one."""
        return self.network.weight

    @property
    def learner(self) -> Learner:
        """The classifier, and what it says about features of zeros [1, feature]."""
        with torch.no_grad():
            logits = self(torch.zeros(1, self.network.in_features).to(self.mean))
        return Learner(self.network, Outputs({"logits": logits}))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.network(features)
        return logits

    def completed(self, trained: TrainedStage, whole: Normalized) -> TrainedStage:
        """The trained classifier with its backbone: the stage of the whole network."""
        state = {name: tensor.detach().cpu() for name, tensor in whole.network.state_dict().items()}
        state |= {f"{self.path}.{name}": tensor for name, tensor in trained.state.items()}
        params = sum(each.numel() for each in whole.network.parameters())
        return TrainedStage(state, trained.metrics, trained.result.model_copy(update={"params": params}))


@dataclass(frozen=True, kw_only=True)
class Features(Images):
    """Features of a frozen backbone, in place of the images that it sees."""

    images: Images
    backbone: Guide
    _epoch: dict[str, Tensor] = field(default_factory=dict)
    _plain: dict[Part, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Images, backbone: Guide) -> Features:
        """The features that a backbone, which says pooled features, makes of images."""
        shared = {name: getattr(images, name) for name in Images.__dataclass_fields__}
        return cls(**shared, images=images, backbone=backbone)

    @property
    def home(self) -> torch.device:
        return self.images.home

    def begin(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> None:
        self._epoch["pooled"] = self.backbone.recall(samples, views, advance)["pooled"]

    def show(self, samples: Tensor, views: Tensor) -> Tensor:
        return self.backbone.recall(samples.cpu().numpy(), views.cpu().numpy(), lambda _: None)["pooled"]

    def shown(self, samples: Tensor, views: Tensor, places: Sequence[slice]) -> Iterator[Tensor]:
        """The features of parts of the epoch that has begun."""
        return (self._epoch["pooled"][place] for place in places)

    def plain(self, part: Part, places: NDArray[np.int64]) -> Tensor:
        if part not in self._plain:
            self._plain[part] = self.backbone.of_plain(part)["pooled"]
        return self._plain[part][torch.from_numpy(places).to(self.labels.device)]


class ProbedGuide:
    """A finished probe as a guide: its logits are computed from the features of its backbone."""

    def __init__(self, backbone: Guide, precision: str, device: str) -> None:
        network = backbone.network
        # A copy, since to() moves a module in place: the backbone keeps its network where it is.
        last = deepcopy(network.network.get_submodule(head(network.network))).to(device).eval()
        assert isinstance(last, nn.Linear)  # it was trained as a Probe
        self._classifier = last
        self._backbone, self._precision, self._device = backbone, precision, device
        self._epoch: dict[str, Tensor] = {}

    @property
    def learner(self) -> Learner:
        """The network, and what it says about one image."""
        return self._backbone.learner

    def begin(self, samples: NDArray[np.int64], views: NDArray[np.int64], advance: Callable[[int], None]) -> None:
        """Look at the views of an epoch's samples [sample]. `advance` gets each finished chunk's size."""
        pooled = self._backbone.recall(samples, views, advance)["pooled"]
        with torch.no_grad(), autocast(self._precision, self._device):
            logits = self._classifier(pooled.to(self._classifier.weight.dtype))
        self._epoch = {"logits": rounded_logits(logits, self._precision), "pooled": pooled}

    def outputs(self, where: slice, images: Tensor) -> Outputs:
        """What the guide says about a part of the epoch's samples."""
        return Outputs({name: values[where] for name, values in self._epoch.items()})
