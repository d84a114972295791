"""Data in: a user's file, or a packaged set by its name, becomes a checked DataSet.

Every row is checked before anything is trained, pictures' files included (they are looked for, not opened).
Bad rows are an error that counts them; with `skip_bad_rows` they are left out and listed, never in silence.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import get_args

from adapters.data.examples import DataSet, Example, Fault
from adapters.data.formats import FORMATS, RawRow, shorten
from adapters.data.picture_scan import scan_pictures
from adapters.data.rows import RATIONALE_FIELD, BadRow, MissingImage, Pictures, has_captions, read_row, tasks_of
from adapters.data.scienceqa import TERMS as SCIENCEQA_TERMS
from adapters.data.scienceqa import is_scienceqa, scienceqa_folder, scienceqa_rows
from adapters.tasks import Task
from qformer.errors import UserError

EASY_VQA = ("easy-vqa:train", "easy-vqa:test")
_NO_RATIONALE = f"field '{RATIONALE_FIELD}' is missing: write the reasons, or \"\" where there are none"


@dataclass(frozen=True)
class _Source:
    """Rows to read, with the folder that their pictures' paths start from."""

    name: str
    rows: Iterator[RawRow]
    base: Path
    terms: str | None


@dataclass(frozen=True)
class ReadRows:
    """All rows of a source, good and bad.

    Args:
        name: the file's name, or the packaged set's.
        task: what the first good row was read as; None if there is none.
        examples: the good rows in the order of the file.
        faults: the bad rows in the order of the file.
        digests: a short hash of each row in the order of the file.
        terms: the licence of a packaged set; None for a user's file.
        pictures: what the rows' pictures were found by.
    """

    name: str
    task: Task | None
    examples: tuple[Example, ...]
    faults: tuple[Fault, ...]
    digests: tuple[str, ...]
    terms: str | None
    pictures: Pictures


def read_data(
    source: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    skip_bad_rows: bool = False,
    broken_pictures_too: bool = False,
    limit: int | None = None,
    offline: bool = False,
) -> DataSet:
    """Read and check rows of questions, of captions, or of questions with the reasons for their answers.

    Args:
        source: a `.jsonl`, `.json` (a list) or `.csv` file; "easy-vqa:train" or "easy-vqa:test"; or "FOLDER:SPLIT"
            of a folder of ScienceQA. Rows are {"image", "question", "answer"} or {"image", "caption"}; an answer may
            be a list, which is kept whole, and so may "captions". "kind" (a text) is the kind of question, for scores.
            "context" and "choices" belong to the question, and the answer is one of the choices. A row with "rationale"
            is one of reasons; "steps" (a whole number) belongs to its scores. "file_name" is read as "image" is, and
            "images" is a list of several, which `<image>` marks in the question may place; "id" or "question_id" is
            kept, and "language"; other fields are ignored. Two names of one field in a row make it bad. A picture is a
            path, absolute or relative to the data file, or a base64 data URI.
        task: "vqa", "caption" or "reason"; None takes what the first good row's fields say. "vqa" reads rows of
            reasons as questions with answers alone.
        need_answers: False reads rows to be answered: answers may be absent, and a picture alone is a row
            that asks for its caption.
        skip_bad_rows: leave bad rows out and list them in `faults`.
        broken_pictures_too: a row whose picture cannot be decoded is a bad row too; if bad rows are left out,
            every picture is opened to know. For callers that cannot leave one out later.
        limit: take the first so many good rows; the file is not read further.
        offline: take a packaged set from the cache folder or not at all.

    Returns:
        The rows in the order of the file.

    Raises:
        UserError: the file is missing or of an unknown kind, rows are bad, or none are there.
    """
    found = read_rows(source, task=task, need_answers=need_answers, limit=limit, offline=offline)
    if skip_bad_rows and broken_pictures_too:
        good, unreadable = scan_pictures(found.examples).sort(found.examples)
        faults = tuple(sorted((*found.faults, *unreadable), key=lambda fault: fault.row))
        found = replace(found, examples=tuple(good), faults=faults)
    if found.faults and not (skip_bad_rows and found.examples):
        raise UserError(_complaint(found.faults, len(found.examples), skip_bad_rows))
    if not found.examples or found.task is None:
        raise UserError(no_rows(source))
    return DataSet(
        name=found.name,
        task=found.task,
        examples=found.examples,
        fingerprint=_fingerprint(found.task, found.examples, found.pictures),
        terms=found.terms,
        faults=found.faults,
        row_digests=found.digests,
    )


def check_source(source: str | Path) -> None:
    """Say what is wrong with a source's name before anything slow is done; no row is read.

    Raises:
        UserError: there is no such file, it is of an unknown kind, or it is empty.
    """
    if str(source) not in EASY_VQA and scienceqa_folder(source) is None:
        _open_file(Path(source).expanduser())


