"""Pixels: every kind of image becomes 8-bit RGB by a stated rule, and nothing is clipped."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokensieve.errors import DataError
from tokensieve.images import as_rgb, decode_image, open_image

GRADIENT = Image.linear_gradient("L").resize((32, 40))
PHOTO = Image.merge("RGB", [GRADIENT, GRADIENT.rotate(180), Image.radial_gradient("L").resize((32, 40))])

FEW = settings(deadline=None, derandomize=True, database=None)


def content(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    """Return the pixels of an image that was stored as a file and read again, `[H, W, 3]`."""
    read = decode_image(content(image, kind, **options), "the image")
    assert read.mode == "RGB"
    return np.asarray(read)


def png(depth: int, colour: int, row: bytes, transparent: bytes = b"") -> bytes:
    """Return a PNG of two pixels side by side, with a transparent colour or without."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    marked = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + marked + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


# -- wide values are scaled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind):
    values = np.asarray(GRADIENT, dtype=np.uint16) * 257  # the 16-bit form of an 8-bit image
    if kind == "PPM":
        file = b"P5 32 40 65535 " + values.astype(">u2").tobytes()
    else:
        file = content(Image.fromarray(values), kind)
    assert np.array_equal(np.asarray(decode_image(file, "x")), np.asarray(GRADIENT.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_grey_of_either_byte_order(mode):
    values = np.array([[0, 255, 32768, 65535]], dtype=">u2" if mode.endswith("B") else "<u2")
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 1, 128, 255]


@FEW
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_16_bit_grey_keeps_its_order_and_range(values):
    pixels = np.asarray(as_rgb(Image.fromarray(np.array([values], dtype=np.uint16))))[0, :, 0]
    assert np.abs(pixels - np.array(values) / 257).max() <= 0.5


def test_16_bit_colour_loses_its_low_byte_only():
    row = struct.pack(">6H", 1000, 20_000, 30_000, 40_000, 50_000, 65_535)
    assert np.asarray(decode_image(png(16, 2, row), "x")).ravel().tolist() == [3, 78, 117, 156, 195, 255]


def test_float_within_0_and_1_is_scaled_as_it_stands():
    dark = np.linspace(0, 0.5, 20, dtype=np.float32).reshape(4, 5)
    assert np.array_equal(decoded(Image.fromarray(dark), "TIFF")[..., 0], (dark.astype(float) * 255).round())


@FEW
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=50))
def test_other_floats_are_scaled_by_their_range(values):
    array = np.array([values], dtype=np.float32)
    if array.min() >= 0 and array.max() <= 1:
        array[0, 0] = 2
    pixels = np.asarray(as_rgb(Image.fromarray(array)))[0, :, 0]
    if array.min() < array.max():
        assert (pixels.min(), pixels.max()) == (0, 255)
    assert (np.diff(pixels[np.argsort(array[0])].astype(int)) >= 0).all()


def test_floats_that_are_no_numbers():
    array = np.array([[np.nan, -np.inf, 2, 6, np.inf]], dtype=np.float32)
    assert np.asarray(as_rgb(Image.fromarray(array)))[0, :, 0].tolist() == [0, 0, 0, 255, 255]
    assert not np.asarray(as_rgb(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)))).any()


def test_32_bit_integers_are_scaled_by_their_range():
    values = np.array([[-70_000, 0, 70_000]], dtype=np.int32)
    assert decoded(Image.fromarray(values), "TIFF")[0, :, 0].tolist() == [0, 128, 255]
    assert not np.asarray(as_rgb(Image.fromarray(np.full((2, 2), 9, dtype=np.int32)))).any()


