"""Layouts that people have: which picture is of which class and for what, what is passed over, and what is refused."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from kd.core.spec import KnownError
from kd.datasets import DatasetConfig, folder, layouts, resolve
from kd.reporting.console import print_plan
from kd.store import Store
from tests.conftest import ROOT
from tests.test_stage import stage

SHARED = ROOT.parent / "shared" / "data"


def make(root: Path, *names: str) -> Path:
    """Files below a folder: a small picture for each name, of another grey."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, number, number)).save(path, "PNG")
    return root


def several(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(count)]


def listed(root: Path, test_fraction: float = 0.2) -> layouts.Listing:
    return folder.listing_in(root, config(root, test_fraction=test_fraction))


def names(files: list[layouts.File]) -> list[str]:
    return [name for name, _ in files]


def config(root: Path | None, **changes: object) -> DatasetConfig:
    fields = {"name": "folder", "augment": "none", "val_fraction": 0.1, "split_seed": 0, "root": root and str(root)}
    return DatasetConfig.model_validate({**fields, **changes})


# splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("Train", "TEST"), ("training", "testing"), ("TRAINING", "Test")]
)
def test_train_and_test(tmp_path: Path, train: str, test: str) -> None:
    found = listed(make(tmp_path, *several(f"{train}/cat", f"{train}/dog", f"{test}/cat", f"{test}/dog")))
    assert found.classes == ["cat", "dog"]
    assert found.train == [
        (f"{train}/{name}/{i}.png", label) for label, name in enumerate(found.classes) for i in (0, 1)
    ]
    assert names(found.test) == several(f"{test}/cat", f"{test}/dog")
    assert (found.val_images, found.choices) == (0, ())


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "Val", "VALID"])
def test_without_test_the_validation_split_is_the_test_set(tmp_path: Path, val: str) -> None:
    found = listed(make(tmp_path, *several("train/cat", "train/dog", f"{val}/cat", f"{val}/dog")))
    assert names(found.test) == several(f"{val}/cat", f"{val}/dog")
    assert found.val_images == 0
    assert len(found.choices) == 1
    assert f"{tmp_path / val} is the test set, because there is no other" in found.choices[0]


def test_with_both_val_validates_and_test_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "pets", *several(*(f"{s}/{c}" for s in ("train", "valid", "test") for c in ("cat", "dog"))))
    found = listed(root)
    assert names(found.train) == several("train/cat", "train/dog", "valid/cat", "valid/dog")
    assert (found.val_images, names(found.test)) == (4, several("test/cat", "test/dog"))
    spec = resolve(config(root), tmp_path / "data")
    assert (spec.val_images, spec.val_fraction, spec.validated) == (4, 0, True)
    assert "own 4 validation images validate, not dataset.val_fraction" in capsys.readouterr().out
    print_plan("pets", [stage(dataset=spec)], Store(tmp_path / "store"), False)
    assert "; 4 of them are for validation" in capsys.readouterr().out


def test_test_images_without_labels_are_passed_over(tmp_path: Path) -> None:
    """As in ImageNet's and Tiny-ImageNet's archives."""
    root = make(tmp_path, *several("train/a", "train/b", "val/a", "val/b", "test/images"))
    found = listed(root)
    assert names(found.test) == several("val/a", "val/b")
    assert any("test is passed over: its images have no labels" in line for line in found.choices)


@pytest.mark.parametrize("test", [[], ["test/7.png"], ["readme.txt"]])
def test_training_images_alone_are_split_here(tmp_path: Path, test: list[str]) -> None:
    """As after unpacking many of Kaggle's archives: train/ with classes, and test/ without."""
    root = make(tmp_path / "pets", *several("train/a", "train/b", count=10), *test)
    found = listed(root)
    assert (found.classes, len(found.train), len(found.test)) == (["a", "b"], 16, 4)
    assert sorted(names(found.train + found.test)) == several("train/a", "train/b", count=10)
    assert "4 of its pictures (dataset.test_fraction=0.2 of each class, one at least)" in found.choices[-1]
    assert any("test is passed over: its images have no labels" in line for line in found.choices) == (test[:1] > ["s"])


