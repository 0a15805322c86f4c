"""Pictures of every kind: each becomes the pixels that a person expects."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from kd.datasets.pictures import PictureError, margin, measure, open_picture, read_square, square

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
GREY = (128, 128, 128)


def filled(colour: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)


def centre(path: Path, **options: object) -> tuple[int, ...]:
    picture = open_picture(path, **options)  # type: ignore[arg-type]
    assert picture.mode == "RGB"
    return tuple(int(v) for v in np.asarray(picture)[picture.height // 2, picture.width // 2])


def png(path: Path, colour_type: int, depth: int, pixel: bytes, size: int = 8, extra: bytes = b"") -> None:
    """A PNG file of one colour, of a kind that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, depth, colour_type, 0, 0, 0))
    rows = zlib.compress((b"\0" + pixel * size) * size)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


# formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("a.png", "PNG", {}),
        ("a.jpg", "JPEG", {"quality": 95}),
        ("a.jpeg", "JPEG", {"progressive": True}),
        ("a.jfif", "JPEG", {}),
        ("a.JPG", "JPEG", {}),
        ("a.bmp", "BMP", {}),
        ("a.gif", "GIF", {}),
        ("a.tif", "TIFF", {}),
        ("a.tiff", "TIFF", {"compression": "tiff_lzw"}),
        ("a.webp", "WEBP", {"lossless": True}),
        ("a.avif", "AVIF", {}),
        ("a.jp2", "JPEG2000", {}),
        ("a.ppm", "PPM", {}),
        ("a.tga", "TGA", {}),
        ("a.pcx", "PCX", {}),
        ("a.ico", "ICO", {}),
        ("a.qoi", "QOI", {}),
        ("a.png", "JPEG", {}),  # endings that are wrong
        ("a.jpg", "PNG", {}),
        ("a.jpg", "WEBP", {"lossless": True}),
        ("a.dat", "GIF", {}),
        ("photo", "JPEG", {}),  # no ending
    ],
)
def test_red_stays_red(tmp_path: Path, name: str, kind: str, options: dict[str, object]) -> None:
    needed = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}.get(kind)
    if needed and not features.check(needed):
        pytest.skip(f"this Pillow is without {kind}")
    try:
        filled(RED).save(tmp_path / name, kind, **options)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write {kind}: {error}")
    assert np.abs(np.subtract(centre(tmp_path / name), RED)).max() <= 3
    assert measure(tmp_path / name) == (16, 16)


