"""A data file examined before anything is trained on it: every row read, every picture decoded, all faults listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.data.duplicates import Copies, copies_between_rows
from adapters.data.examples import Example, Fault
from adapters.data.findings import Findings, find_out
from adapters.data.picture_scan import scan_pictures
from adapters.data.reading import ReadRows, no_rows, read_rows
from qformer.errors import UserError


@dataclass(frozen=True)
class DataCheck:
    """What a data file holds.

    Args:
        name: the file's name, or the packaged set's.
        task: what the good rows are for; None if no row is good.
        rows: all of them, good and bad; blank lines are none.
        pictures: files and data URIs that rows name, each counted once.
        distinct_pictures: the same, distinguished by their bytes, without those that cannot be decoded.
        answers: of the good rows; a caption is an answer.
        languages: good rows by language.
        longest_question: in characters; 0 if there is none.
        longest_question_row: the row that asks it; 0 if there is none.
        faults: every bad row, in the order of the file.
        unread: fields that nothing reads, with how many rows have them.
        findings: what is worth knowing of the good rows.
    """

    name: str
    task: str | None
    rows: int
    pictures: int
    distinct_pictures: int
    answers: int
    languages: Mapping[str, int]
    longest_question: int
    longest_question_row: int
    faults: tuple[Fault, ...]
    unread: Mapping[str, int]
    findings: Findings


def check_data(
    source: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Read every row of a data file as training would and decode every picture.

    Args:
        source: as `adapters.data.reading.read_data` takes it.
        task: "vqa", "caption" or "reason"; if left out, inferred from the rows.
        need_answers: False for rows that are to be answered, as batch jobs take them.
        columns: as `read_data` takes them.
        allow_outside: as `read_data` takes it.
        offline: do not fetch a packaged set.
        on_progress: called with (pictures opened, pictures in all), ten times or fewer.

    Raises:
        UserError: the file as a whole cannot be read, or holds no rows. Bad rows are reported, not raised.
    """
    read = partial(
        read_rows, task=task, need_answers=need_answers, columns=columns, allow_outside=allow_outside, offline=offline
    )
    return _check(source, read, on_progress)[0]


def check_pair(
    train: str | Path,
    val: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[DataCheck, DataCheck, Copies]:
    """Check two files as `check_data` does, and find the pictures of the good rows that are in both.

    Args:
        train: what is, or was, learned from.
        val: what is to be validated or tested on.
        task: of both; if left out, inferred from the rows of each.
        need_answers: as in `check_data`.
        columns: as `read_data` takes them.
        allow_outside: as `read_data` takes it.
        offline: do not fetch a packaged set.
        on_progress: called with (pictures opened, pictures in all) of the one, of the other, and of both as they are
            compared.

    Raises:
        UserError: as `check_data`, of either file.
    """
    read = partial(
        read_rows, task=task, need_answers=need_answers, columns=columns, allow_outside=allow_outside, offline=offline
    )
    first, learned = _check(train, read, on_progress)
    second, asked = _check(val, read, on_progress)
    return first, second, copies_between_rows(learned, asked, on_progress=on_progress)


def _check(
    source: str | Path,
    read: Callable[[str | Path], ReadRows],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[DataCheck, Sequence[Example]]:
    """What a data file holds, and its good rows."""
    found = read(source)
    if not found.rows:
        raise UserError(no_rows(source))
    opened = scan_pictures(found.examples, on_progress)
    good, unreadable = opened.sort(found.examples)
    longest = max(good, key=lambda example: len(example.question), default=None)
    asks = longest is not None and longest.question != ""
    checked = DataCheck(
        name=found.name,
        task=found.task if good else None,
        rows=found.rows,
        pictures=opened.pictures,
        distinct_pictures=len(set(opened.digests.values())),
        answers=sum(len(example.answers) for example in good),
        languages=dict(Counter(example.language for example in good).most_common()),
        longest_question=len(longest.question) if longest is not None else 0,
        longest_question_row=longest.row if longest is not None and asks else 0,
        faults=tuple(sorted((*found.faults, *unreadable), key=lambda fault: fault.row)),
        unread=found.unread,
        findings=find_out(good, opened.digests, found.unread, rows=found.rows),
    )
    return checked, good
