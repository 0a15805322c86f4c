"""Fault injection: if any call of the store fails, or the process dies there, a stage is complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kd.core import files
from kd.core.spec import KnownError
from kd.store import StageResult, Store, TrainedStage
from kd.store.housekeeping import collect, remove
from tests.faults import every_fault
from tests.test_stage import distilled, stage

KEY = stage().key


def trained(seconds: float) -> TrainedStage:
    result = StageResult(params=3, val_acc=None, test_acc=50, epochs=1, selected_epoch=1, seconds=seconds)
    return TrainedStage({"w": torch.zeros(3)}, [{"epoch": 1}], result)


def save(root: Path, seconds: float) -> None:
    """As a run does."""
    store = Store(root)
    with store.lock(KEY):
        store.save(stage(), trained(seconds), {})


def left(root: Path) -> set[str]:
    """Everything in the store except lock files, which may stay."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - {f".locks/{KEY}.lock"}


STAGE = {f"{KEY}/{name}" for name in ("stage.json", "model.safetensors", "metrics.jsonl", "result.json", "SHA256SUMS")}


def nothing(root: Path) -> None:
    root.mkdir()


def earlier(root: Path) -> None:
    save(root, 1)


def damaged(root: Path) -> None:
    save(root, 1)
    (root / KEY / "model.safetensors").write_bytes(b"torn")


def crashed(root: Path) -> None:
    """Between the two renames of a replacement."""
    save(root, 1)
    (root / KEY).rename(root / f".{KEY}.{os.getpid()}@{os.uname().nodename}.old")
    (root / f".{KEY}.{os.getpid()}@{os.uname().nodename}.new").mkdir()


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync: it takes milliseconds, and these tests do not crash the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def told(name: str, calls: list[str], injections: int) -> None:
    """Shown by `pytest -rP`."""
    print(f"\n{name}: {len(calls)} calls, {injections} failures\n  " + "\n  ".join(calls).replace(KEY, "<key>"))


@pytest.mark.parametrize("start", [nothing, earlier, damaged, crashed])
def test_saving(tmp_path: Path, start: Callable[[Path], None]) -> None:
    """The result is the new stage or the old one. The next attempt succeeds and leaves no temporary files."""
    template, root = tmp_path / "template", tmp_path / "store"
    start(template)
    before = {1.0} if start in (earlier, crashed) else set()

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)

    def check() -> None:
        store = Store(root)
        if store.has(KEY):
            assert store.problem(KEY) is None or start is damaged
        with store.lock(KEY):
            assert store.has(KEY) or not before
            assert not store.has(KEY) or store.result(KEY).seconds in before | {2.0}
            store.save(stage(), trained(3), {})
        assert store.whole(KEY)
        assert store.result(KEY).seconds == 3
        remaining = {path for path in left(root) if not path.startswith("damaged/")}
        assert remaining == STAGE
        assert {path.name for path in root.iterdir()} <= {KEY, ".locks", "damaged"}

    calls, injections = every_fault(lambda: save(root, 2), fresh, check)
    told(f"saving, {start.__name__}", calls, injections)
    assert {"mkdir", "open", "write", "fsync", "rename"} <= {call.split()[0] for call in calls}


def test_removing(tmp_path: Path) -> None:
    template, root = tmp_path / "template", tmp_path / "store"
    earlier(template)
    Store(template).save(distilled(guide=stage()), trained(1), {})
    other = distilled(guide=stage()).key

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)

    def check() -> None:
        store = Store(root)
        assert all(store.whole(key) for key in store)
        assert store.has(KEY) or not store.has(other)  # never the guide without its student
        if store.has(KEY):
            remove(store, KEY, with_dependents=True)
        list(collect(store, 0, dry=False))
        assert left(root) == set()
        assert [path.name for path in root.iterdir()] == [".locks"]

    calls, injections = every_fault(lambda: remove(Store(root), KEY, True), fresh, check)
    told("removing", calls, injections)


def test_collecting(tmp_path: Path) -> None:
    template, root = tmp_path / "template", tmp_path / "store"
    damaged(template)
    with Store(template).lock(KEY):  # sets it aside
        Store(template).save(stage(), trained(1), {})
    for folder in (
        Store(template).partial(KEY),
        template / "bank" / f"{'f' * 16}-bf16-cpu-none-0",
        template / "bank" / KEY,
    ):
        folder.mkdir(parents=True)
        (folder / "data").touch()
    (template / f".{KEY}.{os.getpid()}@{os.uname().nodename}.new").mkdir()

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)

    def check() -> None:
        store = Store(root)
        assert store.whole(KEY)
        list(collect(store, 0, dry=False))
        assert left(root) == STAGE | {f"bank/{KEY}/data"}
        assert not list(root.glob(f".{KEY}*"))

    calls, injections = every_fault(lambda: list(collect(Store(root), 0, dry=False)), fresh, check)
    told("collecting", calls, injections)


def test_writing_a_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "result.json"

    def fresh() -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        path.write_text("earlier")

    def work() -> None:
        try:
            files.write(path, "newer")
        except OSError as error:
            raise KnownError(str(error)) from error

    def check() -> None:
        assert path.read_text() in ("earlier", "newer")
        assert all(files.abandoned(left) for left in path.parent.iterdir() if left != path)

    calls, injections = every_fault(work, fresh, check)
    told("writing a file", calls, injections)
    assert [call.split()[0] for call in calls] == ["open", "write", "fsync", "replace", "fsync"]
