"""Finished stages by key: each is complete or absent, has checksums, and is trained by one process at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from kd.core import files
from kd.core.files import ROOT
from kd.core.spec import Frozen, KnownError
from kd.core.stage import FORMAT, Source, Stage
from kd.losses import LOSSES
from kd.store.weights_file import packed

if TYPE_CHECKING:
    from torch import Tensor

    from kd.models.normalization import Normalized

# An epoch's numbers by name, or None where there is none; `alarms`, a list of texts, only in an epoch that has some
Metrics = dict[str, Any]

SUMS = "SHA256SUMS"
RETRIED = "in fp32 after"  # a key of stage.json: the error in the stage's own precision
TAUGHT_BY = "guide weights"  # another one: what Store.weights_of_guides() was when the stage was trained
STAGE_FILES = ("stage.json", "model.safetensors", "metrics.jsonl", "result.json")

_LINE = re.compile(r"([0-9a-f]{64})  (\S+)\n")
_DAMAGE = (errno.EIO, errno.EISDIR, errno.ENOTDIR)  # other errors, e.g. EACCES or EMFILE, say nothing about the data


class DamageError(KnownError):
    """A file of a stage is missing, or does not match its checksum."""


def digest(content: bytes) -> str:
    """The sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def sums_of(contents: Mapping[str, bytes]) -> bytes:
    """The content of SHA256SUMS for these files."""
    return "".join(f"{digest(content)}  {name}\n" for name, content in contents.items()).encode()


def read_file(folder: Path, name: str) -> bytes:
    """A file of a stage. Raises DamageError if it does not match its checksum, OSError if it may not be read."""
    lines = _bytes(folder / SUMS).decode(errors="replace").splitlines(keepends=True)
    sums = {match[2]: match[1] for match in map(_LINE.fullmatch, lines) if match}
    if sorted(sums) != sorted(STAGE_FILES) or len(lines) != len(STAGE_FILES):
        raise DamageError(f"{SUMS} does not list the stage's files")
    content = _bytes(folder / name)
    if digest(content) != sums[name]:
        raise DamageError(f"{name} does not match its checksum")
    return content


def damage_in(folder: Path, key: str) -> str | None:
    """What is wrong with the files of a stage, or None. Raises OSError if they may not be read."""
    try:
        contents = {name: read_file(folder, name) for name in STAGE_FILES}
        found = json.loads(contents["stage.json"])["key"]
    except DamageError as damage:
        return str(damage)
    except (ValueError, KeyError, TypeError):
        return "stage.json does not describe a stage"
    return None if found == key else f"it is a copy of {found}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamageError(f"it has no {path.name}") from error
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise DamageError(f"{path.name} cannot be read: {error.strerror}") from error


_SOURCE: TypeAdapter[Source] = TypeAdapter(Source)


def place(path: str | None, name: str) -> Path:
    """The user's path, relative to the working directory; by default the folder `name` of the repository."""
    return Path(os.path.expanduser(path)) if path else ROOT / name


def parse_source(tree: dict[str, Any]) -> Source:
    """The spec in a stage.json. Raises ValueError, KeyError or TypeError."""
    known = dict(tree)
    if "loss" in known:
        known["loss"] = LOSSES.parse(known["loss"])
    if known.get("guide") is not None:
        known["guide"] = parse_source(known["guide"])
    if "others" in known:
        known["others"] = [parse_source(other) for other in known["others"]]
    return _SOURCE.validate_python(known)


def alarms_in(rows: Iterable[Metrics]) -> tuple[str, ...]:
    """What looked wrong while a stage was trained: "epoch 1: student resnet8: its guide resnet20 teaches nothing"."""
    return tuple(f"epoch {row['epoch']}: {text}" for row in rows for text in row.get("alarms", ()))


class StageResult(Frozen):
    """The result of a stage: accuracies of the kept weights in percent; `seconds` includes all restarts."""

    params: int
    val_acc: float | None  # null without a validation split
    test_acc: float
    epochs: int
    selected_epoch: int  # the epoch of the kept weights, counted from 1
    seconds: float


@dataclass
class TrainedStage:
    """What a stage's training returns: weights by parameter name, a row of metrics per epoch, and the result."""

    state: dict[str, Tensor]
    metrics: list[Metrics]
    result: StageResult


