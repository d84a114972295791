"""Scores of an adapter on a data set, with the controls that belong beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adapters.data.duplicates import copies_between_rows, describe_copies
from adapters.data.examples import DataSet, Example
from adapters.data.reading import read_data
from adapters.evaluation.calibration import calibrate as fit_and_check
from adapters.evaluation.report import Answered, Report, save_report
from adapters.evaluation.short_answers import pictures_of
from adapters.evaluation.wordnet import WordNet
from adapters.inference.reasoning import Passes
from adapters.inference.reasoning_controls import blanked
from adapters.inference.request import Completion
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, short_name
from serve.evaluation.answers import score_answers, score_caption_answers, score_probe_answers
from serve.evaluation.predictions import check_outputs, write_predictions
from serve.evaluation.training_rows import training_rows

MEASURES = {"vqa": "exact_match", "probes": "accuracy", "caption": "CIDEr"}  # what controls are compared by
_LEAST = 1e-30  # of a confidence, whose logarithm is taken
SHOWN = 3  # pairs of one picture in training and test that are named


def evaluate(
    adapter: LoadedAdapter,
    data: str | Path,
    *,
    task: str = "vqa",
    blank_images: bool = False,
    controls: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
    batch_size: int = 64,
    decoding: Decoding | None = None,
    predictions: str | Path | None = None,
    report: str | Path | None = None,
    match: str = "exact",
    wordnet: WordNet | None = None,
    against: LoadedAdapter | None = None,
    calibrate: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score short answers, yes-or-no probes or captions.

    Args:
        adapter: the loaded adapter.
        data: a data file with answers, or a packaged set.
        task: "vqa", "probes" or "caption".
        blank_images: one control alone: every picture is replaced by a mid-grey one.
        controls: ask twice more: about mid-grey pictures, and about other rows' pictures.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: do not fetch a packaged set.
        batch_size: prompts generated together.
        decoding: how tokens are chosen; as the adapter usually does if left out.
        predictions: a JSONL file to write, a line for each row in its order: "row", "image" (or "images"), "question",
            "kind" if the row has one, "answer", "prediction", "right" and "confidence"; of captions a line for each
            picture, without "question", and with "CIDEr" in place of "right".
        report: an HTML file to write (`adapters.evaluation.report`).
        match: of short answers: "exact", or "set": answers with commas are lists, in any order, and what is in one
            twice counts once, as DAQUAR's are.
        wordnet: of short answers: score WUPS too.
        against: of answers and probes: another adapter, which answers the same questions.
        calibrate: of answers and probes: fit the temperature of confidences; the adapter answers with it from now on.
        on_progress: called with (done, total) distinct questions or pictures.
        tell: called with a line for whatever the reader of the scores must know: pictures that training has too, what
            could not be compared, and each score that is left out, and why.

    Returns:
        Scores are fractions, but for CIDEr. NAME_low and NAME_high are a score's 95 % interval by picture, if there
        are two pictures or more. Of short answers "n", "pictures", "exact_match" and "vqa_accuracy" with intervals,
        "anls", and with a WordNet "wups_0.9" and "wups_0.0"; "confidence", the mean, and
        "expected_calibration_error"; "commonest_answer": exact match of giving each question its commonest answer,
        which needs no picture and no model, from "commonest_answer_from": "training" if the training's answers were
        counted, and "test" if those are not here any more as they were, so that this very set's were. With controls
        "blank_exact_match" and "shuffled_exact_match". "over_blank", "over_shuffled" and, from the training's answers,
        "over_commonest": how much higher the adapter scores, with intervals. "against": the other adapter's "name" and
        what `adapters.evaluation.comparison.compare_hits` says, the other as the second. With calibrate "temperature"
        and "calibrated_error", the expected calibration error of answers on pictures that a temperature was not fitted
        to. Then what
        `adapters.evaluation.breakdown.break_down` says. Of probes what `adapters.evaluation.probes.score_probes` says,
        also "by_kind", and "unclear" answers; the controls have "_accuracy", "_F1" and "_yes_rate". Of captions "n"
        pictures, "BLEU-1" to "BLEU-4", "ROUGE-L", "CIDEr" with its interval, "confidence", and "METEOR" and "SPICE" if
        Java can compute them; the controls have "_CIDEr". Of all "in_training": how many of the pictures training
        has too, near copies included (`adapters.data.duplicates`), None if its data are not here; and "skipped".

    Raises:
        UserError: the data cannot be read, the task has no scores here, something does not go with the task, there
            are no two pictures to shuffle, or a file cannot be written.
    """
    _check(task, match=match, controls=controls, blank_images=blank_images, wordnet=wordnet, against=against)
    if calibrate and (task == "caption" or blank_images):
        raise UserError("--calibrate goes with --task vqa or probes, and with pictures as they are")
    check_outputs(predictions, report, data, task)
    kind = "caption" if task == "caption" else "vqa"
    rows = read_data(
        data,
        task=kind,
        skip_bad_rows=skip_bad_rows,
        broken_pictures_too=True,
        limit=limit,
        columns=columns,
        allow_outside=allow_outside,
        offline=offline,
    )
    examples = rows.examples
    languages = {example.language for example in examples}
    if task == "caption" and len(languages) > 1:
        raise UserError(f"{data}: captions in {', '.join(sorted(languages))}; score one language a file")
    if task == "caption":
        examples = tuple(
            replace(examples[first], answers=texts) for first, texts in _captions_by_picture(rows).values()
        )
    passes = Passes(on_progress, len(examples), 1 + 2 * controls + (against is not None))
    say = tell or (lambda line: None)

    def ask(asked: Sequence[Example], other: LoadedAdapter | None = None) -> list[Completion]:
        shown = [blanked(example) for example in asked] if blank_images else asked
        how: Any = {"decoding": decoding, "batch_size": batch_size, "on_progress": passes.next()}
        return (other or adapter).reply(shown, kind, **how)

    learned = training_rows(adapter)
    in_training = _in_training(learned, rows, tell)
    known = [(row.question, row.answers) for row in learned.examples if row.question] if learned is not None else []
    second = None if against is None else (against.name, partial(ask, other=against))
    if task == "caption":
        scores, answered = score_caption_answers(
            examples, ask, language=languages.pop(), controls=controls, tell=say
        )  # fmt: skip
    elif task == "probes":
        scores, answered = score_probe_answers(
            examples, ask, known=known, controls=controls, against=second, tell=say
        )  # fmt: skip
    else:
        scores, answered = score_answers(
            examples, ask, known=known, sets=match == "set", wordnet=wordnet, controls=controls, against=second,
            tell=say,
        )  # fmt: skip
    if calibrate:
        scores |= _calibrated(adapter, answered)
    groups = {name: value for name, value in scores.items() if isinstance(value, dict | list)}
    single = {name: value for name, value in scores.items() if name not in groups}
    found = {**single, "in_training": in_training, "skipped": len(rows.skipped), **groups}
    if predictions is not None:
        write_predictions(predictions, answered, captions=task == "caption")
    if report is not None:
        chosen = decoding or adapter.default_decoding(kind)
        facts = [
            ("adapter", adapter.name), ("data", str(data)), ("task", task), ("rows", str(found["n"])),
            ("left out", f"{len(rows.skipped)} bad rows"), ("limit", "none" if limit is None else f"{limit} rows"),
            ("pictures", "every one replaced by a grey one" if blank_images else "as they are"),
            ("decoding", describe_decoding(chosen)), ("answers compared", "as sets" if match == "set" else "exactly"),
        ]  # fmt: skip
        title = f"{short_name(adapter.name)} on {Path(str(data)).name}"
        save_report(Report(title, facts, MEASURES[task], found, answered, sets=match == "set"), report)
    return found


