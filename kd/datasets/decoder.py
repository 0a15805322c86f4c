"""Picture files as a data set: whether they become an array, and of which size; what is known of them is kept.

Later runs recognise the files by their names, sizes and times.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.core import files
from kd.core.spec import KnownError, printable, tilde
from kd.core.stage import Background, Channels, Resize
from kd.datasets import Facts, Reading, statistics_of
from kd.datasets.layouts import File, Listing, raise_for
from kd.datasets.pictures import PictureError, margin, measure, open_picture, read_square
from kd.datasets.resized import Colours, Failure, counted, in_order, pixels_of, read_arrays, write_pictures
from kd.datasets.stream_roots import keep_root, root_of

_READER = 2  # raise it when the same files become other pixels
_SAMPLE = 2_000  # training pictures from which mean and deviation of a stream are computed


@dataclass(frozen=True)
class Geometry:
    """How pictures are shown (`image_size`), and the squares that are made of them (`side`).

    Without `resize` they are squares of one size already, and stay as they are.
    """

    image_size: int
    side: int
    resize: Resize | None
    streamed: bool


def decode(listing: Listing, place: Path, reading: Reading, *, one_size: bool = False) -> Facts:
    """The facts of the listed pictures.

    Squares of one size become an array as they are, others an array of squares with a margin: `place`/<content>, made
    once. `content` is the hash of the array, so copies of a folder have the same keys. Pictures that are streamed are
    listed in `place`/<content>.files. Raises KnownError, with the names of files, if some cannot be read (unless
    dataset.skip_unreadable), if they are not of one size where they should be, and if the disk has no room.
    """
    for line in listing.choices:
        _say(line)
    place.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(listing)
    geometry = _geometry(listing, place / f"{fingerprint}.size", reading, one_size)
    mark = _hash([fingerprint, asdict(geometry), reading.config.background, _READER])
    manifest = place / f"{mark}{'-readable' if reading.config.skip_unreadable else ''}.json"
    known = _known(manifest, geometry)
    if known is None:
        with files.hold_lock(manifest.with_suffix(".lock"), f"{listing.root} is decoded by"):
            known = _known(manifest, geometry) or _make(listing, manifest, geometry, reading)
    facts, skipped = known
    if facts.streamed:
        keep_root(place / f"{facts.content}.root", listing.root)
    if skipped:
        _say(f"{skipped:,} images of {listing.root} are left out: they cannot be read ({manifest.with_suffix('.txt')})")
    return replace(facts, counts=_counts(facts, place))


def _counts(facts: Facts, place: Path) -> tuple[int, ...]:
    """The training images of each class."""
    where = str(facts.content)
    labels = [x for _, x in listing(place, where).train] if facts.streamed else read_arrays(place / where).labels
    return tuple(np.bincount(labels, minlength=facts.num_classes).tolist())


def listing(place: Path, content: str) -> Listing:
    """The files of streamed pictures, as decode() listed them. Raises KnownError if its file is missing or damaged."""
    path = place / f"{content}.files"
    try:
        root, tree = root_of(path.with_suffix(".root")), json.loads(path.read_text(encoding="utf-8"))
        train, test = ([(name, label) for name, label in tree[part]] for part in ("train", "test"))
        return Listing(root, tree["classes"], train, test, tree["val_images"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KnownError(f"{path} is damaged or missing ({error}); start again to make it again") from error


def _say(line: str) -> None:
    print(printable(tilde(line)), flush=True)


def _hash(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def _fingerprint(listing: Listing) -> str:
    """A hash of the folder's place, and of the files' paths, sizes, times and labels: copies may have equal times."""

    def row(name: str, label: int, part: str) -> str:
        try:
            status = os.stat(f"{listing.root}/{name}")
        except OSError:  # a broken or circular link: the decoder reports it
            return f"{part} {label} {name} absent"
        return f"{part} {label} {name} {status.st_size} {status.st_mtime_ns}"

    rows = [row(*file, part) for part, listed in (("train", listing.train), ("test", listing.test)) for file in listed]
    rows += [*listing.classes, str(listing.val_images), os.path.realpath(listing.root)]
    return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()[:16]


def _geometry(listing: Listing, cache: Path, reading: Reading, one_size: bool) -> Geometry:
    config, count = reading.config, len(listing.train) + len(listing.test)
    own = _own_size(listing, cache)
    if own is None and one_size and config.image_size is None:
        _refuse_sizes(listing)
    size = config.image_size or own or reading.image_size
    keeps = own == size
    if keeps and config.image_size is None and size > reading.image_size:
        _say(f"{listing.root}: the images keep their {size}×{size} pixels; dataset.image_size=… makes them smaller")
    side = size if keeps else margin(size, config.resize)
    total = count * side * side * 3
    streamed = config.decode == "stream" or (config.decode == "auto" and total > config.array_budget * 1e9)
    if streamed and config.decode == "auto":
        _say(
            f"{listing.root}: as an array the images would take {_bytes(total)}, more than "
            f"dataset.array_budget={config.array_budget:g}: they are decoded in every epoch"
        )
    return Geometry(size, side, None if keeps else config.resize, streamed)


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _own_size(listing: Listing, cache: Path) -> int | None:
    """The size of the pictures, if all that can be read are squares of one size; otherwise None."""
    try:
        told = json.loads(cache.read_text(encoding="utf-8"))
        if told is None or isinstance(told, int):
            return told
    except (OSError, ValueError):
        pass
    found = next(_sizes_found(listing), None)
    files.write(cache, json.dumps(found))
    return found


def _sizes_found(listing: Listing) -> Iterator[int]:
    """The size of squares of one size, at once; nothing if there are others."""
    first = None
    for path, size in _sizes(listing):
        first = first or size
        if size != first or size[0] != size[1]:
            what = "are not square" if size == first else "have different sizes and shapes"
            _say(f"{listing.root}: images {what} ({path.name} is {size[0]}×{size[1]})")
            return
    yield first[0] if first else 1  # the decoder reports that none can be read


def _sizes(listing: Listing) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Path, width and height of all pictures that can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, _ in listing.train + listing.test:
            path = listing.root / name
            try:
                size = measure(path)
            except PictureError:  # the decoder reports it
                continue
            yield path, size


def _refuse_sizes(listing: Listing) -> None:
    """Raise KnownError with the names of the files that are not like the first."""
    sizes = list(_sizes(listing))
    first, (width, height) = sizes[0]
    if width != height:
        raise KnownError(f"dataset.root: images should be square ({first} is {width}×{height})")
    odd = (f"{path}: {size[0]}×{size[1]}" for path, size in sizes if size != (width, height))
    raise_for(f"are not {width}×{height} pixels like the first image; dataset.image_size={width} resizes them", odd)


def _known(manifest: Path, geometry: Geometry) -> tuple[Facts, int] | None:
    """The facts of an earlier decoding, and how many images it left out; None if it is missing or damaged."""
    if not manifest.exists():
        return None
    try:
        told: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        skipped = int(told.pop("skipped"))
        facts = Facts(**{name: _as_tuple(value) for name, value in told.items()})
        if (facts.image_size, facts.resize, facts.streamed) != (
            geometry.image_size,
            geometry.resize,
            geometry.streamed,
        ):
            raise ValueError("images of another size")
        if facts.streamed:
            files_of = manifest.parent / f"{facts.content}.files"
            return (facts, skipped) if files_of.is_file() and json.loads(files_of.read_bytes())["classes"] else None
        if (folder := manifest.parent / str(facts.content)).is_dir():
            arrays = read_arrays(folder)
            shape = (geometry.side, geometry.side, 3)
            if arrays.images.shape[1:] == shape and facts.images == (len(arrays.labels), len(arrays.test_labels)):
                return facts, skipped
            raise ValueError("arrays of another shape")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, KnownError):
        _say(f"{manifest} or its arrays are damaged: the images are decoded again")
        manifest.unlink(missing_ok=True)
    return None


def _as_tuple(value: Any) -> Any:
    """A list of JSON as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _make(listing: Listing, manifest: Path, geometry: Geometry, reading: Reading) -> tuple[Facts, int]:
    for line in listing.remarks:
        _say(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns about large images and unusual palettes
        facts, failed = (_stream if geometry.streamed else _array)(listing, manifest, geometry, reading)
    if failed:
        lines = (f"{printable(str(path))}: {reason}\n" for path, reason in failed)
        files.write(manifest.with_suffix(".txt"), "".join(lines))
    files.write(manifest, json.dumps({**asdict(facts), "skipped": len(failed)}))
    return facts, len(failed)


def _array(listing: Listing, manifest: Path, geometry: Geometry, reading: Reading) -> tuple[Facts, list[Failure]]:
    """Make the array of the listed pictures, and publish it under its content."""
    place, count = manifest.parent, len(listing.train) + len(listing.test)
    size = count * geometry.side**2 * 3
    if geometry.resize is None:
        _say(f"decoding {count:,} images of {listing.root}, once")
    else:
        shape = f"{geometry.side}×{geometry.side} ({geometry.resize})"
        _say(f"resizing {count:,} photographs of {listing.root} to {shape}, once: {_bytes(size)} in {place}")
    if (free := shutil.disk_usage(place).free) < size + (1 << 20):
        raise KnownError(
            f"dataset.root: an array of {_bytes(size)} has no room in {place} ({_bytes(free)} free): choose another "
            "place by runtime.data=<path>, a smaller dataset.image_size, or dataset.decode=stream"
        )
    for old in files.temporaries(place, manifest.stem):
        if files.abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    made = files.temporary(place / manifest.stem)
    try:
        made.mkdir()
        facts, failed = _filled(made, listing, manifest, geometry, reading)
        _publish(made, place / str(facts.content))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return facts, failed


def _filled(
    folder: Path, listing: Listing, manifest: Path, geometry: Geometry, reading: Reading
) -> tuple[Facts, list[Failure]]:
    """Write the files of an array into a folder."""
    background, side = reading.config.background, geometry.side
    read = partial(read_square, side=side, resize=geometry.resize or "short_side", background=background)
    if geometry.resize is None:
        read = partial(_as_it_is, side=side, background=background)
    parts = {"": listing.train, "test_": listing.test}
    failed: list[Failure] = []
    kept, colours = {}, {}
    with counted("decoding", len(listing.train) + len(listing.test)) as advance:
        for prefix, listed in parts.items():
            paths = [listing.root / name for name, _ in listed]
            place = folder / f"{prefix}images.npy"
            colours[prefix], kept[prefix], lost = write_pictures(place, paths, read, side, reading.threads, advance)
            failed += lost
    _refuse_failures(failed, manifest, reading)
    left = _left(listing, kept[""], kept["test_"])
    for prefix, listed in (("", left.train), ("test_", left.test)):
        np.save(folder / f"{prefix}labels.npy", np.array([label for _, label in listed], np.int64))
    content = _content(folder, left, side)
    return _facts_of(left, geometry, statistics_of(colours[""].counts), content), failed


def _facts_of(listing: Listing, geometry: Geometry, statistics: tuple[Channels, Channels], content: str) -> Facts:
    return Facts(
        len(listing.classes),
        geometry.image_size,
        *statistics,
        content,
        images=(len(listing.train), len(listing.test)),
        classes=tuple(listing.classes),
        val_images=listing.val_images,
        resize=geometry.resize,
        streamed=geometry.streamed,
    )


def _as_it_is(path: Path, side: int, background: Background) -> NDArray[np.uint8]:
    pixels = np.asarray(open_picture(path, background))
    if pixels.shape != (side, side, 3):
        raise PictureError(f"{pixels.shape[1]}×{pixels.shape[0]} pixels, not the {side}×{side} of its first bytes")
    return pixels


def _refuse_failures(failed: list[Failure], manifest: Path, reading: Reading) -> None:
    if not reading.config.skip_unreadable:
        lines = (f"{path}: {reason}" for path, reason in failed)
        what = "cannot be read as images; dataset.skip_unreadable=true leaves them out"
        raise_for(what, lines, listed=manifest.with_suffix(".txt"))


def _left(listing: Listing, train: list[int], test: list[int]) -> Listing:
    """The listing of the files that could be read, by their positions. Raises KnownError if a class has none left."""
    first_val = len(listing.train) - listing.val_images
    parts: list[list[File]] = [
        [listing.train[i] for i in train if i < first_val],
        [listing.train[i] for i in train if i >= first_val],
        [listing.test[i] for i in test],
    ]
    for part in (parts[0], parts[2], *([parts[1]] if listing.val_images else [])):
        labels = {label for _, label in part}
        bare = (name for label, name in enumerate(listing.classes) if label not in labels)
        raise_for("have no image left that can be read", bare, "classes")
    return Listing(listing.root, listing.classes, parts[0] + parts[1], parts[2], len(parts[1]))


def _content(folder: Path, listing: Listing, side: int) -> str:
    """The hash of class names, pictures and labels."""
    content = hashlib.sha256(json.dumps(listing.classes).encode())
    for prefix, listed in (("", listing.train), ("test_", listing.test)):
        content.update(str((len(listed), side, side, 3)).encode())
        for part in pixels_of(folder / f"{prefix}images.npy"):
            content.update(part)
        labels = np.array([label for _, label in listed], np.int64)
        content.update(str(labels.shape).encode())
        content.update(labels.tobytes())
    return content.hexdigest()[:16]


def _publish(made: Path, folder: Path) -> None:
    """Give a complete folder its final name, unless the same array is there."""
    try:
        read_arrays(folder)
        return
    except KnownError:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        files.publish(made, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process has published the same content first
            raise


# streams ----------------------------------------------------------------------------------------------------------


def _stream(listing: Listing, manifest: Path, geometry: Geometry, reading: Reading) -> tuple[Facts, list[Failure]]:
    """List the pictures that can be read, as far as their first bytes and a sample tell."""
    config, count = reading.config, len(listing.train) + len(listing.test)
    _say(f"looking at {count:,} images of {listing.root}, once")
    sample = np.linspace(0, len(listing.train) - 1, min(_SAMPLE, len(listing.train))).astype(np.int64).tolist()
    read = partial(read_square, side=geometry.side, resize=config.resize, background=config.background)
    colours, failed = Colours(), []
    with counted("looking at images", count + len(sample)) as advance:
        for paths, work in (
            ([listing.root / name for name, _ in listing.train + listing.test], measure),
            ([listing.root / listing.train[index][0] for index in sample], read),
        ):
            for path, found in zip(paths, in_order(paths, work, reading.threads), strict=True):
                if isinstance(found, str):
                    failed.append((path, found))
                elif isinstance(found, np.ndarray):
                    colours.add(found)
                advance()
    failed = [*dict(failed).items()]  # a file can fail in both
    _refuse_failures(failed, manifest, reading)
    lost = {path for path, _ in failed}
    train, test = (
        [i for i, (name, _) in enumerate(part) if not lost or listing.root / name not in lost]
        for part in (listing.train, listing.test)
    )
    left = _left(listing, train, test)
    content = _listed(left, manifest.parent, config.background)
    return _facts_of(left, geometry, statistics_of(colours.counts), content), failed


def _listed(listing: Listing, place: Path, background: Background) -> str:
    """Write the listing of streamed pictures. Returns its content: a hash of paths, sizes and labels."""
    tree = {name: getattr(listing, name) for name in ("classes", "train", "test", "val_images")}
    sizes = [os.stat(f"{listing.root}/{name}").st_size for name, _ in listing.train + listing.test]
    content = _hash([tree, sizes, background])
    files.write(place / f"{content}.files", json.dumps(tree))
    return content