def test_what_lies_beside_the_splits_is_said(tmp_path: Path) -> None:
    root = make(tmp_path / "pets", *several("train/a", "train/b", "test/a", "test/b"), "__MACOSX/x.png", "cover.png")
    (line,) = (line for line in listed(root).remarks if "passed over" in line)
    assert "1 hidden or of the system (__MACOSX)" in line
    assert "1 in no class folder (cover.png)" in line


def test_files_may_be_in_folders_below_a_class(tmp_path: Path) -> None:
    root = make(tmp_path, *several("train/a/images", "train/a/more/2024", "train/b", "test/a", "test/b/x/y/z"))
    found = listed(root)
    assert found.classes == ["a", "b"]
    assert found.train == [(name, 0) for name in several("train/a/images", "train/a/more/2024")] + [
        (name, 1) for name in several("train/b")
    ]


# one folder -------------------------------------------------------------------------------------------------------


def test_one_folder_of_class_folders_is_split_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "pets", *several("cat", count=10), *several("dog", count=20))
    found = listed(root)
    assert (len(found.train), len(found.test)) == (24, 6)
    assert [sum(label == which for _, label in found.test) for which in (0, 1)] == [2, 4]  # a fifth of each class
    assert sorted(names(found.train + found.test)) == sorted(several("cat", count=10) + several("dog", count=20))
    first, other = (resolve(config(root, split_seed=seed), tmp_path / "data") for seed in (0, 1))
    assert first.content == other.content  # the test set is a part of the data, whatever the seed
    line = f"{root} has no test set: 6 of its pictures (dataset.test_fraction=0.2 of each class, one at least)"
    assert capsys.readouterr().out.count(line) == 2
    halves = listed(root, 0.5)
    assert [sum(label == which for _, label in halves.test) for which in (0, 1)] == [5, 10]
    assert {*names(found.test)} < {*names(halves.test)}


def test_the_split_hardly_changes_when_files_are_added(tmp_path: Path) -> None:
    root = make(tmp_path, *several("cat", "dog", count=50))
    before = {*names(listed(root).test)}
    make(root, "cat/new.png")
    assert len(before ^ {*names(listed(root).test)}) <= 1


def test_a_fraction_that_is_not_used_is_said(tmp_path: Path) -> None:
    root = make(tmp_path, *several("train/a", "train/b", "test/a", "test/b"))
    assert listed(root, 0.3).choices == (f"{root} has a test set: dataset.test_fraction=0.3 is not used",)


def test_every_class_has_an_image_on_both_sides(tmp_path: Path) -> None:
    found = listed(make(tmp_path, *several("cat", "dog")), 0.01)
    assert sorted(label for _, label in found.test) == sorted(label for _, label in found.train) == [0, 1]
    make(tmp_path, "fox/alone.png")
    with pytest.raises(KnownError, match=r"1 files are alone in their class.*: fox/alone.png"):
        listed(tmp_path)


def test_the_only_folder_is_entered(tmp_path: Path) -> None:
    root = make(
        tmp_path, *several("pets/images/train/a", "pets/images/train/b", "pets/images/test/a", "pets/images/test/b")
    )
    (root / "__MACOSX").mkdir()
    (root / "README.md").write_text("")
    found = listed(root)
    assert (found.root, found.classes) == (root / "pets" / "images", ["a", "b"])
    assert found.choices == (f"the images are in {root / 'pets' / 'images'}, the only folder in {root}",)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = listed(make(tmp_path, *several("bus", "car", "train", count=5)))
    assert found.classes == ["bus", "car", "train"]
    assert f"{tmp_path / 'train'} is taken as a class, because" in found.choices[0]


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    found = listed(make(tmp_path / "a", *several(*(str(i) for i in range(12)))))
    assert found.classes == [str(i) for i in range(12)]
    assert listed(make(tmp_path / "b", *several("10", "9", "x"))).classes == ["10", "9", "x"]
    assert layouts.sorted_classes(["010", "9", "٣"]) == ["010", "9", "٣"]
    assert layouts.sorted_classes(["0.0", "10.0", "2.5", "-1"]) == ["-1", "0.0", "2.5", "10.0"]
    assert layouts.sorted_classes(["class10", "class9", "1e3"]) == ["1e3", "class10", "class9"]


