"""Lines of a batch job's answers: how a row's is written, and which rows the lines that are there are done with."""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from qformer.errors import UserError
from serve.batch.rows import AskedRow

_LINE_START = b'{"row": '  # how every line of ours begins
_HELD = ("answer", "embedding", "error")  # a line holds one of them
FIELDS = (
    "row", "question_number", "id", "image", "images", "question", "answer", "confidence", "withheld", "rationale",
    "choices", "logprobs", "embedding", "reference", "error",
)  # fmt: skip
"""Names of what a line may hold of ours, in the order of a table's columns."""
# An earlier job's must not stand beside another answer; what was asked is the row's own.
_FOUND = frozenset(FIELDS) - {"id", "image", "images", "question"}
_AHEAD = 2**16  # bytes of a file that are read at a time


def line_of(asked: AskedRow, found: Mapping[str, Any], *, min_confidence: float | None = None) -> bytes:
    """A row's line: what was asked, what was found, and the row's other columns.

    A column whose name is one of ours gets `input_` before it.

    Args:
        asked: the row.
        found: as a predictor gives it, or {"error": what is wrong}.
        min_confidence: an answer below it is left empty, and the line says so.

    Raises:
        UserError: a column cannot be named.
    """
    line: dict[str, Any] = {"row": asked.row}
    if asked.question_number is not None:
        line["question_number"] = asked.question_number
    example = asked.asked if isinstance(asked.asked, Example) else None
    if example is not None:
        line |= {"id": example.id, **named_pictures(example)}
        if example.question:
            line["question"] = example.question
    line |= {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    if "choices" in line:
        line["choices"] = {choice: round(share, 4) for choice, share in line["choices"].items()}
    if "logprobs" in line:
        line["logprobs"] = [one | {"logprob": round(one["logprob"], 4)} for one in line["logprobs"]]
    if min_confidence is not None and line.get("confidence", 1.0) < min_confidence:
        line |= {"answer": "", "withheld": f"confidence {line['confidence']} is below {min_confidence}"}
    if example is not None and example.answers:
        line["reference"] = list(example.answers)
    for name, value in asked.columns.items():
        free = name if name not in line and name not in _FOUND else f"input_{name}"
        if free in line:
            raise UserError(f"row {asked.row}: columns '{name}' and '{free}' would have one name; rename one")
        line[free] = _plain(value)
    return (json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def named_pictures(example: Example) -> dict[str, Any]:
    """The field that names a row's pictures in its line."""
    labels = [image.label for image in example.images]
    return {"image": labels[0]} if len(labels) == 1 else {"images": labels}


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, ImageRef):
        return value.label
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, str | int | float) else str(value)


class NumberSet:
    """A set of numbers that mostly come in order, kept as runs of neighbours."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # the first after each run

    def add(self, number: int) -> None:
        """Take a number; twice is once."""
        place = bisect_right(self._starts, number)
        if place and number < self._ends[place - 1]:
            return
        joins_before = place > 0 and self._ends[place - 1] == number
        joins_after = place < len(self._starts) and self._starts[place] == number + 1
        if joins_before and joins_after:
            self._ends[place - 1] = self._ends.pop(place)
            self._starts.pop(place)
        elif joins_before:
            self._ends[place - 1] += 1
        elif joins_after:
            self._starts[place] = number
        else:
            self._starts.insert(place, number)
            self._ends.insert(place, number + 1)

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self._starts, number)
        return place > 0 and number < self._ends[place - 1]


class FinishedRows:
    """What earlier sittings have written: which rows have a line, and what it holds.

    A half-written last line is cut off. Memory does not grow with the lines, as long as most are in the order of their
    rows.

    Args:
        out: the file of lines; it may not be there.
        questions: how many are asked about each row.
        rows: how many rows the job has read.

    Raises:
        UserError: the file holds something else.
    """

    def __init__(self, out: Path, *, questions: int, rows: int) -> None:
        self.out, self._questions = out, questions
        self._done, self._errors = NumberSet(), NumberSet()
        self._late: dict[int, dict[str, Any]] = {}  # lines behind that of a later row, by number
        last, whole = 0, 0
        if not out.exists():
            self._in_order: Iterator[dict[str, Any]] = iter(())
            return
        for place, content in _lines(out):
            if not content.endswith(b"\n"):  # the job was killed in the middle of a line
                if not _LINE_START.startswith(content[: len(_LINE_START)]):
                    raise UserError(f"--out {out}: its last line is not an answer of this input; name another file")
                continue
            whole += len(content)
            try:
                found = json.loads(content)
                number = self._number(found)
                kind = next(name for name in _HELD if name in found)
                if not 1 <= found["row"] <= rows:
                    raise ValueError("no such row")
            except (ValueError, KeyError, TypeError, StopIteration) as error:
                raise UserError(self._stranger(place)) from error
            if number in self._done:
                raise UserError(f"--out {out}, line {place}: answers a row for the second time; name another file")
            self._done.add(number)
            if kind == "error":
                self._errors.add(number)
            if number < last:
                self._late[number] = found | {"line": place}
            last = max(last, number)
        if whole < out.stat().st_size:
            os.truncate(out, whole)
        self._in_order = self._read_in_order()

    def kind(self, asked: AskedRow) -> str | None:
        """What a row's line holds, "answer" or "error"; None if there is none. To be asked in the order of the rows.

        Raises:
            UserError: the line is about another picture or question.
        """
        if asked.number not in self._done:
            return None
        found = self._late.get(asked.number) or next(self._in_order)
        if isinstance(asked.asked, Example):
            example = asked.asked
            named = {name: found[name] for name in ("image", "images") if name in found}
            question = found.get("question", example.question)
            if self._number(found) != asked.number or named not in ({}, named_pictures(example)):
                raise UserError(self._other_row(found, example))
            if question != example.question:
                raise UserError(self._other_row(found, example))
        return "error" if asked.number in self._errors else "answer"

    def _read_in_order(self) -> Iterator[dict[str, Any]]:
        last = 0
        for place, content in _lines(self.out):
            found = json.loads(content)
            number = self._number(found)
            if number > last:
                last = number
                yield found | {"line": place}

    def _number(self, found: Mapping[str, Any]) -> int:
        return int((found["row"] - 1) * self._questions + found.get("question_number", 1))

    def _stranger(self, line: int) -> str:
        return f"--out {self.out}, line {line}: not an answer of this input; name another file"

    def _other_row(self, found: Mapping[str, Any], example: Example) -> str:
        return f"--out {self.out}, line {found['line']}: answers another row than {example.where}; name another file"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers; only a line feed ends one. What is written meanwhile is read too."""
    with path.open("rb", buffering=_AHEAD) as file:
        yield from enumerate(file, start=1)
