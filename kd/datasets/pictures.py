"""Pictures as people have them, of any kind: opened upright and in colour, and made into squares.

Resizing is Pillow's BICUBIC, which averages over all pixels that a smaller one covers (antialias).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd.core.stage import Background, Resize

if TYPE_CHECKING:
    from PIL.Image import Image

_PIXELS = 178_956_970  # Pillow's own limit: larger images are mistakes or decompression bombs
_ORIENTATION = 0x0112  # EXIF's number of it; its values, and what turns the picture upright:
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class PictureError(Exception):
    """The reason, in one line, why a file cannot be read as a picture."""


def open_picture(path: Path, background: Background = "white", least: int | None = None) -> Image:
    """The picture in a file: upright as its EXIF orientation says, in RGB with 8 bits, the first frame of several.

    What is transparent shows the background. Of 16 bits the highest value is white. The content decides the format,
    and not the file's ending. With `least`, a large JPEG may come smaller, which is faster: both sides keep at least
    so many pixels. Raises PictureError if the file is no picture, is damaged, has more than 179 million pixels, or has
    pixels whose white is not known.
    """
    from PIL import Image

    with _explained(path), Image.open(path) as image:
        _refuse(image)
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        return _in_colour(_upright(image), background)


def measure(path: Path) -> tuple[int, int]:
    """Width and height of the picture as it is stored, from the file's first bytes. Raises PictureError."""
    from PIL import Image

    with _explained(path), Image.open(path) as image:
        _refuse(image)
        return (image.width, image.height)


def square(image: Image, side: int, resize: Resize) -> NDArray[np.uint8]:
    """An RGB picture as uint8 [side, side, 3].

    short_side: the shorter side is resized to `side`, and the centre is kept. squash: both sides are resized. pad: the
    longer side is resized, and the rest is black.
    """
    from PIL import Image

    width, height = image.size
    if resize == "pad":
        longer = max(width, height)
        size = (max(1, round(side * width / longer)), max(1, round(side * height / longer)))
        padded = Image.new("RGB", (side, side))
        padded.paste(image.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2))
        return np.asarray(padded)
    box = (0.0, 0.0, float(width), float(height))
    if resize == "short_side":
        shorter = min(width, height)
        left, top = (width - shorter) / 2, (height - shorter) / 2
        box = (left, top, left + shorter, top + shorter)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))


def read_square(path: Path, side: int, resize: Resize, background: Background = "white") -> NDArray[np.uint8]:
    """The picture in a file as uint8 [side, side, 3], as the arrays of photographs have it. Raises PictureError.

    A JPEG is opened at a half, a quarter or an eighth of its size, where that is still twice as large as the square.
    """
    return square(open_picture(path, background, least=2 * side), side, resize)


def margin(image_size: int, resize: Resize = "short_side") -> int:
    """The side of the square of which a view of `image_size` pixels is cut: 256 for 224.

    A picture that was squashed or padded to be seen as a whole has no margin that evaluation would cut off.
    """
    return round(image_size * 8 / 7) if resize == "short_side" else image_size


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever a damaged file raises in Pillow becomes a PictureError. Errors of memory and of the system stay."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():  # opening a pipe can wait for ever
        raise PictureError("not a file")
    try:
        yield
    except (MemoryError, PictureError):
        raise
    except UnidentifiedImageError as error:
        raise PictureError("no picture that Pillow can read" if path.stat().st_size else "empty") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"more than {_PIXELS:,} pixels") from error
    except Exception as error:  # damaged files raise many types of exceptions
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the system, e.g. too many open files, and not of the picture
        raise PictureError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _refuse(image: Image) -> None:
    if image.width * image.height > _PIXELS:
        raise PictureError(f"{image.width}×{image.height} are more than {_PIXELS:,} pixels")
    if image.format == "EPS":
        raise PictureError("PostScript is a program, which is not run")


def _upright(image: Image) -> Image:
    from PIL import Image

    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # damaged metadata: the pixels are whole
        return image
    # ImageOps.exif_transpose writes the other metadata again, and fails where they are odd.
    return image.transpose(Image.Transpose[turn]) if turn else image


def _in_colour(image: Image, background: Background) -> Image:
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode[-1] in "Aa" or "transparency" in image.info:
        clear = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), clear).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Grey pixels of more than 8 bits as 8 bits: of integers 65,535 is white, of other numbers 1."""
    white = 1.0 if mode == "F" else 65_535.0
    if not (values.min() >= 0 and values.max() <= white):  # also NaN
        raise PictureError(f"its pixels are {values.min():g} to {values.max():g}, and their white is not known")
    return np.rint(values * (255 / white)).astype(np.uint8)
