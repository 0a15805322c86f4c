"""Photographs in training: the same bits however they come, views that a number decides, and few views for a bank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from kd.core.stage import Stage
from kd.datasets import DatasetConfig, load_data, resolve
from kd.datasets.data import Images
from kd.datasets.photos import Photos
from kd.datasets.streamed import Streamed
from kd.datasets.views import draw_crop
from kd.models.normalization import Normalized
from kd.training.bank import Bank, open_bank
from kd.training.checkpoint import Checkpoint, Deferred
from kd.training.guide import Guide
from kd.training.loop import train_stage
from kd.training.step import make_network
from tests.test_train import Signalled, Silent, a_stage, same

Job = Callable[..., Any]
CLASSES = ("blue", "green", "red")
DECODED = {"array": Photos, "stream": Streamed}


def snapshots(root: Path, train: int = 12, test: int = 6, parts: tuple[str, str] = ("train", "test")) -> Path:
    """Photographs of three classes, which their colour tells apart: noisy, of many shapes, one of them turned."""
    rng = np.random.default_rng(0)
    for part, count in zip(parts, (train, test), strict=True):
        for label, name in enumerate(CLASSES):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 90, 2).tolist()
                pixels = rng.integers(0, 120, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
                pixels[..., 2 - label] += 100
                image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                exif = Image.Exif()
                exif[0x0112] = 6 if i == 1 else 1
                image.save(place / f"{i}.jpg", quality=95, exif=exif)
    return root


def photo_config(root: Path, **changes: object) -> DatasetConfig:
    fields = {"name": "folder", "root": str(root), "image_size": 32, "augment": "resized_crop_flip", "views": 4}
    return DatasetConfig.model_validate({"val_fraction": 0.25, "split_seed": 0, **fields, **changes})


def loaded(root: Path, data: Path, **changes: object) -> Images:
    return load_data(resolve(photo_config(root, **changes), data), data, "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshots(tmp_path_factory.mktemp("root") / "photographs")


def nobody(images: int) -> None:
    pass


# the same bits ----------------------------------------------------------------------------------------------------


def photographs(root: Path, decode: str = "array") -> list[str]:
    sizes = "dataset.image_size=32", "dataset.augment=resized_crop_flip", "train.batch_size=8", "train=cifar10"
    return ["dataset=folder", f"dataset.root={root}", f"dataset.decode={decode}", "dataset.views=4", *sizes]


def stage_files(store: Path, key: str) -> list[bytes]:
    return [(store / key / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")]


@pytest.mark.parametrize("decode", ["array", pytest.param("stream", marks=pytest.mark.slow)])
def test_a_student_has_the_same_bits_whatever_was_there_before(
    job: Job, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    """With a new and a filled bank, without a bank, decoded again, in another place, and with a copy of the files."""
    run = [*photographs(root, decode), "method=kd", "train.epochs=3"]
    job(*run, "method.T=7", folder="earlier")  # leaves the teacher, and a bank with three of four views
    key = job(*run, folder="warm")["chain"][-1]["key"]
    warm = stage_files(tmp_path / "store", key)
    assert list((tmp_path / "store" / "bank").glob("*/filled.bin"))
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for name, place, more in [
        ("cold", "data", []),
        ("unbanked", "data", ["runtime.bank=false"]),
        ("elsewhere", "other", []),
        ("copied", "third", [f"dataset.root={copy}"]),
    ]:
        monkeypatch.setenv("KD_STORE", str(tmp_path / name))
        monkeypatch.setenv("KD_DATA", str(tmp_path / place))
        result = job(*run, *more, folder=f"out-{name}")
        assert [stage["reused"] for stage in result["chain"]] == [False, False]
        assert result["chain"][-1]["key"] == key
        assert stage_files(tmp_path / name, key) == warm, name
        assert (tmp_path / name / "bank").exists() == (name != "unbanked")


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("decode", "workers"),
    [("array", None), *(pytest.param("stream", workers, marks=pytest.mark.slow) for workers in (1, 2))],
)
def test_an_interrupted_stage_of_photographs_goes_on_at_its_step(
    root: Path, tmp_path: Path, decode: str, workers: int | None
) -> None:
    images = loaded(root, tmp_path / "data", decode=decode)
    assert type(images) is DECODED[decode]
    images = images if workers is None else replace(images, workers=workers)
    teacher, network = teaching(images)
    stage = a_stage(images, guide=teacher, epochs=3, batch_size=5)  # type: ignore[arg-type]
    guide = Guide(network, images, "fp32", "cpu")
    unbroken = train_stage(stage, data=images, guides=[guide], device="cpu", watch=Silent())
    for stop in (3, 1, 9):  # 6 steps make an epoch
        with Deferred() as signals:
            partial = Checkpoint(tmp_path / "partial", stage, {"threads": 1}, 100, signals)
            with pytest.raises(KeyboardInterrupt):
                train_stage(stage, data=images, guides=[guide], device="cpu", watch=Signalled(stop), checkpoint=partial)
    resumed = train_stage(stage, data=images, guides=[guide], device="cpu", watch=Silent(), checkpoint=partial)
    assert same(unbroken, resumed)
    assert unbroken.metrics[0]["loss"] != unbroken.metrics[1]["loss"]


def teaching(images: Images) -> tuple[Stage, Normalized]:
    """A teacher that was not trained, with statistics of its own."""
    stage = a_stage(images, model="plane4", seed=9)  # type: ignore[arg-type]
    network = make_network(stage, "cpu").train()
    with torch.no_grad():
        network(images.show(torch.arange(20), torch.zeros(20, dtype=torch.long)))
    return stage, network.eval()


# arrays and streams show the same ---------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["short_side", "squash", "pad"])
def test_evaluation_sees_the_same_pixels_of_an_array_and_of_a_stream(root: Path, tmp_path: Path, resize: str) -> None:
    array, stream = (loaded(root, tmp_path / "data", decode=decode, resize=resize) for decode in DECODED)
    assert np.array_equal(array.train, stream.train)
    for part in ("val", "test"):
        seen = [torch.cat(list(images.batches(part))) for images in (array, stream)]  # type: ignore[arg-type]
        assert seen[0].shape == (9 if part == "val" else 18, 3, 32, 32)
        assert torch.equal(*seen)
    places = np.array([7, 0])
    assert torch.equal(array.plain("test", places), stream.plain("test", places))
    assert torch.equal(array.plain("test", places), seen[0][[7, 0]])


@pytest.mark.parametrize(
    ("augment", "resize"), [("none", "short_side"), ("crop_flip", "short_side"), ("resized_crop_flip", "squash")]
)
def test_views_that_are_cut_of_a_square_are_the_same_too(root: Path, tmp_path: Path, augment: str, resize: str) -> None:
    settings: dict[str, Any] = {"augment": augment, "resize": resize, "views": None}
    array, stream = (loaded(root, tmp_path / "data", decode=decode, **settings) for decode in DECODED)
    samples, views = torch.arange(36), torch.from_numpy(array.draw_views(np.random.default_rng(1)))
    assert torch.equal(array.show(samples, views), stream.show(samples, views))


def test_random_crops_of_a_stream_are_cut_from_the_whole_photograph(tmp_path: Path) -> None:
    """An array has the centre square; of a wide photograph its ends are lost."""
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "wide" / part / name).mkdir(parents=True)
            pixels = np.zeros((40, 160, 3), np.uint8)
            pixels[:, :30] = pixels[:, -30:] = 255
            Image.fromarray(pixels).save(tmp_path / "wide" / part / name / "0.png")
    array, stream = (
        loaded(tmp_path / "wide", tmp_path / "data", decode=decode, views=None, val_fraction=0) for decode in DECODED
    )
    samples, views = torch.zeros(200, dtype=torch.long), torch.arange(200)
    brightest = [images.show(samples, views).flatten(1).amax(1) for images in (array, stream)]
    assert brightest[0].max() == 0
    assert 50 < (brightest[1] == 255).sum() < 200


# views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", DECODED)
def test_sample_and_view_alone_decide_the_pixels(root: Path, tmp_path: Path, decode: str) -> None:
    images = loaded(root, tmp_path / "data", decode=decode, views=None)
    rng = np.random.default_rng(0)
    samples, views = torch.from_numpy(rng.integers(0, 36, 70)), torch.from_numpy(rng.integers(0, 2**31, 70))
    together = images.show(samples, views)
    assert together.shape == (70, 3, 32, 32)
    assert together.is_contiguous(memory_format=torch.channels_last)
    torch.rand(5)
    order = torch.from_numpy(rng.permutation(70))
    parts = [slice(0, 1), slice(1, 30), slice(30, 70)]
    again = torch.cat(list(images.shown(samples[order], views[order], parts)))
    assert torch.equal(again, together[order])
    assert (
        len({view.numpy().tobytes() for view in images.show(torch.zeros(50, dtype=torch.long), torch.arange(50))}) > 45
    )
    assert not torch.equal(images.show(torch.tensor([3]), views[:1]), images.show(torch.tensor([4]), views[:1]))


def boxes(height: int, width: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Top, left, height and width [draw, 4] of ours and of torchvision."""
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    known = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ours = [draw_crop(sample, sample // 7, height, width)[0] for sample in range(count)]
    return np.array(ours, float), np.array(known, float)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 500), (480, 320)])
