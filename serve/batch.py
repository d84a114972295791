"""Many questions by script: rows in, rows out, results kept as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from adapters.data.examples import Example
from adapters.data.images import open_image
from adapters.data.readers import read_data
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine import Engine, load_adapter, picture_ref

_LINE_START = b'{"row": '  # how every line of ours begins


class VQAPredictor:
    """Answers a batch of columns; the same class serves a plain loop and a worker of a data engine.

    Args:
        adapter: a run's folder, an artefact's folder or a shipped name.
        decoding: how tokens are chosen; greedy where left out.
        batch_size: prompts generated together.
        options: as `serve.engine.load_adapter` takes them.
    """

    def __init__(
        self,
        adapter: str | Path | None = None,
        *,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        self.engine: Engine = load_adapter(adapter, **options)
        self.decoding = decoding
        self.batch_size = batch_size

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Columns "image" (path, bytes or data URI) and "question" in; the same columns and "answer" out.

        Raises:
            UserError: a column is missing, or a picture cannot be read.
        """
        for column in ("image", "question"):
            if column not in batch:
                raise UserError(f"batch: there is no column '{column}'; rename yours to it")
        examples = []
        for row, (image, question) in enumerate(zip(batch["image"], batch["question"], strict=True)):
            picture = replace(picture_ref(image), where=f"row {row}")
            examples.append(Example((picture,), str(question), (), where=f"row {row}", id=str(row)))
        return {**batch, "answer": self.predict(examples)}

    def predict(self, examples: Sequence[Example], task: str = "vqa") -> list[str]:
        """Answers to examples, in their order."""
        return self.engine.answer(examples, task, decoding=self.decoding, batch_size=self.batch_size)


@dataclass(frozen=True)
class BatchReport:
    """What a batch job did: rows answered now, found answered already, and written with an error."""

    answered: int
    already: int
    failed: int


def run_batch(
    source: str | Path,
    out: Path | str,
    predictor: VQAPredictor,
    *,
    task: str | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    offline: bool = False,
    chunk: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> BatchReport:
    """Answer every row of a file into a JSONL file; a job that was stopped goes on where it stopped.

    Each line of `out` has "row" (from 1), "id", "image", "question" and "answer"; "reference" where the row held an
    answer; and with `skip_bad_rows` a row whose picture cannot be decoded has "error" in place of "answer" (other bad
    rows are only counted).

    Args:
        source: JSONL, JSON or CSV with "image" and "question" columns, or a packaged set.
        out: the JSONL file to write.
        predictor: what answers.
        task: "vqa" or "caption"; told from the rows where left out.
        limit: only the first so many rows.
        skip_bad_rows: write an error for a bad row and go on, instead of stopping there.
        offline: do not fetch a packaged set.
        chunk: rows between two writes.
        on_progress: called with (rows done, rows in all).

    Raises:
        UserError: the input or a row is bad; what was answered before it is kept in `out`.
    """
    out = Path(out)
    data = read_data(source, task=task, need_answers=False, skip_bad_rows=skip_bad_rows, limit=limit, offline=offline)
    answered = failed = 0
    try:
        done = _answered_rows(out, data.examples)
        waiting = [(row, example) for row, example in enumerate(data.examples, start=1) if row not in done]
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            for start in range(0, len(waiting), chunk):
                part = waiting[start : start + chunk]
                good, failures = _answer_part(part, predictor, data.task, skip_bad_rows, file)
                answered += good
                failed += failures
                if on_progress:
                    on_progress(len(done) + start + len(part), len(data.examples))
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); free space or name another file"
        ) from error
    return BatchReport(answered, len(done), failed + len(data.skipped))


def _answer_part(
    part: Sequence[tuple[int, Example]], predictor: VQAPredictor, task: str, skip_bad_rows: bool, file: IO[str]
) -> tuple[int, int]:
    """Answer a chunk of rows and write it; returns how many were answered and how many failed."""
    good: list[tuple[int, Example]] = []
    broken: dict[int, str] = {}
    first_error: UserError | None = None
    try:
        _encode(predictor, [example for _, example in part])
        good = list(part)
    except UserError as error:  # some picture, or something that no row is to blame for, such as a full disk
        for row, example in part:
            try:
                for image in example.images:
                    open_image(image)
                good.append((row, example))
            except UserError as fault:
                if not skip_bad_rows:
                    first_error = fault
                    break
                broken[row] = str(fault)
        if len(good) == len(part):
            raise error
    answers = predictor.predict([example for _, example in good], task) if good else []
    texts = {row: answer for (row, _), answer in zip(good, answers, strict=True)}
    for row, example in part:
        if row in texts:
            _write(file, row, example, {"answer": texts[row]})
        elif row in broken:
            _write(file, row, example, {"error": broken[row]})
    file.flush()
    if first_error is not None:
        raise first_error
    return len(good), len(broken)


def _encode(predictor: VQAPredictor, examples: Sequence[Example]) -> None:
    """Encode the pictures of a chunk together, before any of it is answered."""
    images = [image for example in examples for image in example.images]
    for cache in predictor.engine.assembly.caches:
        if images:
            cache.load(images)  # not `fill`, which would hold the features of the whole job in the cache


def _write(file: IO[str], row: int, example: Example, result: dict[str, str]) -> None:
    line: dict[str, Any] = {"row": row, "id": example.id, "image": example.images[0].label if example.images else None}
    if example.question:
        line["question"] = example.question
    line |= result
    if example.answers:
        line["reference"] = list(example.answers)
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _answered_rows(out: Path, examples: Sequence[Example]) -> set[int]:
    """Rows that an earlier, stopped job has answered; a half-written last line is cut off.

    Raises:
        UserError: the file holds something else, or answers to other rows.
    """
    if not out.exists():
        return set()
    if out.is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file such as answers.jsonl")
    content = out.read_bytes()
    whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    if not _LINE_START.startswith(rest[: len(_LINE_START)]):
        raise UserError(f"--out {out}: its last line is not an answer of this input; name another file")
    done: set[int] = set()
    for number, line in enumerate(whole.splitlines(), start=1):  # of bytes: only real line ends count
        try:
            found = json.loads(line)
            row, question, image = int(found["row"]), found.get("question"), found["image"]
            example = examples[row - 1]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"--out {out}, line {number}: not an answer of this input; name another file") from error
        if image != example.images[0].label or (question is not None and question != example.question):
            raise UserError(f"--out {out}, line {number}: answers another row than {example.where}; name another file")
        done.add(row)
    if rest:  # the job was killed in the middle of a line
        os.truncate(out, len(whole))
    return done
