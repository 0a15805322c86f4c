"""Image files, decoded once into arrays. Later runs recognise the files by their names, sizes and times."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kd.core import files
from kd.core.spec import KnownError, printable, tilde
from kd.datasets import Arrays, Facts, statistics

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_SHOWN = 5  # files that a message names
_PIXELS = 1 << 24  # 4096×4096: larger images are mistakes or decompression bombs

File = tuple[str, int]  # path below the root, label


@dataclass(frozen=True)
class Listing:
    """The image files below `root`. `classes` are the labels' names; `tables` are other files that decide labels."""

    root: Path
    classes: list[str]
    train: list[File]
    test: list[File]
    tables: tuple[str, ...] = ()


def decode(listing: Listing, place: Path, threads: int, skip: bool = False) -> Facts:
    """The facts of the listed images. They are decoded into `place`/<content> if that was not done before.

    `content` is the hash of the decoded arrays, so copies of a folder have the same keys. Raises KnownError, with the
    names of files, if images are not square, not of one size, or cannot be read. With `skip`, those that cannot be read
    are left out.
    """
    manifest = place / f"{_fingerprint(listing)}{'-readable' if skip else ''}.json"
    known = _known(manifest)
    if known is None:
        print(tilde(f"decoding {len(listing.train) + len(listing.test):,} images of {listing.root}, once"), flush=True)
        place.mkdir(parents=True, exist_ok=True)
        arrays, skipped = _decode(listing, threads, manifest.with_suffix(".txt"), skip)
        facts = _facts(arrays, listing.classes)
        _keep(arrays, place / str(facts.content))
        known = facts, skipped
        files.write(manifest, json.dumps({**asdict(facts), "skipped": skipped}))
    facts, skipped = known
    if skipped:
        listed = manifest.with_suffix(".txt")
        print(tilde(f"{skipped:,} images of {listing.root} are left out: they cannot be read ({listed})"), flush=True)
    return facts


def _known(manifest: Path) -> tuple[Facts, int] | None:
    """The facts of an earlier decoding, and how many images it left out; None if it is missing or damaged."""
    if not manifest.exists():
        return None
    try:
        told = json.loads(manifest.read_text())
        skipped = int(told.pop("skipped", 0))
        facts = Facts(**told)
        if (folder := manifest.parent / str(facts.content)).is_dir():
            if read_arrays(folder).images.shape[1:] == (facts.image_size, facts.image_size, 3):
                return facts, skipped
            raise ValueError("images of another size")
    except (OSError, ValueError, TypeError, AttributeError, KnownError):
        print(tilde(f"{manifest} or its arrays are damaged: the images are decoded again"), flush=True)
    return None


def read_arrays(folder: Path) -> Arrays:
    """The arrays that decode() wrote into a folder, as memory maps. Raises KnownError if they are damaged."""
    try:
        arrays = Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Arrays.__dataclass_fields__))
        images, labels = arrays.images, arrays.labels
        fits = images.ndim == 4 and labels.shape == images.shape[:1] and images.dtype == np.uint8
        test_fits = arrays.test_labels.shape == arrays.test_images.shape[:1] and arrays.test_images.dtype == np.uint8
        if fits and test_fits and arrays.test_images.shape[1:] == images.shape[1:]:
            return arrays
        reason = "their shapes do not fit together"
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    raise KnownError(f"{folder}: decoded images are damaged or missing ({reason}); start again to decode them again")


def image_names(folder: Path) -> list[str]:
    """The names of a folder's images, sorted. Raises KnownError if it has none."""
    found = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(ENDINGS))
    if not found:
        raise KnownError(f"dataset.root: {printable(str(folder))} has no images ({', '.join(ENDINGS)})")
    return found


def raise_for(what: str, found: Iterable[str], kind: str = "files", listed: Path | None = None) -> None:
    """Raise KnownError if any names were found. It shows the first few; the file `listed` gets all of them."""
    names = list(map(printable, found))
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        if listed is not None and more:
            listed.write_text("".join(f"{name}\n" for name in names))
            more += f" ({listed})"
        raise KnownError(f"dataset.root: {len(names)} {kind} {what}: {'; '.join(names[:_SHOWN])}{more}")