# kinds of pixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", filled(128, "L"), GREY),
        ("bits.png", filled(1, "1"), WHITE),
        ("palette.png", filled(RED).convert("P"), RED),
        ("palette.gif", filled(RED).quantize(4), RED),
        ("cmyk.tif", filled((0, 255, 255, 0), "CMYK"), RED),
        ("cmyk.jpg", filled((0, 255, 255, 0), "CMYK"), RED),
        ("lab.tif", filled(RED).convert("LAB"), (251, 5, 4)),
        ("clear.png", filled((255, 0, 0, 0), "RGBA"), WHITE),
        ("clear.webp", filled((255, 0, 0, 0), "RGBA"), WHITE),
        ("clear.tif", filled((255, 0, 0, 0), "RGBA"), WHITE),
        ("covered.png", filled((255, 0, 0, 255), "RGBA"), RED),
        ("half.png", filled((255, 0, 0, 128), "RGBA"), (255, 127, 127)),
        ("grey_clear.png", filled((0, 0), "LA"), WHITE),
        ("grey_half.png", filled((0, 128), "LA"), (127, 127, 127)),
        ("sixteen.png", Image.fromarray(np.full((8, 8), 65_535, np.uint16)), WHITE),
        ("sixteen_half.png", Image.fromarray(np.full((8, 8), 32_896, np.uint16)), GREY),
        ("sixteen_black.png", Image.fromarray(np.zeros((8, 8), np.uint16)), BLACK),
        ("sixteen.tif", Image.fromarray(np.full((8, 8), 65_535, np.uint16)), WHITE),
        ("sixteen_big_endian.tif", Image.fromarray(np.full((8, 8), 32_896, ">u2")), GREY),
        ("sixteen.pgm", Image.fromarray(np.full((8, 8), 65_535, np.int32)), WHITE),
        ("thirty_two.tif", Image.fromarray(np.full((8, 8), 65_535, np.int32)), WHITE),
        ("real.tif", Image.fromarray(np.full((8, 8), 0.5, np.float32)), GREY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_of_pixels(tmp_path: Path, name: str, image: Image.Image, expected: tuple[int, ...]) -> None:
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert np.abs(np.subtract(centre(tmp_path / name), expected)).max() <= 2


@pytest.mark.parametrize(
    ("colour_type", "depth", "pixel", "expected"),
    [
        (2, 16, struct.pack(">HHH", 65_535, 0, 32_896), (255, 0, 128)),
        (6, 16, struct.pack(">HHHH", 65_535, 0, 0, 0), WHITE),  # transparent
        (4, 16, struct.pack(">HH", 65_535, 65_535), WHITE),
        (4, 16, struct.pack(">HH", 0, 0), WHITE),  # transparent
        (0, 16, struct.pack(">H", 257), (1, 1, 1)),
    ],
)
def test_sixteen_bits_of_each_colour(
    tmp_path: Path, colour_type: int, depth: int, pixel: bytes, expected: tuple[int, ...]
) -> None:
    png(tmp_path / "a.png", colour_type, depth, pixel)
    assert centre(tmp_path / "a.png") == expected


def test_transparent_ground_is_white_or_as_set(tmp_path: Path) -> None:
    image = filled((0, 0, 0, 0), "RGBA", (30, 30))
    image.paste((255, 0, 0, 255), (10, 10, 20, 20))
    for name in ("a.png", "palette.gif"):
        image.save(tmp_path / name)
        pixels = np.asarray(open_picture(tmp_path / name))
        assert (tuple(pixels[0, 0]), tuple(pixels[15, 15])) == (WHITE, RED)
        assert tuple(np.asarray(open_picture(tmp_path / name, "black"))[0, 0]) == BLACK


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1"])
def test_a_colour_that_stands_for_transparency(tmp_path: Path, mode: str) -> None:
    image = filled({"P": 1, "RGB": GREEN, "L": 9, "1": 0}[mode], mode)  # type: ignore[arg-type]
    if mode == "P":
        image.putpalette([*BLUE, *GREEN, *RED])
    image.save(tmp_path / "a.png", transparency={"P": 1, "RGB": GREEN, "L": 9, "1": 0}[mode])
    assert centre(tmp_path / "a.png") == WHITE


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(tmp_path: Path, kind: str) -> None:
    frames = [filled(BLUE), filled(GREEN)]
    options = {"lossless": True} if kind == "WEBP" else {}
    filled(RED).save(tmp_path / "a", kind, save_all=True, append_images=frames, **options)
    with Image.open(tmp_path / "a") as image:
        assert getattr(image, "n_frames", 1) == 3
    assert centre(tmp_path / "a") == RED


# orientation ------------------------------------------------------------------------------------------------------


def portrait() -> Image.Image:
    """Red at the top, blue at the bottom left."""
    image = filled(WHITE, size=(16, 48))
    image.paste(RED, (0, 0, 16, 16))
    image.paste(BLUE, (0, 32, 8, 48))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_sideways_photograph_stands_up(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the stored picture lies on its left side
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    portrait().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a", kind, exif=exif, **options)
    picture = open_picture(tmp_path / "a")
    assert picture.size == (16, 48)
    assert np.abs(np.subtract(np.asarray(picture).astype(int), np.asarray(portrait()))).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    portrait().save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(open_picture(tmp_path / "a.png"), ImageOps.exif_transpose(image))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""])
def test_damaged_metadata_leave_the_pixels(tmp_path: Path, exif: bytes) -> None:
    portrait().save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_picture(tmp_path / "a.png"), portrait())


# squares ----------------------------------------------------------------------------------------------------------


