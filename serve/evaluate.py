"""Scores of an adapter on a data set, with the controls that belong beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters.data.images import blank_image
from adapters.data.readers import read_data
from adapters.evaluation.vqa import commonest_answer_score, score
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine import Engine


def evaluate(
    engine: Engine,
    data: str | Path,
    *,
    task: str = "vqa",
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    offline: bool = False,
    batch_size: int = 16,
    decoding: Decoding | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Score short answers.

    Args:
        engine: the loaded adapter.
        data: a data file with answers, or a packaged set.
        task: "vqa".
        blank_images: the control: every picture is replaced by a mid-grey one.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        offline: do not fetch a packaged set.
        batch_size: prompts generated together.
        decoding: how tokens are chosen; greedy where left out.
        on_progress: called with (done, total) distinct questions.

    Returns:
        "n", "exact_match" and "vqa_accuracy" as fractions, "skipped", and "commonest_answer": the exact match of
        giving each question the answer it most often has in this very set, which needs no picture and no model.

    Raises:
        UserError: the data cannot be read, or the task has no scores here.
    """
    if task != "vqa":
        raise UserError(f"--task {task}: only vqa can be scored by this version")
    rows = read_data(data, task=task, skip_bad_rows=skip_bad_rows, limit=limit, offline=offline)
    examples = rows.examples
    if blank_images:
        blank = blank_image()
        examples = tuple(replace(example, images=(blank,) * len(example.images)) for example in examples)
    said = engine.answer(examples, task, decoding=decoding, batch_size=batch_size, on_progress=on_progress)
    answers = [example.answers for example in examples]
    return {
        **score(said, answers),
        "commonest_answer": commonest_answer_score([example.question for example in examples], answers),
        "skipped": len(rows.skipped),
    }
