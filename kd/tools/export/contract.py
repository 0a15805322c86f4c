"""The contract of an exported network: what its labels mean, and how a picture becomes an image that it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from kd.core.spec import Frozen, printable
from kd.core.stage import Background, Normalization, Resize, Source
from kd.datasets import DATASETS
from kd.datasets.pictures import margin, read_square

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 20  # classes that a text names


class Contract(Frozen):
    """What one has to know to use a network. It goes with the weights, so that neither store nor data is needed."""

    key: str
    network: str
    dataset: str
    num_classes: int = Field(ge=1)
    classes: tuple[str, ...] = ()  # the labels' names, in order; empty: not known
    image_size: int = Field(ge=1)  # pixels; height and width are equal
    resize: Resize | None = None  # how photographs become squares; null: the data set has squares of one size
    side: int = Field(ge=1)  # of these squares; the network takes their centre
    background: Background = "white"  # behind what is transparent
    normalization: Normalization  # inside the network; its `size`: the network resizes its images to it

    @model_validator(mode="after")
    def _fits_together(self) -> Contract:
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names for {self.num_classes} classes")
        if self.side < self.image_size:
            raise ValueError(f"images of {self.image_size} pixels from squares of {self.side}")
        return self

    @classmethod
    def of(cls, source: Source) -> Contract:
        """The contract of a stage's network, or of a given one."""
        data = source.dataset
        return cls(
            key=source.key,
            network=source.model,
            dataset=data.name,
            num_classes=data.num_classes,
            classes=data.classes,
            image_size=data.image_size,
            resize=data.resize,
            side=data.image_size if data.resize is None else margin(data.image_size, data.resize),
            background=data.background,
            normalization=source.normalize,
        )

    @classmethod
    def told(cls, entries: Mapping[str, Any]) -> Contract:
        """The contract in entries(), or in what dump() has; other entries are ignored. Raises ValueError."""
        known = {name: entries[name] for name in cls.model_fields if name in entries}
        for name in ("classes", "normalization"):
            if isinstance(known.get(name), str):
                known[name] = json.loads(known[name])
        return cls.model_validate(known)

    def entries(self) -> dict[str, str]:
        """The same as texts, for the metadata of a file: lists and groups are JSON. What is not known is left out."""
        known = {name: value for name, value in self.dump().items() if value not in (None, [])}
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}

    def image_of(self, path: Path) -> Tensor:
        """The picture in a file, prepared as the test images were: uint8 [image_size, image_size, 3].

        Raises PictureError if it cannot be read.
        """
        import torch

        from kd.datasets.photos import centre

        square = torch.tensor(read_square(path, self.side, self.resize or "short_side", self.background))
        return centre(square[None], self.image_size)[0]

    def named(self, label: int) -> str | int:
        """The name of a label; its number where names are not known."""
        return self.classes[label] if self.classes else label

    @property
    def labels(self) -> str:
        """The names of the classes, one a line; "" where they are not known."""
        return "".join(f"{printable(name)}\n" for name in self.classes)

    @property
    def images(self) -> str:
        """What the network takes, in words."""
        return f"float32 [batch, 3, {self.image_size}, {self.image_size}], RGB in [0, 1]; normalisation is inside"

    @property
    def inside(self) -> str:
        """What the network does with its images, in words."""
        own = self.normalization
        resized = f", after resizing to {own.size}×{own.size} ({own.interpolation}, antialiased)" if own.size else ""
        return f"{Normalization(mean=own.mean, std=own.std)}{resized}"

    @property
    def preprocessing(self) -> str:
        """How a picture becomes an image, in words."""
        how = {
            "short_side": f"the shorter side resized to {self.side}, the centre of {self.image_size}×{self.image_size}",
            "squash": f"resized to {self.side}×{self.side} whatever its shape",
            "pad": f"the longer side resized to {self.side}, in the middle of a black square",
        }[self.resize or "short_side"]
        return f"upright by its EXIF, {self.background} where it is transparent, {how} (bicubic, antialiased)"

    @property
    def made(self) -> str:
        """What the data set's own images were made from; "" for pictures of their size."""
        made = DATASETS[self.dataset].made if self.resize is None and self.dataset in DATASETS else ""
        return f", made from {made}" if made else ""

    @property
    def shown_classes(self) -> str:
        """The first names in a line; "" where they are not known."""
        more = self.num_classes - _SHOWN
        names = ", ".join(map(printable, self.classes[:_SHOWN]))
        return f"{names} and {more:,} more (labels.txt)" if self.classes and more > 0 else names
