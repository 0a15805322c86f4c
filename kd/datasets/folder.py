"""folder: any images as root/{train,test}/<class>/*.{png,jpg,…}, decoded once into arrays."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd.datasets.base import Arrays, Facts, statistics
from kd.spec import KnownError

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_SHOWN = 5  # offending files named in a message

File = tuple[str, int]  # path below the split's folder, label


def prepare(root: Path, data_root: Path, threads: int) -> Facts:
    """A folder's facts; its images are decoded into `data_root`/folder/<content> if they have not been before.

    A folder is known again by its files' names, sizes and times, the array by the hash of what it holds, so
    that copies of one folder share keys. Raises KnownError, naming files, where the folder is not as it should be.
    """
    classes = _classes(root)
    manifest = data_root / "folder" / f"{_fingerprint(root, classes)}.json"
    try:
        facts = Facts(**json.loads(manifest.read_text()))
        if (manifest.parent / str(facts.content)).is_dir():
            return facts
    except OSError:
        pass
    files = {split: list(_files(root / split, classes)) for split in ("train", "test")}
    print(f"decoding {sum(map(len, files.values())):,} images of {root}, once", flush=True)
    arrays = _decode(root, files, threads)
    facts = _facts(arrays, classes)
    _keep(arrays, manifest.parent / str(facts.content))
    partial = manifest.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(facts)))
    partial.replace(manifest)
    return facts


def read(data_root: Path, content: str | None) -> Arrays:
    """The arrays that prepare() left, mapped from disk."""
    folder = data_root / "folder" / str(content)
    return Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Arrays.__dataclass_fields__))


def _classes(root: Path) -> list[str]:
    for split in ("train", "test"):
        if not (root / split).is_dir():
            place = f"{root}/{{train,test}}/<class>/"
            raise KnownError(f"dataset.root: {root / split} is no folder; images should lie in {place}")
    train, test = ({e.name for e in os.scandir(root / s) if e.is_dir()} for s in ("train", "test"))
    if len(train) < 2:
        raise KnownError(f"dataset.root: {root / 'train'} should have a folder a class, two or more (got {len(train)})")
    if train != test:
        odd = ", ".join(sorted(train ^ test))
        raise KnownError(f"dataset.root: these classes of {root} are not in both train and test: {odd}")
    return sorted(train)


def _files(folder: Path, classes: list[str]) -> Iterator[File]:
    for label, name in enumerate(classes):
        found = sorted(e.name for e in os.scandir(folder / name) if e.name.lower().endswith(_ENDINGS))
        if not found:
            raise KnownError(f"dataset.root: {folder / name} has no images ({', '.join(_ENDINGS)})")
        yield from ((f"{name}/{file}", label) for file in found)


def _fingerprint(root: Path, classes: list[str]) -> str:
    rows = (
        f"{split}/{name}/{entry.name} {entry.stat().st_size} {entry.stat().st_mtime_ns}"
        for split in ("train", "test")
        for name in classes
        for entry in os.scandir(root / split / name)
    )
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def _decode(root: Path, files: dict[str, list[File]], threads: int) -> Arrays:
    from PIL import Image, UnidentifiedImageError

    def decode(path: Path) -> NDArray[np.uint8] | str:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{path}: {error}"

    paths = [root / split / name for split in ("train", "test") for name, _ in files[split]]
    with ThreadPoolExecutor(threads) as pool:
        decoded = list(pool.map(decode, paths))
    images = [image for image in decoded if not isinstance(image, str)]
    _raise_for("cannot be read as images", [problem for problem in decoded if isinstance(problem, str)])
    height, width, _ = images[0].shape
    if height != width:
        raise KnownError(f"dataset.root: images should be square ({paths[0]} is {width}×{height})")
    odd = [f"{p}: {i.shape[1]}×{i.shape[0]}" for p, i in zip(paths, images, strict=True) if i.shape != images[0].shape]
    _raise_for(f"are not {width}×{height} pixels as {paths[0]} is", odd)
    pixels, split = np.stack(images), len(files["train"])
    labels = [np.array([label for _, label in files[s]], np.int64) for s in ("train", "test")]
    return Arrays(pixels[:split], labels[0], pixels[split:], labels[1])


def _raise_for(what: str, files: list[str]) -> None:
    if files:
        more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        raise KnownError(f"dataset.root: {len(files)} files {what}: {'; '.join(files[:_SHOWN])}{more}")


def _facts(arrays: Arrays, classes: list[str]) -> Facts:
    content = hashlib.sha256(json.dumps(classes).encode())
    for array in (arrays.images, arrays.labels, arrays.test_images, arrays.test_labels):
        content.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    mean, std = statistics(arrays.images)
    return Facts(len(classes), arrays.images.shape[1], mean, std, content.hexdigest()[:16])


def _keep(arrays: Arrays, folder: Path) -> None:
    """Under a name of this process first, so that a folder is there whole or not at all."""
    if folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    for name, array in vars(arrays).items():
        np.save(partial / f"{name}.npy", array)
    try:
        partial.rename(folder)
    except OSError:  # another process was first, with the same content
        for file in partial.iterdir():
            file.unlink()
        partial.rmdir()
