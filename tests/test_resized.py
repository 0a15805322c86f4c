"""Arrays of photographs that are resized once, and listings of those that are streamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd.core.spec import KnownError
from kd.datasets import DatasetConfig, decoder, load_data, resized, resolve, specify
from kd.datasets.data import Data
from kd.datasets.photos import Photos
from kd.datasets.pictures import read_square
from tests.conftest import ROOT

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def photographs(root: Path, count: int = 3) -> Path:
    """Pictures of many kinds and shapes: all of `warm` are red at the centre, all of `cold` blue."""
    for split in ("train", "test"):
        for name, colour in (("cold", BLUE), ("warm", RED)):
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (60 + 10 * i, 40), colour)
                image.save(place / f"{i}.png")
            Image.new("RGB", (40, 90), colour).save(place / "tall.webp", lossless=True)
    return root


def config(root: Path | None, **changes: object) -> DatasetConfig:
    fields = {"name": "folder", "augment": "auto", "views": "auto", "val_fraction": 0.25, "split_seed": 0}
    return DatasetConfig.model_validate({**fields, "root": root and str(root), **changes})


def arrays(folder: Path, content: str | None) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / str(content)).iterdir()}


# which pictures become which array --------------------------------------------------------------------------------


def test_photographs_are_resized_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    spec = resolve(config(root), data)
    said = capsys.readouterr().out
    assert "images are not square (0.png is 60×40)" in said
    assert f"resizing 16 photographs of {root} to 256×256 (short_side), once: 3.1 MB in {data / 'folder'}" in said
    assert "folder: images of 224×224: augment=resized_crop_flip, views=16" in said
    assert (spec.image_size, spec.resize, spec.streamed, spec.classes) == (224, "short_side", False, ("cold", "warm"))
    stored = resized.stored(data / "folder", str(spec.content))
    assert (stored.side, stored.labels.tolist(), stored.test_labels.tolist()) == (
        256,
        [0] * 4 + [1] * 4,
        [0] * 4 + [1] * 4,
    )
    for split in ("train", "test"):
        pixels = stored.read(split, np.array([7, 0, 3]))  # type: ignore[arg-type]
        assert (pixels.shape, pixels.dtype) == ((3, 256, 256, 3), np.uint8)
        assert [tuple(picture[128, 128]) for picture in pixels] == [RED, BLUE, BLUE]
    assert resolve(config(root), data) == spec
    said = capsys.readouterr().out
    assert "resizing" not in said
    assert "photos:" not in said


def test_the_array_has_the_pictures_in_order(tmp_path: Path) -> None:
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(20):
                noise = rng.integers(0, 256, (20 + i, 33, 3)).astype(np.uint8)
                Image.fromarray(noise).save(root / part / name / f"{i}.png")
    spec = resolve(config(root, image_size=28), tmp_path / "data", 4)
    stored = resized.stored(tmp_path / "data" / "folder", str(spec.content))
    paths = [path for name in "ab" for path in sorted((root / "train" / name).iterdir())]
    known = np.stack([read_square(path, 32, "short_side") for path in paths])
    assert np.array_equal(stored.read("train", np.arange(40)), known)
    means, stds = known.reshape(-1, 3).mean(0) / 255, known.reshape(-1, 3).std(0) / 255
    assert np.allclose((spec.mean, spec.std), (means, stds), atol=1e-5)


def squares(root: Path, size: int) -> Path:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (size, size), RED).save(root / split / name / "0.png")
            Image.new("RGB", (size, size), BLUE).save(root / split / name / "1.png")
    return root


@pytest.mark.parametrize(
    ("size", "asked", "network", "shown", "side"),
    [
        (32, None, 224, 32, 32),  # squares of one size keep it
        (32, 32, 224, 32, 32),
        (32, 64, 224, 64, 73),
        (100, None, 64, 100, 100),
        (100, 56, 224, 56, 64),
    ],
)
def test_which_size(tmp_path: Path, size: int, asked: int | None, network: int, shown: int, side: int) -> None:
    spec = resolve(config(squares(tmp_path / "a", size), image_size=asked), tmp_path / "data", 1, network)
    assert (spec.image_size, spec.resize) == (shown, None if shown == size else "short_side")
    assert resized.stored(tmp_path / "data" / "folder", str(spec.content)).side == side
    large = shown > 64
    assert (spec.augment, spec.views) == (("resized_crop_flip", 16) if large else ("crop_flip", None))


def test_a_network_of_another_size_has_an_array_of_its_own(tmp_path: Path) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    specs = [
        resolve(config(root, **changes), data, 1, size)
        for changes, size in (({}, 224), ({}, 64), ({"image_size": 64}, 224))
    ]
    assert [spec.image_size for spec in specs] == [224, 64, 64]
    assert specs[1] == specs[2]
    others = [resolve(config(root, image_size=64, resize=resize), data) for resize in ("squash", "pad")]
    assert len({(spec.content, spec.resize) for spec in [*specs, *others]}) == 4


def test_squares_that_are_larger_than_the_network_needs_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(config(squares(tmp_path / "a", 100)), tmp_path / "data", 1, 64)
    assert "the images keep their 100×100 pixels; dataset.image_size=… makes them smaller" in capsys.readouterr().out


def test_one_image_of_another_size_makes_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = squares(tmp_path / "a", 16)
    Image.new("RGB", (16, 17)).save(root / "test" / "b" / "1.png")
    assert resolve(config(root), tmp_path / "data").image_size == 224
    assert "different sizes and shapes (1.png is 16×17)" in capsys.readouterr().out
    with pytest.raises(KnownError, match=r"1 files are not 16×16 pixels .*dataset.image_size=16 resizes them"):
        decoder.decode(*_as_one_size(root, tmp_path), one_size=True)
    assert resolve(config(root, image_size=16), tmp_path / "data").image_size == 16


def _as_one_size(root: Path, place: Path) -> Any:
    from kd.datasets import Reading, layouts

    return layouts.find(root, 0.2), place, Reading(config(root))


def test_settings_of_pictures_are_refused_where_no_pictures_are_read(tmp_path: Path) -> None:
    for name, value in (("image_size", 64), ("resize", "pad"), ("decode", "stream"), ("test_fraction", 0.5)):
        with pytest.raises(KnownError, match=f"dataset.{name}: digits is no folder of images"):
            resolve(config(None, name="digits", **{name: value}), tmp_path)
    with pytest.raises(KnownError, match=r"dataset.image_size: .*\ndataset.resize: "):  # all of them at once
        resolve(config(None, name="digits", image_size=64, resize="pad"), tmp_path)


def test_the_background_is_a_setting(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos")
    Image.new("RGBA", (50, 40)).save(root / "train" / "cold" / "0.png")
    for background, colour in (("white", WHITE), ("black", (0, 0, 0))):
        spec = resolve(config(root, image_size=28, background=background), tmp_path / "data")
        pixels = resized.stored(tmp_path / "data" / "folder", str(spec.content)).read("train", np.array([0]))
        assert tuple(pixels[0, 16, 16]) == colour


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_what_is_to_be_seen_as_a_whole_has_no_margin(tmp_path: Path, resize: str) -> None:
    root = photographs(tmp_path / "photos")
    image = Image.new("RGB", (60, 20), WHITE)
    image.paste(RED, (0, 0, 6, 20))
    image.paste(BLUE, (54, 0, 60, 20))
    image.save(root / "train" / "cold" / "0.png")
    spec = resolve(config(root, image_size=64, resize=resize), tmp_path / "data")
    stored = resized.stored(tmp_path / "data" / "folder", str(spec.content))
    row = stored.read("train", np.array([0]))[0, 32]
    assert (stored.side, tuple(row[1]), tuple(row[-2])) == (64, RED, BLUE)


def test_progress_is_a_line_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(resized, "_LINE_EVERY", 0)
    resolve(config(photographs(tmp_path / "photos")), tmp_path / "data")
    said = capsys.readouterr().out
    assert "decoding: 8 of 16, about 0 s left" in said
    assert "\r" not in said


# made once, and whole ---------------------------------------------------------------------------------------------


def test_made_again_it_has_the_same_bytes(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", count=9)
    one = resolve(config(root), tmp_path / "a", 1)
    other = resolve(config(root), tmp_path / "b", 4)
    assert one == other
    assert arrays(tmp_path / "a" / "folder", one.content) == arrays(tmp_path / "b" / "folder", one.content)
    loaded = np.load(tmp_path / "a" / "folder" / str(one.content) / "images.npy")
    assert loaded.shape == (20, 256, 256, 3)


def test_what_cannot_be_read_is_named_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    (root / "train" / "cold" / "1.png").write_text("no image")
    with pytest.raises(KnownError, match=r"1 files cannot be read as images; .*cold/1.png: no picture that Pillow"):
        resolve(config(root), data)
    assert not [path for path in (data / "folder").iterdir() if path.is_dir()]
    spec = resolve(config(root, skip_unreadable=True), data)
    stored = resized.stored(data / "folder", str(spec.content))
    assert stored.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert tuple(stored.read("train", np.array([3]))[0, 128, 128]) == RED
    assert f"1 images of {root} are left out" in capsys.readouterr().out
    (root / "train" / "cold" / "1.png").unlink()
    assert resolve(config(root), data) == spec


def test_own_validation_images_that_cannot_be_read(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos")
    for name in ("cold", "warm"):
        place = root / "val" / name
        place.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (30, 40), GREEN).save(place / f"{i}.png")
    (root / "val" / "cold" / "0.png").write_text("")
    spec = resolve(config(root, skip_unreadable=True, image_size=28), tmp_path / "data")
    stored = resized.stored(tmp_path / "data" / "folder", str(spec.content))
    assert (spec.val_images, len(stored.labels)) == (5, 13)
    pixels = stored.read("train", np.arange(13))[:, 16, 16]
    assert [tuple(pixel) == GREEN for pixel in pixels] == [False] * 8 + [True] * 5


@pytest.mark.parametrize("moment", [0, 5, 12])
def test_an_interrupted_making_leaves_nothing(tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    read, seen = decoder.read_square, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        if len(seen) > moment:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    monkeypatch.setattr(decoder, "read_square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve(config(root), data)
    monkeypatch.undo()
    assert not [path for path in (data / "folder").iterdir() if path.is_dir() or path.suffix == ".json"]
    assert resolve(config(root), data) == resolve(config(root), tmp_path / "other")


def start(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


RESOLVE = """
import sys
from pathlib import Path
from kd.datasets import DatasetConfig, resolve
print("content", resolve(DatasetConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])).content)
"""


def test_two_processes_make_one_array(tmp_path: Path) -> None:
    root, data = photographs(tmp_path / "photos", count=30), tmp_path / "data"
    both = [start(RESOLVE, config(root).model_dump_json(), data) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({line for text in said for line in text.splitlines() if line.startswith("content")}) == 1
    assert sum("resizing 124 photographs" in text for text in said) == 1
    assert len([path for path in (data / "folder").iterdir() if path.is_dir()]) == 1


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    resolve(config(root), data)
    (manifest,) = (data / "folder").glob("*.json")
    manifest.unlink()
    left = data / "folder" / f".{manifest.stem}.999999@{os.uname().nodename}.new"
    left.mkdir()
    resolve(config(root), data)
    assert not left.exists()


def test_a_disk_without_room_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = decoder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(decoder.shutil, "disk_usage", lambda place: usage._replace(free=3_000_000))
    with pytest.raises(
        KnownError, match=r"an array of 3.1 MB has no room in .* \(3.0 MB free\): .*dataset.decode=stream"
    ):
        resolve(config(photographs(tmp_path / "photos")), tmp_path / "data")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-7]),
        lambda folder: (folder / "test_images.npy").unlink(),
        lambda folder: np.save(folder / "labels.npy", np.zeros(3, np.int64)),
        lambda folder: (folder / "labels.npy").write_bytes(b""),
    ],
)
def test_damaged_arrays_are_made_again(tmp_path: Path, harm: Any) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    spec = resolve(config(root), data)
    before = arrays(data / "folder", spec.content)
    harm(data / "folder" / str(spec.content))
    with pytest.raises(KnownError, match="damaged or missing"):
        resized.stored(data / "folder", str(spec.content))
    assert resolve(config(root), data) == spec
    assert arrays(data / "folder", spec.content) == before


def test_numbers_beyond_the_array_are_refused(tmp_path: Path) -> None:
    spec = resolve(config(photographs(tmp_path / "photos")), tmp_path / "data")
    stored = resized.stored(tmp_path / "data" / "folder", str(spec.content))
    for numbers in ([8], [-1], [0, 99]):
        with pytest.raises(IndexError, match="numbers should be 0 to 7"):
            stored.read("test", np.array(numbers))
    assert stored.read("test", np.array([], np.int64)).shape == (0, 256, 256, 3)


# streamed ---------------------------------------------------------------------------------------------------------


def test_streamed_photographs_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    spec = resolve(config(root, decode="stream"), data)
    assert (spec.streamed, spec.resize, spec.image_size, spec.views) == (True, "short_side", 224, None)
    found = decoder.listing(data / "folder", str(spec.content))
    assert (found.root, found.classes, found.val_images) == (root, ["cold", "warm"], 0)
    assert found.train == [
        (f"train/{n}/{f}", i) for i, n in enumerate(("cold", "warm")) for f in ("0.png", "1.png", "2.png", "tall.webp")
    ]
    assert not [path for path in (data / "folder").iterdir() if path.is_dir()]
    array = resolve(config(root), data)
    assert (spec.mean, spec.std) == (array.mean, array.std)  # the sample is all of them
    capsys.readouterr()
    assert resolve(config(root, decode="stream"), data) == spec
    assert "looking at" not in capsys.readouterr().out


def test_what_exceeds_the_budget_is_streamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photographs(tmp_path / "photos")
    assert resolve(config(root, array_budget=0.003), tmp_path / "data").streamed
    line = "as an array the images would take 3.1 MB, more than dataset.array_budget=0.003: they are decoded in every"
    assert line in capsys.readouterr().out
    assert not resolve(config(root, array_budget=0.004), tmp_path / "data").streamed
    assert not resolve(config(root, array_budget=0.003, decode="array"), tmp_path / "data").streamed


def test_a_moved_stream_is_the_same_data(tmp_path: Path) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    spec = resolve(config(root, decode="stream"), data)
    moved = root.rename(tmp_path / "moved")
    assert resolve(config(moved, decode="stream"), data) == spec
    assert decoder.listing(data / "folder", str(spec.content)).root == moved
    (moved / "train" / "cold" / "1.png").rename(moved / "train" / "warm" / "9.png")
    assert resolve(config(moved, decode="stream"), data).content != spec.content


def test_a_stream_that_is_damaged(tmp_path: Path) -> None:
    root, data = photographs(tmp_path / "photos"), tmp_path / "data"
    (root / "test" / "warm" / "0.png").write_bytes(b"no image")
    with pytest.raises(KnownError, match=r"1 files cannot be read as images; .*warm/0.png"):
        resolve(config(root, decode="stream"), data)
    spec = resolve(config(root, decode="stream", skip_unreadable=True), data)
    path = data / "folder" / f"{spec.content}.files"
    assert len(decoder.listing(path.parent, str(spec.content)).test) == 7
    path.write_text(json.dumps({"classes": []}))
    with pytest.raises(KnownError, match="is damaged or missing"):
        decoder.listing(path.parent, str(spec.content))


def test_what_auto_means_depends_on_size_and_stream() -> None:
    from kd.datasets import Facts

    def resolved(size: int, streamed: bool, **changes: object) -> tuple[object, object]:
        facts = Facts(2, size, (0.5,) * 3, (0.2,) * 3, streamed=streamed)
        spec = specify(config(Path("x"), **changes), facts)
        return spec.augment, spec.views

    assert resolved(64, False) == ("crop_flip", None)
    assert resolved(65, False) == ("resized_crop_flip", 16)
    assert resolved(224, True) == ("resized_crop_flip", None)
    assert resolved(224, False, augment="none") == ("none", None)
    assert resolved(224, True, views=3) == ("resized_crop_flip", 3)


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_large_squares_are_read_when_they_are_needed(tmp_path: Path, augment: str) -> None:
    """And look as they would in memory."""
    rng = np.random.default_rng(0)
    for name in (f"{part}/{label}/{i}.png" for part in ("train", "test") for label in "ab" for i in range(4)):
        (tmp_path / "squares" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (72, 72, 3)).astype(np.uint8)).save(tmp_path / "squares" / name)
    spec = resolve(config(tmp_path / "squares", augment=augment), tmp_path / "data")
    assert (spec.image_size, spec.resize) == (72, None)
    read = load_data(spec, tmp_path / "data", "cpu")
    assert isinstance(read, Photos)
    held = Data.of(spec, resized.read_arrays(tmp_path / "data" / "folder" / str(spec.content)), "cpu")
    samples, views = torch.arange(8), torch.arange(8) % (1 if augment == "none" else 16)
    assert torch.equal(read.show(samples, views), held.show(samples, views))
    for part in ("val", "test"):
        assert all(map(torch.equal, read.batches(part), held.batches(part)))


# memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
import torch
from kd.datasets import load_data, resolve
from tests.test_resized import config
spec = resolve(config(Path(sys.argv[1])), Path(sys.argv[2]), 2)
data = load_data(spec, Path(sys.argv[2]), "cpu")
order = torch.randperm(len(data.labels))
for start in range(0, len(order), 100):
    data.show(order[start : start + 100], torch.zeros(len(order[start : start + 100]), dtype=torch.int64))
# Not the system's maximum resident set: a new process begins with that of the process that started it.
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("squares", [False, True])
def test_the_memory_does_not_grow_with_the_photographs(tmp_path: Path, squares: bool) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for split, times in (("train", 90), ("test", 10)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(50):
                first = tmp_path / "photos" / split / name / f"{i}.jpg"
                noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8))
                noise.resize((256, 256) if squares else (400, 300 + i)).save(first)
                for copy in range(times - 1):
                    os.link(first, first.with_name(f"{i}-{copy}.jpg"))
    process = start(MEMORY, tmp_path / "photos", tmp_path / "data")
    said = process.communicate()[0]
    assert ("decoding 10,000 images" if squares else "resizing 10,000 photographs") in said
    peak = int(said.split("peak")[1]) * 1024
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"
    print(f"{peak / 1e6:.0f} MB")
