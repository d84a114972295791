"""A batch job's lines on their way into their file, in the order of their rows, and what they come to."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adapters.data.examples import Fault
from qformer.errors import UserError
from serve.batch.asking import Fields
from serve.batch.lines import line_of
from serve.batch.rows import AskedRow

_MOST = 1024  # lines that wait to be written


@dataclass(frozen=True)
class BatchReport:
    """What a batch job came to; together these are the rows that were asked about, each question about one counted.

    Args:
        answered: rows answered now.
        already: rows that were answered already.
        failed: bad rows: their lines hold an error, from now or from before.
    """

    answered: int
    already: int
    failed: int


class Writing:
    """Lines on their way into the file, in the order of their rows.

    Args:
        file: open for appending, without a buffer.
        total: rows in all, for the progress.
        min_confidence: as `run_batch` takes it.
        skip_bad_rows: as `run_batch` takes it.
        write_every: seconds between two writes.
        on_progress: as `run_batch` takes it.
    """

    def __init__(
        self,
        file: Any,
        *,
        total: int,
        min_confidence: float | None,
        skip_bad_rows: bool,
        write_every: float,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._file, self._total, self._min_confidence = file, total, min_confidence
        self._skip, self._write_every, self._on_progress = skip_bad_rows, write_every, on_progress
        self._expected: deque[AskedRow] = deque()
        self._found: dict[int, Fields] = {}
        self._ready: list[bytes] = []
        self._written_at = time.monotonic()
        self._now = {"answer": 0, "error": 0}
        self._earlier = {"answer": 0, "error": 0}
        self._told = -1

    def expect(self, asked: AskedRow) -> None:
        """Take the row whose line comes next; a bad row's may be written at once."""
        self._expected.append(asked)
        if isinstance(asked.asked, Fault):
            self.take({})

    def count_earlier(self, kind: str) -> None:
        """Count a row that has its line from an earlier sitting."""
        self._earlier[kind] += 1

    def take(self, found: dict[int, Fields]) -> None:
        """Take answers; write the lines whose turn it is if it is time.

        Raises:
            UserError: a row is bad and bad rows are not to be skipped; those before it are written first.
        """
        self._found |= found
        self._queue()
        if len(self._ready) >= _MOST or time.monotonic() - self._written_at >= self._write_every:
            self.write()

    def finish(self) -> None:
        """Write what is left."""
        self._queue()
        self.write()
        if self._expected:
            raise RuntimeError(f"{len(self._expected)} rows have no answer")

    def report(self) -> BatchReport:
        """What the job came to."""
        return BatchReport(self._now["answer"], self._earlier["answer"], self._now["error"] + self._earlier["error"])

    def write(self) -> None:
        """Put the lines that are ready onto the disk.

        Raises:
            OSError: there is no room; the last line may be half there.
        """
        content = memoryview(b"".join(self._ready))
        while content:
            content = content[self._file.write(content) :]
        if self._ready:
            self._ready.clear()
            with suppress(OSError):  # a pipe, or a disk that knows no such thing
                os.fsync(self._file.fileno())
        self._written_at = time.monotonic()
        done = sum(self._now.values()) + sum(self._earlier.values())
        if self._on_progress and done != self._told:
            self._told = done
            self._on_progress(done, self._total)

    def _queue(self) -> None:
        while self._expected:
            asked = self._expected[0]
            if isinstance(asked.asked, Fault):
                found: Fields = {"error": str(asked.asked)}
            elif asked.number in self._found:
                found = self._found.pop(asked.number)
            else:
                return
            if "error" in found and not self._skip:
                raise UserError(found["error"])
            self._expected.popleft()
            self._ready.append(line_of(asked, found, min_confidence=self._min_confidence))
            self._now["error" if "error" in found else "answer"] += 1
