"""The data sets: facts, splits, views, folders, and the files of torchvision's readers."""

from __future__ import annotations

import os
import pickle
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import functional as tv

from kd.core.spec import KnownError, load_attribute
from kd.core.stage import VIEWS, DatasetSpec
from kd.datasets import DATASETS, Arrays, DatasetConfig, Facts, digits, load_data, resolve, specify, statistics
from kd.datasets.data import Data, split
from kd.datasets.views import pad_images, show_views


def config(name: str = "digits", augment: str = "none", **changes: object) -> DatasetConfig:
    return DatasetConfig.model_validate(
        {"name": name, "augment": augment, "val_fraction": 0.1, "split_seed": 0, **changes}
    )


def facts(arrays: Arrays) -> Facts:
    return Facts(len(np.unique(arrays.labels)), arrays.images.shape[1], *statistics(arrays.images))


def random_images(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def arrays(count: int = 60, classes: int = 3, size: int = 32) -> Arrays:
    labels = np.arange(count, dtype=np.int64) % classes
    return Arrays(random_images(count, size), labels, random_images(6, size), labels[:6])


def test_digits_are_scikit_learns() -> None:
    scans, labels = load_digits(return_X_y=True)
    table = digits._table()
    assert np.array_equal(table[:, :-1], scans)
    assert np.array_equal(table[:, -1], labels)


def test_digits_are_what_the_table_says() -> None:
    spec = resolve(config(), Path("/nowhere"))
    data = load_data(spec, Path("/nowhere"), "cpu")
    assert (len(data.labels), len(data.test_labels)) == (1437, 360)
    assert data.test_images.shape[1:] == (16, 16, 3)
    mean, std = statistics(data.padded.numpy())
    assert (spec.mean, spec.std) == (mean, std)
    assert len(data.labels.unique()) == spec.num_classes


def test_class_names_are_those_of_the_labels() -> None:
    from torchvision.datasets import FashionMNIST

    known = {
        name: resolve(config(name), Path("/nowhere")) for name in ("digits", "fashion_mnist", "cifar10", "cifar100")
    }
    assert all(len(set(spec.classes)) == spec.num_classes for spec in known.values())
    assert list(known["fashion_mnist"].classes) == FashionMNIST.classes
    for name in ("digits", "cifar10", "cifar100"):
        assert sorted(known[name].classes) == list(known[name].classes)  # as their labels are numbered


DOWNLOADS = {"cifar10", "cifar100", "fashion_mnist"}  # their files are tested below


@pytest.mark.parametrize("name", [n for n, entry in DATASETS.items() if entry.facts is not None and n not in DOWNLOADS])
def test_facts_are_those_of_the_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    entry = DATASETS[name]
    assert entry.facts is not None
    try:
        found: Arrays = load_attribute(entry.read)(tmp_path, None)
    except KnownError as error:
        pytest.skip(f"{name} cannot be read without network: {error}")
    size, images = entry.facts.image_size, (len(found.labels), len(found.test_labels))
    assert (entry.facts.mean, entry.facts.std) == statistics(found.images)
    assert entry.facts.images in (None, images)
    for arrays, labels in ((found.images, found.labels), (found.test_images, found.test_labels)):
        assert (arrays.dtype, arrays.shape) == (np.uint8, (len(labels), size, size, 3))
        assert (labels.dtype, sorted({*labels})) == (np.int64, [*range(entry.facts.num_classes)])


def test_the_split_is_stratified_and_a_function_of_its_seed() -> None:
    labels = np.repeat(np.arange(5), [100, 50, 20, 10, 10])
    train, val = split(labels, 0.1, 0)
    assert np.bincount(labels[val]).tolist() == [10, 5, 2, 1, 1]
    assert sorted([*train, *val]) == list(range(190))
    assert np.array_equal(val, split(labels, 0.1, 0)[1])
    assert not np.array_equal(val, split(labels, 0.1, 1)[1])
    assert len(split(labels, 0.0, 0)[1]) == 0


def earlier_split(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The validation samples by the rule of before: a class may have none."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, 0)))
    members = (rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels))
    return np.sort(np.concatenate([each[: round(fraction * len(each))] for each in members]))


@pytest.mark.parametrize("rare", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.2])
def test_a_rare_class_has_a_validation_image(rare: int, fraction: float) -> None:
    labels = np.repeat(np.arange(4), [60, rare, 60, 2])
    train, val = split(labels, fraction, 0, rare=True)
    assert np.bincount(labels[val]).tolist() == [
        round(60 * fraction),
        max(round(rare * fraction), min(rare - 1, 1)),
        round(60 * fraction),
        1,
    ]
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert {*earlier_split(labels, fraction, 0)} <= {*val}
    assert len(split(labels, 0.0, 0)[1]) == 0


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fraction=st.floats(0, 0.95),
    seed=st.integers(0, 2),
)
def test_a_split_in_which_every_class_had_a_validation_image_is_what_it_was(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    before = earlier_split(labels, fraction, seed)
    assert np.array_equal(split(labels, fraction, seed)[1], before)  # under the keys of before, whatever the classes
    assume(len(np.unique(labels[before])) == len(counts))
    assert np.array_equal(split(labels, fraction, seed, rare=True)[1], before)


def test_crop_flip_is_torchvisions_crop_and_flip() -> None:
    images = torch.from_numpy(random_images(162))
    every = torch.arange(162)
    shown = show_views(pad_images(images, "crop_flip"), every, every, "crop_flip")
    assert shown.is_contiguous(memory_format=torch.channels_last)
    for view in range(162):
        top, left = divmod(view // 2, 9)
        crop = tv.crop(tv.pad(images[view].permute(2, 0, 1), [4]), top, left, 32, 32)
        assert torch.equal(shown[view], tv.hflip(crop) if view % 2 else crop)


@pytest.mark.parametrize("size", [32, 64])
def test_rotate_flip_is_torchvisions_rotation_and_flip(size: int) -> None:
    images = torch.from_numpy(random_images(82, size))
    every = torch.arange(82)
    shown = show_views(pad_images(images, "rotate_flip"), every.flip(0), every, "rotate_flip")
    assert shown.is_contiguous(memory_format=torch.channels_last)
    assert shown.dtype == torch.uint8
    for view in range(82):
        rotated = tv.rotate(images[81 - view].permute(2, 0, 1), view // 2 - 20)
        assert torch.equal(shown[view], tv.hflip(rotated) if view % 2 else rotated)
    assert torch.equal(shown[40], images[41].permute(2, 0, 1))


@pytest.mark.parametrize(("augment", "count"), [("crop_flip", 162), ("rotate_flip", 82)])
def test_every_view_is_drawn_and_none_beyond(augment: str, count: int) -> None:
    data = Data.of(specify(config(augment=augment), facts(arrays())), arrays(), "cpu")
    drawn = np.concatenate([data.draw_views(np.random.default_rng(s)) for s in range(100)])
    assert set(drawn) == set(range(count))


@pytest.mark.parametrize("augment", ["crop_flip", "rotate_flip"])
def test_restricted_views(augment: str) -> None:
    spec = specify(config(augment=augment, views=5), facts(arrays()))
    data, again = Data.of(spec, arrays(), "cpu"), Data.of(spec, arrays(), "cpu")
    drawn = np.stack([data.draw_views(np.random.default_rng(s)) for s in range(200)])
    assert all(len(set(column)) == 5 for column in drawn.T)
    assert len({tuple(sorted(set(column))) for column in drawn.T}) > 50  # each sample has its own
    assert data.allowed_views is not None
    assert np.array_equal(data.allowed_views, again.allowed_views)
    assert Data.of(specify(config(views=5), facts(arrays())), arrays(), "cpu").allowed_views is None  # `none` has one


@pytest.mark.parametrize("augment", VIEWS)
def test_validation_images_are_shown_as_they_are(augment: str) -> None:
    data = Data.of(specify(config(augment=augment), facts(arrays())), arrays(), "cpu")
    assert torch.equal(data.val_images, torch.from_numpy(arrays().images[data.val]))
    assert torch.equal(data.val_labels, torch.from_numpy(arrays().labels[data.val]))


# folder -----------------------------------------------------------------------------------------------------------


def write_folder(root: Path, size: tuple[int, int] = (8, 8), per_class: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.{'png' if i % 2 else 'bmp'}")
    return root


def folder(root: Path, **changes: object) -> DatasetConfig:
    return config("folder", root=str(root), **changes)


def test_a_folder_is_decoded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, places = write_folder(tmp_path / "pets"), tmp_path / "data"
    spec = resolve(folder(root), places)
    assert "decoding 16 images" in capsys.readouterr().out
    assert resolve(folder(root), places) == spec
    assert capsys.readouterr().out == ""
    data = load_data(resolve(folder(root, val_fraction=0), places), places, "cpu")
    assert (spec.num_classes, spec.image_size, len(data.labels)) == (2, 8, 8)
    pixels = np.asarray(Image.open(root / "train" / "dog" / "1.png"))
    assert np.array_equal(data.padded[5], pixels)
    assert data.labels[5] == 1


@pytest.mark.parametrize("decode", ["array", "stream"])
def test_small_classes_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], decode: str) -> None:
    """A class without a validation image is named. Only where the split is not what it was, the key is another."""
    root = write_folder(tmp_path / "pets", per_class=10)

    def seen(**changes: object) -> tuple[DatasetSpec, str]:
        capsys.readouterr()
        spec = resolve(folder(root, decode=decode, **changes), tmp_path / "data")
        labels = load_data(spec, tmp_path / "data", "cpu").val_labels
        assert sorted(labels.tolist()) == sorted(expected)
        return spec, capsys.readouterr().out

    def leave(images: int) -> None:
        for path in sorted((root / "train" / "cat").iterdir())[images:]:
            path.unlink()

    expected = [0, 1]
    spec, out = seen()
    assert "rare" not in spec.identity()
    assert "no validation image" not in out
    leave(3)
    spec, out = seen()
    assert spec.identity()["rare"] == 1
    assert "no validation image" not in out
    leave(1)
    expected = [1]
    spec, out = seen()
    assert "rare" not in spec.identity()
    assert "folder: no validation image of cat: they have one image each" in out.splitlines()
    expected = [0] + [1] * 9
    out = seen(val_fraction=0.9)[1]
    assert "folder: no training image of cat: dataset.val_fraction=0.9 takes all of theirs" in out.splitlines()
    expected = []
    assert "no validation image" not in seen(val_fraction=0)[1]


def test_statistics_include_the_validation_images(tmp_path: Path) -> None:
    root, places = write_folder(tmp_path / "pets"), tmp_path / "data"
    specs = [resolve(folder(root, val_fraction=fraction), places) for fraction in (0, 0.5)]
    every = statistics(load_data(specs[0], places, "cpu").padded.numpy())  # type: ignore[attr-defined]
    assert [(spec.mean, spec.std) for spec in specs] == [every, every]


def test_a_copy_of_a_folder_is_the_same_data_and_a_change_is_not(tmp_path: Path) -> None:
    one, other = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    spec = resolve(folder(one), tmp_path / "data")
    assert spec.content == "616cfcf21550d049"  # in keys: a change here trains every folder's stages again
    assert resolve(folder(other), tmp_path / "data") == spec
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(other / "train" / "cat" / "1.png")
    assert resolve(folder(other), tmp_path / "data").content != spec.content


def test_a_folder_with_equal_names_sizes_and_times_is_another_one(tmp_path: Path) -> None:
    """As tar --mtime and reproducible archives make them."""
    contents = set()
    for name, shade in (("a", 0), ("b", 255)):
        for part, label, i in product(("train", "test"), ("cat", "dog"), range(4)):
            path = tmp_path / name / part / label / f"{i}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), abs(shade - i), np.uint8)).save(path)
            os.utime(path, (1e9, 1e9))
        contents.add(resolve(folder(tmp_path / name), tmp_path / "data").content)
    assert len(contents) == 2


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: (root / "test").rename(root / "tset"), "test is not a folder"),
        (lambda root: (root / "test" / "dog").rename(root / "test" / "fox"), "not in both train and test: dog; fox"),
        (lambda root: [f.unlink() for f in (root / "train" / "cat").iterdir()], "has no images"),
        (
            lambda root: (root / "train" / "cat" / "1.png").write_bytes(b"no image"),
            "1 files cannot be read as images.*skip_unreadable.*1.png",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_should_be(tmp_path: Path, harm: object, message: str) -> None:
    root = write_folder(tmp_path / "pets")
    harm(root)  # type: ignore[operator]
    with pytest.raises(KnownError, match=message):
        resolve(folder(root), tmp_path / "data")


# torchvision's files ----------------------------------------------------------------------------------------------


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist"])
def test_without_network_one_line_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    with pytest.raises(KnownError) as caught:
        load_data(resolve(config(name), tmp_path), tmp_path, "cpu")
    text = str(caught.value)
    assert "could not be downloaded" in text
    assert "runtime.data" in text
    assert "\n" not in text


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_files(name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets as tvd

    reader = {"cifar10": tvd.CIFAR10, "cifar100": tvd.CIFAR100}[name]
    monkeypatch.setattr(reader, "_check_integrity", lambda self: True)  # the fake files have other checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    place = tmp_path / reader.base_folder
    place.mkdir()
    for file, _ in [*reader.train_list, *reader.test_list]:
        pixels = random_images(classes).transpose(0, 3, 1, 2).reshape(classes, -1)
        labels = list(range(classes))
        (place / file).write_bytes(pickle.dumps({"data": pixels, "labels": labels, "fine_labels": labels}))
    (place / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: [str(i) for i in range(classes)]}))
    data = load_data(
        specify(config(name, val_fraction=0), DATASETS[name].facts or pytest.fail("no facts")), tmp_path, "cpu"
    )
    assert np.array_equal(data.test_images, random_images(classes))
    assert data.test_labels.tolist() == list(range(classes))
    assert data.spec.num_classes == classes


def test_fashion_mnist_is_padded(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28)).astype(np.uint8)
    for part in ("train", "t10k"):
        header = b"".join(n.to_bytes(4, "big") for n in (2051, 20, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (2049, 20))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(range(10)) * 2)
    data = load_data(resolve(config("fashion_mnist", val_fraction=0), tmp_path), tmp_path, "cpu")
    assert data.padded.shape == (20, 32, 32, 3)
    assert np.array_equal(data.padded[:, 2:30, 2:30, 1], pixels)
    assert data.padded[:, :2].sum() == 0


def test_fashion_mnist_statistics_are_of_the_padded_images() -> None:
    # From the published mean .2860 and std .3530 of 28×28 images: a share of 28²/32² of the pixels, the rest black.
    share = (28 / 32) ** 2
    mean = 0.2860 * share
    std = ((0.3530**2 + 0.2860**2) * share - mean**2) ** 0.5
    known = DATASETS["fashion_mnist"].facts
    assert known is not None
    assert known.mean[0] == pytest.approx(mean, abs=5e-4)
    assert known.std[0] == pytest.approx(std, abs=5e-4)
