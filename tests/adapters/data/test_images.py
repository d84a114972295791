"""Every kind of good and bad picture, made here with Pillow or by hand."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from adapters.data import image_ref as image_refs
from adapters.data import images
from adapters.data.image_ref import ImageRef, blank_image, image_ref
from adapters.data.images import MAX_PIXELS, open_image
from qformer.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG by hand whose one pixel row is all it holds, whatever its header says."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * (1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int, **options: object) -> bytes:
    """A JPEG whose frame header is overwritten: the data of 16 x 16 pixels is all it holds."""
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG", **options))
    marker = b"\xff\xc2" if options.get("progressive") else b"\xff\xc0"
    frame = data.index(marker)
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def fails(source: object, *words: str) -> str:
    """Open, expect one clear line with the row, and return it."""
    with pytest.raises(UserError) as caught:
        open_image(source, where="data.jsonl row 3 (line 4)")  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith("data.jsonl row 3 (line 4): ")
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# -- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(kind: str, tmp_path: Path) -> None:
    picture = photo()
    path = tmp_path / "a.any"
    path.write_bytes(encoded(picture, kind))
    for source in (path, str(path), path.read_bytes(), ImageRef("a", path=path), picture):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(picture))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "JPEG2000"])
def test_lossy_formats_come_back_nearly(kind: str) -> None:
    opened = open_image(encoded(Image.new("RGB", (32, 24), (200, 100, 50)), kind))
    assert opened.size == (32, 24)
    assert np.abs(np.asarray(opened).astype(int) - (200, 100, 50)).max() <= 6


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_png.jpg"
    path.write_bytes(encoded(photo(), "PNG"))
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(photo()))


def test_cmyk() -> None:
    cmyk = Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (0, 255, 255, 0)])
    assert open_image(encoded(cmyk, "TIFF")).getpixel((3, 3)) == RED
    red, green, blue = open_image(encoded(cmyk, "JPEG", quality=95)).getpixel((3, 3))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 257, 1000, 32768, 65535]], dtype=np.uint16)
    opened = np.asarray(open_image(encoded(Image.fromarray(values), kind)))
    assert opened[0, :, 0].tolist() == [0, 0, 1, 4, 128, 255]  # value / 257, rounded
    assert (opened[..., 0] == opened[..., 1]).all() and (opened[..., 0] == opened[..., 2]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("white", [255, 4095])
def test_twelve_or_eight_bits_of_sixteen_are_not_dark(kind: str, white: int) -> None:
    values = np.array([[0, white // 2, white]])
    for dtype in (np.uint16, np.int32) if kind == "TIFF" and white > 255 else (np.uint16,):
        opened = np.asarray(open_image(encoded(Image.fromarray(values.astype(dtype)), kind)))
        assert opened[0, :, 0].tolist() == [0, 127, 255]


def wide_png(colour: int, samples: list[int]) -> bytes:
    """A PNG of one row with 16 bits a sample; colour type 2 is RGB, 4 grey with transparency."""
    channels = {2: 3, 4: 2}[colour]
    header = struct.pack(">IIBBBBB", len(samples) // channels, 1, 16, colour, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(f">{len(samples)}H", *samples))
    parts = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(("colour", "samples"), [(2, [0, 2000, 4095]), (4, [4095, 65535])])
def test_colours_of_twelve_bits_in_sixteen_are_refused(colour: int, samples: list[int]) -> None:
    with pytest.raises(UserError, match=r"uses 12 or fewer of its 16 bits a colour.*: save it with 8 bits"):
        open_image(wide_png(colour, samples))


def test_colours_of_sixteen_bits_are_read() -> None:
    assert open_image(wide_png(2, [65535, 32768, 0])).getpixel((0, 0)) == (255, 128, 0)
    assert open_image(wide_png(2, [0, 0, 0])).getpixel((0, 0)) == (0, 0, 0)


def test_big_endian_sixteen_bits() -> None:
    picture = Image.frombytes("I;16B", (2, 1), bytes([0xFF, 0xFF, 0x80, 0x00]))
    assert np.asarray(open_image(picture))[0, :, 0].tolist() == [255, 128]


def test_wide_types() -> None:
    def grey(values: list[float], dtype: type) -> list[int]:
        return np.asarray(open_image(encoded(Image.fromarray(np.array([values], dtype)), "TIFF")))[0, :, 0].tolist()

    assert grey([0, 32768, 65535], np.int32) == [0, 128, 255]  # 16 bits in 32
    assert grey([-1000, 0, 1000], np.int32) == [0, 128, 255]
    assert grey([0.0, 0.5, 1.0], np.float32) == [0, 128, 255]
    assert grey([7.0, 7.0], np.float32) == [0, 0]
    assert grey([float("nan"), 0.0, 1.0], np.float32) == [0, 0, 255]


def test_transparency_lies_on_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128)])
    opened = open_image(encoded(rgba, "PNG"))
    assert opened.getpixel((0, 0)) == RED
    assert opened.getpixel((1, 0)) == WHITE
    half = opened.getpixel((2, 0))
    assert half[0] == 255 and abs(half[1] - 127) <= 1 and abs(half[2] - 127) <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *GREEN])
    palette.putdata([0, 1])
    opened = open_image(encoded(palette, "PNG", transparency=1))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]

    keyed = Image.new("RGB", (2, 1))
    keyed.putdata([RED, BLUE])
    opened = open_image(encoded(keyed, "PNG", transparency=BLUE))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]

    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    opened = open_image(encoded(grey, "PNG"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(10, 10, 10), WHITE]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert opened.size == (20, 20)
    assert opened.getpixel((10, 10)) == RED
    assert getattr(opened, "n_frames", 1) == 1


# What a viewer shows for each EXIF orientation, in terms of the stored array (EXIF 2.3, tag 274).
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    opened = open_image(encoded(photo(6, 4), kind, exif=exif))
    assert np.array_equal(np.asarray(opened), SHOWN[orientation](np.asarray(photo(6, 4))))
    # Nothing is left that would turn it a second time.
    assert np.array_equal(np.asarray(open_image(encoded(opened, "PNG"))), np.asarray(opened))
    assert opened.getexif().get(274, 1) == 1


def test_rotated_jpeg_and_broken_exif() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert open_image(encoded(photo(40, 30), "JPEG", exif=exif)).size == (30, 40)
    assert open_image(encoded(photo(40, 30), "JPEG", exif=b"Exif\0\0not a TIFF header")).size == (40, 30)


def test_data_uri() -> None:
    uri = "data:image/png;base64," + base64.b64encode(encoded(photo(), "PNG")).decode()
    assert np.array_equal(np.asarray(open_image(uri)), np.asarray(photo()))
    assert len(image_ref(uri).label) < 80
    broken_lines = uri[:60] + "\n" + uri[60:]
    assert image_ref(broken_lines).data == encoded(photo(), "PNG")


def test_blank_is_mid_grey() -> None:
    opened = open_image(blank_image())
    assert np.unique(np.asarray(opened)).tolist() == [128]
    assert blank_image().digest() == blank_image().digest()


# -- what is refused ---------------------------------------------------------------------------------------------


def test_missing_folder_empty_and_text(tmp_path: Path) -> None:
    fails(tmp_path / "gone.jpg", "gone.jpg", "is not there")
    fails(tmp_path, "is not a file")
    fails("nul\0l.jpg", "cannot be read")
    fails("", "empty")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    fails(empty, "empty.png", "0 bytes")
    text = tmp_path / "text.jpg"
    text.write_text("Hello, this is not a picture")
    fails(text, "text.jpg", "is not a picture", "Hello")
    fails(b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC", "JPEG or PNG")
    fails(b"%!PS-Adobe-3.0 EPSF-3.0", "EPS")  # never handed to Ghostscript


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    fails(tmp_path / "pipe.png", "is not a file")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("keep", [0.03, 0.5, 0.9])
def test_truncated(kind: str, keep: float, tmp_path: Path) -> None:
    whole = encoded(photo(64, 64), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(whole[: int(len(whole) * keep)])
    message = fails(path, "cut.img")
    assert "damaged" in message or "is not a picture" in message


def test_no_damage_escapes_as_anything_but_a_user_error() -> None:
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM", "JPEG2000"):
        whole = np.frombuffer(encoded(photo(24, 24), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            spots = rng.integers(0, min(len(whole), 300), 3)
            damaged[spots] = rng.integers(0, 256, 3)
            try:
                assert open_image(damaged.tobytes()).mode == "RGB"
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("address", ["http://example.org/a.jpg", "https://example.org/a.jpg"])
def test_web_addresses_are_not_fetched(address: str) -> None:
    fails(address, address, "download it first")


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("data:image/png;base64,####", "broken base64"),
        ("data:image/png;base64,", "no data"),
        ("data:image/png,abc", "not of the form"),
        ("data:image/png;base64," + base64.b64encode(b"plain text").decode(), "is not a picture"),
    ],
)
def test_bad_data_uri(uri: str, word: str) -> None:
    fails(uri, word)


# -- large pictures ----------------------------------------------------------------------------------------------


def refuse_to_load(*_: object) -> None:
    raise AssertionError("pixels were decoded")


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])  # below, within and beyond Pillow's own two limits
def test_a_huge_picture_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse_to_load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fails(png_of_size(side, side), f"{side} x {side}", f"{side * side:,}", f"{MAX_PIXELS:,}", "save it smaller")


def test_a_huge_progressive_jpeg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its decoder would hold 2.4 GB of coefficients, whatever size is asked for.
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse_to_load)
    fails(jpeg_of_size(20_000, 20_000, progressive=True), "400,000,000 pixels")


def test_a_huge_baseline_jpeg_is_asked_for_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: asked.append(self.size))
    monkeypatch.setattr(images, "_to_rgb", lambda picture: picture)
    monkeypatch.setattr(images, "_upright", lambda picture: picture)
    open_image(jpeg_of_size(20_000, 20_000))
    assert asked == [(5_000, 5_000)]  # a half would still be over the cap


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reduced_jpeg_shows_the_same_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100 * 100)
    ramp = np.linspace(0, 255, 301, dtype=np.uint8)
    whole = Image.fromarray(np.stack([np.tile(ramp, (203, 1))] * 3, axis=-1)).convert(mode)
    opened = open_image(encoded(whole, "JPEG", quality=95))
    assert opened.size == (76, 51)  # a quarter, rounded up
    expected = np.asarray(whole.convert("RGB").resize((76, 51), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(opened).astype(int) - expected).mean() < 3


def test_the_cap_holds_for_other_formats_and_open_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF"):
        fails(encoded(photo(11, 10), kind), "110 pixels")
    fails(photo(11, 10), "110 pixels")
    assert open_image(encoded(photo(10, 10), "PNG")).size == (10, 10)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_refs, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "large.bmp"
    path.write_bytes(encoded(photo(), "BMP"))
    with pytest.raises(UserError, match="larger than"):
        ImageRef("large.bmp", path=path).read()


# -- references --------------------------------------------------------------------------------------------------


def test_digest_is_of_the_bytes_and_computed_once(tmp_path: Path) -> None:
    data = encoded(photo(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    ref = ImageRef("a.png", path=path)
    assert ref.digest() == ImageRef("inline", data=data).digest() == hashlib.sha256(data).hexdigest()
    path.unlink()
    assert ref.digest() == hashlib.sha256(data).hexdigest()  # remembered
    with pytest.raises(UserError, match="is not there"):
        ref.read()


def test_reference_names_its_row(tmp_path: Path) -> None:
    ref = image_ref("pictures/a.png", base=tmp_path, where="rows.csv row 7 (line 8)")
    assert ref.path == tmp_path / "pictures" / "a.png"
    with pytest.raises(UserError, match=r"^rows\.csv row 7 \(line 8\): image 'pictures/a\.png' is not there"):
        open_image(ref)
    with pytest.raises(UserError, match=r"^rows\.csv row 7"):
        ref.digest()
    assert ref == image_ref("pictures/a.png", base=tmp_path)  # the row is for messages only
    assert image_ref(str(tmp_path / "b.png"), base=Path("elsewhere")).path == tmp_path / "b.png"


def test_reference_holds_one_source() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        ImageRef("a")
    with pytest.raises(ValueError, match="exactly one"):
        ImageRef("a", path=Path("a"), data=b"a")