def test_crops_have_torchvisions_distribution(height: int, width: int) -> None:
    ours, known = boxes(height, width, 4000)
    for name, of in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0] / (height - b[:, 2] + 1),
        "left": lambda b: b[:, 1] / (width - b[:, 3] + 1),
    }.items():
        assert ks_2samp(of(ours), of(known)).pvalue > 0.01, name
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    flipped = [draw_crop(sample, 3, height, width)[1] for sample in range(4000)]
    assert 0.47 < np.mean(flipped) < 0.53
    # The test can fail: crops of half as much of the area at least.
    least = np.array(
        [RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.16, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    assert ks_2samp(least[:, 2] * least[:, 3], known[:, 2] * known[:, 3]).pvalue < 1e-6


def test_two_photographs_have_different_crops_under_one_view() -> None:
    assert len({draw_crop(sample, 5, 300, 400) for sample in range(100)}) > 95


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_a_crop_that_never_fits_is_torchvisions_at_the_centre(height: int, width: int) -> None:
    ours, known = boxes(height, width, 300)
    central = tuple(known[0])
    assert (known == central).mean() > 0.9
    assert (ours == central).all(1).mean() == pytest.approx((known == central).all(1).mean(), abs=0.1)


# few views for a bank ---------------------------------------------------------------------------------------------


class Reckoner(Guide):
    """Counts the rows that its network computes."""

    computed = 0

    def _compute(self, samples: Any, views: Any, advance: Any) -> dict[str, torch.Tensor]:
        self.computed += len(samples)
        return super()._compute(samples, views, advance)


def banked(images: Images, place: Path) -> tuple[Reckoner, Bank]:
    bank = open_bank(place, "0123456789abcdef", "w", images, "fp32", "cpu")
    assert bank is not None
    return Reckoner(teaching(images)[1], images, "fp32", "cpu", bank), bank


@pytest.mark.parametrize("decode", DECODED)
def test_a_bank_of_k_views_is_full_after_k_passes(root: Path, tmp_path: Path, decode: str) -> None:
    images = loaded(root, tmp_path / "data", decode=decode, views=3)
    drawn = [images.draw_views(np.random.default_rng(seed)) for seed in range(40)]
    assert {*np.concatenate(drawn).tolist()} == {0, 1, 2}
    guide, bank = banked(images, tmp_path / "bank")
    assert bank.shape == (36, 3, 3)
    for number, views in enumerate(drawn, 1):  # each a student's epoch
        guide.begin(np.arange(36), views, nobody)
        distinct = {(i, view) for seen in drawn[:number] for i, view in enumerate(seen.tolist())}
        assert guide.computed == len(distinct) <= 3 * 36
        assert (np.fromfile(bank.folder / "filled.bin", np.uint8) == 1).sum() == len(distinct)
    assert guide.computed == 3 * 36


def test_without_a_limit_of_views_one_line_and_no_bank(
    job: Job, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(*photographs(root), "dataset.views=null", "method=kd")
    line = "the guide's logits are not cached: every epoch has new views of an image; dataset.views=16 draws from 16"
    assert capsys.readouterr().out.count(line) == 1
    assert not (tmp_path / "store" / "bank").exists()
    rows = [json.loads(row) for row in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4


def test_photographs_are_learned(job: Job, root: Path) -> None:
    """Well above chance, 33 %, from an array and from a stream: the labels belong to the pictures.

    They are different stages.
    """
    keys = set()
    for decode in DECODED:
        run = [
            *photographs(root, decode),
            "method=scratch",
            "train.epochs=25",
            "dataset.val_fraction=0",
            "train.lr=0.02",
        ]
        (student,) = job(*run, "train.select=last", folder=decode)["chain"]
        assert student["test_acc"] > 75
        keys.add(student["key"])
    assert len(keys) == 2


def test_squares_of_one_size_are_the_same_in_an_array_and_in_a_stream(tmp_path: Path) -> None:
    """Nothing is resized or cut off, also where a transparent ground is black."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "squares" / part / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (32, 32, 4)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "squares" / part / name / f"{i}.png")
    settings: dict[str, Any] = {"image_size": None, "background": "black", "views": None, "val_fraction": 0}
    array, stream = (loaded(tmp_path / "squares", tmp_path / "data", decode=decode, **settings) for decode in DECODED)
    assert (type(stream), stream.spec.resize) == (Streamed, None)
    assert torch.equal(*(torch.cat(list(images.batches("test"))) for images in (array, stream)))
    samples, views = torch.arange(6), torch.arange(6) * 11
    assert torch.equal(array.show(samples, views), stream.show(samples, views))
