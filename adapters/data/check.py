"""A data file examined before anything is trained on it: every row read, every picture decoded, all faults listed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adapters.data.examples import Fault
from adapters.data.images import ImageRef, open_image
from adapters.data.readers import no_rows, read_rows
from qformer.errors import UserError

_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class DataCheck:
    """What a data file holds.

    Args:
        name: the file's name, or the packaged set's.
        task: what the good rows are for; None where no row is good.
        rows: all of them, good and bad; blank lines are none.
        pictures: files and data URIs that rows name, each counted once.
        distinct_pictures: the same told apart by their bytes, those that cannot be decoded left out.
        answers: of the good rows; a caption is an answer.
        languages: good rows by language.
        longest_question: in characters; 0 where there is none.
        longest_question_row: the row that asks it; 0 where there is none.
        faults: every bad row, in the order of the file.
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


def check_data(
    source: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    offline: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Read every row of a data file as training would and decode every picture.

    Args:
        source: as `adapters.data.readers.read_data` takes it.
        task: "vqa", "caption" or "reason"; told from the rows where left out.
        need_answers: False for rows that are to be answered, as batch jobs take them.
        offline: do not fetch a packaged set.
        on_progress: called with (pictures opened, pictures in all), ten times or fewer.

    Raises:
        UserError: the file as a whole cannot be read, or holds no rows. Bad rows are reported, not raised.
    """
    found = read_rows(source, task=task, need_answers=need_answers, offline=offline)
    if not found.digests:
        raise UserError(no_rows(source))
    refs = list(dict.fromkeys(image for example in found.examples for image in example.images))
    broken: dict[ImageRef, str] = {}
    digests: set[str] = set()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="check")
    try:
        for done, (ref, result) in enumerate(zip(refs, pool.map(_examine, refs), strict=True), start=1):
            if isinstance(result, UserError):
                broken[ref] = str(result)
            else:
                digests.add(result)
            if on_progress and (done == len(refs) or done % -(-len(refs) // 10) == 0):
                on_progress(done, len(refs))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    faults = list(found.faults)
    good = []
    for example in found.examples:
        wrong = next((image for image in example.images if image in broken), None)
        if wrong is None:
            good.append(example)
        else:
            faults.append(Fault(example.row, example.where, broken[wrong]))
    longest = max(good, key=lambda example: len(example.question), default=None)
    asks = longest is not None and longest.question != ""
    return DataCheck(
        name=found.name,
        task=found.task if good else None,
        rows=len(found.digests),
        pictures=len(refs),
        distinct_pictures=len(digests),
        answers=sum(len(example.answers) for example in good),
        languages=dict(Counter(example.language for example in good).most_common()),
        longest_question=len(longest.question) if longest is not None else 0,
        longest_question_row=longest.row if longest is not None and asks else 0,
        faults=tuple(sorted(faults, key=lambda fault: fault.row)),
    )


def _examine(ref: ImageRef) -> str | UserError:
    """The digest of a picture's bytes, or what is wrong with it, without the row that names it."""
    try:
        content = ref.read()
        open_image(ImageRef(ref.label, data=content))
    except UserError as error:
        return UserError(str(error).removeprefix(f"{ref.where}: "))
    return hashlib.sha256(content).hexdigest()
