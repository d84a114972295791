"""Scores of an adapter on a data set, with the controls that belong beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters.data.caption_batches import group_captions
from adapters.data.examples import DataSet, Example
from adapters.data.image_ref import ImageRef, blank_image
from adapters.data.readers import read_data
from adapters.evaluation.captions import score_captions
from adapters.evaluation.java_scores import java_scores
from adapters.evaluation.retrieval import recalls
from adapters.evaluation.vqa import commonest_answer_score, exact_match, interval_by_picture, score
from adapters.inference.retrieval import RERANKED, Retriever
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter


def evaluate(
    engine: LoadedAdapter,
    data: str | Path,
    *,
    task: str = "vqa",
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    offline: bool = False,
    batch_size: int = 64,
    decoding: Decoding | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Score short answers or captions.

    Args:
        engine: the loaded adapter.
        data: a data file with answers, or a packaged set.
        task: "vqa" or "caption".
        blank_images: the control: every picture is replaced by a mid-grey one.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        offline: do not fetch a packaged set.
        batch_size: prompts generated together.
        decoding: how tokens are chosen; as the adapter usually does if left out.
        on_progress: called with (done, total) distinct questions or pictures.
        tell: called with a line for each score of captions that is left out, and why.

    Returns:
        Of answers "n", "pictures", "exact_match" and "vqa_accuracy" as fractions, "exact_match_low" and
        "exact_match_high" if there are two pictures or more (the 95 % interval by picture), "skipped", and
        "commonest_answer": exact match of giving each question the answer it most often has in this very set, which
        needs no picture and no model. Of captions "n" pictures, "BLEU-1" to "BLEU-4" and "ROUGE-L" as fractions,
        "CIDEr", "skipped", and "METEOR" and "SPICE" if Java can compute them.

    Raises:
        UserError: the data cannot be read, or the task has no scores here.
    """
    if task not in ("vqa", "caption"):
        raise UserError(f"--task {task}: an LLM's answers are scored as vqa or caption")
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
    said = engine.answer(asked, task, decoding=decoding, batch_size=batch_size, on_progress=on_progress)
    answers = [example.answers for example in examples]
    if task == "caption":
        language = languages.pop()
        by_java, left_out = java_scores(said, answers, language=language)
        if tell is not None:
            for reason in left_out.values():
                tell(reason)
        return {**score_captions(said, answers, language=language), **by_java, "skipped": len(rows.skipped)}
    pictures = [_digests(example) for example in examples]
    scores = {"n": len(examples), "pictures": len(set(pictures)), **score(said, answers)}
    if scores["pictures"] > 1:
        hits = [exact_match(*pair) for pair in zip(said, answers, strict=True)]
        scores["exact_match_low"], scores["exact_match_high"] = interval_by_picture(hits, pictures)
    return {
        **scores,
        "commonest_answer": commonest_answer_score([example.question for example in examples], answers),
        "skipped": len(rows.skipped),
    }


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