# Tiny-ImageNet and ImageNet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "tiny_imagenet"])
@pytest.mark.parametrize("sorted_val", [False, True])
def test_tiny_imagenet_in_both_forms(tmp_path: Path, name: str, sorted_val: bool) -> None:
    root = make(tmp_path / "tiny", *several("train/n1/images", "train/n2/images", "test/images"))
    (root / "train" / "n1" / "n1_boxes.txt").write_text("")
    if sorted_val:
        make(root, "val/n2/images/v0.png", "val/n1/images/v1.png")
    else:
        make(root, "val/images/v0.png", "val/images/v1.png")
        (root / "val" / "val_annotations.txt").write_text("v0.png\tn2\t0\t0\t1\t1\nv1.png\tn1\t0\t0\t1\t1\n")
    found = listed(root)
    assert found.classes == ["n1", "n2"]
    assert {Path(file).name: label for file, label in found.test} == {"v0.png": 1, "v1.png": 0}
    spec = resolve(config(root, name=name), tmp_path / "data")
    assert (spec.num_classes, spec.image_size, spec.classes) == (2, 8, ("n1", "n2"))


@pytest.mark.parametrize("inside", ["", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"])
def test_imagenet(tmp_path: Path, inside: str) -> None:
    root = tmp_path / "data" / "imagenet"
    make(root / inside, *several("train/n01", "train/n02", "val/n01", "val/n02", "test"))
    if inside:
        make(root, "ILSVRC/Annotations/x", "ILSVRC/ImageSets/y")
    spec = resolve(config(None, name="imagenet"), tmp_path / "data")
    assert (spec.name, spec.num_classes, spec.classes) == ("imagenet", 2, ("n01", "n02"))
    with pytest.raises(KnownError, match=r"imagenet is not in .*: set dataset.root=<path> to the folder"):
        resolve(config(tmp_path / "nowhere", name="imagenet"), tmp_path / "data")


# a CSV file -------------------------------------------------------------------------------------------------------


def table(root: Path, *lines: str, name: str = "labels.csv") -> Path:
    (root / name).write_text("".join(f"{line}\n" for line in lines))
    return root / name


def test_a_csv_file(tmp_path: Path) -> None:
    make(tmp_path, *several("images", count=10))
    rows = [f"images/{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(10)]
    found = listed(table(tmp_path, "file,label", *rows))
    assert found.classes == ["cat", "dog"]
    assert all(label == 1 - int(Path(name).stem) % 2 for name, label in found.train)
    assert (len(found.train), len(found.test)) == (8, 2)
    assert "labels.csv has no test set: 2 of its pictures" in found.choices[0]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("file,label,split", "{file},{label},{split}"),
        ("split;class;Filename", "{split};{label};{file}"),
        ("\ufeffimage_path\tsubset\tspecies\tx", "{file}\t{split}\t{label}\t1"),
        ("file, label, split", '"{file}", {label}, {split}'),
    ],
)
def test_a_csv_file_with_splits(tmp_path: Path, header: str, row: str) -> None:
    make(tmp_path, *several("i", count=6))
    told = [("a", "train"), ("b", "train"), ("a", "Valid"), ("b", "valid"), ("a", "TEST"), ("b", "test")]
    rows = [row.format(file=f"i/{n}.png", label=label, split=split) for n, (label, split) in enumerate(told)]
    found = listed(table(tmp_path, header, *rows))
    assert found.train == [("i/0.png", 0), ("i/1.png", 1), ("i/2.png", 0), ("i/3.png", 1)]
    assert (found.val_images, found.test) == (2, [("i/4.png", 0), ("i/5.png", 1)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b", "x,y"], "should begin with the names of its columns, file and label"),
        ([], "should begin with the names of its columns"),
        (["file,label", "i/0.png,a", "i/0.png,b", "i/1.png,b"], "1 files of .* are named more than once: i/0.png"),
        (["file,label", "i/0.png,a", "./i/0.png,b", "i/1.png,b"], "1 files of .* are named more than once: i/0.png"),
        (["file,label", "i/0.png,a", "i/../i/0.png,b"], "1 files of .* are named more than once: i/0.png"),
        (["file,label", "i/0.png,a", "i/9.png,b"], "1 files that .* names do not exist: i/9.png"),
        (["file,label,split", "i/0.png,a,holdout", "i/1.png,b,train"], "1 splits in .* are not known: .*: holdout"),
        (["file,label,split", "i/0.png,a,", "i/1.png,b,train"], "1 lines of .* have no file, label or split: line 2"),
        (["file,label", "i/0.png", "i/1.png,b"], "1 lines of .* have no file, label or split: line 2"),
        (["file,label", "i/0.png,a", "i/1.png,a"], "should have two or more labels .got 1."),
        (
            ["file,label,split", "i/0.png,a,train", "i/1.png,b,train", "i/2.png,a,test"],
            "1 classes of .* have no image in test: b",
        ),
        (
            ["file,label,split", "i/0.png,a,test", "i/1.png,b,test"],
            "no images for training",
        ),
        (
            ["file,label", '"i/0.png,a', *9000 * ["i/0.png,a,and,more"]],
            "is no CSV file .*; maybe a quote is not closed",
        ),
    ],
)
def test_a_csv_file_that_is_wrong(tmp_path: Path, lines: list[str], message: str) -> None:
    make(tmp_path, *several("i", count=3))
    with pytest.raises(KnownError, match=message) as caught:
        listed(table(tmp_path, *lines))
    assert all(line.startswith("dataset.root: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize("spelled", ["{root}/i/{n}.png", "./i/{n}.png", "i/../i/{n}.png", "i//{n}.png"])
def test_a_csv_file_may_spell_its_paths_as_it_likes(tmp_path: Path, spelled: str) -> None:
    make(tmp_path, *several("i", count=4))
    rows = [f"{spelled.format(root=tmp_path, n=n)},{'ab'[n % 2]},{'train' if n < 2 else 'test'}" for n in range(4)]
    found = listed(table(tmp_path, "file,label,split", *rows))
    assert (found.train, found.test) == ([("i/0.png", 0), ("i/1.png", 1)], [("i/2.png", 0), ("i/3.png", 1)])


def test_a_csv_file_is_reported_with_all_its_problems(tmp_path: Path) -> None:
    make(tmp_path, "0.png")
    with pytest.raises(KnownError) as caught:
        listed(table(tmp_path, "file,label,split", "0.png,a,x", "0.png,a,train", "1.png,b,train"))
    assert len(str(caught.value).splitlines()) == 3


def test_a_csv_file_beside_its_pictures_is_named(tmp_path: Path) -> None:
    make(tmp_path, *several("images"))
    table(tmp_path, "file,label", name="train.csv")
    with pytest.raises(KnownError, match=r"or is it dataset.root=.*train.csv\?"):
        listed(tmp_path)
    make(tmp_path, "train/0.png", "test/0.png")
    with pytest.raises(KnownError, match=r"or is it dataset.root=.*train.csv\?"):
        listed(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(KnownError, match=r"photo.png is no text in UTF-8: it should be a CSV file or a folder"):
        listed(tmp_path / "photo.png")


# what is passed over ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk",
    [".DS_Store", "Thumbs.db", "._0.png", ".hidden.png", ".ipynb_checkpoints/0.png", "__MACOSX/0.png", "@eaDir/0.png"],
)
def test_what_systems_leave_is_no_data(tmp_path: Path, junk: str) -> None:
    names_ = several("train/a", "train/b", "test/a", "test/b")
    clean = listed(make(tmp_path / "clean", *names_))
    root = make(tmp_path / "pets", *names_, *(f"{place}{junk}" for place in ("", "train/", "train/a/", "test/b/")))
    found = listed(root)
    assert (found.train, found.test, found.classes) == (clean.train, clean.test, clean.classes)
    assert any("hidden or of the system" in line and junk.split("/")[0] in line for line in found.remarks)


def test_other_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    root = make(tmp_path, *several("train/a", "train/b", "test/a", "test/b"), "train/loose.png", "train/a/noending")
    for name in ("train/a/notes.txt", "train/a/more.TXT", "train/b/boxes.xml", "train/a/x.mat"):
        (root / name).write_text("")
    (root / "extra").mkdir()
    found = listed(root)
    assert ("train/a/noending", 0) in found.train
    assert len(found.train) == 5
    (line,) = (line for line in found.remarks if "passed over" in line)
    for part in ("2 .txt (train/a/", "1 .xml", "1 .mat", "1 in no class folder (train/loose.png)", "(extra)"):
        assert part in line


def test_the_classes_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "pets", *several(*"abcdefg", count=5))
    resolve(config(root), tmp_path / "data")
    line = f"{root}: 35 pictures of 7 classes: a (5), b (5), c (5), d (5), e (5) and 2 more"
    assert line in capsys.readouterr().out.splitlines()
    assert resolve(config(root), tmp_path / "data").classes == (*"abcdefg",)
    assert line not in capsys.readouterr().out


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", *several("cats"))
    root = make(tmp_path / "pets", *several("train/dog", "test/dog", "test/cat"))
    (root / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "train" / "dog" / "up").symlink_to(root / "train")
    found = listed(root)
    assert names(found.train) == several("train/cat", "train/dog")
    assert any("links to a folder that it is in (train/dog/up)" in line for line in found.remarks)


# what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            ["train/a/0.png", "train/b/0.png", "eval/a/0.png"],
            r"what eval should be is not clear; .*train ",
        ),
        (["train/a/0.png", "train/b/0.png", "tset/a/0.png"], r"test is not a folder, and what tset should be"),
        (["test/a/0.png", "test/b/0.png"], "train is not a folder, and there is test; "),
        (["train/a/0.png", "train/b/0.png", "test/a/0.png"], "1 classes of .* not in both train and test: b"),
        (["train/a/0.png", "train/b/0.png", "dev/c/0.png"], "not in both train and dev: a; b; c"),
        ([*several(*(f"train/{i}" for i in range(9))), "val/0.png"], "val has no class folders, so nobody knows"),
        (
            ["train/a/0.png", "train/b/0.png", "val/a/0.png", "test/a/0.png"],
            "not in both train and val: b\ndataset.root: .*not in both train and test: b",
        ),
        (["train/a/0.png", "Train/b/0.png", "test/a/0.png"], "several folders for one purpose .Train, train."),
        (["train/0.png", "test/0.png"], "train should have two or more class folders .got 0."),
        (["a/0.png"], "should have two or more class folders .got 1."),
        (["a/train/0.png", "a/test/0.png", "b/train/0.png"], "3 folders of .* are splits in a folder of pictures"),
        (["0.png"], "should have two or more class folders .got 0."),
    ],
)
def test_what_can_mean_two_things_or_nothing_is_refused(tmp_path: Path, made: list[str], message: str) -> None:
    with pytest.raises(KnownError, match=message) as caught:
        listed(make(tmp_path / "pets", *made))
    assert all(line.startswith("dataset.root: ") for line in str(caught.value).splitlines())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KnownError, match=r"dataset.root: .*/nowhere does not exist"):
        listed(tmp_path / "nowhere")


