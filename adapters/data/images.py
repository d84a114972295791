"""Decoding: any file, bytes or data URI in; one upright 8-bit RGB picture of bounded size out.

Every picture of training and of serving comes through `open_image`, so that both see the same pixels. Here is
also the whole list of what can be wrong with a picture, each with a one-line message for its owner.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from adapters.data.image_ref import ImageRef, at_place, image_ref
from adapters.data.views import cut_view
from qformer.errors import UserError

MAX_PIXELS = 64 * 2**20
"""The most pixels that are decoded: 8192 x 8192, which Pillow holds in 256 MiB."""

# Only formats whose decoders stay inside Pillow: its EPS reader, for one, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
_KNOWN_STRANGERS = (
    (b"ftyphei", "HEIC"),
    (b"ftypmif1", "HEIF"),
    (b"<svg", "SVG"),
    (b"%PDF", "PDF"),
    (b"%!PS", "EPS"),
)

# What Pillow's plugins are seen to raise on a damaged file.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    EOFError,
    RuntimeError,  # AVIF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(source: ImageRef | Path | str | bytes | Image.Image, *, where: str = "") -> Image.Image:
    """Decode one picture completely and return it as an upright RGB image in memory.

    An animation gives its first frame, EXIF rotation is applied, transparency lies on white, 16 bits a
    channel are scaled to 8 (in grey pictures from the 8, 12 or 16 bits that are used), and CMYK is converted by
    Pillow's plain formula (its colour profile is not used). A JPEG of more than `MAX_PIXELS` is decoded at 1/2, 1/4 or
    1/8 of its size if it can be; any other picture of more is refused before a pixel is decoded.

    Args:
        source: a reference, a path, a path or data URI as text, encoded bytes, or an image of Pillow.
        where: the file and row for messages; left out, the reference's own.

    Raises:
        UserError: the picture is missing, empty, damaged, of an unknown format or too large.
    """
    if isinstance(source, Image.Image):
        return _finish(source, at_place(where, "image"))
    if isinstance(source, bytes):
        ref = ImageRef("bytes", data=source, where=where)
    elif isinstance(source, str):
        ref = image_ref(source, where=where)
    elif isinstance(source, Path):
        ref = ImageRef(str(source), path=source, where=where)
    else:
        ref = replace(source, where=where) if where else source
    with ref.open() as file:
        picture = _finish(_open_header(file, ref.subject), ref.subject, file)
    return cut_view(picture, ref.content_digest(), ref.view) if ref.view else picture


def _open_header(file: BinaryIO, subject: str) -> Image.Image:
    """Read the header only.

    `Image.open` is not used: above its own limit it warns or raises before a JPEG could be asked for a
    smaller size, and that limit can only be changed for the whole process.
    """
    prefix = file.read(16)
    if not prefix:
        raise UserError(f"{subject} is empty (0 bytes): replace the file")
    Image.init()
    for name in _FORMATS:
        if name not in Image.OPEN:  # Pillow was built without it
            continue
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(prefix) is not True:  # text: a decoder that is missing
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except _DECODING_ERRORS as error:
            raise UserError(f"{subject} is damaged ({name}: {_reason(error)}): replace the file") from error
    kind = next((kind for mark, kind in _KNOWN_STRANGERS if mark in prefix), None)
    found = f"is {kind}, which is not read" if kind else f"is not a picture (it starts with {prefix!r})"
    raise UserError(f"{subject} {found}: save it as JPEG or PNG")


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _finish(picture: Image.Image, subject: str, file: BinaryIO | None = None) -> Image.Image:
    width, height = picture.size
    if width * height > MAX_PIXELS and not _reduce_on_load(picture, file):
        raise UserError(
            f"{subject} has {width} x {height} = {width * height:,} pixels, over the cap of {MAX_PIXELS:,}: "
            "save it smaller"
        )
    halved = _loses_bits(picture)
    try:
        picture.load()
        rgb = _to_rgb(_upright(picture))
    except _DECODING_ERRORS as error:
        raise UserError(f"{subject} is cut short or damaged ({_reason(error)}): replace the file") from error
    if halved and 0 < np.asarray(picture.convert("RGB")).max() < 16:
        raise UserError(
            f"{subject} uses 12 or fewer of its 16 bits a colour, and only the upper 8 are read: save it with 8 bits"
        )
    return rgb


def _loses_bits(picture: Image.Image) -> bool:
    """Whether 16 bits a channel become their upper 8 as the pixels are decoded, which Pillow does to colours."""
    return picture.mode in ("RGB", "RGBA") and any(";16" in str(part[3]) for part in getattr(picture, "tile", ()))


def _reduce_on_load(picture: Image.Image, file: BinaryIO | None) -> bool:
    """Ask a JPEG's decoder for the largest of 1/2, 1/4 and 1/8 that fits the cap; False if it cannot."""
    if picture.format not in ("JPEG", "MPO") or file is None:
        return False
    # A progressive file, or one with a scan for each channel, is held as coefficients (6 bytes a pixel) at
    # its full size whatever size is asked for. Pillow has just read the header of the first scan: length,
    # number of channels, …
    channels = len(picture.getbands())
    header = 6 + 2 * channels
    file.seek(-header, io.SEEK_CUR)
    one_scan = file.read(3) == bytes([0, header, channels])
    file.seek(header - 3, io.SEEK_CUR)
    if picture.info.get("progressive") or not one_scan:
        return False
    width, height = picture.size
    for scale in (2, 4, 8):
        if -(-width // scale) * -(-height // scale) <= MAX_PIXELS:
            picture.draft(None, (width // scale, height // scale))
            return picture.size[0] * picture.size[1] <= MAX_PIXELS
    return False


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, KeyError, TypeError, ValueError, struct.error):
        return picture  # the pixels are sound, only the camera's notes are broken: no orientation is known


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        picture = Image.fromarray(_scale_down(values, _full_scale(values)))
    elif picture.mode in ("I", "F"):
        picture = Image.fromarray(_wide_to_grey(np.asarray(picture)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        rgb = Image.new("RGB", picture.size, "white")
        rgb.paste(picture, mask=picture.getchannel("A"))
    else:
        rgb = picture.convert("RGB")
    rgb.info = {}  # EXIF that stays would turn the picture a second time
    return rgb


def _full_scale(values: np.ndarray) -> int:
    """What is white among samples of 16 bits: cameras and scanners often fill only the lower 12, and masks 8."""
    largest = int(values.max(initial=0))
    return next(white for white in (255, 4095, 65535) if largest <= white)


def _scale_down(values: np.ndarray, largest: int) -> np.ndarray:
    """Map 0…largest to 0…255, rounded."""
    return ((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8)


def _wide_to_grey(values: np.ndarray) -> np.ndarray:
    """32-bit samples: 16-bit ones in a wide type are scaled as such; else least is black, greatest white."""
    if values.dtype.kind == "i" and values.min() >= 0 and 255 < values.max() <= 65535:
        return _scale_down(values, _full_scale(values))
    # Integers and floats beyond that have no agreed range.
    values = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255.0 / (high - low) if high > low else 0.0) + 0.5).astype(np.uint8)
