from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from slq_embed.inputs.images import MAX_DECODED_PIXELS, read_image


def solid(mode: str, colour, size=(8, 6)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("RGB", (10, 20, 30)), (10, 20, 30)),
        (solid("L", 77), (77, 77, 77)),
        (solid("1", 1), (255, 255, 255)),
        (solid("RGBA", (200, 0, 0, 0)), (255, 255, 255)),
        (solid("LA", (0, 0)), (255, 255, 255)),
        (solid("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (Image.fromarray(np.full((6, 8), 32768, dtype=np.uint16)), (127, 127, 127)),
        (Image.fromarray(np.full((6, 8), 255, dtype=np.uint16)), (0, 0, 0)),
        (solid("F", 0.5), (127, 127, 127)),
        (solid("F", 77.0), (77, 77, 77)),
        (solid("I", 1), (1, 1, 1)),
        (solid("RGB", (9, 9, 9), size=(1, 1)), (9, 9, 9)),
    ],
    ids=[
        "rgb",
        "grey",
        "bilevel",
        "transparent",
        "grey-alpha",
        "cmyk",
        "16-bit",
        "16-bit-dark",
        "float-to-1",
        "float-to-255",
        "int",
        "1-pixel",
    ],
)
def test_every_mode_becomes_upright_opaque_rgb(image, expected):
    read = read_image(image)
    assert read.mode == "RGB"
    assert read.size == image.size
    assert read.getpixel((0, 0)) == expected


def test_a_transparent_palette_is_laid_on_white():
    image = solid("P", 0)
    image.putpalette([0, 0, 0] * 256)
    image.info["transparency"] = 0
    assert read_image(image).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (0, 0, 200)), ("L", 200)])
def test_a_transparent_colour_is_white(mode, colour, tmp_path):
    solid(mode, colour).save(tmp_path / "key.png", transparency=colour)
    assert read_image(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(10))
def test_every_exif_orientation_is_undone(orientation, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    for source in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        found = read_image(source)
        assert np.array_equal(found, expected)
        assert np.array_equal(ImageOps.exif_transpose(found), expected), "nobody turns it again"


def test_malformed_metadata_costs_no_picture(tmp_path):
    # The tag says a short, and holds text, as some phones write it.
    tags = b"II*\0" + struct.pack("<LH", 8, 2) + struct.pack("<HHL", 0x112, 3, 1) + b"\6\0\0\0"
    tags += struct.pack("<HHL", 0x128, 2, 2) + b"2\0\0\0" + b"\0" * 4
    Image.new("RGB", (30, 50)).save(tmp_path / "phone.jpg", exif=b"Exif\0\0" + tags)
    assert read_image(tmp_path / "phone.jpg").size == (50, 30)
    Image.new("RGB", (30, 50)).save(tmp_path / "phone.png", exif=b"Exif\0\0no metadata at all")
    assert read_image(tmp_path / "phone.png").size == (30, 50)


def test_a_decoder_may_raise_anything(monkeypatch):
    def damaged(self):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "load", damaged)
    with pytest.raises(ValueError, match="cannot be decoded: unpack requires"):
        read_image(Image.new("RGB", (3, 3)))


def test_a_name_too_long_for_a_file_is_no_file():
    with pytest.raises(ValueError, match="There is no image file 'aaa"):
        read_image(Path("a" * 5000))


def test_exif_rotation_is_applied(tmp_path):
    image = solid("RGB", "white", size=(8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [solid("RGB", "red"), solid("RGB", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("source", ["path", "str", "bytes", "undecoded", "undecoded-path"])
def test_images_come_from_files_and_bytes(tmp_path, source):
    path = tmp_path / "a.png"
    solid("RGB", (1, 2, 3)).save(path)
    raw = path.read_bytes()
    given = {"path": path, "str": str(path), "bytes": raw}
    given |= {"undecoded": {"bytes": raw, "path": None}, "undecoded-path": {"bytes": None, "path": str(path)}}
    assert read_image(given[source]).getpixel((0, 0)) == (1, 2, 3)


def test_a_huge_image_is_reduced(monkeypatch):
    monkeypatch.setattr("slq_embed.inputs.images.MAX_DECODED_PIXELS", 10_000)
    read = read_image(solid("L", 5, size=(400, 300)))
    assert read.width * read.height <= 10_000
    assert read.width / read.height == pytest.approx(4 / 3, rel=0.05)
    assert MAX_DECODED_PIXELS == 16_000_000


def test_what_a_caller_has_opened_keeps_its_size(monkeypatch, tmp_path):
    monkeypatch.setattr("slq_embed.inputs.images.MAX_DECODED_PIXELS", 10_000)
    solid("RGB", (9, 9, 9), size=(400, 300)).save(tmp_path / "photo.jpg")
    opened = Image.open(tmp_path / "photo.jpg")
    assert read_image(opened).size == (100, 75)
    assert opened.size == (400, 300)
    assert np.asarray(opened).shape == (300, 400, 3)


def test_a_decompression_bomb_is_refused_before_decoding(tmp_path):
    # A valid PNG header that claims 60,000 x 60,000 pixels, with no pixels behind it.
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"bomb\.png.*exceeds limit"):
        read_image(tmp_path / "bomb.png")


def test_a_strip_is_padded_to_a_readable_shape():
    read = read_image(solid("RGB", (0, 0, 0), size=(1, 1000)))
    assert read.size == (10, 1000)
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert (0, 0, 0) in {read.getpixel((x, 500)) for x in range(10)}


def test_a_corrupt_or_missing_file_is_named(tmp_path):
    whole = io.BytesIO()
    solid("RGB", "red", size=(64, 64)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:-60])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cut\.png.*decoded"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"text\.png.*not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"no image file.*gone\.png"):
        read_image(tmp_path / "gone.png")