# -- transparency is laid on white ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("RGBA", "WEBP"), ("PA", None), ("La", None),
     ("RGBa", None)],
)  # fmt: skip
def test_alpha_is_laid_on_white(mode, kind):
    grey = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        grey.putpixel((x, 0), (40, 40, 40, alpha))
    if mode == "PA":  # Pillow's own conversion to PA loses the transparency
        image = Image.new("PA", (3, 1))
        image.putpalette([0, 0, 0, 40, 40, 40])
        for x, alpha in enumerate((0, 128, 255)):
            image.putpixel((x, 0), (1, alpha))
    else:
        image = grey.convert("LA").convert("La") if mode == "La" else grey.convert(mode)
    pixels = decoded(image, kind, lossless=True, exact=True) if kind else np.asarray(as_rgb(image))
    expected = [255, round(40 * 128 / 255 + 255 * 127 / 255), 40]
    assert np.abs(pixels[0].astype(int) - np.array(expected)[:, None]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decoded(image, kind, transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    # one alpha per colour
    if kind == "PNG":
        assert decoded(image, kind, transparency=b"\x00\xff")[0].tolist() == [[255, 255, 255], [200, 100, 50]]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png(1, 0, b"\x40", b"\0\1"), [0, 255]),
        (png(2, 0, b"\x40", b"\0\1"), [255, 0]),
        (png(4, 0, b"\x1f", b"\0\1"), [255, 255]),
        (png(4, 0, b"\x12", b"\0\1"), [255, 34]),
        (png(8, 0, b"\1\x80", b"\0\1"), [255, 128]),
        (png(16, 0, struct.pack(">2H", 257, 25_700), struct.pack(">H", 257)), [255, 100]),
        (png(8, 2, b"\1\1\1\2\2\2", b"\0\1" * 3), [255, 2]),
        (png(16, 2, struct.pack(">6H", *[300] * 3, *[900] * 3), struct.pack(">3H", *[300] * 3)), [255, 3]),
        (png(16, 4, struct.pack(">4H", 5000, 0, 25_700, 65_535)), [255, 100]),
        (png(16, 6, struct.pack(">8H", 9, 9, 9, 0, 25_700, 25_700, 25_700, 65_535)), [255, 100]),
    ],
    ids=["1-bit", "2-bit", "4-bit", "4-bit below", "8-bit", "16-bit", "RGB", "16-bit RGB", "16-bit LA", "16-bit RGBA"],
)
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(file, expected):
    assert np.asarray(decode_image(file, "x")).tolist() == [[[value] * 3 for value in expected]]


def test_black_text_on_transparency_stays_readable():
    drawn = Image.new("RGBA", (20, 20))
    drawn.paste((0, 0, 0, 255), (5, 5, 10, 10))
    pixels = decoded(drawn, "PNG")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[7, 7].tolist() == [0, 0, 0]


# -- all other kinds stay as they are -------------------------------------------------------------------------------


@FEW
@given(st.sampled_from(["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]), st.integers(0, 2**32 - 1))
def test_8_bit_modes_are_converted_as_pillow_does(mode, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    assert np.array_equal(np.asarray(as_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_formats_without_loss_return_the_same_pixels(kind):
    assert np.array_equal(decoded(PHOTO, kind, lossless=True), np.asarray(PHOTO))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("AVIF", "RGB")])
def test_formats_with_loss_return_similar_pixels(kind, mode):
    if kind.lower() not in {name[1:] for name in Image.registered_extensions()}:
        pytest.skip(f"this Pillow cannot read {kind}")
    expected = np.asarray(PHOTO.convert(mode).convert("RGB"), float)
    assert np.abs(decoded(PHOTO.convert(mode), kind, quality=95) - expected).mean() < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_read(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    pixels = decoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4


def test_16_bit_grey_is_turned_upright_too():
    image, exif = Image.fromarray(np.asarray(GRADIENT, dtype=np.uint16) * 257), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    assert decoded(image, "PNG", exif=exif).shape == (32, 40, 3)


def test_damaged_exif_does_not_cost_the_image():
    file = content(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert decode_image(file, "x").size == PHOTO.size


# -- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGBA"), ("AVIF", "RGB"),
     ("TIFF", "F"), ("BMP", "RGB"), ("PPM", "RGB")],
)  # fmt: skip
def test_a_damaged_file_is_one_line_whatever_the_damage(kind, mode):
    if kind.lower() not in {name[1:] for name in Image.registered_extensions()}:
        pytest.skip(f"this Pillow cannot read {kind}")
    wide = Image.fromarray(np.asarray(GRADIENT, dtype=np.uint16) * 257)
    whole = content(wide if mode == "I;16" else PHOTO.convert(mode), kind)
    draw, messages = random.Random(0), []
    for number in range(150):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if number % 3 == 0 else whole)
        for place in draw.choices(range(len(damaged)), k=8 if damaged else 0):
            damaged[place] = draw.randrange(256)
        try:
            decode_image(bytes(damaged), "the image")
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.startswith("the image: ") and "\n" not in message for message in messages)


def test_a_file_that_vanishes_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: no such image file"):
        open_image(tmp_path / "gone.png")
