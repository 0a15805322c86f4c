"""Knowledge distillation in stages: each network is trained once, and stored by a key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.models.normalization import Normalized


def load(key: str, store: str | Path | None = None) -> Normalized:
    """A finished stage's network in eval mode, on the CPU, with its normalisation inside.

    It takes RGB images [batch, 3, height, width], uint8 or floating in [0, 1], and gives logits [batch, class] in the
    order of its data set's classes. Images should be squares as its test images were: of `dataset.image_size` pixels,
    photographs upright and resized as `python -m kd.predict` does it. A network that needs another size resizes them.
    `store` is the path of the store, by default the one in the repository (or $KD_STORE). Raises
    kd.core.spec.KnownError if there is no such stage, or if it is damaged.
    """
    from kd.store import Store, place

    return Store(place(str(store) if store else os.environ.get("KD_STORE"), "store")).network(key)
