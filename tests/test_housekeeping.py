"""`python -m kd.store`: what it prints, what it removes, and what it never removes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kd.core import files
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.reporting.console import in_bytes
from kd.store import Store
from kd.store.housekeeping import DAY, collect, dependents, remove
from kd.tools.store import main
from tests.conftest import ROOT
from tests.test_faults import trained
from tests.test_stage import TEACHER, distilled, stage

STUDENT = distilled()
ASSISTED = stage(role="student", model="resnet8", loss=STUDENT.loss, guide=STUDENT)


@pytest.fixture
def store() -> Store:
    """$KD_STORE with the chain teacher → student → its student, and one unrelated stage."""
    store = Store(Path(os.environ["KD_STORE"]))
    for each in (TEACHER, STUDENT, ASSISTED, stage(seed=9)):
        store.save(each, trained(1), {})
    return store


def test_the_list(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for key, file in (("0" * 16, "state"), ("1" * 16, "fp32/state"), ("2" * 16, "wandb.json")):
        (path := store.partial(key) / file).parent.mkdir(parents=True)
        path.write_bytes(b"")
    store.partial("3" * 16).mkdir()
    (store.root / stage(seed=9).key / "result.json").write_text("{}")
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith(ASSISTED.key))
    assert " ".join(line.split()[1:10]) == "student digits resnet8 ← resnet8 ← resnet20 – 50.00"
    assert "3 finished stages" in shown
    assert all(f"{each * 16} is unfinished" in shown for each in "01")
    assert not any(each * 16 in shown for each in "23")  # aborted before a checkpoint: nobody can go on with them
    assert f"stage {stage(seed=9).key} is damaged (result.json does not match its checksum)" in shown
    assert main(["list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    guides = {each["key"]: each["guides"] for each in told["finished"]}
    assert guides == {TEACHER.key: [], STUDENT.key: [TEACHER.key], ASSISTED.key: [STUDENT.key, TEACHER.key]}


def test_a_narrow_list_has_whole_keys(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in store)


@pytest.mark.parametrize(("size", "told"), [(999, "999 B"), (2.5e9, "2.5 GB"), (2.34e13, "23.4 TB")])
def test_sizes_have_their_units(size: float, told: str) -> None:
    assert in_bytes(size) == told


def test_the_list_needs_no_torch(store: Store) -> None:
    code = "import sys; from kd.store.__main__ import main; main([sys.argv[1]]); assert 'torch' not in sys.modules"
    for command in ("list", "verify", "gc"):
        subprocess.run([sys.executable, "-c", code, command], cwd=ROOT, check=True, capture_output=True)


def test_one_stage(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", STUDENT.key[:6]]) == 0
    shown = capsys.readouterr().out
    assert f'kd.load("{STUDENT.key}")' in shown
    assert f"stages that depend on it: {ASSISTED.key}" in shown
    for beginning in ("", "xyz"):
        with pytest.raises(KnownError, match="should be the key of one finished stage"):
            main(["show", beginning])


def test_verifying(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    (store.root / STUDENT.key / "metrics.jsonl").unlink()
    assert main(["verify"]) == 1
    assert main(["verify", STUDENT.key]) == 1
    assert main(["verify", TEACHER.key]) == 0
    shown = capsys.readouterr().out
    assert f"stage {STUDENT.key} is damaged (it has no metrics.jsonl)" in shown
    assert "3 of 4 stages match their checksums" in shown
    assert (store.root / STUDENT.key).exists()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="has no coreutils")
def test_coreutils_check_a_stage_too(store: Store) -> None:
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    subprocess.run(check, cwd=store.root / TEACHER.key, check=True, capture_output=True)


def test_removing(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert dependents(store, TEACHER.key) == [ASSISTED.key, STUDENT.key]
    with pytest.raises(KnownError, match=f"2 finished stages depend on .*: {ASSISTED.key}, {STUDENT.key}"):
        main(["rm", TEACHER.key])
    assert len(list(store)) == 4
    with store.lock(STUDENT.key), pytest.raises(KnownError, match=f"stage {STUDENT.key} is locked by another process"):
        remove(store, TEACHER.key, with_dependents=True)
    assert len(list(store)) == 4
    left = old(store.partial(STUDENT.key))  # by a crash, or of a training that was to be made again
    assert main(["rm", TEACHER.key, "--with-dependents"]) == 0
    assert list(store) == [stage(seed=9).key]
    assert not left.exists()
    with pytest.raises(KnownError, match="no finished stage"):
        remove(store, TEACHER.key, with_dependents=False)


def old(path: Path) -> Path:
    long_ago = time.time() - 40 * 86400
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"x" * 5000)
    for each in (path / "data", path):
        os.utime(each, (long_ago, long_ago))
    return path


def test_collecting(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    goes = [
        old(store.partial(STUDENT.key)),
        old(store.partial("1" * 16)),
        old(store.banks / f"{'2' * 16}-bf16-cpu-none-12345678"),
        old(store.damaged / f"{'3' * 16}-20200101T000000.000000Z"),
        old(files.temporary(store.root / TEACHER.key)),
        old(files.temporary(store.banks / "x")),
    ]
    stays = [
        store.partial("4" * 16),
        old(store.partial("5" * 16)),
        old(store.banks / f"{TEACHER.key}-bf16-cpu-none-12345678"),
        old(store.damaged / f"{'6' * 16}-29990101T000000.000000Z"),
        *(store.root / key for key in store),
    ]
    stays[0].mkdir()
    with store.lock("5" * 16):  # of a process that is at it
        assert main(["gc"]) == 0
        assert goes[2].exists()  # and might be reading it
    assert main(["gc", "--dry-run"]) == 0
    assert goes[2].exists()
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith("leftovers: 3, ")  # the logits, a checkpoint and a lock
    stays.remove(store.partial("5" * 16))
    assert main(["gc"]) == 0
    assert not any(path.exists() for path in goes)
    assert all(path.exists() for path in stays)
    assert not list((store.root / ".locks").iterdir())
    assert main(["gc"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("leftovers: 0, 0 B, removed from")
    assert next(collect(store, 0, dry=True)).path == stays[0]


def test_a_stage_that_is_finished_meanwhile_is_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run removes the checkpoint between gc's look at the folder and its turn."""
    place = old(store.partial(STUDENT.key))

    @contextmanager
    def claimed(*_: Any) -> Iterator[bool]:
        shutil.rmtree(place, ignore_errors=True)
        yield True

    monkeypatch.setattr("kd.store.housekeeping._claim", claimed)
    assert main(["gc"]) == 0


