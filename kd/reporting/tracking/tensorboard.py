"""TensorBoard: a page in the run's folder, without an account."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.core.spec import KnownError
from kd.reporting.tracking import LONGEST, Opening, Page, shortened
from kd.store import Metrics

_FLUSH_SECONDS = 10  # the page may be so much behind the training
# The columns of the table of runs (HPARAMS); all settings would not fit a screen.
_COMPARED = ("dataset.name", "method.", "model.", "teacher.", "train.", "mode", "seed")
_FINAL = ("objective", "test_acc", "teacher/test_acc")


class TensorBoardPage(Page):
    """`folder`/tensorboard/<name of the run>/, written again by every run like metrics.jsonl.

    Raises KnownError if the package is not installed.
    """

    def __init__(self, opening: Opening) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise KnownError(
                f"tracking=tensorboard needs a package that is not installed ({error}): pip install 'tensorboard>=2.18'"
            ) from error
        place = opening.folder / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        name = shortened("run_name", re.sub(r"[/\\]", "-", opening.name), LONGEST["run_name"])  # one folder
        self._writer = SummaryWriter(str(place / name), flush_secs=_FLUSH_SECONDS)
        self._config, self._final = opening.config, dict[str, Any]()
        if self._config:
            self._writer.add_text("configuration", _listing(dict(_settings(self._config))))

    def log(self, axis: str, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(f"{axis}/{name}", value, metrics["epoch"])

    def summarize(self, values: dict[str, Any]) -> None:
        self._final |= values

    def show(self, table: Sequence[Mapping[str, Any]], figures: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_text("jobs", _markdown(table))
        for figure in figures:
            pixels = np.asarray(Image.open(figure).convert("RGB"))
            self._writer.add_image(figure.stem, pixels, dataformats="HWC")

    def close(self, failed: bool) -> None:
        if self._final:
            self._writer.add_text("result", _listing(self._final))
            settings = {name: value for name, value in _settings(self._config) if name.startswith(_COMPARED)}
            final = {f"summary/{name}": self._final[name] for name in _FINAL if self._final.get(name) is not None}
            self._writer.add_hparams(settings, final, run_name=".")
        self._writer.close()


def _settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names, without those that are null."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _listing(values: Mapping[str, Any]) -> str:
    return _markdown([{"name": name, "value": value} for name, value in values.items()])


def _markdown(table: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in table for name in row))
    rows = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in table)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
