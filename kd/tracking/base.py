"""What all pages have in common, and the one that shows nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kd.spec import Frozen, Text
from kd.store import Metrics


class TrackingSpec(Frozen):
    """The `tracking` section of the configuration."""

    name: Literal["wandb", "tensorboard", "none"]
    project: Text
    entity: Text | None = None
    group: Text | None = None  # null: the multirun's own; a single run has none
    tags: tuple[Text, ...] = ()
    mode: Literal["auto", "online", "offline"] = "auto"


@dataclass(frozen=True)
class Opening:
    """What a page is opened with."""

    name: str
    job_type: str
    group: str | None
    folder: Path  # where the page may write
    config: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()  # that epochs will be logged on
    keep: Path | None = None  # a folder that lasts as long as what is recorded may be gone on with


class Page:
    """Where people look at a run; this one shows nothing."""

    def log(self, axis: str, step: int, metrics: Metrics) -> None:
        """One epoch of the stage named by `axis`; `step` counts the epochs of all stages of the run."""

    def summarize(self, values: dict[str, Any]) -> None:
        """What the run comes to; later values replace earlier ones of the same name."""

    def show(self, table: Sequence[Mapping[str, Any]], figures: Sequence[Path]) -> None:
        """A table by rows, and pictures (PNG) under their files' names."""

    def close(self, failed: bool) -> None:
        """The run is over."""
