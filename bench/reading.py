"""Reading photographs, without a network: python -m bench.reading --root hymenoptera_data.

Each contestant reads the same training photographs as batches of random resized crops and flips of 224 pixels, with as
many workers as there are processors. Rounds alternate, an epoch each; a first epoch, which starts the workers, does not
count. lightly-train is only there if it is installed (AGPL: it is no dependency of ours). Writes results/reading.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bench.workloads import RESULTS, ROOT
from kd.app.options import register
from kd.app.parsing import parse
from kd.core import hardware
from kd.datasets import load_data, resolve

Epoch = Callable[[], Iterable[Any]]  # the batches of an epoch
BATCH, SIZE = 32, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE = (0.08, 1.0)


def repeated(root: Path, times: int, place: Path) -> Path:
    """A folder in which each training photograph is there so many times, as files of their own."""
    for source in sorted(path for path in (root / "train").rglob("*") if path.is_file()):
        for number in range(times):
            copy = place / "train" / source.parent.name / f"{number}-{source.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    shutil.copytree(root / "val", place / "val")
    return place


def _loaded(dataset: Dataset[Any]) -> DataLoader[Any]:
    workers = hardware.cpu_count()
    return DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)


def by_torchvision(root: Path) -> Epoch:
    """The transforms of torchvision's references/classification for training, on tensors."""
    steps = [
        v2.PILToTensor(),
        v2.RandomResizedCrop(SIZE, scale=_SCALE, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    loader = _loaded(ImageFolder(root / "train", v2.Compose(steps)))
    return lambda: loader


def by_timm(root: Path) -> Epoch:
    """timm's loader for training, as its train.py makes it."""
    data: Any = importlib.import_module("timm.data")  # its types do not permit what its train.py does
    told = {"is_training": True, "scale": _SCALE, "color_jitter": None, "interpolation": "bilinear"}
    own = {"num_workers": hardware.cpu_count(), "device": torch.device("cpu"), "persistent_workers": True}
    loader = data.create_loader(
        data.create_dataset("", str(root), split="train"), (3, SIZE, SIZE), BATCH, **told, **own
    )
    return lambda: loader


def by_lightly(root: Path) -> Epoch:
    """lightly-train's data set of unlabelled photographs, with the crop and flip of its distillation alone."""
    data: Any = importlib.import_module("lightly_train._data.image_dataset")
    made: Any = importlib.import_module("lightly_train._methods.distillation.distillation_transform")
    crop = made.DistillationRandomResizedCropArgs(min_scale=_SCALE[0], max_scale=_SCALE[1])
    off = dict.fromkeys(("color_jitter", "random_gray_scale", "gaussian_blur"))
    told = made.DistillationTransformArgs(image_size=(SIZE, SIZE), num_channels=3, random_resize=crop, **off)
    told.resolve_auto()
    names = [str(path.relative_to(root)) for path in sorted((root / "train").rglob("*")) if path.is_file()]
    loader = _loaded(data.ImageDataset(root, names, made.DistillationTransform(told), num_channels=3))
    return lambda: loader


def ours(root: Path, decode: str, place: Path) -> Epoch:
    """Ours, as run.py reads them: uint8, because the network's first layer normalises."""
    register()
    told = ["dataset=folder", f"dataset.root={root}", f"dataset.decode={decode}", f"dataset.image_size={SIZE}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", [*told, "dataset.val_fraction=0", f"runtime.data={place}"]))
    data = load_data(resolve(config.dataset, config.data_root), config.data_root, "cpu")
    rng = np.random.default_rng(0)
    full = [slice(start, start + BATCH) for start in range(0, len(data.train) // BATCH * BATCH, BATCH)]

    def epoch() -> Iterator[torch.Tensor]:
        samples = torch.from_numpy(rng.permutation(data.train))
        return data.shown(samples, torch.from_numpy(data.draw_views(rng))[samples], full)

    return epoch


def seconds(epoch: Epoch) -> tuple[float, int]:
    """The seconds of an epoch, and its images."""
    began = time.perf_counter()
    images = sum(_images(batch) for batch in epoch())
    return time.perf_counter() - began, images


def _images(batch: Any) -> int:
    first = batch["views"][0] if isinstance(batch, dict) else batch[0] if isinstance(batch, list | tuple) else batch
    assert first.shape[1:] == (3, SIZE, SIZE), first.shape
    return len(first)


def measure(root: Path, rounds: int, place: Path) -> dict[str, Any]:
    """Images a second of each contestant and round, and the seconds in which ours makes its array."""
    began = time.perf_counter()
    contestants = {"ours, array": ours(root, "array", place)}
    made = time.perf_counter() - began
    contestants |= {"ours, streamed": ours(root, "stream", place), "torchvision": by_torchvision(root)}
    contestants |= {"timm": by_timm(root)}
    if importlib.util.find_spec("lightly_train"):
        contestants["lightly-train"] = by_lightly(root)
    else:
        print("lightly-train is not installed, so it is left out", flush=True)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, epoch in contestants.items():
            took, images = seconds(epoch)
            if number:
                speeds[name].append(round(images / took, 1))
        print(f"round {number}: { ({name: each[-1] for name, each in speeds.items() if each}) }", flush=True)
    return {"images_per_second": speeds, "array_made_in_seconds": round(made, 2), "images": images}


def ratios(speeds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The median of each contestant, and of each round's ratio to torchvision."""
    usual = speeds["torchvision"]
    return {
        name: {
            "images_per_second": statistics.median(each),
            "ratio": round(statistics.median(one / other for one, other in zip(each, usual, strict=True)), 2),
        }
        for name, each in speeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, required=True, help="photographs in train/<class> and val/<class>")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="how often each training photograph is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = repeated(given.root, given.times, Path(folder) / "photos")
        measured = measure(root, given.rounds, Path(folder) / "data")
    names = ["timm", *(["lightly-train"] if "lightly-train" in measured["images_per_second"] else [])]
    where = {"platform": platform.machine(), "processors": hardware.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    where |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    found = {"summary": ratios(measured["images_per_second"]), **measured, **where, **{n: version(n) for n in names}}
    print(json.dumps(found["summary"], indent=1), flush=True)
    (RESULTS / "reading.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
