"""Data in: a user's file, or a packaged set by its name, becomes a checked DataSet.

Every row is checked before anything is trained, pictures' files included (they are looked for, not opened).
Bad rows are an error that counts them; with `skip_bad_rows` they are left out and listed, never in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import get_args

from adapters.data.columns import READ, look_for_columns, named_rows
from adapters.data.examples import DataSet, Example, Fault
from adapters.data.formats.raw_rows import RawRow
from adapters.data.picture_files import MissingImage, Pictures
from adapters.data.picture_scan import scan_pictures
from adapters.data.row_store import StoredExamples
from adapters.data.rows import RATIONALE_FIELD, BadRow, has_captions, read_row, tasks_of
from adapters.data.sources import open_source
from adapters.tasks import Task
from qformer.errors import UserError

_NO_RATIONALE = f"field '{RATIONALE_FIELD}' is missing: write the reasons, or \"\" where there are none"


@dataclass(frozen=True)
class ReadRows:
    """All rows of a source, good and bad.

    Args:
        name: the file's name, or the packaged set's.
        task: what the first good row was read as; None if there is none.
        examples: the good rows in the order of the file.
        faults: the bad rows in the order of the file.
        rows: how many the file has, good and bad.
        terms: the licence of a packaged set; None for a user's file.
        pictures: what the rows' pictures were found by.
        unread: fields that nothing reads, with how many rows have them.
        fingerprint: of the good rows, as a `DataSet` has it.
    """

    name: str
    task: Task | None
    examples: Sequence[Example]
    faults: tuple[Fault, ...]
    rows: int
    terms: str | None
    pictures: Pictures
    unread: dict[str, int]
    fingerprint: str


def read_data(
    source: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    skip_bad_rows: bool = False,
    broken_pictures_too: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
) -> DataSet:
    """Read and check rows of questions, of captions, or of questions with the reasons for their answers.

    Args:
        source: a file, a pattern of files, a folder, a packaged set or one of the hub, as
            `adapters.data.sources.open_source` takes it. Rows are {"image", "question", "answer"} or {"image",
            "caption"}; an answer may be a list, which is kept whole, and so may "captions". "kind" (a text) is the
            kind of question, for scores. "context" and "choices" belong to the question, and the answer is one of the
            choices. A row with "rationale" is one of reasons; "steps" (a whole number) belongs to its scores.
            "file_name" is read as "image" is, and "images" is a list of several, which `<image>` marks in the
            question may place; "id" or "question_id" is kept, and "language"; other fields are ignored. Two names of
            one field in a row make it bad. A picture is a path, absolute or relative to the data file, a base64 data
            URI, or bytes. Conversations are read in the shapes of `adapters.data.conversations`.
        task: "vqa", "caption" or "reason"; None takes what the first good row's fields say. "vqa" reads rows of
            reasons as questions with answers alone.
        need_answers: False reads rows to be answered: answers may be absent, and a picture alone is a row
            that asks for its caption.
        skip_bad_rows: leave bad rows out and list them in `faults`.
        broken_pictures_too: a row whose picture cannot be decoded is a bad row too; if bad rows are left out,
            every picture is opened to know. For callers that cannot leave one out later.
        limit: take the first so many good rows; the file is not read further.
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: take a packaged set from the cache folder or not at all.

    Returns:
        The rows in the order of the file.

    Raises:
        UserError: the file is missing or of an unknown kind, rows are bad, or none are there.
    """
    found = read_rows(
        source, task=task, need_answers=need_answers, limit=limit, columns=columns, allow_outside=allow_outside,
        offline=offline,
    )  # fmt: skip
    if skip_bad_rows and broken_pictures_too:
        good, unreadable = scan_pictures(found.examples).sort(found.examples)
        faults = tuple(sorted((*found.faults, *unreadable), key=lambda fault: fault.row))
        if unreadable and found.task is not None:
            found = replace(found, fingerprint=_fingerprint(found.task, good, found.pictures))
        found = replace(found, examples=good, faults=faults)
    if found.faults and not (skip_bad_rows and found.examples):
        raise UserError(_complaint(found.faults, len(found.examples), skip_bad_rows))
    if not found.examples or found.task is None:
        raise UserError(no_rows(source))
    return DataSet(
        name=found.name,
        task=found.task,
        examples=found.examples,
        fingerprint=found.fingerprint,
        terms=found.terms,
        faults=found.faults,
    )


def read_rows(
    source: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
) -> ReadRows:
    """Read and check rows as `read_data` does, and hand over the bad ones too, even if no row is good.

    Raises:
        UserError: what is wrong with the file as a whole, or with the task.
    """
    if task is not None and task not in get_args(Task):
        raise UserError(f"--task '{task}' has no reader: take {' or '.join(get_args(Task))}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a number of rows from 1 on")
    opened = open_source(source, offline=offline)
    pictures = Pictures(opened.base, also=opened.also, allow_outside=allow_outside)
    examples = StoredExamples()
    faults: list[Fault] = []
    sha = hashlib.sha256()
    count = 0
    unread: Counter[str] = Counter()
    good = 0
    found_task: Task | None = None
    settled_by: RawRow | None = None
    if limit is not None and columns:
        look_for_columns(open_source(source, offline=offline).rows, columns)
    rows = named_rows(opened.rows, columns or {})
    if task is None and not need_answers:
        alone, settled_by = _pictures_alone(rows, limit)
        rows = chain(alone, rows)
        found_task = _tasks_in(settled_by)[0] if settled_by is not None else None
        sha.update((found_task or "").encode())
    for row in rows:
        count += 1
        unread.update(str(field) for field in row.fields if field not in READ)
        try:
            if row.problem is not None:
                raise BadRow(row.problem)
            tasks = tasks_of(row.fields, need_answers=need_answers, asked=task)
            if found_task is None:
                found_task, settled_by = _settle_task(task, tasks, row), row
                sha.update(found_task.encode())
            elif found_task not in tasks or (task is None and tasks[0] == "reason" != found_task):
                raise BadRow(_stray(tasks[0], found_task, row, settled_by))
            for example in read_row(row, found_task, pictures, need_answers=need_answers):
                examples.append(example)
                sha.update(_told(found_task, example, pictures))
            good += 1
        except BadRow as error:
            missing = error.label if isinstance(error, MissingImage) else None
            faults.append(Fault(row.number, row.where, str(error), missing))
        if limit is not None and good == limit:
            break
    fingerprint = "sha256:" + sha.hexdigest()
    return ReadRows(
        opened.name, found_task, examples, tuple(faults), count, opened.terms, pictures, dict(unread), fingerprint
    )  # fmt: skip


def _pictures_alone(rows: Iterator[RawRow], limit: int | None) -> tuple[list[RawRow], RawRow | None]:
    """Rows to be answered, up to the first that asks or captions something, which says what the file is for.

    Only a file of pictures alone asks for captions: among questions, a picture alone lacks one.

    Returns:
        The rows that were taken, and the one that settles the task; None if the limit or the end comes before it.
    """
    taken: list[RawRow] = []
    alone = 0
    for row in rows:
        taken.append(row)
        tasks = _tasks_in(row)
        if tasks and (tasks != ("caption",) or has_captions(row.fields)):
            return taken, row
        alone += len(tasks)
        if alone == limit:
            break
    return taken, None


def _tasks_in(row: RawRow) -> tuple[Task, ...]:
    """What a row to be answered can be read as; () if it is bad."""
    try:
        return () if row.problem is not None else tasks_of(row.fields, need_answers=False)
    except BadRow:
        return ()


def no_rows(source: str | Path) -> str:
    """What is said of a source without rows."""
    return f"{source} holds no rows: give it at least one"


def _settle_task(asked: str | None, tasks: tuple[Task, ...], row: RawRow) -> Task:
    if asked is None:
        return tasks[0]
    for task in tasks:
        if task == asked:
            return task
    if asked == "reason" and "vqa" in tasks:
        raise UserError(f"--task reason, but {row.where}: {_NO_RATIONALE}")
    raise UserError(f"--task {asked}, but {row.where} is a {tasks[0]} row: give --task {tasks[0]}, or none")


def _stray(task: Task, among: Task, row: RawRow, settled_by: RawRow | None) -> str:
    """What is said of a row that is for another task than the file's, which an earlier row has settled."""
    if task == "caption" and among != "caption" and not has_captions(row.fields):
        before = settled_by is None or settled_by.number < row.number
        having = "the rows before have" if before or settled_by is None else f"{settled_by.where} has"
        return f"field 'question' is missing, which {having}: add it"
    if among == "caption" and settled_by is not None and not has_captions(settled_by.fields):
        return (
            f"it has a question, but {settled_by.where}, a picture alone, asks for a caption: give that row a question"
        )
    if among == "reason" and task == "vqa":
        return _NO_RATIONALE
    if task == "reason":
        return "a row with a rationale among rows without: give each one, or --task vqa to read them without"
    return f"a {task} row among {among} rows: keep one task in a file"


