"""Folders with bad images: each problem is reported in a line, and unreadable images can be left out."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.core.spec import KnownError
from kd.datasets import load_data, resolve
from tests.test_datasets import config, folder, no_network, write_folder

TARGET = "train/cat/1.png"


def truncated_jpeg(file: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:-90])


def huge(file: Path) -> None:
    Image.new("1", (30_000, 10_000)).save(file)  # beyond PIL's own limit


def without_white(file: Path) -> None:
    Image.fromarray(np.full((8, 8), 400, np.float32)).save(file, "TIFF")


def again(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def harm(file: Path) -> None:
        file.unlink()
        make(file)

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("no image"),
        lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)),
        truncated_jpeg,
        huge,
        without_white,
        again(os.mkfifo),
        again(lambda file: file.symlink_to(file)),
        again(lambda file: file.symlink_to("nowhere.png")),
    ],
)
def test_what_is_no_image_is_a_line_or_left_out(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    root = write_folder(tmp_path / "pets")
    harm(root / TARGET)
    with pytest.raises(KnownError, match=r"^dataset.root: 1 files cannot be read as images.*cat/1.png: .") as caught:
        resolve(folder(root), tmp_path / "data")
    assert "\n" not in str(caught.value)
    spec = resolve(folder(root, skip_unreadable=True, val_fraction=0), tmp_path / "data")
    assert len(load_data(spec, tmp_path / "data", "cpu").labels) == 7


@pytest.mark.parametrize("mode", ["P", "L", "CMYK", "RGBA", "1", "LA"])
def test_other_kinds_of_pixels_are_converted(tmp_path: Path, mode: str) -> None:
    root = write_folder(tmp_path / "pets")
    Image.new(mode, (8, 8)).save(root / "train/cat/1.tiff" if mode == "CMYK" else root / TARGET)
    assert resolve(folder(root), tmp_path / "data").image_size == 8


def test_many_are_listed_in_a_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", per_class=9)
    for file in (root / "train" / "cat").iterdir():
        if file.suffix == ".bmp" or file.stem > "4":
            file.write_text("")
    with pytest.raises(
        KnownError, match=r"7 files cannot be read .* and 2 more \((.*/data/folder/\w+\.txt)\)"
    ) as caught:
        resolve(folder(root), tmp_path / "data")
    listed = Path(str(caught.value).rpartition("(")[2].rstrip(")"))
    assert len(listed.read_text().splitlines()) == 7


def test_what_is_left_out_decides_the_key_by_content_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, harmed = write_folder(tmp_path / "whole"), write_folder(tmp_path / "harmed")
    spec = resolve(folder(whole), tmp_path / "data")
    assert resolve(folder(whole, skip_unreadable=True), tmp_path / "data") == spec
    (whole / TARGET).unlink()
    (harmed / TARGET).write_text("no image")
    less = resolve(folder(whole), tmp_path / "data")
    for _ in range(2):  # decoded now, and known again
        capsys.readouterr()
        assert resolve(folder(harmed, skip_unreadable=True), tmp_path / "data") == less
        assert "1 images of " in capsys.readouterr().out
    with pytest.raises(KnownError, match="cannot be read"):
        resolve(folder(harmed), tmp_path / "data")


def test_a_class_without_a_readable_image(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    for file in (root / "test" / "dog").iterdir():
        file.write_text("")
    with pytest.raises(KnownError, match="1 classes have no image left that can be read: dog"):
        resolve(folder(root, skip_unreadable=True), tmp_path / "data")


@pytest.mark.parametrize("name", [b"a\nb.png", b"a\xff\xfe.png", b"\x1b[31m.png"])
def test_odd_names(tmp_path: Path, name: bytes) -> None:
    root = write_folder(tmp_path / "pets")
    odd = root / "train" / "cat" / os.fsdecode(name)
    (root / TARGET).rename(odd)
    assert resolve(folder(root), tmp_path / "data").num_classes == 2
    odd.write_text("")
    with pytest.raises(KnownError, match="1 files cannot be read") as caught:
        resolve(folder(root), tmp_path / "data")
    assert str(caught.value).isprintable()
    (root / "test" / os.fsdecode(name)).mkdir()
    with pytest.raises(KnownError, match="are not in both train and test") as caught:
        resolve(folder(root), tmp_path / "data")
    assert str(caught.value).isprintable()


def test_one_class_and_none(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    (root / "train" / "loop").mkdir(parents=True)
    (root / "test").mkdir()
    with pytest.raises(KnownError, match=r"two or more class folders .got 1."):
        resolve(folder(root), tmp_path / "data")
    (root / "train" / "up").symlink_to(root / "train")
    with pytest.raises(KnownError, match="loop has no images"):
        resolve(folder(root), tmp_path / "data")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize("name", ["images", "labels", "test_images", "test_labels", "manifest"])
@pytest.mark.parametrize(
    "harm", [cut, lambda file: file.write_bytes(b""), lambda file: file.write_text("[1]"), Path.unlink]
)
def test_damaged_caches_are_made_again(tmp_path: Path, name: str, harm: Callable[[Path], object]) -> None:
    root, data = write_folder(tmp_path / "pets"), tmp_path / "data"
    spec = resolve(folder(root, val_fraction=0), data)
    (manifest,) = (data / "folder").glob("*.json")
    harm(manifest if name == "manifest" else data / "folder" / str(spec.content) / f"{name}.npy")
    if name != "manifest":
        with pytest.raises(KnownError, match="decoded images are damaged or missing"):
            load_data(spec, data, "cpu")
    assert resolve(folder(root, val_fraction=0), data) == spec
    assert len(load_data(spec, data, "cpu").labels) == 8


def test_a_cache_of_another_shape_is_made_again(tmp_path: Path) -> None:
    root, data = write_folder(tmp_path / "pets"), tmp_path / "data"
    spec = resolve(folder(root), data)
    (manifest,) = (data / "folder").glob("*.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "image_size": 9}))
    assert resolve(folder(root), data) == spec


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(16), gzip.compress(b"x", mtime=0)])
def test_fashion_mnist_of_garbage_is_a_line(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(KnownError, match=r"FashionMNIST is missing or damaged in "):
        load_data(resolve(config("fashion_mnist"), tmp_path), tmp_path, "cpu")