def test_caches_stay_with_their_guides_and_go_on_request(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    probe = Stage(**{**dict(stage(seed=3)), "init": "0" * 64, "freeze": "backbone"})
    store.save(probe, trained(1), {})
    caches = [store.banks / f"{key}-bf16-cpu-none-1" for key in (TEACHER.key, probe.backbone, "f" * 16)]
    for folder in caches:
        folder.mkdir(parents=True)
    main(["gc"])
    assert [folder.exists() for folder in caches] == [True, True, False]
    main(["gc", "--banks", "--dry-run"])
    assert "a guide's cache (--banks)" in capsys.readouterr().out
    assert [folder.exists() for folder in caches] == [True, True, False]
    os.utime(caches[0], (time.time() - 9 * DAY,) * 2)
    main(["gc", "--banks", "7"])
    assert [folder.exists() for folder in caches] == [False, True, False]
    main(["gc", "--banks"])
    assert not any(folder.exists() for folder in caches)
    assert store.whole(TEACHER.key)


def test_a_stage_between_two_renames_is_not_collected(store: Store) -> None:
    kept = files.temporary(store.root / TEACHER.key, "old")
    (store.root / TEACHER.key).rename(kept)
    list(collect(store, 0, dry=False))
    with store.lock(TEACHER.key):
        assert store.whole(TEACHER.key)


def test_testing_a_stored_network(job: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    student = job()["chain"][1]
    capsys.readouterr()
    assert main(["eval", student["key"], "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    for name in ("val_acc", "test_acc"):
        assert f"{student[name]:.4f} % (recorded: {student[name]:.4f} %)" in told
    with pytest.raises(KnownError, match="device: should be auto, cpu"):
        main(["eval", student["key"], "--device", "tpu"])
