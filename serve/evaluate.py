"""Scores of an adapter on a data set, with the controls that belong beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.data.caption_batches import group_captions
from adapters.data.duplicates import copies_between_rows, describe_copies
from adapters.data.examples import DataSet, Example
from adapters.data.image_ref import ImageRef, blank_image
from adapters.data.readers import read_data
from adapters.evaluation.breakdown import break_down
from adapters.evaluation.captions import score_captions
from adapters.evaluation.java_scores import java_scores
from adapters.evaluation.retrieval import recalls
from adapters.evaluation.vqa import commonest_answer_score, exact_match, interval_by_picture, score
from adapters.inference.answering import Completion
from adapters.inference.retrieval import RERANKED, Retriever
from qformer.atomic import whole_file
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter
from serve.training_rows import training_rows

SHOWN = 3  # pairs of one picture in training and test that are named


def evaluate(
    adapter: LoadedAdapter,
    data: str | Path,
    *,
    task: str = "vqa",
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    offline: bool = False,
    batch_size: int = 64,
    decoding: Decoding | None = None,
    predictions: str | Path | None = None,
    match: str = "exact",
    on_progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score short answers or captions.

    Args:
        adapter: the loaded adapter.
        data: a data file with answers, or a packaged set.
        task: "vqa" or "caption".
        blank_images: the control: every picture is replaced by a mid-grey one.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        offline: do not fetch a packaged set.
        batch_size: prompts generated together.
        decoding: how tokens are chosen; as the adapter usually does if left out.
        predictions: a JSONL file to write, a line for each row in its order: "row", "image" (or "images"), "question",
            "kind" if the row has one, "answer", "prediction", "right" and "confidence". Of answers only.
        match: "exact", or "set": answers with commas are lists, in any order, and what is in one twice counts once, as
            DAQUAR's are.
        on_progress: called with (done, total) distinct questions or pictures.
        tell: called with a line for whatever the reader of the scores must know: pictures that training has too, what
            could not be compared, and each score of captions that is left out, and why.

    Returns:
        Of answers "n", "pictures", "exact_match" and "vqa_accuracy" as fractions, "exact_match_low" and
        "exact_match_high" if there are two pictures or more (the 95 % interval by picture), "skipped", and
        "commonest_answer": exact match of giving each question its commonest answer, which needs no picture and no
        model. "commonest_answer_from" is "training" if the training's answers were counted, and "test" if those are
        not here any more as they were, so that this very set's were. "in_training" is how many of the pictures
        training has too, near copies included (`adapters.data.duplicates`); None if its data are not here. Then what
        `adapters.evaluation.breakdown.break_down` says. Of captions "n" pictures, "BLEU-1" to "BLEU-4" and "ROUGE-L"
        as fractions, "CIDEr", "in_training", "skipped", and "METEOR" and "SPICE" if Java can compute them.

    Raises:
        UserError: the data cannot be read, the task has no scores here, or `predictions` cannot be written.
    """
    if task not in ("vqa", "caption"):
        raise UserError(f"--task {task}: an LLM's answers are scored as vqa or caption")
    check_match(match)
    if predictions is not None:
        check_predictions(predictions, data, task)
    rows = read_data(
        data, task=task, skip_bad_rows=skip_bad_rows, broken_pictures_too=True, limit=limit, offline=offline
    )
    examples = rows.examples
    languages = {example.language for example in examples}
    if task == "caption" and len(languages) > 1:
        raise UserError(f"{data}: captions in {', '.join(sorted(languages))}; score one language a file")
    if task == "caption":
        examples = tuple(
            replace(examples[first], answers=texts) for first, texts in _captions_by_picture(rows).values()
        )
    blank = blank_image()
    asked = [
        replace(example, images=(blank,) * len(example.images)) if blank_images else example for example in examples
    ]
    how: Any = {"decoding": decoding, "batch_size": batch_size, "on_progress": on_progress}
    answers = [example.answers for example in examples]
    learned = training_rows(adapter)
    in_training = _in_training(learned, rows, tell)
    if task == "caption":
        said, language = adapter.answer(asked, task, **how), languages.pop()
        by_java, left_out = java_scores(said, answers, language=language)
        if tell is not None:
            for reason in left_out.values():
                tell(reason)
        found = {**score_captions(said, answers, language=language), **by_java}
        return {**found, "in_training": in_training, "skipped": len(rows.skipped)}
    sets = match == "set"
    told = adapter.reply(asked, task, **how)
    said = [one.text for one in told]
    if predictions is not None:
        _write_predictions(Path(predictions), examples, told, sets=sets)
    known = [(row.question, row.answers) for row in learned.examples if row.question] if learned is not None else []
    pictures = [_digests(example) for example in examples]
    scores: dict[str, Any] = {"n": len(examples), "pictures": len(set(pictures)), **score(said, answers, sets=sets)}
    hits = [exact_match(*pair, sets=sets) for pair in zip(said, answers, strict=True)]
    in_any_order = sum(exact_match(*pair, sets=True) for pair in zip(said, answers, strict=True)) - sum(hits)
    if in_any_order and tell is not None:
        tell(f"{in_any_order} more answers would be right as lists in any order, which --match set is for")
    if scores["pictures"] > 1:
        scores["exact_match_low"], scores["exact_match_high"] = interval_by_picture(hits, pictures)
    return {
        **scores,
        "commonest_answer": commonest_answer_score([row.question for row in examples], answers, known, sets=sets),
        "commonest_answer_from": "training" if known else "test",
        "in_training": in_training,
        "skipped": len(rows.skipped),
        **break_down(said, examples, sets=sets),
    }