def _check(
    task: str,
    *,
    match: str,
    controls: bool,
    blank_images: bool,
    wordnet: WordNet | None,
    against: LoadedAdapter | None,
) -> None:
    if task not in MEASURES:
        raise UserError(f"--task {task}: what an LLM writes is scored as {', '.join(MEASURES)}")
    check_match(match)
    if controls and blank_images:
        raise UserError("--blank-images is one of the --controls; leave it out")
    if task != "vqa" and (wordnet is not None or match != "exact"):
        raise UserError(f"--wordnet and --match go with --task vqa, not {task}")
    if task == "caption" and against is not None:
        raise UserError("--against goes with --task vqa or probes, not caption; compare takes captions' predictions")


def _calibrated(adapter: LoadedAdapter, answered: Sequence[Answered]) -> dict[str, float]:
    """Fit the temperature of an adapter's confidences, and answer with it from now on."""
    log_probs = [adapter.assembly.temperature * math.log(max(row.confidence, _LEAST)) for row in answered]
    try:
        temperature, error = fit_and_check(
            log_probs, [row.score for row in answered], pictures_of([row.example for row in answered])
        )
    except ValueError as problem:
        raise UserError(f"--calibrate: {problem}: give a file of 200 rows or more, on many pictures") from problem
    adapter.assembly.temperature = temperature
    return {"temperature": temperature, "calibrated_error": error}


def check_match(match: str) -> None:
    """Raise a UserError for a way of comparing that there is not."""
    if match not in ("exact", "set"):
        raise UserError(f"--match {match}: take exact or set")


def describe_decoding(decoding: Decoding) -> str:
    """How tokens are chosen, in words."""
    beams = "greedy" if decoding.num_beams == 1 else f"{decoding.num_beams} beams"
    return f"{beams}, {decoding.max_new_tokens} tokens at most"


def _in_training(learned: DataSet | None, rows: DataSet, tell: Callable[[str], None] | None) -> int | None:
    """How many of the rows' pictures training has too; the first of them are told. None if its rows are not here."""
    if learned is None:
        if tell is not None:
            tell("the adapter's training data are not here as they were, so these scores are not compared with them")
        return None
    found = copies_between_rows(learned.examples, rows.examples)
    count = len(found.pairs)
    if tell is not None and count:
        listed = "; ".join(describe_copies(found.pairs, SHOWN)) + ("; …" if count > SHOWN else "")
        tell(f"warning: {count} of the pictures are in the training data too, so the scores flatter: {listed}")
    if tell is not None and found.unreadable:
        listed = "; ".join(found.unreadable[:SHOWN]) + ("; …" if len(found.unreadable) > SHOWN else "")
        tell(f"{len(found.unreadable)} pictures could not be compared with the training data: {listed}")
    return count


def _digests(example: Example) -> tuple[str, ...]:
    return tuple(image.digest() for image in example.images)


def _captions_by_picture(rows: DataSet) -> dict[tuple[str, ...], tuple[int, tuple[str, ...]]]:
    """For each distinct picture, or several shown together: the row it first appears in, and all its rows' captions."""
    grouped: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {}
    for number, example in enumerate(rows.examples):
        first, texts = grouped.get(_digests(example), (number, ()))
        grouped[_digests(example)] = (first, texts + example.answers)
    return grouped
