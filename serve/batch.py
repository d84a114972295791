"""Many questions by script: rows in, rows out, results kept as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from adapters.data.batches import prompt_for
from adapters.data.examples import DataSet, Example, Fault
from adapters.data.images import open_image
from adapters.data.readers import read_data
from adapters.inference.answering import Completion, Request
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.file_lock import lock
from serve.adapter import LoadedAdapter, load_adapter, picture_ref
from serve.batch_job import BatchJob, check_same_job, digest_of, read_job, write_job

TASKS = ("vqa", "caption")
"""What a batch job may be."""

_TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".xlsx", ".xls", ".tar", ".gz", ".zst")
_LONG = 1024  # tokens of a prompt that is answered by itself
_LINE_START = b'{"row": '  # how every line of ours begins

Row = Example | Fault


class VQAPredictor:
    """Answers a batch of columns; the same class serves a plain loop and a worker of a data engine.

    Args:
        adapter: a run's folder, an artefact's folder or a shipped name.
        decoding: how tokens are chosen, for every task or by task; left out, as the adapter usually does.
        batch_size: prompts generated together.
        options: as `serve.adapter.load_adapter` takes them.
    """

    def __init__(
        self,
        adapter: str | Path | None = None,
        *,
        decoding: Decoding | Mapping[str, Decoding] | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        self.engine: LoadedAdapter = load_adapter(adapter, **options)
        self.decoding = decoding
        self.batch_size = batch_size

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Columns "image" (path, bytes or data URI, or a list of them) and "question" in.

        Out come these and "answer" and "confidence".

        Raises:
            UserError: a column is missing, or a picture cannot be read.
        """
        for column in ("image", "question"):
            if column not in batch:
                raise UserError(f"batch: there is no column '{column}'; rename yours to it")
        examples = []
        for row, (image, question) in enumerate(zip(batch["image"], batch["question"], strict=True)):
            chosen = image if isinstance(image, list | tuple) else [image]
            pictures = tuple(replace(picture_ref(picture), where=f"row {row}") for picture in chosen)
            examples.append(Example(pictures, str(question), (), where=f"row {row}", id=str(row)))
        said = self.predict(examples)
        return {**batch, "answer": [one.text for one in said], "confidence": [one.confidence for one in said]}

    def predict(self, examples: Sequence[Example], task: str = "vqa") -> list[Completion]:
        """Answers to examples, in their order.

        Raises:
            UserError: a picture cannot be read, or a question is longer than the language model reads.
        """
        lengths = [self.check_length(example, task) for example in examples]
        said: dict[int, Completion] = {}
        for batch_size, chosen in (
            (self.batch_size, [place for place, length in enumerate(lengths) if length <= _LONG]),
            (1, [place for place, length in enumerate(lengths) if length > _LONG]),  # the others need no such padding
        ):
            if chosen:
                asked = [examples[place] for place in chosen]
                found = self.engine.reply(asked, task, decoding=self.decoding_for(task), batch_size=batch_size)
                said |= zip(chosen, found, strict=True)
        return [said[place] for place in range(len(examples))]

    def check_length(self, example: Example, task: str) -> int:
        """The tokens of an example's prompt.

        Raises:
            UserError: they are more than the language model reads, or no prompt can be made.
        """
        prompt = prompt_for(example, task, self.engine.assembly.prompts)
        try:
            self.engine.check_length(Request(prompt, example.images))
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from None
        return len(prompt.ids)

    def decoding_for(self, task: str) -> Decoding:
        """How tokens are chosen for "vqa" or "caption"."""
        if isinstance(self.decoding, Decoding):
            return self.decoding
        return (self.decoding or {}).get(task) or self.engine.default_decoding(task)