def read_rows(
    source: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    limit: int | None = None,
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
    if str(source) in EASY_VQA:
        opened = _open_packaged(str(source), offline)
    elif (science := scienceqa_folder(source)) is not None:
        folder, split = science
        opened = _Source(f"{folder.name}:{split}", scienceqa_rows(folder, split), folder, SCIENCEQA_TERMS)
    else:
        opened = _open_file(Path(source).expanduser())

    pictures = Pictures(opened.base)
    examples: list[Example] = []
    faults: list[Fault] = []
    digests: list[str] = []
    found_task: Task | None = None
    settled_by: RawRow | None = None
    rows = opened.rows
    if task is None and not need_answers:
        alone, settled_by = _pictures_alone(rows, limit)
        rows = chain(alone, rows)
        found_task = _tasks_in(settled_by)[0] if settled_by is not None else None
    for row in rows:
        digests.append(_digest(row))
        try:
            if row.problem is not None:
                raise BadRow(row.problem)
            tasks = tasks_of(row.fields, need_answers=need_answers, asked=task)
            if found_task is None:
                found_task, settled_by = _settle_task(task, tasks, row), row
            elif found_task not in tasks or (task is None and tasks[0] == "reason" != found_task):
                raise BadRow(_stray(tasks[0], found_task, row, settled_by))
            examples.append(read_row(row, found_task, pictures, need_answers=need_answers))
        except BadRow as error:
            missing = error.label if isinstance(error, MissingImage) else None
            faults.append(Fault(row.number, row.where, str(error), missing))
        if limit is not None and len(examples) == limit:
            break
    return ReadRows(opened.name, found_task, tuple(examples), tuple(faults), tuple(digests), opened.terms, pictures)


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


def _digest(row: RawRow) -> str:
    """What distinguishes a row from another, 16 hex digits: what the file holds, whatever became of its pictures."""
    return hashlib.sha256(json.dumps([row.fields, row.problem]).encode()).hexdigest()[:16]


def _fingerprint(task: Task, examples: Sequence[Example], pictures: Pictures) -> str:
    """SHA-256 over all that was read, with each picture's name and size.

    The pictures' bytes are not read, so a picture changed within its size goes unseen here; the features cannot
    be confused by that, for their cache goes by the bytes.
    """
    sha = hashlib.sha256(task.encode())
    for example in examples:
        marks = [pictures.mark(image) for image in example.images]
        row = [example.id, example.question, example.answers, example.language, marks]
        if task == "reason":
            row += [example.context, example.choices, example.rationale]
        elif example.context or example.choices:
            row += [example.context, example.choices]
        sha.update(json.dumps(row).encode() + b"\n")
    return "sha256:" + sha.hexdigest()


def _open_file(path: Path) -> _Source:
    try:
        there = path.exists()
    except OSError as error:  # a name too long: rows given in place of a file's name, perhaps
        raise UserError(f"data '{shorten(str(path))}' is not a usable path: {error.strerror}") from None
    if is_scienceqa(path):
        raise UserError(f"{path} is a folder of ScienceQA: name a split of it, such as {path}:train")
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix.lower() in FORMATS)
        if not inside:
            raise UserError(
                f"{path} is a folder without a data file ({', '.join(FORMATS)}): write one, a row a picture"
            )
        raise UserError(f"{path} is a folder: name the data file in it, such as {path / inside[0]}")
    if not there:
        raise UserError(f"data '{path}' is not there: {_suggestion(path)}")
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: '{path.suffix.lower()}' data files are not read: take {', '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): give it at least one row")
    return _Source(path.name, read(path), path.parent, None)


def _suggestion(path: Path) -> str:
    """Say what was probably meant."""
    names = sorted(difflib.get_close_matches(str(path), EASY_VQA, n=2, cutoff=0.7), reverse=True)
    if not names and path.parent.is_dir():
        files = [file.name for file in path.parent.iterdir() if file.suffix.lower() in FORMATS]
        near = difflib.get_close_matches(path.name, files, n=1, cutoff=0.7)
        names = [str(path.parent / name) for name in near]
    if names:
        return f"did you mean {' or '.join(names)}?"
    return f"give a {', '.join(FORMATS)} file, {' or '.join(EASY_VQA)}, or FOLDER:SPLIT of ScienceQA"


def _open_packaged(name: str, offline: bool) -> _Source:
    """easy-VQA from its wheel: rows [question, answer, image id] in questions.json, pictures beside it."""
    from qformer.sources import resolve_wheel_data

    part = name.partition(":")[2]
    folder = resolve_wheel_data("easy-vqa", offline=offline)
    table = folder / part / "questions.json"
    try:
        listed = json.loads(table.read_bytes())
        rows = [(str(question), str(answer), int(image)) for question, answer, image in listed]
    except (OSError, ValueError, TypeError) as error:
        reason = shorten(str(error), 100)
        raise UserError(f"{name}: {table} is damaged ({reason}): remove {folder} and run again") from error

    def raw_rows() -> Iterator[RawRow]:
        for number, (question, answer, image) in enumerate(rows, start=1):
            fields = {"image": f"{part}/images/{image}.png", "question": question, "answer": answer}
            yield RawRow(f"{name} row {number}", number, fields)

    return _Source(name, raw_rows(), folder, "MIT (easy-VQA by Victor Zhou)")
