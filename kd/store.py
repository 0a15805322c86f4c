"""Finished stages by key: each is complete or absent, and trained by one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from kd.spec import Frozen, KnownError
from kd.stage import FORMAT, Source, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from kd.models.normalized import Normalized

_REPOSITORY = Path(__file__).resolve().parent.parent


def place(path: str | None, name: str) -> Path:
    """A path as the user gave it, from the working directory; by default the folder `name` of the repository."""
    return Path(os.path.expanduser(path)) if path else _REPOSITORY / name


Metrics = dict[str, float | int | None]


class StageResult(Frozen):
    """How a stage ended: accuracies of the kept weights in percent, time over all restarts."""

    params: int
    val_acc: float | None  # null where there is no validation split
    test_acc: float
    epochs: int
    selected_epoch: int  # whose weights were kept, counted from 1
    seconds: float


@dataclass
class Trained:
    """What a stage's training leaves behind: weights by parameter name, a row an epoch, and how it ended."""

    state: dict[str, Tensor]
    metrics: list[Metrics]
    result: StageResult


class Store:
    """`root`/<key>/{stage.json, model.safetensors, metrics.jsonl, result.json}; partial/<key>/ while training."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, key: str) -> bool:
        """Whether the stage is finished."""
        return (self.root / key / "result.json").is_file()

    def result(self, key: str) -> StageResult:
        """The result of a finished stage. Raises KnownError where there is none to read."""
        return StageResult.model_validate_json(self._read(key, "result.json"))

    def source(self, key: str) -> Source:
        """The spec of a finished stage, or of somebody's network. Raises KnownError where there is none to read."""
        return TypeAdapter[Source](Source).validate_python(json.loads(self._read(key, "stage.json"))["stage"])

    def made_with(self, key: str) -> dict[str, Any]:
        """What a finished stage's training was that its key does not say. Raises KnownError where there is none."""
        made_with: dict[str, Any] = json.loads(self._read(key, "stage.json"))["made_with"]
        return made_with

    def network(self, key: str) -> Normalized:
        """A finished stage's network on the CPU, in eval mode, its normalisation inside.

        Raises KnownError where there is none, or its weights cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from kd.models import build
        from kd.models.normalized import Normalized

        source = self.source(key)
        data = source.dataset
        network = build(source.model, num_classes=data.num_classes, image_size=data.image_size)
        if isinstance(source, Stage) and source.train.precision == "fp64":
            network = network.double()
        try:
            network.load_state_dict(load_file(self.root / key / "model.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self._damaged(key, error) from error
        *_, weight = network.parameters()
        return Normalized(network, source.normalize.mean, source.normalize.std).to(weight.dtype).eval()

    def fingerprint(self, key: str) -> str:
        """The hash of a finished stage's weights. Raises KnownError where they cannot be read."""
        try:
            return hashlib.sha256((self.root / key / "model.safetensors").read_bytes()).hexdigest()
        except OSError as error:
            raise self._damaged(key, error) from error

    def save(self, source: Source, trained: Trained, made_with: dict[str, Any]) -> None:
        """Publish a finished stage or somebody's network, in place of an earlier one of the same key.

        `made_with` records what is no part of the key but may move the last bits. Raises KnownError where
        the store cannot be written.
        """
        from safetensors.torch import save_file

        partial = self.root / f".{source.key}.new"  # under the stage's lock, so nobody else's
        record = {"format": FORMAT, "key": source.key, "stage": source.dump(), "made_with": made_with}
        try:
            shutil.rmtree(partial, ignore_errors=True)  # a crash may have left one
            partial.mkdir(parents=True)
            (partial / "stage.json").write_text(json.dumps(record, indent=2))
            save_file(
                {name: tensor.contiguous() for name, tensor in trained.state.items()}, partial / "model.safetensors"
            )
            (partial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained.metrics))
            (partial / "result.json").write_text(trained.result.model_dump_json(indent=2))
            for path in (*partial.iterdir(), partial):
                _sync(path)
            self._publish(partial, source.key)
        except OSError as error:
            raise KnownError(f"cannot write to the store: {error}; runtime.store or KD_STORE names another") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, key: str) -> None:
        place, old = self.root / key, self.root / f".{key}.old"
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        try:
            partial.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise
        _sync(self.root)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def banks(self) -> Path:
        """Where guides' logits are kept; disposable."""
        return self.root / "bank"

    def partial(self, key: str) -> Path:
        """The folder of an unfinished stage's checkpoint."""
        return self.root / "partial" / key

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the stage's lock; where another process has it, say so and wait."""
        path = self.root / ".locks" / f"{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"stage {key} is being trained by another process: waiting for it", flush=True)
                lock.acquire()
        except OSError as error:
            raise KnownError(f"cannot write to the store: {error}; runtime.store or KD_STORE names another") from error
        try:
            yield
        finally:
            lock.release()

    def _read(self, key: str, name: str) -> str:
        try:
            return (self.root / key / name).read_text()
        except FileNotFoundError as error:
            raise KnownError(f"no finished stage {key} in {self.root}") from error
        except OSError as error:
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, error: Exception) -> KnownError:
        return KnownError(f"stage {key} cannot be read ({error}); remove {self.root / key} to train it again")


def _sync(path: Path) -> None:
    """Force a file's or a folder's entries to disk, so that a rename never publishes what is not yet there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
