"""Rows on disk instead of in memory: records in a temporary file, written once and read at any place.

In memory a record takes 8 bytes, and a picture its reference, once however many rows name it. The file has no name,
so it is gone when nothing uses it any more, however the program ends; it lies where `TMPDIR` says.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from dataclasses import fields
from typing import IO, Any

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.lazy import LazySequence
from adapters.data.picture_store import PictureStore
from adapters.data.prompts import Turn
from qformer.errors import UserError

_AT_ONCE = 2**20  # bytes that are written together; fewer never leave memory
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_REST = ("language", "row", "task", "context", "choices", "rationale", "kind", "steps", "turn")
_DEFAULTS = {each.name: each.default for each in fields(Example)}


class RecordFile:
    """Values that JSON holds, written one after the other and read at any place; a tuple comes back as a list."""

    def __init__(self) -> None:
        self._ends = array("Q", [0])
        self._waiting = bytearray()  # what is not in the file yet
        self._written = 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, record: object) -> None:
        """Write one more.

        Raises:
            UserError: there is no room.
        """
        self.append_written(_ENCODER.encode(record).encode())

    def append_written(self, record: bytes) -> None:
        """Write one more that is JSON already.

        Raises:
            UserError: there is no room.
        """
        self._waiting += record
        self._ends.append(self._written + len(self._waiting))
        if len(self._waiting) >= _AT_ONCE:
            self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="querybridge-", buffering=0)  # noqa: SIM115
            while self._waiting:
                count = self._file.write(self._waiting) or 0
                self._written += count
                del self._waiting[:count]
        except OSError as error:
            raise UserError(
                f"no room for the rows of a data file in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a"
                " folder with more"
            ) from error

    def read(self, number: int) -> Any:
        """Return the record of a number from 0 on."""
        start, end = self._ends[number], self._ends[number + 1]
        if start >= self._written:
            return json.loads(self._waiting[start - self._written : end - self._written].decode())
        assert self._file is not None  # something was written
        return json.loads(os.pread(self._file.fileno(), end - start, start).decode())


class PictureTable:
    """The distinct pictures of many rows, by number; those that came as text are moved to disk."""

    def __init__(self) -> None:
        self._numbers: dict[ImageRef, int] = {}
        self._images: list[ImageRef] = []
        self._store = PictureStore()

    def number(self, image: ImageRef, where: str) -> int:
        """Return the number of a picture, a new one if it was not seen before."""
        if image.data is not None:
            image = self._store.keep(image.data, image.label).found_at(image.where or where)
        number = self._numbers.setdefault(image, len(self._images))
        if number == len(self._images):
            self._images.append(image)
        return number

    def images(self, numbers: Iterable[int]) -> tuple[ImageRef, ...]:
        """Return the pictures of some numbers."""
        return tuple(self._images[number] for number in numbers)


class StoredExamples(LazySequence[Example]):
    """Examples on disk, each made anew when it is asked for."""

    def __init__(self) -> None:
        self._records = RecordFile()
        self._pictures = PictureTable()

    def __len__(self) -> int:
        return len(self._records)

    def append(self, example: Example) -> None:
        """Keep one more example.

        Raises:
            UserError: there is no room.
        """
        numbers = [self._pictures.number(image, example.where) for image in example.images]
        given = vars(example)
        rest = {name: given[name] for name in _REST if given[name] != _DEFAULTS[name]}
        said = [
            (turn.role, turn.text, [self._pictures.number(image, example.where) for image in turn.images])
            for turn in example.history
        ]
        self._records.append((numbers, example.question, example.answers, example.where, example.id, rest, said))

    def item(self, index: int) -> Example:
        """Make the example of a row."""
        numbers, question, answers, where, own_id, rest, said = self._records.read(index)
        if "choices" in rest:
            rest["choices"] = tuple(rest["choices"])
        history = tuple(Turn(role, text, self._pictures.images(shown)) for role, text, shown in said)
        images = self._pictures.images(numbers)
        return Example(images, question, tuple(answers), where, own_id, history=history, **rest)
