"""Sample predictions of a run: the same few validation questions, with their pictures, at each validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.data.examples import Example, sample_evenly
from adapters.data.preview import draw_sheet
from adapters.evaluation.vqa import exact_match
from qformer.atomic import whole_file

SAMPLES = 8


def save_samples(
    folder: Path, step: int, examples: Sequence[Example], texts: Sequence[str], *, sets: bool = False
) -> NDArray[np.uint8]:
    """Draw `samples.png` of the newest validation and add its predictions to `samples.jsonl`.

    Args:
        folder: of the run.
        step: of the validation.
        examples: validation questions.
        texts: the adapter's answers to them.
        sets: as in `adapters.evaluation.vqa.exact_match`.

    Returns:
        The sheet, [height, width, 3].

    Raises:
        OSError: a file cannot be written.
    """
    chosen = sample_evenly(list(zip(examples, texts, strict=True)), SAMPLES)
    cells, lines = [], []
    for example, text in chosen:
        right = exact_match(text, example.answers, sets=sets)
        verdict = f"{text or '(nothing)'} – right" if right else f"{text or '(nothing)'} – wrong: {example.answers[0]}"
        cells.append(replace(example, answers=(verdict,)))
        lines.append(
            {
                "step": step,
                "images": [image.label for image in example.images],
                "question": example.question,
                "prediction": text,
                "answers": list(example.answers),
                "right": right,
            }
        )
    sheet, _, _ = draw_sheet(cells, f"validation questions at step {step}")
    with whole_file(folder / "samples.png") as partial:
        sheet.save(partial, format="PNG")
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return np.asarray(sheet)
