"""Many questions by script: rows in, rows out, results kept as they come, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from adapters.data.examples import Example, Fault
from qformer.errors import UserError
from qformer.file_lock import lock
from serve.batch.asking import Asking, Predictor
from serve.batch.blocks import Answerer, Block, OneProcess
from serve.batch.job import BatchJob, RowsDigest, check_same_job, read_job, write_job
from serve.batch.lines import FinishedRows
from serve.batch.ordered_lines import BatchReport, Writing
from serve.batch.rows import AskedRow, BatchRows
from serve.batch.tables import check_table, journal_of, write_table

_NAMED = 3  # missing pictures that a message names


def run_batch(
    source: str | Path,
    out: Path | str,
    predictor: Predictor | Answerer,
    *,
    task: str | None = None,
    questions: Sequence[str] = (),
    choices: Sequence[str] = (),
    logprobs: bool = False,
    min_confidence: float | None = None,
    rationale_tokens: int | None = None,
    votes: int = 1,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    allow_outside: bool = False,
    offline: bool = False,
    chunk: int = 128,
    write_every: float = 2.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> BatchReport:
    """Answer every row of a file into another; a job that was stopped goes on where it stopped.

    Each line of `out` has "row" (the row's number in the input, from 1; neither a header nor blank lines count), "id",
    "image" (or "images", a list, if the row has several), "question", "answer" and its "confidence"; "choices" with
    their probabilities, "logprobs", "rationale" or "embedding" if they were asked for; "reference" if the row held an
    answer; and the row's other columns. With `skip_bad_rows` a bad row's line has "row" and "error", and what could be
    read of the rest. Beside `out` a small `.job.json` file says what the answers were made by; the input may grow at
    its end between sittings. A name that ends in `.csv` or `.parquet` gets a table: its lines are kept in
    `OUT.rows.jsonl`, and the table is written from them when the job is done.

    Args:
        source: a data file with "image" and "question" columns, a packaged set, or a folder of pictures.
        out: the file to write.
        predictor: what answers: a `VQAPredictor`, or workers.
        task: "vqa", "caption", "reason" or "embed"; inferred from the rows if left out.
        questions: asked about every row; a column's value goes in for its name in braces.
        choices: what may be answered to all questions.
        logprobs: with each answer, its tokens and their log-probabilities.
        min_confidence: leave an answer empty whose confidence is below this.
        rationale_tokens: how long reasons may be; as the adapter's recipe says if left out.
        votes: reasons that are sampled for a question, whose answers are voted on.
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        limit: only the first so many good rows, with the bad ones among them.
        skip_bad_rows: write an error for a bad row and go on, instead of stopping there.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: do not fetch a packaged set.
        chunk: rows that are planned together: questions on one picture among them are asked together.
        write_every: seconds between two writes.
        on_progress: called with (rows done, rows in all) after each write.

    Raises:
        UserError: the input is bad, or a row that can be told without opening its picture: nothing is answered. A
            picture or a prompt is bad: what was answered before it is kept. Another job writes to `out`, or what is in
            it was made by another adapter, with another decoding, for another task or from other rows. Or its name is
            not that of a format that is written.
    """
    out = Path(out)
    check_table(out)
    journal = journal_of(out)
    listed: tuple[str, ...] = ()
    if choices:
        from serve.adapter import checked_choices  # which loads torch

        listed = checked_choices(choices)
    rows = BatchRows(
        source, task=task, questions=questions, columns=columns, choices=bool(listed), allow_outside=allow_outside,
        offline=offline,
    )  # fmt: skip
    asking = Asking(rows.task, listed, logprobs, rationale_tokens, votes)
    _check_asking(asking, min_confidence)
    before = read_job(journal)
    if before is None and journal != out and out.exists():
        raise UserError(
            f"--out {out}: it is there, and no {journal.name} beside it says what it was made from; name another file,"
            " or delete it"
        )
    _check_free(journal)
    survey = _survey(rows, limit, before, skip_bad_rows)
    answerer = predictor if isinstance(predictor, Answerer) else OneProcess(lambda: predictor)
    facts = answerer.facts(asking)
    job = BatchJob(
        source=rows.name,
        rows=survey.digest.rows,
        rows_digest=survey.digest.value(),
        adapter=facts.adapter,
        adapter_fingerprint=facts.fingerprint,
        task=rows.task,
        decoding=dict(facts.decoding),
        settings={
            "--columns": dict(columns or {}) or None,
            "--question": [one.text for one in rows.questions],
            "--choices": list(listed),
            "--logprobs": logprobs or None,
            "--min-confidence": min_confidence,
            "--rationale-tokens": rationale_tokens,
            "--votes": None if votes == 1 else votes,
            "--dtype": facts.dtype,
        },
    )
    if before is not None:
        check_same_job(journal, before, job, survey.same_as_before)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("ab", buffering=0) as file:
            if not lock(file):
                raise UserError(_busy(journal))
            if read_job(journal) != before:
                raise UserError(f"--out {journal}: another job wrote to it while this one read its input; start again")
            finished = FinishedRows(journal, questions=max(1, len(rows.questions)), rows=job.rows)
            if before is None or job.rows > before.rows:
                write_job(journal, job)
            writing = Writing(
                file, total=survey.asked, min_confidence=min_confidence, skip_bad_rows=skip_bad_rows,
                write_every=write_every, on_progress=on_progress,
            )  # fmt: skip
            report = _answer(_asked(rows, limit, survey), finished, answerer, asking, writing, chunk)
            if journal != out:
                write_table(journal, out)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); free space or name another file"
        ) from error
    return report


def _check_asking(asking: Asking, min_confidence: float | None) -> None:
    """See that no setting would be without effect."""
    if asking.choices and asking.task not in ("vqa", "reason"):
        raise UserError(f"--choices: --task {asking.task} has no answer to choose; leave it out")
    if asking.logprobs and asking.task == "embed":
        raise UserError("--logprobs: --task embed writes no tokens; leave it out")
    if asking.logprobs and asking.choices:
        raise UserError(
            "--logprobs: with --choices nothing is written, and each choice gets its probability; leave it out"
        )
    if asking.rationale_tokens is not None and asking.task != "reason":
        raise UserError(
            f"--rationale-tokens: --task {asking.task} gives no reasons; leave it out, or take --task reason"
        )
    if asking.votes > 1 and asking.task != "reason":
        raise UserError(f"--votes: --task {asking.task} gives no reasons; leave it out, or take --task reason")
    if asking.votes > 1 and asking.logprobs:
        raise UserError("--logprobs: with --votes an answer is what several came to; leave one of them out")
    if min_confidence is not None and asking.task == "embed":
        raise UserError("--min-confidence: --task embed has no confidence; leave it out")
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise UserError(f"--min-confidence {min_confidence}: give a number between 0 and 1")


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


@dataclass
class _Survey:
    """What a first walk through the rows has found.

    Attributes:
        digest: over the rows that were read.
        asked: how many questions there are, bad rows' among them.
        same_as_before: the rows of an earlier sitting are still those.
    """

    digest: RowsDigest = field(default_factory=RowsDigest)
    asked: int = 0
    same_as_before: bool = True


def _survey(rows: BatchRows, limit: int | None, before: BatchJob | None, skip_bad_rows: bool) -> _Survey:
    """Read all rows once: bad ones stop the job before anything is answered.

    What was read in an earlier sitting is read again, however few rows are asked for now: to compare it.
    """
    found = _Survey()
    good, bad, missing = 0, 0, 0
    first: Fault | None = None
    names: dict[str, None] = {}
    for row in rows:
        if good == limit and (before is None or found.digest.rows >= before.rows):
            break
        found.digest.add(row.digest)
        if before is not None and found.digest.rows == before.rows:
            found.same_as_before = found.digest.value() == before.rows_digest
        if good == limit:
            continue
        found.asked += len(row.asked)
        good += row.good
        fault = next((one.asked for one in row.asked if isinstance(one.asked, Fault)), None)
        if fault is not None:
            first, bad = first or fault, bad + 1
            missing += fault.missing is not None
            if fault.missing is not None and len(names) <= _NAMED:
                names[fault.missing] = None
    if first is not None and not (skip_bad_rows and good):
        raise UserError(_complaint(first, bad, good, missing, list(names), skip_bad_rows))
    if not good:
        raise UserError(f"{rows.source} holds no rows: give it at least one")
    return found


def _complaint(first: Fault, bad: int, good: int, missing: int, names: Sequence[str], skipping: bool) -> str:
    text = str(first)
    if first.missing is not None and missing > 1:
        text += f"; {missing} rows name pictures that are not there: {', '.join(names[:_NAMED])}"
        text += ", …" if len(names) > _NAMED else ""
    count = f"{bad} of {bad + good} rows are bad"
    if skipping:
        return f"{text}; {count}, so none are left"
    if not good:
        return f"{text}; {count}"
    return f"{text}; {count} (--skip-bad-rows writes what is wrong with each, and goes on)"


def _asked(rows: BatchRows, limit: int | None, survey: _Survey) -> Iterator[AskedRow]:
    """All that is asked, up to the good row that makes up the limit.

    Raises:
        UserError: the rows are not those of the survey any more.
    """
    digest, count = RowsDigest(), 0
    for row in rows:
        if count == survey.asked:
            break
        digest.add(row.digest)
        for one in row.asked:
            count += 1
            yield one
    if count < survey.asked or (limit is None and digest.value() != survey.digest.value()):
        raise UserError(f"{rows.source}: it was changed while its rows were answered; start again with another --out")


def _answer(
    asked: Iterator[AskedRow],
    finished: FinishedRows,
    answerer: Answerer,
    asking: Asking,
    writing: Writing,
    chunk: int,
) -> BatchReport:
    """Answer what has no line yet; the lines are written in the order of the rows."""

    def blocks() -> Iterator[Block]:
        examples: list[tuple[int, Example]] = []
        waiting: set[int] = set()
        number = 0
        for one in asked:
            if (one.number - 1) // chunk != number:
                if waiting:
                    yield Block(number, tuple(examples), frozenset(waiting))
                examples, waiting, number = [], set(), (one.number - 1) // chunk
            kind = finished.kind(one)
            if isinstance(one.asked, Example):
                examples.append((one.number, one.asked))
            if kind is not None:
                writing.count_earlier(kind)
                continue
            writing.expect(one)
            if isinstance(one.asked, Example):
                waiting.add(one.number)
        if waiting:
            yield Block(number, tuple(examples), frozenset(waiting))

    try:
        for piece in answerer.run(blocks(), asking):
            writing.take(piece.found)
    except BaseException as error:
        if not isinstance(error, OSError):
            with suppress(OSError):
                writing.write()  # what is ready
        raise
    writing.finish()
    return writing.report()