# real data and many files -----------------------------------------------------------------------------------------


def unpacked(name: str, place: Path) -> Path:
    archive = SHARED / f"{name}.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")
    return place


def test_hymenoptera(tmp_path: Path) -> None:
    found = listed(unpacked("hymenoptera", tmp_path))
    assert found.classes == ["ants", "bees"]
    assert (len(found.train), len(found.test)) == (245, 153)
    assert "train/ants/imageNotFound.gif" in names(found.train)  # a picture, whatever it shows
    assert any("398 pictures of 2 classes: ants (194), bees (204)" in line for line in found.remarks)


def test_flowers(tmp_path: Path) -> None:
    found = listed(unpacked("flowers-128", tmp_path))
    assert found.classes == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert (len(found.train), len(found.test)) == (3_453, 864)
    assert any("passed over: 1 hidden or of the system (.DS_Store)" in line for line in found.remarks)


@pytest.mark.slow
def test_many_files_are_listed_quickly(tmp_path: Path) -> None:
    for split, count in (("train", 95), ("val", 5)):
        for name in (f"n{i:04}" for i in range(1000)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.JPEG").touch()
    began = time.monotonic()
    found = listed(tmp_path)
    assert time.monotonic() - began < 20
    assert (len(found.train), len(found.test), len(found.classes)) == (95_000, 5_000, 1000)
