"""tiny_imagenet (Stanford CS231n 2015): 200 classes of 64×64 images, in the layout of its archive.

train/<wnid>/images/ is one folder per class. val/images/ is one folder for all classes, with labels in
val/val_annotations.txt. val/ is the test set here, as in the papers, because the archive's test images have no labels.
Classes are numbered in the order of their names, as in torchvision; wnids.txt has another order.
"""

import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock

from kd.core.spec import KnownError, tilde
from kd.datasets import Arrays, Facts, Reading, decoder, label_file, layouts, resized

_NAME = "tiny-imagenet-200"
_URL = f"http://cs231n.stanford.edu/{_NAME}.zip"
# Limits for an archive: twice the files of the real one (110,000 images and 400 tables), and several times its bytes.
_MOST_FILES = 250_000
_MOST_BYTES = 2_000_000_000


def prepare(root: Path, data_root: Path, reading: Reading) -> Facts:
    """The facts of the images in `root`, which are decoded. If `root` is missing, the zip beside it is unpacked first.

    val/ may also have a folder for each class, as many people have sorted it. Raises KnownError, with the names of
    files, if both are missing or the folder has another layout.
    """
    if root.suffix == ".zip":
        root = root.with_suffix("")
    if not root.is_dir():
        _unpack(root.with_name(f"{root.name}.zip"), root)
    if _in_class_folders(root):
        listing = layouts.find(root, reading.config.test_fraction)
    else:
        listing = label_file.annotated(root)
    return decoder.decode(listing, data_root / "tiny_imagenet", reading, one_size=True)


def read(data_root: Path, content: str | None) -> Arrays:
    """The arrays that prepare() wrote."""
    return resized.read_arrays(data_root / "tiny_imagenet" / str(content))


def _unpack(archive: Path, root: Path) -> None:
    if not archive.is_file():
        raise KnownError(
            f"tiny_imagenet is not in {root}: download {_URL} to {archive}, or set dataset.root=<path> to the folder "
            "that has train/ and val/"
        )
    partial = root.with_name(f".{root.name}.partial")
    with FileLock(root.with_name(f".{root.name}.lock")):
        if root.is_dir():  # another process has unpacked it
            return
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        print(tilde(f"unpacking {archive}, once"), flush=True)
        try:
            with zipfile.ZipFile(archive) as packed:
                _check(packed)
                packed.extractall(partial)
            if not (partial / _NAME).is_dir():
                raise zipfile.BadZipFile(f"no folder {_NAME}/ in it")
            (partial / _NAME).rename(root)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:  # also encrypted
            raise KnownError(f"{archive} is damaged, or is not {_URL} ({error}): download it again") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check(packed: zipfile.ZipFile) -> None:
    """Raise BadZipFile for members that no archive of images has. extractall() reads at most their declared sizes."""
    members = packed.infolist()
    if len(members) > _MOST_FILES or sum(member.file_size for member in members) > _MOST_BYTES:
        raise zipfile.BadZipFile(f"it holds more than {_MOST_FILES:,} files or {_MOST_BYTES:,} bytes")
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise zipfile.BadZipFile(f"{member.filename!r} is a link or a device")
        if member.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.filename):
            raise zipfile.BadZipFile(f"{member.filename!r} would be unpacked outside of the folder")


def _in_class_folders(root: Path) -> bool:
    """Whether val/ has a folder for each class."""
    archived = (root / label_file.ANNOTATIONS).exists() or not (root / "train").is_dir() or not (root / "val").is_dir()
    return not archived and any(name != "images" for name in layouts.folders_in(root / "val"))