@dataclass(frozen=True)
class BatchReport:
    """What a batch job came to; together these are the rows that were asked about.

    Args:
        answered: rows answered now.
        already: rows that were answered already.
        failed: bad rows: their lines hold an error, from now or from before.
    """

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

    Each line of `out` has "row" (the row's number in the input, from 1; neither a header nor blank lines count), "id",
    "image" (or "images", a list, if the row has several), "question", "answer" and its "confidence";
    "reference" if the row held an answer. With `skip_bad_rows` a bad row's line has "row" and "error", and
    what could be read of the rest. Beside `out` a small `.job.json` file says what the answers were made by; the input
    may grow at its end between sittings.

    Args:
        source: JSONL, JSON or CSV with "image" and "question" columns, or a packaged set.
        out: the JSONL file to write.
        predictor: what answers.
        task: "vqa" or "caption"; inferred from the rows if left out.
        limit: only the first so many good rows, with the bad ones among them.
        skip_bad_rows: write an error for a bad row and go on, instead of stopping there.
        offline: do not fetch a packaged set.
        chunk: rows between two writes.
        on_progress: called with (rows done, rows in all).

    Raises:
        UserError: the input is bad, or a row that can be told without opening its picture: nothing is answered. A
            picture or a prompt is bad: what was answered before it is kept in `out`. Another job writes to `out`, or
            what is in it was made by another adapter, with another decoding, for another task or from other rows. Or
            its name is not that of JSON lines.
    """
    out = Path(out)
    if out.suffix.lower() in _TABLES:
        raise UserError(f"--out {out}: JSON lines are written, whatever the name; name it {out.stem}.jsonl")
    before = read_job(out)
    _check_free(out)
    # What was read in an earlier sitting is read again, however few rows are asked for now: to compare it.
    reach = max(limit, before.rows if before else 0) if limit is not None else None
    data = read_data(source, task=task, need_answers=False, skip_bad_rows=skip_bad_rows, limit=reach, offline=offline)
    if data.task not in TASKS:
        raise UserError(f"{source}: rows with reasons; --task vqa answers their questions, without reasons")
    job = _job(data, predictor)
    if before is not None:
        check_same_job(out, before, job, data.row_digests)
    everything: list[Row] = [*data.examples, *data.faults]
    rows = sorted(everything, key=lambda row: row.row)
    asked = _first(rows, limit)
    counts = {"answer": 0, "error": 0}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a character is \\ud83d in JSON
            if not lock(file):
                raise UserError(_busy(out))
            if read_job(out) != before:
                raise UserError(f"--out {out}: another job wrote to it while this one read its input; start again")
            done = _finished_rows(out, {row.row: row for row in rows})
            waiting = [row for row in asked if row.row not in done]
            if before is None or job.rows > before.rows:
                write_job(out, job)
            for start in range(0, len(waiting), chunk):
                part = waiting[start : start + chunk]
                for kind in _answer_part(part, predictor, data.task, skip_bad_rows, file):
                    counts[kind] += 1
                if on_progress:
                    on_progress(len(asked) - len(waiting) + start + len(part), len(asked))
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); free space or name another file"
        ) from error
    earlier = [done[row.row] for row in asked if row.row in done]
    return BatchReport(counts["answer"], earlier.count("answer"), counts["error"] + earlier.count("error"))


def _check_free(out: Path) -> None:
    """Say before the input is read that another job writes."""
    try:
        if out.exists():
            with out.open("ab") as file:
                if not lock(file):
                    raise UserError(_busy(out))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error


def _busy(out: Path) -> str:
    return f"--out {out}: another job is writing to it; wait until it ends, or name another file"


def _job(data: DataSet, predictor: VQAPredictor) -> BatchJob:
    engine = predictor.engine
    return BatchJob(
        source=data.name,
        rows=len(data.row_digests),
        rows_digest=digest_of(data.row_digests),
        adapter=engine.name,
        adapter_fingerprint=engine.fingerprint(),
        task=data.task,
        decoding=asdict(predictor.decoding_for(data.task)),
    )


def _first(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """Rows up to the good one that makes up the limit."""
    chosen: list[Row] = []
    good = 0
    for row in rows:
        if good == limit:
            break
        chosen.append(row)
        good += isinstance(row, Example)
    return chosen


def _answer_part(
    part: Sequence[Row], predictor: VQAPredictor, task: str, skip_bad_rows: bool, file: IO[str]
) -> list[str]:
    """Answer a chunk of rows and write it; returns what each written line holds, "answer" or "error".

    Raises:
        UserError: a row is bad and bad rows are not to be skipped; those before it are written first.
    """
    examples = [row for row in part if isinstance(row, Example)]
    faults: dict[int, str] = {row.row: str(row) for row in part if isinstance(row, Fault)}
    stop: UserError | None = None
    try:
        answers = _answers(examples, predictor, task)
    except UserError:  # some row, or something that no row is to blame for, such as a full disk
        blamed = _blamed(examples, predictor, task)
        if not blamed:
            raise
        if skip_bad_rows:
            faults |= {row: str(fault) for row, fault in blamed.items()}
            good = [example for example in examples if example.row not in blamed]
        else:
            first = min(blamed)
            stop = blamed[first]
            good = [example for example in examples if example.row < first]
        answers = _answers(good, predictor, task)
    lines, kinds = [], []
    for row in part:
        if row.row in answers:
            said = answers[row.row]
            lines.append(_line(row, {"answer": said.text, "confidence": said.confidence}))
        elif row.row in faults:
            lines.append(_line(row, {"error": faults[row.row]}))
        else:
            break  # the row to stop at
        kinds.append("answer" if row.row in answers else "error")
    file.write("".join(lines))
    file.flush()
    if stop is not None:
        raise stop
    return kinds


def _answers(examples: Sequence[Example], predictor: VQAPredictor, task: str) -> dict[int, Completion]:
    """Answers by row. The pictures of all are encoded together, before any is answered."""
    images = [image for example in examples for image in example.images]
    if not images:
        return {}
    for cache in predictor.engine.assembly.caches:
        cache.load(images)  # not `fill`, which would hold the features of the whole job in the cache
    return dict(zip((example.row for example in examples), predictor.predict(examples, task), strict=True))


def _blamed(examples: Sequence[Example], predictor: VQAPredictor, task: str) -> dict[int, UserError]:
    """The rows that cannot be answered, for themselves, each with what is wrong with it."""
    faults: dict[int, UserError] = {}
    for example in examples:
        try:
            for image in example.images:
                open_image(image, where=example.where)  # the row of its own, not the first that names the picture
            predictor.check_length(example, task)
        except UserError as error:
            faults[example.row] = error
    return faults


def _line(row: Row, found: Mapping[str, str | float | None]) -> str:
    line: dict[str, Any] = {"row": row.row}
    if isinstance(row, Example):
        line |= {"id": row.id, **_pictures(row)}
        if row.question:
            line["question"] = row.question
    line |= {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    if isinstance(row, Example) and row.answers:
        line["reference"] = list(row.answers)
    return json.dumps(line, ensure_ascii=False) + "\n"


def _pictures(example: Example) -> dict[str, Any]:
    """The field that names a row's pictures in its line."""
    labels = [image.label for image in example.images]
    return {"image": labels[0]} if len(labels) == 1 else {"images": labels}


def _finished_rows(out: Path, rows: Mapping[int, Row]) -> dict[int, str]:
    """Rows that an earlier sitting is done with, and what their lines hold; a half-written last line is cut off.

    Raises:
        UserError: the file holds something else, or answers to other rows.
    """
    if not out.exists():
        return {}
    content = out.read_bytes()
    whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    if not _LINE_START.startswith(rest[: len(_LINE_START)]):
        raise UserError(f"--out {out}: its last line is not an answer of this input; name another file")
    done: dict[int, str] = {}
    for number, line in enumerate(whole.splitlines(), start=1):  # of bytes: only real line ends count
        try:
            found = json.loads(line)
            row = rows[found["row"]]
            kind = "error" if "error" in found else "answer"
            str(found[kind])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {out}, line {number}: not an answer of this input; name another file") from error
        if isinstance(row, Example):
            named = {name: found[name] for name in ("image", "images") if name in found}
            if named not in ({}, _pictures(row)) or found.get("question", row.question) != row.question:
                raise UserError(f"--out {out}, line {number}: answers another row than {row.where}; name another file")
        done[row.row] = kind
    if rest:  # the job was killed in the middle of a line
        os.truncate(out, len(whole))
    return done
