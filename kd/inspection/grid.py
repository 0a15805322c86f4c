"""What a loss surface is: the grid that is asked for, and the losses on it, as surface.json has them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from kd.spec import Frozen
from kd.stage import Seed

METHOD = (
    "mean cross-entropy at weights + x*first + y*second, in the precision of the stored weights, without autocast; "
    "two Gaussian directions drawn from the seed, each filter scaled to the length of the network's own (Li et al. "
    "2018, section 4), zero for biases and BatchNorm's parameters; BatchNorm's statistics as stored"
)


class Grid(Frozen):
    """Where the loss is computed: at points × points weights around a network's, on some of the test images."""

    span: float = Field(gt=0)  # both axes run from -span to span, in lengths of the filters
    points: int = Field(ge=3)
    images: int = Field(ge=1)
    seed: Seed

    @field_validator("points")
    @classmethod
    def _has_a_centre(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError("should be odd, so that the network itself is one of them")
        return points

    @property
    def axis(self) -> NDArray[np.float64]:
        """The values of an axis, in steps that are equal to the bit on both sides of zero."""
        steps = np.arange(self.points) - self.points // 2
        return self.span * steps / (self.points // 2)


class Landscape(Frozen):
    """The loss around one network, in nats."""

    key: str
    name: str
    losses: tuple[tuple[float, ...], ...]  # [y, x]; the network's own is in the middle

    @property
    def loss(self) -> float:
        """At the network's own weights."""
        middle = len(self.losses) // 2
        return self.losses[middle][middle]


class Surface(Frozen):
    """surface.json: the loss around networks, on the same test images, spread over the classes."""

    method: str = METHOD
    dataset: str
    content: str | None
    images: int
    span: float
    seed: int
    axis: tuple[float, ...]  # of x and y alike, in lengths of the filters
    networks: tuple[Landscape, ...]
    made_with: dict[str, str | int]
