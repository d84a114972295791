"""The rows of a batch job, read anew at each walk and never held: each with its question, or what is wrong with it.

A source is a data file, a packaged set or a folder of pictures. Questions given for all rows are put into each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from adapters.data.columns import look_for_columns, named_rows
from adapters.data.conversations import SHAPE_FIELDS, is_conversation
from adapters.data.examples import Example, Fault
from adapters.data.formats.columnar import CLASS_QUESTION
from adapters.data.formats.raw_rows import RawRow
from adapters.data.formats.web_dataset import PICTURE_ENDINGS
from adapters.data.image_ref import ImageRef
from adapters.data.picture_files import MissingImage, Pictures
from adapters.data.rows import (
    ANSWER_FIELDS,
    CAPTION_FIELDS,
    ID_FIELDS,
    IMAGE_FIELDS,
    BadRow,
    has_captions,
    read_row,
    tasks_of,
)
from adapters.data.sources import Source, check_source, open_source
from adapters.tasks import Task
from qformer.errors import UserError

TASKS = ("vqa", "caption", "reason", "embed")
"""What a batch job may be."""

_KEPT_PICTURES = 4096  # rows whose pictures' files are looked up once; then all are forgotten
_ASKED = (*IMAGE_FIELDS, *ID_FIELDS, *ANSWER_FIELDS, "question", "choices")
_OURS = {  # the columns that are read for a task; the others are passed through
    "vqa": _ASKED,
    "reason": _ASKED,
    "caption": (*IMAGE_FIELDS, *ID_FIELDS, *CAPTION_FIELDS, "question"),
    "embed": (*IMAGE_FIELDS, *ID_FIELDS),
}


@dataclass(frozen=True)
class AskedRow:
    """One question about one row.

    Args:
        number: of all questions about all rows, counted from 1.
        row: the row's number in its file, counted from 1.
        question_number: which of several questions about the row it is, counted from 1; None if there is but one.
        asked: the example, or what is wrong with it.
        columns: the columns of the row that are not read for the task.
    """

    number: int
    row: int
    question_number: int | None
    asked: Example | Fault
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class ReadRow:
    """A row with all questions about it, and a short hash of what the file holds."""

    asked: tuple[AskedRow, ...]
    digest: str

    @property
    def good(self) -> bool:
        """Whether something can be asked."""
        return any(isinstance(one.asked, Example) for one in self.asked)


class Template:
    """A question with columns in braces: `is there a {part}?`

    Args:
        text: as given; `{{` and `}}` are braces.

    Raises:
        UserError: it is empty, or its braces name no columns.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if not text.strip():
            raise UserError("--question: it is empty; ask something about the picture")
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"--question '{text}': {error}; write {{{{ and }}}} for braces themselves") from None
        for _, name, form, conversion in parts:
            if name is not None and (not name.strip() or form or conversion):
                raise UserError(
                    f"--question '{text}': a column's name goes between the braces, as in {{part}}; write {{{{ and }}}}"
                    " for braces themselves"
                )
        self.columns = tuple(name for _, name, _, _ in parts if name is not None)
        self._parts = [(literal, name) for literal, name, _, _ in parts]

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The question about a row; BadRow if the row lacks a column, or holds no text or number there."""
        text = ""
        for literal, name in self._parts:
            text += literal
            if name is None:
                continue
            value = fields.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
                has = f"holds {json.dumps(value, default=str)}" if name in fields else "is missing"
                raise BadRow(f"column '{name}', which --question names, {has}: write text or a number there")
            text += str(value)
        return text


class BatchRows:
    """The rows of a source, as often as they are walked through.

    Args:
        source: a data file, a packaged set, or a folder of pictures.
        task: one of `TASKS`; left out, questions are asked if the rows have or are given any, else captions.
        questions: asked about every row, in place of the rows' own.
        columns: the file's name of a field by ours.
        choices: whether choices are given for all rows; then no row may have its own.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: do not fetch a packaged set.

    Attributes:
        name: the source's, for people.
        task: what the rows are read for.

    Raises:
        UserError: the source cannot be read, a question cannot be put, or the task does not fit.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        task: str | None = None,
        questions: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
        choices: bool = False,
        allow_outside: bool = False,
        offline: bool = False,
    ) -> None:
        if task is not None and task not in TASKS:
            raise UserError(f"--task '{task}': take one of {', '.join(TASKS)}")
        if questions and task in ("caption", "embed"):
            raise UserError(f"--task {task} asks no question: leave --question out, or take --task vqa")
        self.source = source
        self.questions = [Template(text) for text in questions]
        self._columns = dict(columns or {})
        self._choices = choices
        self._asked_task = task or ("vqa" if questions else None)
        self._allow_outside = allow_outside
        self._offline = offline
        self._folder = _picture_folder(source) if questions or task in ("caption", "embed") else None
        if self._folder is None:
            check_source(source)
            if self._columns:  # a job with a limit does not come to the end of the rows
                look_for_columns(open_source(source, offline=offline).rows, self._columns)
        self.name = self._open().name
        self.task = self._asked_task or self._task_of_rows()

    def __iter__(self) -> Iterator[ReadRow]:
        """Read the rows from the first on."""
        self._first_good = True
        source = self._open()
        found_by = partial(Pictures, source.base, also=source.also, allow_outside=self._allow_outside)
        pictures = found_by()
        for raw in source.rows:
            if raw.number % _KEPT_PICTURES == 0:
                pictures = found_by()
            yield self._read(raw, pictures)

    def _open(self) -> Source:
        if self._folder is not None:
            return Source(self._folder.name, _pictures_in(self._folder), self._folder)
        source = open_source(self.source, offline=self._offline)
        return replace(source, rows=named_rows(source.rows, self._columns))

    def _task_of_rows(self) -> str:
        """Questions, if a row has one: among them a picture alone lacks one. Else captions."""
        for raw in self._open().rows:
            try:
                tasks = () if raw.problem is not None else tasks_of(raw.fields, need_answers=False)
            except BadRow:
                continue
            if tasks and tasks[0] == "reason":
                raise UserError(
                    f"{self.source}: rows with reasons; --task reason gives reasons too, --task vqa answers their"
                    " questions, without reasons"
                )
            if tasks and (tasks != ("caption",) or has_captions(raw.fields)):
                return tasks[0]
        return "caption"

    def _read(self, raw: RawRow, pictures: Pictures) -> ReadRow:
        many = max(1, len(self.questions))
        asked = []
        columns = {name: value for name, value in raw.fields.items() if name not in _OURS[self.task]}
        if columns and self.task == "vqa" and is_conversation(raw.fields):
            columns = {name: value for name, value in columns.items() if name not in SHAPE_FIELDS}
        for place in range(many):
            found: Example | Fault
            try:
                found = self._example(raw, self.questions[place] if self.questions else None, pictures)
            except BadRow as error:
                missing = error.label if isinstance(error, MissingImage) else None
                found = Fault(raw.number, raw.where, str(error), missing)
            number = (raw.number - 1) * many + place + 1
            asked.append(AskedRow(number, raw.number, place + 1 if many > 1 else None, found, columns))
        content = json.dumps([raw.fields, raw.problem], default=_identity)
        return ReadRow(tuple(asked), hashlib.sha256(content.encode()).hexdigest()[:16])

    def _example(self, raw: RawRow, question: Template | None, pictures: Pictures) -> Example:
        """A row as what is asked about it; BadRow if it cannot be."""
        if raw.problem is not None:
            raise BadRow(raw.problem)
        fields = raw.fields
        if self.task == "embed":
            fields = {name: fields[name] for name in (*IMAGE_FIELDS, *ID_FIELDS) if name in fields}
            return read_row(replace(raw, fields=fields), "caption", pictures, need_answers=False)[0]
        if question is not None:
            if fields.get("question") == CLASS_QUESTION and raw.label is not None:
                fields = {name: value for name, value in fields.items() if name != "question"}  # not the row's own
            if is_conversation(fields) or ("question" in fields and "question" not in question.columns):
                raise UserError(
                    f"--question: {raw.where} has a question of its own; write {{question}} within --question, or leave"
                    " --question out"
                )
            fields = {**fields, "question": question.fill(fields)}
        if self._choices and fields.get("choices"):
            raise UserError(f"--choices: {raw.where} has choices of its own; leave --choices out")
        tasks = tasks_of(fields, need_answers=False, asked=self._asked_task)
        if self.task not in tasks:
            if self._first_good and self._asked_task is not None:
                raise UserError(
                    f"--task {self.task}, but {raw.where} is a {tasks[0]} row: give --task {tasks[0]}, or none"
                )
            if tasks[0] == "caption" and not has_captions(fields):
                raise BadRow("field 'question' is missing, which the other rows have: add it")
            raise BadRow(f"a {tasks[0]} row among {self.task} rows: keep one task in a file")
        if self._asked_task is None and tasks[0] == "reason" != self.task:
            raise BadRow("a row with a rationale among rows without: --task vqa reads them all without")
        self._first_good = False
        named = raw if fields is raw.fields else replace(raw, fields=fields)
        task: Task = "reason" if self.task == "reason" else "caption" if self.task == "caption" else "vqa"
        return read_row(named, task, pictures, need_answers=False)[0]  # of a conversation, its last question


def _identity(value: object) -> str:
    """What a value that JSON has no word for is recognised by."""
    return (value.mark() or value.label) if isinstance(value, ImageRef) else str(value)


def _picture_folder(source: str | Path) -> Path | None:
    """A folder whose pictures are the rows: one with pictures, and without a table that describes them."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(folder.glob("metadata.*")):
        return None
    return folder if next(_pictures_in(folder), None) is not None else None


def _pictures_in(folder: Path) -> Iterator[RawRow]:
    """Every picture below a folder, by its ending; linked folders too, each once."""
    number = 0
    seen: set[Path] = set()
    for top, inner, names in os.walk(folder, followlinks=True, onerror=_refuse):
        if Path(top).resolve() in seen:  # a link in a circle, or to what was here already
            inner.clear()
            continue
        seen.add(Path(top).resolve())
        inner.sort()
        for name in sorted(names):
            if Path(name).suffix.lower().removeprefix(".") in PICTURE_ENDINGS:
                number += 1
                path = Path(top) / name
                yield RawRow(str(path), number, {"image": str(path.relative_to(folder))})


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: the folder cannot be read ({error.strerror}); mend its rights") from error
