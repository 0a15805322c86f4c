"""Image files decoded once: into arrays named by what they hold, known again by the files' names, sizes and times."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd.datasets.base import Arrays, Facts, statistics
from kd.spec import KnownError, tilde

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_SHOWN = 5  # offending files named in a message

File = tuple[str, int]  # path below the root, label


@dataclass(frozen=True)
class Listing:
    """The image files below `root`; `classes` are the labels' names, `tables` other files that decide labels."""

    root: Path
    classes: list[str]
    train: list[File]
    test: list[File]
    tables: tuple[str, ...] = ()


def prepare(listing: Listing, place: Path, threads: int) -> Facts:
    """The facts of listed images; they are decoded into `place`/<content> if they have not been before.

    The listing is known again by its files' names, sizes and times, the array by the hash of what it holds, so
    that copies share keys. Raises KnownError, naming files, where they are no square images of one size.
    """
    manifest = place / f"{_fingerprint(listing)}.json"
    try:
        facts = Facts(**json.loads(manifest.read_text()))
        if (place / str(facts.content)).is_dir():
            return facts
    except OSError:
        pass
    print(tilde(f"decoding {len(listing.train) + len(listing.test):,} images of {listing.root}, once"), flush=True)
    arrays = _decode(listing, threads)
    facts = _facts(arrays, listing.classes)
    _keep(arrays, place / str(facts.content))
    partial = manifest.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(facts)))
    partial.replace(manifest)
    return facts


def read(folder: Path) -> Arrays:
    """The arrays that prepare() left in a folder, mapped from disk."""
    return Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Arrays.__dataclass_fields__))


def images(folder: Path) -> list[str]:
    """The names of a folder's images, sorted. Raises KnownError where it has none."""
    found = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(ENDINGS))
    if not found:
        raise KnownError(f"dataset.root: {folder} has no images ({', '.join(ENDINGS)})")
    return found


def raise_for(what: str, found: Iterable[str], kind: str = "files") -> None:
    """Raise KnownError, naming the first few, if anything of the kind was found."""
    names = list(found)
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise KnownError(f"dataset.root: {len(names)} {kind} {what}: {'; '.join(names[:_SHOWN])}{more}")


def _fingerprint(listing: Listing) -> str:
    names = [*listing.tables, *(name for name, _ in listing.train + listing.test)]
    stats = ((name, (listing.root / name).stat()) for name in names)
    rows = (f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def _decode(listing: Listing, threads: int) -> Arrays:
    from PIL import Image, UnidentifiedImageError

    def decode(path: Path) -> NDArray[np.uint8] | str:
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{path}: {error}"

    paths = [listing.root / name for name, _ in listing.train + listing.test]
    first = (image for image in map(decode, paths) if not isinstance(image, str))
    height, width, _ = next(first, np.zeros((1, 1, 3))).shape
    pixels = np.empty((len(paths), height, width, 3), np.uint8)  # filled in place: a list would hold them twice
    unreadable, odd = "cannot be read as images", f"are not {width}×{height} pixels as {paths[0]} is"

    def fill(index: int) -> tuple[str, str] | None:
        image = decode(paths[index])
        if isinstance(image, str):
            return unreadable, image
        if image.shape != pixels.shape[1:]:
            return odd, f"{paths[index]}: {image.shape[1]}×{image.shape[0]}"
        pixels[index] = image
        return None

    with ThreadPoolExecutor(threads) as pool:
        problems = [problem for problem in pool.map(fill, range(len(paths))) if problem]
    raise_for(unreadable, (file for what, file in problems if what == unreadable))
    if height != width:
        raise KnownError(f"dataset.root: images should be square ({paths[0]} is {width}×{height})")
    raise_for(odd, (file for what, file in problems if what == odd))
    split = len(listing.train)
    labels = [np.array([label for _, label in files], np.int64) for files in (listing.train, listing.test)]
    return Arrays(pixels[:split], labels[0], pixels[split:], labels[1])


def _facts(arrays: Arrays, classes: list[str]) -> Facts:
    content = hashlib.sha256(json.dumps(classes).encode())
    for array in (arrays.images, arrays.labels, arrays.test_images, arrays.test_labels):
        content.update(str(array.shape).encode())
        content.update(np.ascontiguousarray(array).data.cast("B"))  # tobytes() would be a copy
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
