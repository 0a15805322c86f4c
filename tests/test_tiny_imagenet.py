"""tiny_imagenet: labels from the annotations, one line for each problem, and the unpacking of the archive."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.core.spec import KnownError
from kd.datasets import DatasetConfig, load_data, resolve, statistics
from tests.conftest import ROOT

SUBSET = ROOT.parent / "shared" / "data" / "tiny-imagenet-20.tar"  # 20 of the 200 classes; no part of the project
WNIDS = ("n03", "n01", "n02")  # as wnids.txt has them; labels are 2, 0, 1
ANNOTATIONS = "val/val_annotations.txt"


def write(root: Path, size: int = 16, per_class: int = 4) -> Path:
    """The archive's layout. Each class has noisy images of one colour; the classes of the test images alternate."""
    rng = np.random.default_rng(0)

    def save(path: Path, label: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(80 * label, 80 * label + 20, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert("L" if path.stem.endswith("_0") else "RGB").save(path)

    lines = []
    for label, wnid in enumerate(sorted(WNIDS)):
        for i in range(per_class):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for i in range(6):
        save(root / "val" / "images" / f"val_{i}.JPEG", label=sorted(WNIDS).index(WNIDS[i % 3]))
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9\n")
    (root / ANNOTATIONS).write_text("".join(lines[::-1]))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return root


def config(root: Path | None = None) -> DatasetConfig:
    return DatasetConfig(
        name="tiny_imagenet", root=root and str(root), augment="rotate_flip", val_fraction=0, split_seed=0
    )


def test_labels_are_the_annotations_and_not_the_folders(tmp_path: Path) -> None:
    root = write(tmp_path / "tiny")
    assert all(entry.is_file() for entry in (root / "val" / "images").iterdir())  # one flat folder: no class in it
    spec = resolve(config(root), tmp_path)
    data = load_data(spec, tmp_path, "cpu")
    assert (spec.num_classes, spec.image_size) == (3, 16)
    assert data.test_labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert (data.test_images.float().mean((1, 2, 3)) / 80).int().tolist() == [2, 0, 1, 2, 0, 1]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_images_are_the_files_and_grey_ones_have_three_channels(tmp_path: Path) -> None:
    root = write(tmp_path / "tiny")
    spec = resolve(config(root), tmp_path)
    data = load_data(spec, tmp_path, "cpu")
    files = [Image.open(file) for file in sorted((root / "train").glob("*/images/*.JPEG"))]
    pixels = np.stack([np.asarray(file.convert("RGB")) for file in files])
    assert files[0].mode == "L"
    assert np.array_equal(data.padded[:, 1:-1, 1:-1], pixels)
    assert (spec.mean, spec.std) == statistics(pixels)


def test_it_is_decoded_once_and_copies_share_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a"), write(tmp_path / "b")
    spec = resolve(config(one), tmp_path)
    assert "decoding 18 images" in capsys.readouterr().out
    assert resolve(config(one), tmp_path) == spec
    assert capsys.readouterr().out == ""
    assert resolve(config(other), tmp_path) == spec
    assert (tmp_path / "tiny_imagenet" / str(spec.content)).is_dir()


def test_other_annotations_are_other_data(tmp_path: Path) -> None:
    root = write(tmp_path / "tiny")
    content = resolve(config(root), tmp_path).content
    text = (root / ANNOTATIONS).read_text()
    (root / ANNOTATIONS).write_text(text.replace("n01", "n").replace("n02", "n01").replace("n\t", "n02\t"))
    assert resolve(config(root), tmp_path).content != content
    assert load_data(resolve(config(root), tmp_path), tmp_path, "cpu").test_labels.tolist() == [2, 1, 0, 2, 1, 0]


def annotate(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda root: (root / ANNOTATIONS).write_text(change((root / ANNOTATIONS).read_text()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), "train is not a folder"),
        (lambda root: shutil.rmtree(root / "val" / "images"), "val/images is not a folder"),
        (lambda root: [shutil.rmtree(root / "train" / n) for n in WNIDS[:2]], "two classes or more .got 1."),
        (lambda root: shutil.rmtree(root / "train" / "n01" / "images"), "1 classes of .*train have no folder .*: n01"),
        (lambda root: [f.unlink() for f in (root / "train/n01/images").iterdir()], "n01/images has no images"),
        (lambda root: (root / ANNOTATIONS).unlink(), "val_annotations.txt is missing"),
        (annotate(lambda text: text.replace("\t", " ", 5)), "1 lines of .* are not <file>, <wnid>.*: 'val_5.JPEG n02"),
        (annotate(lambda text: text + text[:20] + "\n"), "more than once .7 lines, 6 files."),
        (lambda root: (root / "val/images/val_3.JPEG").unlink(), "1 files that .* names are not in .*: val_3.JPEG"),
        (annotate(lambda text: text.split("\n", 1)[1]), "1 files of val/images have no line in .*: val_5.JPEG"),
        (annotate(lambda text: text.replace("n01", "n09")), "1 classes of .* are not in train/: n09"),
        (annotate(lambda text: text.replace("n01", "n02")), "1 classes of train/ have no image in .*: n01"),
        (
            lambda root: Image.new("RGB", (16, 9)).save(root / "val" / "images" / "val_1.JPEG"),
            "1 files are not 16×16 pixels .*val_1.JPEG: 16×9",
        ),
        (
            lambda root: (root / "val/images/val_1.JPEG").write_bytes(b"no"),
            "1 files cannot be read as images.*: .*val_1",
        ),
    ],
)
def test_a_layout_that_is_not_as_it_should_be(tmp_path: Path, harm: object, message: str) -> None:
    root = write(tmp_path / "tiny")
    harm(root)  # type: ignore[operator]
    with pytest.raises(KnownError, match=message) as caught:
        resolve(config(root), tmp_path)
    assert "\n" not in str(caught.value)


# the archive ------------------------------------------------------------------------------------------------------


def pack(archive: Path, root: Path, top: str = "tiny-imagenet-200") -> None:
    with zipfile.ZipFile(archive, "w") as packed:
        for file in root.rglob("*.*"):
            packed.write(file, f"{top}/{file.relative_to(root)}")


def test_the_archive_is_unpacked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = tmp_path / "data"
    (places / ".tiny-imagenet-200.partial" / "left by a killed process").mkdir(parents=True)
    root = write(tmp_path / "tiny")
    pack(places / "tiny-imagenet-200.zip", root)
    spec = resolve(config(), places)
    assert "unpacking" in capsys.readouterr().out
    assert (places / "tiny-imagenet-200" / ANNOTATIONS).is_file()
    assert not (places / ".tiny-imagenet-200.partial").exists()
    assert resolve(config(), places) == spec == resolve(config(root), places)
    assert "unpacking" not in capsys.readouterr().out


def test_without_folder_and_archive_one_line_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(KnownError) as caught:
        resolve(config(), tmp_path)
    text = str(caught.value)
    assert "http://cs231n.stanford.edu/tiny-imagenet-200.zip" in text
    assert str(tmp_path / "tiny-imagenet-200.zip") in text
    assert "dataset.root=" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "make",
    [
        lambda archive, root: archive.write_bytes(b"<html>not found</html>"),
        lambda archive, root: pack(archive, root, top="other"),
        lambda archive, root: (pack(archive, root), archive.write_bytes(archive.read_bytes()[:-100])),
    ],
)
def test_an_archive_that_is_another_or_cut_off(tmp_path: Path, make: Callable[[Path, Path], object]) -> None:
    make(tmp_path / "tiny-imagenet-200.zip", write(tmp_path / "tiny"))
    with pytest.raises(KnownError, match=r"is damaged, or is not .*: download it again"):
        resolve(config(), tmp_path)
    assert not (tmp_path / "tiny-imagenet-200").exists()
    assert not (tmp_path / ".tiny-imagenet-200.partial").exists()


