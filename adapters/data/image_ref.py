"""References to pictures: a file or encoded bytes that have not been decoded yet, and what identifies them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from adapters.data.known_pictures import known_pictures
from qformer.errors import UserError

MAX_FILE_BYTES = 256 * 2**20
"""The largest file that is read into memory."""


@dataclass(frozen=True)
class ByteRange:
    """A picture's encoded bytes inside a larger file, such as a tar archive.

    Args:
        path: the file.
        offset: where they begin.
        length: how many they are.
    """

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the bytes; OSError if they are not there any more."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            raise OSError(f"{self.path} is shorter than it was")
        return data


@dataclass(frozen=True)
class ImageRef:
    """A picture that has not been opened yet: a file, its bytes, or the place of its bytes in a larger file.

    Args:
        label: how the user wrote it, for messages.
        path: the file, or None.
        data: the encoded bytes (PNG, JPEG, …), or None.
        part: where the encoded bytes lie, or None. Exactly one of these three is given.
        where: the file and row that first named it, for messages; two references are equal without it.
        view: 0 is the picture itself; the others show a part of it (`adapters.data.views`) once opened.
    """

    label: str
    path: Path | None = None
    data: bytes | None = None
    part: ByteRange | None = None
    where: str = field(default="", compare=False)
    view: int = 0

    def __post_init__(self) -> None:
        """Hold exactly one of file, bytes and place."""
        if (self.path, self.data, self.part).count(None) != 2:
            raise ValueError("ImageRef takes exactly one of path, data and part")

    @property
    def subject(self) -> str:
        """What an error message calls this picture: its place, if it has one, and its label."""
        return at_place(self.where, f"image '{self.label}'")

    def read(self) -> bytes:
        """Return the encoded bytes; UserError if the file is missing, unreadable or over the cap."""
        if self.data is not None:
            return self.data
        with self.open() as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise UserError(f"{self.subject} is larger than {MAX_FILE_BYTES >> 20} MiB: save it smaller")
        return data

    def _read_part(self, part: ByteRange) -> bytes:
        if part.length > MAX_FILE_BYTES:
            raise UserError(f"{self.subject} is larger than {MAX_FILE_BYTES >> 20} MiB: save it smaller")
        try:
            return part.read()
        except OSError as error:
            raise UserError(f"{self.subject} cannot be read any more ({error}): leave the file as it is") from error

    def digest(self) -> str:
        """Return the identity of this picture in this view: 64 hex digits.

        Of the picture itself it is `content_digest`.
        """
        return self._digest

    def mark(self) -> str | None:
        """Tell a picture inside a larger file from another, without reading it; None for any other picture."""
        if self.part is None:
            return None
        known: str | None = self.__dict__.get("_content_digest")
        return known or f"{self.label} {self.part.length}"

    def content_digest(self) -> str:
        """Return the SHA-256 of the bytes in hex; a file is read once, then it is remembered, by later runs too."""
        return self._content_digest

    def found_at(self, where: str) -> ImageRef:
        """The same picture, named first by another file and row; what is known of it stays known."""
        if self.where:
            return self
        other = replace(self, where=where)
        if "_content_digest" in self.__dict__:
            other.__dict__["_content_digest"] = self._content_digest
        return other

    def seen_as(self, view: int) -> ImageRef:
        """Another view of the same picture; its bytes are not read again to know it."""
        if view == self.view:
            return self
        other = replace(self, view=view)
        other.__dict__["_content_digest"] = self._content_digest
        return other

    @cached_property
    def _digest(self) -> str:
        content = self._content_digest
        return hashlib.sha256(f"{content}:{self.view}".encode()).hexdigest() if self.view else content

    @cached_property
    def _content_digest(self) -> str:
        if self.path is None:
            with self.open() as encoded:
                return hashlib.file_digest(encoded, "sha256").hexdigest()
        known = known_pictures()
        if (digest := known.digest(self.path)) is not None:
            return digest
        with self.open() as file:
            return known.read(self.path, file)

    def open(self) -> io.BufferedReader | io.BytesIO:
        """Open the encoded bytes for reading; UserError if the file is missing or cannot be read."""
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.part is not None:
            return io.BytesIO(self._read_part(self.part))
        assert self.path is not None  # by __post_init__
        try:
            if self.path.exists() and not self.path.is_file():  # opening a pipe would wait for ever
                raise UserError(f"{self.subject} is not a file: give the path of a picture")
            return self.path.open("rb")
        except FileNotFoundError:
            advice = windows_hint(self.label) or "correct the path or put the file there"
            raise UserError(f"{self.subject} is not there: {advice}") from None
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise UserError(f"{self.subject} cannot be read ({error}): give the path of a picture") from error


def recall_digests(images: Iterable[ImageRef]) -> None:
    """Look up together the digests of files that earlier runs have read, for `digest` to give; no file is read."""
    waiting = {image.path: image for image in images if image.path is not None and "_content_digest" not in vars(image)}
    for path, digest in known_pictures().digests(list(waiting)).items():
        vars(waiting[path])["_content_digest"] = digest


def image_ref(text: str, *, base: Path | None = None, where: str = "") -> ImageRef:
    """Turn what a user wrote into a reference, without opening anything.

    Args:
        text: a path, or a base64 data URI.
        base: the folder that a relative path starts from; None: the working folder.
        where: the file and row for messages.

    Raises:
        UserError: nothing written, a web address, or a data URI that is not base64.
    """
    if not text.strip():
        raise UserError(at_place(where, "the image is empty: give a path or a base64 data URI"))
    if text.startswith("data:"):
        label = text if len(text) <= 48 else f"{text[:40]}… ({len(text)} characters)"
        return ImageRef(label, data=_data_uri_bytes(text, label, where), where=where)
    if text.startswith("file:"):
        named = urllib.parse.unquote(text.removeprefix("file:").removeprefix("//"))
        raise UserError(at_place(where, f"image '{text}' is a file's address: write its path alone, {named}"))
    if "://" in text[:12]:
        raise UserError(at_place(where, f"image '{text}' is a web address: download it first and give its path"))
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # a name that begins with ~ and is nobody's
        path = Path(text)
    return ImageRef(text, path=path if base is None else base / path, where=where)


def _data_uri_bytes(text: str, label: str, where: str) -> bytes:
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise UserError(at_place(where, f"image '{label}' is not of the form 'data:image/png;base64,…'"))
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(at_place(where, f"image '{label}' is broken base64 ({error}): encode it again")) from error
    if not data:
        raise UserError(at_place(where, f"image '{label}' holds no data: encode the picture again"))
    return data


def windows_hint(label: str) -> str | None:
    """What to do about a path that only Windows understands; None if it is none, or this is Windows."""
    if os.sep == "\\" or "\\" not in label:
        return None
    if label[1:2] == ":":
        return "it is a path of Windows: write where the file is on this machine"
    return f"it is written as on Windows: write {label.replace(chr(92), '/')}"


def at_place(where: str, message: str) -> str:
    """A message with the file and row it is about before it, if they are known."""
    return f"{where}: {message}" if where else message


def blank_image() -> ImageRef:
    """Return a mid-grey 16 x 16 picture: the control that shows what is answered without seeing."""
    # PPM by hand: the same bytes, and so the same digest, with every Pillow.
    return ImageRef("blank", data=b"P6\n16 16\n255\n" + bytes([128]) * (16 * 16 * 3))
