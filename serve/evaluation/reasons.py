"""Scores of an adapter that reasons: its answers, its reasons, and the controls that show where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.data.answers import choice_letter, normalise
from adapters.data.examples import Example
from adapters.data.reading import read_data
from adapters.data.scienceqa import read_scienceqa, scienceqa_folder
from adapters.evaluation.breakdown import score_groups
from adapters.evaluation.calibration import expected_calibration_error
from adapters.evaluation.intervals import with_interval
from adapters.evaluation.rationales import language_control
from adapters.evaluation.report import Answered, Report, save_report
from adapters.evaluation.scienceqa import score_scienceqa
from adapters.evaluation.short_answers import mean, over, pictures_of
from adapters.evaluation.vqa import exact_match
from adapters.inference.reasoned_answer import ReasonedAnswer, ballots
from adapters.inference.reasoning import main_scores, reason_examples, score_thoughts, trained_reasoning_mode
from adapters.inference.reasoning_controls import blanked, reason_controls
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, short_name
from serve.evaluation.predictions import check_outputs, write_predictions
from serve.evaluation.run import describe_decoding


def evaluate_reasons(
    adapter: LoadedAdapter,
    data: str | Path,
    *,
    answer_adapter: LoadedAdapter | None = None,
    controls: bool = False,
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
    batch_size: int = 64,
    votes: int = 1,
    decoding: Decoding | None = None,
    rationale_tokens: int | None = None,
    predictions: str | Path | None = None,
    report: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Score answers and the reasons for them, as `adapters.evaluation.rationales.score_reasons` does.

    Args:
        adapter: the one that reasons, and answers too if there is no other; or one that answers directly.
        data: a file of rows with reasons, or FOLDER:SPLIT of ScienceQA.
        answer_adapter: another adapter that answers.
        controls: score `adapters.inference.reasoning_controls.reason_controls` too.
        blank_images: one of the controls alone: every picture is replaced by a mid-grey one.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: do not fetch a packaged set.
        batch_size: prompts generated together.
        votes: reasons that are sampled, whose answers are voted on.
        decoding: how tokens are chosen, and how long an answer may be; greedy and 32 tokens if left out.
        rationale_tokens: how long the reasons may be; as the adapter's recipe says if left out.
        predictions: a JSONL file to write, a line for each row, as `serve.evaluation.run.evaluate` writes it, with the
            "rationale" that was written.
        report: an HTML file to write (`adapters.evaluation.report`).
        on_progress: called with (done, total); if there are controls, first of them, and then of the rest.

    Returns:
        "n"; "no_choice", answers that are none of their choices; "accuracy", and with "_single_step", "_multi_step"
        and "_<kind>" behind it if rows say their steps and kind; "ROUGE-L" of the reasons with the same endings;
        "commonest_answer", the accuracy of giving each kind of question (all of them, if rows say no kind) its
        commonest answer in this very set, which needs no picture and no model; and "skipped". Of controls "accuracy"
        and "ROUGE-L" by steps, with the control's name and "_" before. All these are fractions. Of ScienceQA also
        its leaderboard's columns, in per cent (`adapters.evaluation.scienceqa.score_scienceqa`).

    Raises:
        UserError: the data cannot be read, an adapter was not taught its stage, or there are no two pictures to
            shuffle, or nothing to vote on.
    """
    if controls and blank_images:
        raise UserError("--blank-images is one of the --controls; leave it out")
    check_outputs(predictions, report, data, "reason")
    second = None if answer_adapter is None else answer_adapter.assembly
    thinks = trained_reasoning_mode(adapter.assembly, second) == "two-stage"
    ballots(decoding or Decoding(), votes, thinks=thinks)  # a mistake is reported before the data are read
    rows = read_data(
        data,
        task="reason",
        skip_bad_rows=skip_bad_rows,
        broken_pictures_too=True,
        limit=limit,
        columns=columns,
        allow_outside=allow_outside,
        offline=offline,
    )
    languages = {example.language for example in rows.examples}
    if len(languages) > 1:
        raise UserError(f"{data}: reasons in {', '.join(sorted(languages))}; score one language a file")
    examples = [blanked(example) for example in rows.examples] if blank_images else list(rows.examples)
    options: Any = {
        "answer_adapter": second,
        "votes": votes,
        "decoding": decoding,
        "rationale_tokens": rationale_tokens,
        "batch_size": batch_size,
        "on_progress": on_progress,
    }
    found: dict[str, float] = {}
    # first, since they may find that there is nothing to shuffle
    taken = reason_controls(adapter.assembly, examples, **options) if controls else {}
    for name, thoughts in taken.items():
        found |= {f"{name}_{score}": value for score, value in _control_scores(name, thoughts, examples).items()}
    thoughts = reason_examples(adapter.assembly, examples, **options)
    scores = {_plain(name): value for name, value in score_thoughts(thoughts, examples).items()}
    by_kind = [replace(example, question=example.kind or "") for example in examples]
    scores |= {"commonest_answer": language_control(by_kind)["accuracy"], "skipped": len(rows.skipped)}
    answered = _answered(thoughts, examples)
    if predictions is not None:
        write_predictions(predictions, answered)
    if report is not None:
        facts = [
            ("adapter", adapter.name), *([] if answer_adapter is None else [("answered by", answer_adapter.name)]),
            ("data", str(data)), ("task", "reason"), ("rows", str(len(examples))),
            ("left out", f"{len(rows.skipped)} bad rows"), ("limit", "none" if limit is None else f"{limit} rows"),
            ("pictures", "every one replaced by a grey one" if blank_images else "as they are"),
            ("votes", str(votes)), ("decoding", describe_decoding(decoding or Decoding())),
        ]  # fmt: skip
        title = f"{short_name(adapter.name)} on {Path(str(data)).name}"
        told = _told(scores["commonest_answer"], answered, {
            "blank": taken.get("blank_images", []), "shuffled": taken.get("shuffled_images", []),
        })  # fmt: skip
        save_report(Report(title, facts, "accuracy", told, answered), report)
    return scores | found | _leaderboard(data, thoughts, examples)


