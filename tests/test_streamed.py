"""Streamed photographs: what workers decode, how they end, ImageNet's layout, and many files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec
from kd.datasets import DatasetConfig, pictures, resolve, stream_roots, streamed
from kd.datasets.layouts import Listing
from kd.datasets.streamed import Streamed
from kd.datasets.views import draw_crop, resized_crop
from kd.training.loop import Loop
from tests.conftest import QUICK, ROOT, run_py
from tests.test_photos import loaded, photographs, snapshots, stage_files
from tests.test_ranks import finish, launch

Job = Callable[..., Any]
SPEC = DatasetSpec(
    name="folder",
    num_classes=2,
    image_size=32,
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
    augment="resized_crop_flip",
    val_fraction=0,
    resize="short_side",
    streamed=True,
)


@pytest.fixture
def stream(tmp_path: Path) -> Streamed:
    images = loaded(snapshots(tmp_path / "photographs"), tmp_path / "data", decode="stream", views=None)
    assert isinstance(images, Streamed)
    return images


def one_picture(
    image: Image.Image, folder: Path, name: str = "0.png", spec: DatasetSpec = SPEC, **how: Any
) -> Streamed:
    """A stream of one picture, for training and for testing."""
    image.save(folder / name, **how)
    return Streamed.of(spec, Listing(folder, ["a", "b"], [(name, 0)], [(name, 0)]), "cpu", 1)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    return noise(height // 50, width // 50).resize((width, height), Image.Resampling.BICUBIC)


def drawn(images: Streamed, view: int) -> np.ndarray:
    """The view of its one picture: uint8 [height, width, 3]."""
    return images.show(torch.tensor([0]), torch.tensor([view]))[0].permute(1, 2, 0).numpy()


# crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (70, 70)])
def test_a_crop_is_torchvisions(tmp_path: Path, height: int, width: int) -> None:
    """Of a picture that stands, the box is that of the same picture lying down, turned."""
    image = noise(height, width)
    images = one_picture(image, tmp_path)
    for view in range(20):
        (top, left, tall, wide), flipped = draw_crop(0, view, min(height, width), max(height, width))
        box = (top, left, tall, wide) if width >= height else (left, top, wide, tall)
        cut = functional.resized_crop(image, *box, [32, 32])
        assert np.array_equal(drawn(images, view), functional.horizontal_flip(cut) if flipped else cut)


def test_a_photograph_that_is_stored_turned_is_cut_as_one_that_stands(tmp_path: Path) -> None:
    upright, exif = noise(90, 60), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    one = one_picture(upright, tmp_path, "upright.png")
    other = one_picture(turned, tmp_path, "turned.png", exif=exif)
    for view in range(5):
        assert np.array_equal(drawn(one, view), drawn(other, view))


def test_a_large_jpeg_is_opened_smaller_where_the_crop_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to the crop of the whole, with the same box. The view alone decides how small."""
    image = smooth(900, 1200)
    images, opened = one_picture(image, tmp_path, "0.jpg", quality=95), []
    whole = Image.open(tmp_path / "0.jpg").convert("RGB")

    def spied(*args: Any, **kwargs: Any) -> Image.Image:
        found = pictures.open_picture(*args, **kwargs)
        opened.append(found.width)
        return found

    monkeypatch.setattr(streamed, "open_picture", spied)
    for view in range(60):
        shown = drawn(images, view)
        (top, left, tall, wide), flipped = draw_crop(0, view, 900, 1200)
        exact = functional.resized_crop(whole, top, left, tall, wide, [32, 32])
        exact = np.asarray(functional.horizontal_flip(exact) if flipped else exact)
        assert np.abs(shown.astype(int) - exact).mean() < 4
        assert np.abs(shown.astype(int) - exact[:, ::-1]).mean() > 15
        assert min(tall, wide) * opened[-1] / 1200 >= 2 * 32
    assert {*opened} == {1200 // 8, 1200 // 4}
    again = [opened[i] for i in range(60)]
    for view in range(60):
        drawn(images, view)
    assert opened[60:] == again


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_squares_of_one_size_stay_as_they_are(tmp_path: Path, augment: str) -> None:
    """As in an array of them: nothing is resized, or cut off."""
    image, spec = noise(32, 32), SPEC.model_copy(update={"resize": None, "augment": augment})
    images = one_picture(image, tmp_path, spec=spec)
    pixels = np.asarray(image)
    (shown,) = images.batches("test")
    assert np.array_equal(shown[0].permute(1, 2, 0), pixels)
    if augment == "resized_crop_flip":
        assert np.array_equal(drawn(images, 3), resized_crop(torch.tensor(pixels), 0, 3, 32))
    noise(32, 33).save(tmp_path / "0.png")
    with pytest.raises(KnownError, match=r"has changed since it was listed: .*0.png is 33×32, not 32×32"):
        next(images.batches("test"))


# workers ----------------------------------------------------------------------------------------------------------


def epoch(images: Streamed, batch: int = 20) -> list[torch.Tensor]:
    samples, views = torch.arange(36).flip(0), torch.arange(36) * 7
    return list(images.shown(samples, views, [slice(i, min(i + batch, 36)) for i in range(0, 36, batch)]))


def test_the_number_of_workers_changes_no_pixel_and_no_random_number(stream: Streamed) -> None:
    state, known = torch.get_rng_state(), torch.cat(epoch(replace(stream, workers=1)))
    for workers, batch in ((2, 20), (2, 3), (1, 36), (2, 16), (2, 17)):
        found = epoch(replace(stream, workers=workers), batch)
        assert [len(each) for each in found[:-1]] == [batch] * (36 // batch - (36 % batch == 0))
        assert torch.equal(torch.cat(found), known)
    assert torch.equal(torch.get_rng_state(), state)
    assert multiprocessing.active_children() == []
    assert list(stream.shown(torch.arange(0), torch.arange(0), [])) == []


def test_as_many_workers_as_torch_has_threads(stream: Streamed) -> None:
    assert stream.workers == torch.get_num_threads()


def test_workers_end_where_the_epoch_is_left(stream: Streamed) -> None:
    batches = replace(stream, workers=2).shown(torch.arange(36).repeat(9), torch.arange(324), [slice(0, 9)] * 36)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_little_shared_memory_takes_fewer_workers(
    stream: Streamed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage(NamedTuple):
        free: int

    known = epoch(stream)
    part = streamed._PART * 32 * 32 * 3
    for free, left in ((6 * part, 1), (12 * part, 2), (1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(free))
        streamed._say_once.cache_clear()
        for _ in range(2):
            assert all(map(torch.equal, epoch(replace(stream, workers=3)), known))
        line = f"photographs are decoded by {left} of 3 workers: /dev/shm has {free / 1e6:,.0f} MB free"
        assert capsys.readouterr().out.count(line) == 1


def test_a_file_that_is_gone(stream: Streamed, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stream.root / "train" / "green" / "3.jpg").unlink()
    for workers in (1, 2):
        with pytest.raises(
            KnownError, match=r"^dataset.root: .*photographs has changed since it was listed: .*not a file"
        ):
            epoch(replace(stream, workers=workers))
    with pytest.raises(KnownError, match="not a file"):
        stream.show(torch.tensor([17]), torch.tensor([0]))
    assert multiprocessing.active_children() == []


LEFT_OPEN = """
import pickle, sys, torch
images = pickle.load(open(sys.argv[1], "rb"))
batches = images.shown(torch.arange(36).repeat(9), torch.arange(324), [slice(0, 9)] * 36)
next(batches)
print("begun", flush=True)
raise ValueError("which keeps the generator alive, in its traceback")
"""


def test_a_process_that_fails_does_not_wait_for_its_workers(stream: Streamed, tmp_path: Path) -> None:
    import pickle

    (tmp_path / "images").write_bytes(pickle.dumps(replace(stream, workers=2)))
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path / "images")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert done.stderr.splitlines()[-1].startswith("ValueError: which keeps")
    assert "dataloader" not in done.stderr


def of_session(session: int) -> set[int]:
    """The processes of a session."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_is_answered_by_one(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a terminal and SLURM send it. The run goes on at its step, to the bits of an unbroken one."""
    root = snapshots(tmp_path / "photographs", train=40)
    run = [*QUICK, *photographs(root, "stream"), "method=scratch", "train.epochs=30", "runtime.threads=2"]
    run += ["hydra.run.dir=out", "runtime.checkpoint_every=1000"]
    command, rows = [sys.executable, str(ROOT / "run.py"), *run], tmp_path / "out" / "metrics.jsonl"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # pytest in the background ignores SIGINT, and its children would, too.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    while not (rows.exists() and rows.read_text().count("\n") > 1 and len(of_session(process.pid)) == 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.count("asked to end") == 1
    assert err.splitlines()[-1] == "interrupted: start the same command again to continue"
    assert "Traceback" not in err
    assert of_session(process.pid) == set()
    again = run_py(*run, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "student plane2: resuming after epoch" in again.stdout
    key = json.loads((tmp_path / "out" / "result.json").read_text())["chain"][0]["key"]
    monkeypatch.setenv("KD_STORE", str(tmp_path / "unbroken"))
    assert run_py(*run, cwd=tmp_path).returncode == 0
    assert stage_files(tmp_path / "store", key) == stage_files(tmp_path / "unbroken", key)


LISTENING = """
import os, sys

def listen(event, details):
    if event == "open" and str(details[0]).endswith(".jpg"):
        from torch.utils.data import get_worker_info
        if get_worker_info() is not None:
            with open(os.environ["OPENED"] + os.environ["RANK"], "a") as log:
                log.write(details[0] + os.linesep)

if "RANK" in os.environ:
    sys.addaudithook(listen)
"""


@pytest.mark.slow
def test_two_ranks_open_different_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each photograph is opened once in an epoch, by a worker of one of the ranks, which share them equally."""
    root = snapshots(tmp_path / "photographs")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(LISTENING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    run = [*photographs(root, "stream"), "method=scratch", "train.epochs=1", "train.batch_size=12"]
    code, out, problems = finish(launch(*run, "dataset.val_fraction=0", "train.select=last", cwd=tmp_path))
    assert (code, problems) == (0, []), out
    opened = [(tmp_path / f"opened{rank}").read_text().splitlines() for rank in (0, 1)]
    trained = [Counter(name for name in names if Path(name).parts[-3] == "train") for names in opened]
    assert {*trained[0].values(), *trained[1].values()} == {2}  # for its size, and for its pixels
    assert [len(names) for names in trained] == [18, 18]
    assert sorted([*trained[0], *trained[1]]) == sorted(map(str, root.glob("train/*/*.jpg")))


@pytest.mark.slow
def test_two_ranks_that_stream_give_the_same_bits_again(tmp_path: Path) -> None:
    root = snapshots(tmp_path / "photographs")
    run = [*photographs(root, "stream"), "method=kd", "train.epochs=3", "runtime.bank=false"]
    code, out, problems = finish(launch(*run, cwd=tmp_path))
    assert (code, problems) == (0, []), out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [stage["reused"] for stage in result["chain"]] == [False, False]
    keys = [stage["key"] for stage in result["chain"]]
    before = [stage_files(tmp_path / "store", key) for key in keys]
    shutil.rmtree(tmp_path / "store")
    assert finish(launch(*run, cwd=tmp_path))[0] == 0
    assert [stage_files(tmp_path / "store", key) for key in keys] == before


LOSING = """
import os, sys

def listen(event, details):
    if event == "open" and str(details[0]).endswith(".jpg") and os.path.exists(os.environ["LOST"]):
        raise OSError("lost")

if os.environ.get("RANK") == os.environ["LOSER"]:
    sys.addaudithook(listen)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loser", ["0", "1"])
def test_a_photograph_that_one_rank_loses_ends_the_run_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loser: str
) -> None:
    """The other rank knows nothing of it, and waits for the batch."""
    root, flag = snapshots(tmp_path / "photographs"), tmp_path / "lost"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(LOSING)
    for name, value in {"PYTHONPATH": tmp_path / "hook", "LOST": flag, "LOSER": loser}.items():
        monkeypatch.setenv(name, str(value))
    process = launch(*photographs(root, "stream"), "method=scratch", "train.epochs=2000", cwd=tmp_path)
    rows = tmp_path / "out" / "metrics.jsonl"
    while not rows.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    flag.touch()
    code, _, problems = finish(process)
    assert code == 1
    assert any("photographs has changed since it was listed" in line for line in problems)


def test_two_copies_of_streamed_photographs_are_used_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps to its own copy. One that names none takes the newest that is there."""
    file, one, other = tmp_path / "c.root", tmp_path / "1", tmp_path / "2"
    stream_roots.keep_root(file, one)
    own = dict(stream_roots._chosen)
    monkeypatch.setattr(stream_roots, "_chosen", {})  # another process
    stream_roots.keep_root(file, other)
    monkeypatch.setattr(stream_roots, "_chosen", own)
    assert stream_roots.root_of(file) == one
    monkeypatch.setattr(stream_roots, "_chosen", {})
    for place in (one, other):
        place.mkdir()
        assert stream_roots.root_of(file) == place
    other.rmdir()
    assert stream_roots.root_of(file) == one
    file.write_text(json.dumps(str(other)))  # of an earlier version
    assert stream_roots.root_of(file) == other


def test_a_damaged_list_of_streamed_files_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(snapshots(tmp_path / "pets"))
    chosen = DatasetConfig(
        name="folder", root=root, augment="none", decode="stream", image_size=32, val_fraction=0.1, split_seed=0
    )
    spec = resolve(chosen, tmp_path / "data")
    (path,) = (tmp_path / "data").glob("**/*.files")
    path.write_bytes(path.read_bytes()[:-9])
    capsys.readouterr()
    assert resolve(chosen, tmp_path / "data") == spec
    assert "damaged" in capsys.readouterr().out


# ImageNet ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_imagenet_streams_and_goes_on_after_an_interruption(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its usual layout, its recipe, and a ResNet of its style. val/ is the test set."""
    root = snapshots(tmp_path / "data" / "imagenet", parts=("train", "val"))
    for part in ("train", "val"):
        for label, name in enumerate(("blue", "green", "red")):
            (root / part / name).rename(root / part / f"n0144076{label}")
    run = ["dataset=imagenet", "dataset.decode=stream", "dataset.image_size=72", "model=resnet14_imagenet", "method=kd"]
    run += ["train=imagenet", "train.epochs=3", "train.batch_size=16", "runtime.checkpoint_every=1"]
    validate = Loop._validate

    def interrupted(loop: Loop) -> float | None:
        if loop.stage.role == "student" and len(loop.history) == 1:
            raise KeyboardInterrupt
        return validate(loop)

    monkeypatch.setattr(Loop, "_validate", interrupted)
    job(*run, code=130)
    said = capsys.readouterr().out
    assert "3 classes: n01440760 (18), n01440761 (18), n01440762 (18)" in said
    assert "imagenet: images of 72×72: augment=resized_crop_flip, views=all" in said
    assert said.count("cached: every epoch has new views") == 1
    monkeypatch.undo()
    monkeypatch.setenv("KD_DATA", str(tmp_path / "data"))
    for store in ("store", "unbroken"):
        monkeypatch.setenv("KD_STORE", str(tmp_path / store))
        result = job(*run, folder=store)
        assert ("resnet14_imagenet: resuming after epoch 1" in capsys.readouterr().out) == (store == "store")
    key = result["chain"][-1]["key"]
    assert stage_files(tmp_path / "store", key) == stage_files(tmp_path / "unbroken", key)
    rows = [json.loads(row) for row in (tmp_path / "unbroken" / key / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.01, 0.001])  # divided by ten after each third
    assert result["dataset"] == "imagenet"


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["array", "stream"])
def test_takds_row_of_imagenet_trains_on_a_stand_in(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    """The experiment as it is declared, with small pictures, and one epoch."""
    monkeypatch.setattr("tests.conftest.QUICK", QUICK[3:])  # the networks are the experiment's
    root = snapshots(tmp_path / "imagenet", parts=("train", "val"))
    row = ["experiment=takd/imagenet/ta_resnet50_resnet20_resnet14", f"dataset.root={root}", f"dataset.decode={decode}"]
    chain = job(*row, "dataset.image_size=32", "dataset.views=2", "train.epochs=1", "train.batch_size=12")["chain"]
    assert [stage["model"] for stage in chain] == [f"resnet{depth}_imagenet" for depth in (50, 20, 14)]
    assert [stage["guides"] for stage in chain] == [[], [chain[0]["key"]], [chain[1]["key"]]]
    assert not any(stage["reused"] for stage in chain)


# many files -------------------------------------------------------------------------------------------------------

MANY = 100_000
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("peak of the largest process:", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, "MB")
sys.exit(code)
"""


@pytest.mark.slow
def test_a_hundred_thousand_photographs_train_streamed(tmp_path: Path) -> None:
    """Hard links to a few photographs. One epoch at 32 pixels; the memory is that of a small data set."""
    seen = snapshots(tmp_path / "few")
    peaks = []
    for count in (30, MANY):
        root = tmp_path / str(count)
        for part, share in (("train", count), ("val", 30)):
            for name in ("blue", "green", "red"):
                (root / part / name).mkdir(parents=True)
                for i in range(share // 3):
                    os.link(seen / "train" / name / f"{i % 12}.jpg", root / part / name / f"{i:06}.jpg")
        run = [*QUICK, *photographs(root, "stream"), "method=scratch", "train.epochs=1", "train.batch_size=250"]
        run += [f"hydra.run.dir={tmp_path / f'out{count}'}", "runtime.threads=2", "dataset.image_size=16"]
        command = [sys.executable, "-c", MEASURED, sys.executable, str(ROOT / "run.py"), *run]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1].split()[-2]))
    print(f"peak of a process: {peaks[0]} MB of 30 photographs, {peaks[1]} MB of {MANY:,}")
    assert peaks[1] < peaks[0] + 200