def flag(width: int, height: int) -> Image.Image:
    """Three vertical stripes: red, white and blue."""
    image = filled(WHITE, size=(width, height))
    image.paste(RED, (0, 0, width // 3, height))
    image.paste(BLUE, (width - width // 3, 0, width, height))
    return image


def test_the_shorter_side_is_resized_and_the_centre_kept() -> None:
    pixels = square(flag(300, 100), 50, "short_side")
    assert (pixels.shape, pixels.dtype) == ((50, 50, 3), np.uint8)
    assert (pixels[:, 1:-1] == 255).all()  # the white stripe; its edges are averages
    tall = square(flag(300, 100).transpose(Image.Transpose.ROTATE_90), 50, "short_side")
    assert (tall[1:-1] == 255).all()


def test_a_square_is_torchvisions_resize_and_centre_crop() -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    noise = np.random.default_rng(0).integers(0, 256, (150, 220, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((440, 300), Image.Resampling.BICUBIC)
    known = tv.center_crop(tv.resize(image, [150], InterpolationMode.BICUBIC), [150, 150])
    assert np.abs(square(image, 150, "short_side").astype(int) - np.asarray(known)).max() <= 1


def test_squashed_and_padded() -> None:
    squashed = square(flag(300, 100), 60, "squash")
    assert [tuple(squashed[30, x]) for x in (10, 30, 50)] == [RED, WHITE, BLUE]
    padded = square(flag(300, 100), 60, "pad")
    assert [tuple(padded[30, x]) for x in (10, 30, 50)] == [RED, WHITE, BLUE]
    assert padded[:20].max() == padded[40:].max() == 0
    assert padded[20:40].any(axis=2).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (1000, 7)])
@pytest.mark.parametrize("resize", ["short_side", "squash", "pad"])
def test_every_shape_becomes_a_square(size: tuple[int, int], resize: str) -> None:
    pixels = square(filled(RED, size=size), 32, resize)  # type: ignore[arg-type]
    assert pixels.shape == (32, 32, 3)
    assert tuple(pixels[16, 16] if resize != "pad" else pixels.max((0, 1))) == RED


def test_a_large_jpeg_is_opened_smaller_and_looks_the_same(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((1500, 1000), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    assert open_picture(tmp_path / "a.jpg", least=128).size == (375, 250)
    small, whole = read_square(tmp_path / "a.jpg", 64, "short_side"), open_picture(tmp_path / "a.jpg")
    assert whole.size == (1500, 1000)
    assert np.abs(small.astype(int) - square(whole, 64, "short_side")).mean() < 1


def test_the_margin_is_the_usual_one() -> None:
    assert [margin(size) for size in (224, 112, 7)] == [256, 128, 8]
    assert [margin(224, resize) for resize in ("short_side", "squash", "pad")] == [256, 224, 224]  # type: ignore[arg-type]


# what cannot be read ----------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("no picture"), "no picture that Pillow can read"),
        (lambda path: None, "not a file"),
        (lambda path: path.mkdir(), "not a file"),
        (truncated, "truncated"),
        (lambda path: Image.new("1", (30_000, 10_000)).save(path, "PNG"), "more than 178,956,970 pixels"),
        (lambda path: Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(path, "TIFF"), "white is not known"),
        (lambda path: Image.fromarray(np.full((8, 8), -1, np.int32)).save(path, "TIFF"), "white is not known"),
        (lambda path: Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path, "TIFF"), "white is not known"),
        (lambda path: filled(RED).save(path, "EPS"), "PostScript"),
    ],
)
def test_what_cannot_be_read_has_a_reason_of_one_line(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(PictureError, match=reason) as caught:
        open_picture(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_a_photograph_of_a_large_camera_is_read(tmp_path: Path) -> None:
    Image.new("L", (9_000, 9_000), 255).save(tmp_path / "a.jpg", quality=10)
    assert (read_square(tmp_path / "a.jpg", 8, "short_side") == 255).all()


def test_text_in_a_png_is_not_unpacked_without_limit(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (1 << 22), zip=True)
    filled(RED).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(PictureError, match=r"too large|Decompressed"):
        open_picture(tmp_path / "a.png")