def check_match(match: str) -> None:
    """Raise a UserError for a way of comparing that there is not."""
    if match not in ("exact", "set"):
        raise UserError(f"--match {match}: take exact or set")


def check_predictions(predictions: str | Path, data: str | Path, task: str) -> None:
    """Say what is wrong with a file for predictions before anything slow is done.

    Raises:
        UserError: it is the data file or a folder, its folder cannot be made, or the task has no predictions.
    """
    path = Path(predictions)
    if task != "vqa":
        raise UserError(f"--predictions goes with --task vqa, not {task}")
    if path.is_dir() or path.resolve() == Path(data).expanduser().resolve():
        what = "a folder" if path.is_dir() else "the data file itself"
        raise UserError(f"--predictions {predictions}: this is {what}; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: OSError) -> str:
    return f"--predictions {path}: cannot be written ({error.strerror}); free space or name another file"


def _write_predictions(path: Path, examples: Sequence[Example], told: Sequence[Completion], *, sets: bool) -> None:
    try:
        with whole_file(path) as building, building.open("w", encoding="utf-8") as file:
            for example, one in zip(examples, told, strict=True):
                file.write(json.dumps(_prediction(example, one, sets), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def _prediction(example: Example, said: Completion, sets: bool) -> dict[str, Any]:
    """A row as its file has it, with what was answered."""
    labels = [image.label for image in example.images]
    return {
        "row": example.row,
        **({"image": labels[0]} if len(labels) == 1 else {"images": labels}),
        "question": example.question,
        **({"kind": example.kind} if example.kind else {}),
        "answer": example.answers[0] if len(example.answers) == 1 else example.answers,
        "prediction": said.text,
        "right": exact_match(said.text, example.answers, sets=sets),
        "confidence": round(said.confidence, 4),
    }


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


def evaluate_retrieval(
    retriever: Retriever,
    data: str | Path,
    *,
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    offline: bool = False,
    rerank: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Score how pictures find their captions and captions their pictures, among all of a file's.

    Args:
        retriever: the loaded first stage.
        data: a file of captions.
        blank_images: the control: every picture is replaced by a mid-grey one.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        offline: do not fetch a packaged set.
        rerank: let ITM rank the best 16 by ITC again; "i2t_R@1" and the like are then its, and "itc_i2t_R@1" ITC's own.
        on_progress: called with (pairs done, pairs in all) of ITM.

    Returns:
        "n" pictures, "texts", R@1, R@5 and R@10 both ways as fractions, and "skipped".

    Raises:
        UserError: the data cannot be read.
    """
    rows = read_data(
        data, task="caption", skip_bad_rows=skip_bad_rows, broken_pictures_too=True, limit=limit, offline=offline
    )
    pictures = group_captions(rows.examples)
    if not pictures:
        raise UserError(f"{data}: no pictures with captions in English, which is what the text side reads")
    images: list[ImageRef] = [blank_image() if blank_images else picture.image for picture in pictures]
    texts = [text for picture in pictures for text in picture.captions]
    owners = [row for row, picture in enumerate(pictures) for _ in picture.captions]
    scores = retriever.scores(retriever.embed_images(images), retriever.embed_texts(texts))
    found: dict[str, float] = {"n": len(images), "texts": len(texts), "skipped": len(rows.skipped)}
    plain = recalls(scores, owners)
    if not rerank:
        return found | plain
    by_image, by_text = retriever.rerank(images, texts, scores, most=RERANKED, on_progress=on_progress)
    to_text, to_image = recalls(by_image, owners), recalls(by_text, owners)
    reranked = {name: (to_text if name.startswith("i2t") else to_image)[name] for name in plain}
    return found | reranked | {f"itc_{name}": value for name, value in plain.items()}


def _digests(example: Example) -> tuple[str, ...]:
    return tuple(image.digest() for image in example.images)


def _captions_by_picture(rows: DataSet) -> dict[tuple[str, ...], tuple[int, tuple[str, ...]]]:
    """For each distinct picture, or several shown together: the row it first appears in, and all its rows' captions."""
    grouped: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {}
    for number, example in enumerate(rows.examples):
        first, texts = grouped.get(_digests(example), (number, ()))
        grouped[_digests(example)] = (first, texts + example.answers)
    return grouped
