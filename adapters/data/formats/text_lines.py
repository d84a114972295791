"""The lines of a text file, decoded: plain, gzip or Zstandard, in UTF-8 or UTF-16."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from qformer.errors import UserError

COMPRESSED = (".gz", ".zst")
"""Endings of compressed files, behind that of the format."""
_LONGEST_LINE = 2**30  # bytes
_LONGEST_UNPACKED = 64 * 2**20  # bytes of a compressed file's line, which may be far longer than the file
_LARGEST_UNPACKED = 128 * 2**20  # characters of a compressed file that is read whole
_FED = 256  # bytes that are unpacked at once: Zstandard may make 32 000 times as many of them
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines, decoded; line ends stay, a byte-order mark does not.

    Raises:
        UserError: the file cannot be read or unpacked, breaks off, is no text, or has a line of over 1 GiB, or one that
            unpacks to over 64 MiB.
    """
    encoding = _utf16(path)
    if encoding is not None:
        yield from _wide_lines(path, encoding)
        return
    for number, line in _byte_lines(path):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x}"
            raise UserError(f"{path} line {number}: not UTF-8 ({byte}): save the file as UTF-8 text") from None


def joined(path: Path, lines: Iterable[str]) -> str:
    """All lines of a file as one text, for what is read whole.

    Raises:
        UserError: it is compressed and unpacks to over 128 Mi characters.
    """
    if path.suffix.lower() not in COMPRESSED:
        return "".join(lines)
    parts, held = [], 0
    for line in lines:
        held += len(line)
        if held > _LARGEST_UNPACKED:
            raise UserError(
                f"{path} unpacks to a list of more than {_LARGEST_UNPACKED >> 20} MiB: write an object a line, or"
                " unpack the file first"
            )
        parts.append(line)
    return "".join(parts)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked if its ending says that it is compressed.

    Raises:
        UserError: it cannot be read, or what it holds is not what its ending says.
    """
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as file:
                yield cast(BinaryIO, file)
        elif path.suffix.lower() == ".zst":
            with path.open("rb") as packed:
                yield io.BufferedReader(_Zstandard(packed), 2**17)
        else:
            with path.open("rb") as file:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, _Broken) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): it is damaged, or its ending is wrong") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file's rights") from error


class _Broken(Exception):
    """Compressed data are damaged or break off."""


class _Zstandard(io.RawIOBase):
    """Zstandard frames unpacked one after the other; what breaks off is an error, never a shorter file."""

    def __init__(self, packed: BinaryIO) -> None:
        import zstandard

        self._library: Any = zstandard
        self._packed = packed
        self._frame: Any = None
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer; 0 at the end."""
        while not self._ready:
            chunk = self._rest[:_FED] or self._packed.read(_FED)
            self._rest = self._rest[_FED:]
            if not chunk:
                if self._frame is not None:
                    raise _Broken("it breaks off")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._library.ZstdError as error:
                raise _Broken(str(error)) from None
            if self._frame.eof:
                self._rest = self._frame.unused_data + self._rest
                self._frame = None
        given = self._ready[: len(buffer)]
        self._ready = self._ready[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)


def _byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as file:
        number, most = 0, _longest(path)
        while line := file.readline(most + 1):
            number += 1
            if len(line) > most:
                raise _too_long(path, number)
            yield number, line


def _longest(path: Path) -> int:
    return _LONGEST_UNPACKED if path.suffix.lower() in COMPRESSED else _LONGEST_LINE


def _too_long(path: Path, line: int) -> UserError:
    most = _longest(path) >> 20
    if path.suffix.lower() in COMPRESSED:
        return UserError(
            f"{path} line {line} unpacks to more than {most} MiB: no row is so long; write an object a line, or unpack"
            " the file first if it is meant so"
        )
    return UserError(f"{path} line {line} is longer than {most} MiB: break it up")


def _utf16(path: Path) -> str | None:
    """Which UTF-16 a file is in, by its mark or by the empty halves of its first letters."""
    with open_bytes(path) as file:
        head = file.read(64)
    if head[:2] in _UTF16:
        return _UTF16[head[:2]]
    even, odd = head[0::2], head[1::2]
    if len(head) >= 8 and 0 not in even and not any(odd):
        return "utf-16-le"
    if len(head) >= 8 and 0 not in odd and not any(even):
        return "utf-16-be"
    return None


def _wide_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    number, most = 0, _longest(path)
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding=encoding, newline="\n")
        while True:
            try:
                line = text.readline(most + 1)
            except UnicodeDecodeError as error:
                where = f"{path} after line {number}"
                raise UserError(f"{where}: not UTF-16 ({error.reason}): save the file as UTF-8 text") from None
            if not line:
                return
            number += 1
            if len(line) > most:
                raise _too_long(path, number)
            yield number, line.removeprefix("\ufeff") if number == 1 else line