@pytest.mark.slow
def test_real_images(tmp_path: Path) -> None:
    if not SUBSET.exists():
        pytest.skip(f"{SUBSET.name} is not beside the project")
    with tarfile.open(SUBSET) as archive:
        archive.extractall(tmp_path, filter="data")
    from torchvision.datasets import ImageFolder

    root = tmp_path / "tiny-imagenet-20"
    spec = resolve(config(root), tmp_path)
    data = load_data(spec, tmp_path, "cpu")
    known = ImageFolder(str(root / "train"))
    assert (spec.num_classes, spec.image_size) == (20, 64)
    assert data.labels.tolist() == known.targets
    lines = sorted(line.split("\t") for line in (root / ANNOTATIONS).read_text().splitlines())
    assert data.test_labels.tolist() == [known.class_to_idx[line[1]] for line in lines]
    assert data.test_labels.bincount().tolist() == [50] * 20


def link(packed: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("tiny-imagenet-200/link")
    info.external_attr = 0o120777 << 16
    packed.writestr(info, "/etc")


def understate(packed: zipfile.ZipFile) -> None:
    """A member that unpacks to more than its declared size."""
    packed.writestr("tiny-imagenet-200/bomb", bytes(10**7), zipfile.ZIP_DEFLATED)
    packed.filelist[-1].file_size = 10


def bomb(packed: zipfile.ZipFile) -> None:
    packed.writestr("tiny-imagenet-200/bomb", b"", zipfile.ZIP_DEFLATED)
    packed.filelist[-1].file_size = 3 * 10**9


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda packed: packed.writestr("../outside", "x"), "would be unpacked outside"),
        (lambda packed: packed.writestr("tiny-imagenet-200/../../outside", "x"), "would be unpacked outside"),
        (lambda packed: packed.writestr("/outside", "x"), "would be unpacked outside"),
        (link, "is a link or a device"),
        (bomb, "more than 250,000 files or 2,000,000,000 bytes"),
        (understate, "download it again"),
    ],
)
def test_an_archive_that_attacks(tmp_path: Path, add: Callable[[zipfile.ZipFile], object], message: str) -> None:
    archive, root = tmp_path / "data" / "tiny-imagenet-200.zip", write(tmp_path / "tiny")
    archive.parent.mkdir()
    pack(archive, root)
    with zipfile.ZipFile(archive, "a") as packed:
        add(packed)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KnownError, match=message):
        resolve(config(), tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert {path.name for path in archive.parent.iterdir()} <= {archive.name, ".tiny-imagenet-200.lock"}


def test_an_archive_of_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.datasets.tiny_imagenet._MOST_FILES", 10)
    pack(tmp_path / "tiny-imagenet-200.zip", write(tmp_path / "tiny"))
    with pytest.raises(KnownError, match="more than 10 files"):
        resolve(config(), tmp_path)
