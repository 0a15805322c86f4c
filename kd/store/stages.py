"""Finished stages by key: each is whole or absent, and trained by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from kd import files
from kd.spec import Frozen, KnownError
from kd.stage import FORMAT, Source, Stage
from kd.store import locks, sums

if TYPE_CHECKING:
    from torch import Tensor

    from kd.models.normalized import Normalized

_REPOSITORY = Path(__file__).resolve().parents[2]
_SOURCE: TypeAdapter[Source] = TypeAdapter(Source)


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
    """`root`/<key>/{stage.json, model.safetensors, metrics.jsonl, result.json, SHA256SUMS}.

    Whatever is read of a stage is compared with its sums; what cannot be is a KnownError.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._whole: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the stage was finished; what is in its files is not looked at."""
        return (self.root / key / "result.json").is_file()

    def whole(self, key: str) -> bool:
        """Whether the stage is finished, and all of its files are what was written; looked up until it is.

        Raises KnownError where they may not be read.
        """
        if key not in self._whole and self.has(key) and self.problem(key) is None:
            self._whole.add(key)
        return key in self._whole

    def problem(self, key: str) -> str | None:
        """What is wrong with the files of a stage, if anything. Raises KnownError where they may not be read."""
        try:
            return sums.problem(self.root / key, key)
        except OSError as error:
            raise KnownError(f"stage {key} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """The keys of the finished stages, sorted."""
        found = sorted(os.listdir(self.root)) if self.root.is_dir() else []
        return (name for name in found if re.fullmatch("[0-9a-f]{16}", name) and self.has(name))

    def complete(self, beginning: str) -> str:
        """The key of the one finished stage that begins so. Raises KnownError where there is none, or are several."""
        found = [key for key in self if key.startswith(beginning)]
        if len(found) != 1:
            several = f"{len(found)} stages begin so: {', '.join(found[:5])}"
            which = several if found else f"none begins so in {self.root}"
            raise KnownError(f"{beginning}: should be the key of one finished stage ({which})")
        return found[0]

    def result(self, key: str) -> StageResult:
        """The result of a finished stage. Raises KnownError where there is none, or it is damaged."""
        with self._parsing(key):
            return StageResult.model_validate_json(self._read(key, "result.json"))

    def record(self, key: str) -> dict[str, Any]:
        """stage.json of a finished stage: its spec and what it was made with. Raises KnownError as above."""
        with self._parsing(key):
            return dict(json.loads(self._read(key, "stage.json")))

    def metrics(self, key: str) -> list[Metrics]:
        """A row an epoch of a finished stage. Raises KnownError as above."""
        with self._parsing(key):
            return [json.loads(line) for line in self._read(key, "metrics.jsonl").splitlines()]

    def source(self, key: str) -> Source:
        """The spec of a finished stage, or of somebody's network. Raises KnownError as above."""
        with self._parsing(key):
            return _SOURCE.validate_python(self.record(key)["stage"])

    def network(self, key: str) -> Normalized:
        """A finished stage's network on the CPU, in eval mode, its normalisation inside. Raises KnownError as above."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from kd.models import build
        from kd.models.normalized import Normalized

        source = self.source(key)
        data = source.dataset
        network = build(source.model, num_classes=data.num_classes, image_size=data.image_size)
        if isinstance(source, Stage) and source.train.precision == "fp64":
            network = network.double()
        with self._parsing(key, SafetensorError, RuntimeError):
            network.load_state_dict(load(self._read(key, "model.safetensors")))
        *_, weight = network.parameters()
        return Normalized(network, source.normalize.mean, source.normalize.std).to(weight.dtype).eval()

    def fingerprint(self, key: str) -> str:
        """The hash of a finished stage's weights. Raises KnownError as above."""
        return sums.digest(self._read(key, "model.safetensors"))

    def save(self, source: Source, trained: Trained, made_with: dict[str, Any]) -> None:
        """Publish a finished stage or somebody's network, in place of an earlier one of the same key.

        `made_with` records what is no part of the key but may move the last bits. Raises KnownError where
        the store cannot be written.
        """
        from safetensors.torch import save

        record = {"format": FORMAT, "key": source.key, "stage": source.dump(), "made_with": made_with}
        contents = {
            "stage.json": json.dumps(record, indent=2).encode(),
            "model.safetensors": save({name: tensor.contiguous() for name, tensor in trained.state.items()}),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in trained.metrics).encode(),
            "result.json": trained.result.model_dump_json(indent=2).encode(),
        }
        new = files.temporary(self.root / source.key)
        with self.writing():
            try:
                shutil.rmtree(new, ignore_errors=True)  # left by an attempt of this process
                os.makedirs(new)
                for name, content in {**contents, sums.NAME: sums.describe(contents)}.items():
                    with open(new / name, "wb") as file:
                        file.write(content)
                files.settle(new)
                self._publish(new, source.key)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def _publish(self, new: Path, key: str) -> None:
        stage = self.root / key
        old = files.temporary(stage, "old")
        with suppress(FileNotFoundError):
            os.rename(stage, old)
        try:
            os.rename(new, stage)
        except OSError as error:
            # Another process published the same bits meanwhile: only where locks do not work.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    os.rename(old, stage)
                raise
        files.sync(self.root)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def banks(self) -> Path:
        """Where guides' logits are kept; disposable."""
        return self.root / "bank"

    @property
    def outputs(self) -> Path:
        """Where the logits of finished stages on their test images are kept; disposable."""
        return self.root / "outputs"

    @property
    def damaged(self) -> Path:
        """Where stages are set aside whose files are not what was written."""
        return self.root / "damaged"

    def partial(self, key: str) -> Path:
        """The folder of an unfinished stage's checkpoint."""
        return self.root / "partial" / key

    def lock_file(self, key: str) -> Path:
        """What the stage's lock is on."""
        return self.root / ".locks" / f"{key}.lock"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the stage's lock, within which it is whole or absent; where another process has it, say so and wait.

        Raises KnownError where the store cannot be written.
        """
        with ExitStack() as held:
            with self.writing():
                held.enter_context(locks.hold(self.lock_file(key), f"stage {key} is being trained by"))
                self.recover(key)
            yield

    def recover(self, key: str) -> None:
        """Under its lock, set the stage aside if it is damaged, and clear away what a crash has left of it.

        Raises OSError where that cannot be done.
        """
        stage = self.root / key
        self._whole.discard(key)
        problem = self.problem(key) if os.path.lexists(stage) else None
        if problem is not None:
            self._set_aside(key, problem)
        for old in files.temporaries(self.root, key, "old"):
            if not stage.exists() and sums.problem(old, key) is None:  # it ended between the renames of _publish
                os.rename(old, stage)
                files.sync(self.root)
        for left in (*files.temporaries(self.root, key), *files.temporaries(self.partial(key))):
            if files.abandoned(left) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif files.abandoned(left):
                left.unlink(missing_ok=True)

    def _set_aside(self, key: str, problem: str) -> None:
        aside = self.damaged / f"{key}-{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}"
        os.makedirs(self.damaged, exist_ok=True)
        os.rename(self.root / key, aside)
        files.sync(self.damaged)
        files.sync(self.root)
        print(f"stage {key} is damaged ({problem}): it lies in {aside} now, and is trained again", flush=True)

    def _read(self, key: str, name: str) -> bytes:
        if not (self.root / key).is_dir():
            raise KnownError(f"no finished stage {key} in {self.root}")
        try:
            return sums.read(self.root / key, name)
        except sums.DamageError as damage:
            raise sums.DamageError(
                f"stage {key} is damaged ({damage}): a run that needs it trains it again"
            ) from damage
        except OSError as error:
            raise KnownError(f"stage {key} cannot be read: {error}") from error

    @contextmanager
    def _parsing(self, key: str, *errors: type[Exception]) -> Iterator[None]:
        expected: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, *errors)
        try:
            yield
        except expected as error:
            said = str(error).splitlines()[0]
            raise KnownError(f"stage {key} is of another version of kd, or not its own work ({said})") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What cannot be written within is a KnownError that says how to name another store."""
        try:
            yield
        except OSError as error:
            raise KnownError(f"cannot write to the store: {error}; runtime.store or KD_STORE names another") from error