class Store:
    """`root`/<key>/{stage.json, model.safetensors, metrics.jsonl, result.json, SHA256SUMS}.

    Every file that is read is compared with its checksum. Raises KnownError if it cannot be read or does not match.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._whole: set[str] = set()

    @classmethod
    def at(cls, path: str | Path | None = None) -> Store:
        """The store at a path; by default $KD_STORE, or the one in the repository."""
        return cls(place(str(path) if path else os.environ.get("KD_STORE"), "store"))

    def has(self, key: str) -> bool:
        """Whether the stage is finished. Its checksums are not compared."""
        return (self.root / key / "result.json").is_file()

    def whole(self, key: str) -> bool:
        """Whether the stage is finished and all its files match their checksums. A positive answer is remembered.

        Raises KnownError if they may not be read.
        """
        if key not in self._whole and self.has(key) and self.problem(key) is None:
            self._whole.add(key)
        return key in self._whole

    def problem(self, key: str) -> str | None:
        """What is wrong with the files of a stage, or None. Raises KnownError if they may not be read."""
        try:
            return damage_in(self.root / key, key)
        except OSError as error:
            raise KnownError(f"stage {key} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        """The keys of the finished stages, sorted."""
        found = sorted(os.listdir(self.root)) if self.root.is_dir() else []
        return (name for name in found if re.fullmatch("[0-9a-f]{16}", name) and self.has(name))

    def complete(self, beginning: str) -> str:
        """The one finished stage's key that has this beginning. Raises KnownError if there are none or several."""
        if not beginning:  # an unset variable of the shell would be the key of any stage
            raise KnownError("an empty text: should be the key of one finished stage")
        found = [key for key in self if key.startswith(beginning)]
        if len(found) != 1:
            several = f"{len(found)} keys begin with it: {', '.join(found[:5])}"
            which = several if found else f"no key begins with it in {self.root}"
            raise KnownError(f"{beginning}: should be the key of one finished stage ({which})")
        return found[0]

    def loading(self, key: str) -> str:
        """What loads a stage's network in Python: `kd.load("0123…")`, with the store if it is not the usual one."""
        here = self.root.absolute()
        other = "" if here == Store.at().root.absolute() else f", {json.dumps(str(here), ensure_ascii=False)}"
        return f'kd.load("{key}"{other})'

    def result(self, key: str) -> StageResult:
        """The result of a finished stage. Raises KnownError if there is no such stage, or it is damaged."""
        with self._parsing(key):
            return StageResult.model_validate_json(self._read(key, "result.json"))

    def record(self, key: str) -> dict[str, Any]:
        """stage.json of a finished stage: its spec and what it was made with. Raises KnownError as above."""
        with self._parsing(key):
            return dict(json.loads(self._read(key, "stage.json")))

    def retried(self, key: str) -> str | None:
        """The error after which a finished stage was trained again in fp32; None if there was none."""
        error: str | None = self.record(key)["made_with"].get(RETRIED)
        return error

    def precision(self, key: str) -> str:
        """The precision in which a finished stage was trained and evaluated; fp32 of a given network."""
        source = self.source(key)
        return source.train.precision if isinstance(source, Stage) and not self.retried(key) else "fp32"

    def metrics(self, key: str) -> list[Metrics]:
        """The metrics of a finished stage, a row per epoch. Raises KnownError as above."""
        with self._parsing(key):
            return [json.loads(line) for line in self._read(key, "metrics.jsonl").splitlines()]

    def source(self, key: str) -> Source:
        """The spec of a finished stage or of a given network. Raises KnownError as above."""
        with self._parsing(key):
            return parse_source(self.record(key)["stage"])

    def network(self, key: str) -> Normalized:
        """A finished stage's network on the CPU, in eval mode, with its normalisation. Raises KnownError as above."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        from kd.models import build
        from kd.models.normalization import Normalized

        source = self.source(key)
        data = source.dataset
        network = build(source.model, num_classes=data.num_classes, image_size=source.input_size)
        if isinstance(source, Stage) and source.train.precision == "fp64":
            network = network.double()
        with self._parsing(key, SafetensorError, RuntimeError):
            network.load_state_dict(load(self._read(key, "model.safetensors")))
        *_, weight = network.parameters()
        return Normalized.of(network, source.normalize).to(weight.dtype).eval()

    def fingerprint(self, key: str) -> str:
        """The hash of a finished stage's weights. Raises KnownError as above."""
        return digest(self._read(key, "model.safetensors"))

    def weights_of_guides(self, stage: Stage) -> str:
        """Hashes of the weights of a stage's guides, shortened. The same key has other bits after a second training."""
        return " ".join(self.fingerprint(guide.key)[:16] for guide in stage.guides)

    def save(self, source: Source, trained: TrainedStage, made_with: dict[str, Any]) -> None:
        """Publish a finished stage or a given network. It replaces an earlier one with the same key.

        `made_with` records what is not in the key but may change the last bits. Raises KnownError if the store cannot
        be written.
        """
        record = {"format": FORMAT, "key": source.key, "stage": source.dump(), "made_with": made_with}
        contents = {
            "stage.json": json.dumps(record, indent=2).encode(),
            "model.safetensors": packed(trained.state),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in trained.metrics).encode(),
            "result.json": trained.result.model_dump_json(indent=2).encode(),
        }
        new = files.temporary(self.root / source.key)
        with self.writing():
            try:
                shutil.rmtree(new, ignore_errors=True)  # left by an earlier attempt of this process
                os.makedirs(new)
                for name, content in {**contents, SUMS: sums_of(contents)}.items():
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
            # Another process has published the same bits meanwhile. This happens only if locks do not work.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                with suppress(OSError):
                    os.rename(old, stage)
                raise
        files.sync(self.root)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def banks(self) -> Path:
        """The folder of cached guide logits. It can be deleted."""
        return self.root / "bank"

    @property
    def outputs(self) -> Path:
        """The folder of cached logits of finished stages on their test images. It can be deleted."""
        return self.root / "outputs"

    @property
    def damaged(self) -> Path:
        """The folder to which damaged stages are moved."""
        return self.root / "damaged"

    def partial(self, key: str) -> Path:
        """The folder of an unfinished stage's checkpoint."""
        return self.root / "partial" / key

    def lock_file(self, key: str) -> Path:
        """The stage's lock file."""
        return self.root / ".locks" / f"{key}.lock"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the stage's lock. If another process has it, say so and wait. Inside, the stage is complete or absent.

        Raises KnownError if the store cannot be written.
        """
        with ExitStack() as held:
            with self.writing():
                held.enter_context(files.hold_lock(self.lock_file(key), f"stage {key} is being trained by"))
                self.recover(key)
            yield

    def recover(self, key: str) -> None:
        """Move the stage aside if it is damaged, and remove what a crash has left. The caller holds the stage's lock.

        Raises OSError if that fails.
        """
        stage = self.root / key
        self._whole.discard(key)
        problem = self.problem(key) if os.path.lexists(stage) else None
        if problem is not None:
            self._set_aside(key, problem)
        for old in files.temporaries(self.root, key, "old"):
            if not stage.exists() and damage_in(old, key) is None:  # killed between the renames of _publish
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
        print(f"stage {key} is damaged ({problem}): it is moved to {aside} and trained again", flush=True)

    def _read(self, key: str, name: str) -> bytes:
        if not (self.root / key).is_dir():
            raise KnownError(f"no finished stage {key} in {self.root}")
        try:
            return read_file(self.root / key, name)
        except DamageError as damage:
            raise DamageError(f"stage {key} is damaged ({damage}): a run that needs it trains it again") from damage
        except OSError as error:
            raise KnownError(f"stage {key} cannot be read: {error}") from error

    @contextmanager
    def _parsing(self, key: str, *errors: type[Exception]) -> Iterator[None]:
        expected: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, *errors)
        try:
            yield
        except expected as error:
            said = str(error).splitlines()[0]
            raise KnownError(f"stage {key} was written by another version of kd, or not by kd ({said})") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise OSErrors of the block as KnownErrors that say how to choose another store."""
        try:
            yield
        except OSError as error:
            raise KnownError(f"cannot write to the store: {error}; set runtime.store or KD_STORE to another") from error