def _complaint(faults: Sequence[Fault], good: int, skipping: bool) -> str:
    text = str(faults[0])
    missing = [fault.missing for fault in faults if fault.missing is not None]
    if faults[0].missing is not None and len(missing) > 1:
        names = list(dict.fromkeys(missing))
        text += f"; {len(missing)} rows name pictures that are not there: {', '.join(names[:3])}"
        text += ", …" if len(names) > 3 else ""
    count = f"{len(faults)} of {len(faults) + good} rows are bad"
    if skipping:
        return f"{text}; {count}, so none are left"
    if not good:
        return f"{text}; {count}"
    return f"{text}; {count} (--skip-bad-rows leaves them out; in training, --set data.skip_bad_rows=true)"


def _fingerprint(task: Task, examples: Iterable[Example], pictures: Pictures) -> str:
    """SHA-256 over all that was read, with each picture's name and size.

    The pictures' bytes are not read, so a picture changed within its size goes unseen here; the features cannot
    be confused by that, for their cache goes by the bytes.
    """
    sha = hashlib.sha256(task.encode())
    for example in examples:
        sha.update(_told(task, example, pictures))
    return "sha256:" + sha.hexdigest()


def _told(task: Task, example: Example, pictures: Pictures) -> bytes:
    """What a fingerprint is made of, of one row."""
    marks = [pictures.mark(image) for image in example.images]
    row: list[object] = [example.id, example.question, example.answers, example.language, marks]
    if task == "reason":
        row += [example.context, example.choices, example.rationale]
    elif example.context or example.choices:
        row += [example.context, example.choices]
    if example.history:
        row.append([[turn.role, turn.text, len(turn.images)] for turn in example.history])
    return json.dumps(row).encode() + b"\n"