def _answered(thoughts: Sequence[ReasonedAnswer], examples: Sequence[Example]) -> list[Answered]:
    """Rows with what came of them, scored as `adapters.evaluation.rationales.score_reasons` does."""
    return [
        Answered(row, one.answer, one.confidence or 0.0, float(exact_match(one.answer, row.answers[:1])), one.rationale)
        for one, row in zip(thoughts, examples, strict=True)
    ]


def _told(
    commonest: float, answered: Sequence[Answered], controls: Mapping[str, Sequence[ReasonedAnswer]]
) -> dict[str, Any]:
    """What a report tells: the accuracy by kind, with intervals, and how far it is above each control."""
    examples = [row.example for row in answered]
    hits, pictures = [row.score for row in answered], pictures_of(examples)
    confidences = [row.confidence for row in answered]
    found: dict[str, Any] = {"n": len(hits), "pictures": len(set(pictures))}
    found |= with_interval("accuracy", hits, pictures)
    found |= {"confidence": mean(confidences), "commonest_answer": commonest, "commonest_answer_from": "test"}
    found["expected_calibration_error"] = expected_calibration_error(confidences, [hit == 1 for hit in hits])
    for name, thoughts in controls.items():
        if thoughts:
            blind = [row.score for row in _answered(thoughts, examples)]
            found |= {f"{name}_accuracy": mean(blind), **over(name, blind, hits, pictures)}
    return found | {"by_kind": score_groups([row.kind for row in examples], {"accuracy": hits}, pictures)}


def _control_scores(name: str, thoughts: Sequence[ReasonedAnswer], examples: Sequence[Example]) -> dict[str, float]:
    """Accuracy by steps, and ROUGE-L of reasons that the model wrote."""
    if name in ("direct", "gold_rationale"):
        thoughts = [replace(thought, rationale=None) for thought in thoughts]
    return {_plain(score): value for score, value in main_scores(score_thoughts(thoughts, examples)).items()}


def _plain(name: str) -> str:
    return name.removeprefix("rationale_")


def _leaderboard(data: str | Path, thoughts: Sequence[ReasonedAnswer], examples: Sequence[Example]) -> dict[str, float]:
    """ScienceQA's own columns; nothing for other data."""
    found = scienceqa_folder(data)
    if found is None:
        return {}
    problems = {problem.id: problem for problem in read_scienceqa(*found, need_images=False)}
    letters = [_letter(thought.answer, example.choices) for thought, example in zip(thoughts, examples, strict=True)]
    columns = score_scienceqa(letters, [problems[example.id] for example in examples])
    return {name: value for name, value in columns.items() if name not in ("n", "no_choice")}


def _letter(answer: str, choices: Sequence[str]) -> str:
    """The answer as ScienceQA's scores take it, such as "(A)"; "" if it is none of the choices."""
    said = normalise(answer)
    return next((choice_letter(n) for n, choice in enumerate(choices) if normalise(choice) == said), "")