def _fingerprint(listing: Listing) -> str:
    def row(name: str) -> str:
        try:
            status = (listing.root / name).stat()
        except OSError:  # a broken or circular link: the decoder reports it
            return f"{name} absent"
        return f"{name} {status.st_size} {status.st_mtime_ns}"

    names = [*listing.tables, *(name for name, _ in listing.train + listing.test)]
    return hashlib.sha256("\n".join(sorted(map(row, names))).encode(errors="surrogateescape")).hexdigest()[:16]


def _open(path: Path) -> NDArray[np.uint8] | str:
    """An image's pixels [height, width, 3], or the reason why it cannot be read."""
    from PIL import Image

    try:
        if not path.is_file():  # opening a pipe can wait for ever
            return f"{path}: not a file"
        with Image.open(path) as image:
            if image.width * image.height > _PIXELS:
                return f"{path}: {image.width}×{image.height} are more than {_PIXELS:,} pixels"
            if image.mode.startswith(("I", "F")):
                return f"{path}: pixels have more than 8 bits ({image.mode}); converting them loses values"
            return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise many types of exceptions in PIL
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the system, e.g. too many open files, and not of the image
        return f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _decode(listing: Listing, threads: int, listed: Path, skip: bool) -> tuple[Arrays, int]:
    """The images, and the number of images that were left out."""
    files = listing.train + listing.test
    paths = [listing.root / name for name, _ in files]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about large images and unusual palettes
        opened = zip(paths, map(_open, paths), strict=True)
        shapes = ((path, image.shape) for path, image in opened if not isinstance(image, str))
        first, (height, width, _) = next(shapes, (paths[0], (1, 1, 3)))
        try:
            pixels = np.empty((len(paths), height, width, 3), np.uint8)  # filled in place: a list takes twice as much
        except MemoryError as error:
            raise KnownError(f"dataset.root: {len(paths):,} images of {width}×{height} do not fit in memory") from error

        def fill(index: int) -> tuple[bool, str] | None:
            image = _open(paths[index])
            if isinstance(image, str):
                return False, image
            if image.shape != pixels.shape[1:]:
                return True, f"{paths[index]}: {image.shape[1]}×{image.shape[0]}"
            pixels[index] = image
            return None

        with ThreadPoolExecutor(threads) as pool:
            problems = list(pool.map(fill, range(len(paths))))
    unreadable = [problem[1] for problem in problems if problem and not problem[0]]
    if not skip:
        raise_for("cannot be read as images; dataset.skip_unreadable=true leaves them out", unreadable, listed=listed)
    if height != width:
        raise KnownError(f"dataset.root: images should be square ({printable(str(first))} is {width}×{height})")
    odd = [problem[1] for problem in problems if problem and problem[0]]
    raise_for(f"are not {width}×{height} pixels like the first image", odd, listed=listed)
    if unreadable:
        listed.write_text("".join(f"{printable(name)}\n" for name in unreadable))
    return _sorted_out(listing, pixels, np.array([problem is None for problem in problems])), len(unreadable)


def _sorted_out(listing: Listing, pixels: NDArray[np.uint8], kept: NDArray[np.bool_]) -> Arrays:
    """The images that are kept, with their labels. Raises KnownError if a class has none left."""

    def part(files: list[File], of: slice) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = np.array([label for _, label in files], np.int64)[kept[of]]
        left = set(labels.tolist())
        bare = (name for label, name in enumerate(listing.classes) if label not in left)
        raise_for("have no image left that can be read", bare, "classes")
        return pixels[of] if kept[of].all() else pixels[of][kept[of]], labels

    split = len(listing.train)
    return Arrays(*part(listing.train, slice(split)), *part(listing.test, slice(split, None)))


def _facts(arrays: Arrays, classes: list[str]) -> Facts:
    content = hashlib.sha256(json.dumps(classes).encode())
    for array in (arrays.images, arrays.labels, arrays.test_images, arrays.test_labels):
        content.update(str(array.shape).encode())
        content.update(np.ascontiguousarray(array).data.cast("B"))  # tobytes() makes a copy
    mean, std = statistics(arrays.images)
    return Facts(len(classes), arrays.images.shape[1], mean, std, content.hexdigest()[:16])


def _keep(arrays: Arrays, folder: Path) -> None:
    """Write the arrays under a temporary name first, so that a folder is complete or absent."""
    try:
        read_arrays(folder)
        return
    except KnownError:
        shutil.rmtree(folder, ignore_errors=True)
    partial = files.temporary(folder)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for name, array in vars(arrays).items():
            np.save(partial / f"{name}.npy", array)
        files.publish(partial, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process has published the same content first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
