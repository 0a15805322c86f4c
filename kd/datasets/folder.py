"""folder and imagenet: any pictures, in any layout that people have, of which arrays are made once."""

from dataclasses import replace
from pathlib import Path

from kd.core.spec import KnownError
from kd.datasets import Arrays, DatasetConfig, Facts, Reading, decoder, label_file, layouts, resized

_INSIDE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # where ImageNet's archives have train/ and val/


def prepare(root: Path, data_root: Path, reading: Reading) -> Facts:
    """The facts of pictures in folders, or of a CSV file. Raises KnownError, with the names of files, for bad input."""
    return decoder.decode(listing_in(root, reading.config), data_root / "folder", reading)


def read(data_root: Path, content: str | None) -> Arrays:
    """The arrays that prepare() wrote."""
    return resized.read_arrays(data_root / "folder" / str(content))


def prepare_imagenet(root: Path, data_root: Path, reading: Reading) -> Facts:
    """The facts of ImageNet's photographs, in train/<wnid>/ and val/<wnid>/. Raises KnownError for another layout."""
    if not root.is_dir():
        raise KnownError(
            f"dataset.root: imagenet is not in {root}: set dataset.root=<path> to the folder that has "
            "train/<wnid>/ and val/<wnid>/"
        )
    root = next((root / inside for inside in _INSIDE if (root / inside / "train").is_dir()), root)
    return decoder.decode(listing_in(root, reading.config), data_root / "imagenet", reading)


def read_imagenet(data_root: Path, content: str | None) -> Arrays:
    """The arrays that prepare_imagenet() wrote."""
    return resized.read_arrays(data_root / "imagenet" / str(content))


def listing_in(root: Path, config: DatasetConfig) -> layouts.Listing:
    """The pictures of a folder or of a CSV file. Raises KnownError where its layout is not understood."""
    listing = _listed(root, config.test_fraction)
    if listing.own_test and config.test_fraction != DatasetConfig.model_fields["test_fraction"].default:
        line = f"{root} has a test set: dataset.test_fraction={config.test_fraction:g} is not used"
        return replace(listing, choices=(*listing.choices, line))
    return listing


def _listed(root: Path, test_fraction: float) -> layouts.Listing:
    if root.is_file():
        return label_file.read_table(root, test_fraction)
    if (root / label_file.ANNOTATIONS).is_file():
        return label_file.annotated(root)
    return layouts.find(root, test_fraction)
