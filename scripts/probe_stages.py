"""What each stage of an adapter holds of its pictures: a linear probe on features, norm, queries and projection.

    .venv/bin/python scripts/probe_stages.py RUN --train train.jsonl --test test.jsonl

Each line is the exact match of ridge regression from what a picture is at that stage, and the question's words; the
ridge's strength is chosen by leaving training pictures out, never by the test file. The last line is the adapter's own
exact match. A stage that falls below the one before it loses what the pictures show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.data.image_ref import ImageRef
    from adapters.loading.assembly import Assembly
    from adapters.training.reader_fit import Look

CHUNK = 32  # pictures that go through the bridge at once


def main() -> int:
    """Read the flags, probe one stage after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", help="a run's folder, an artefact's, or a shipped adapter's name")
    parser.add_argument("--train", required=True, help="the data file that the probes learn from")
    parser.add_argument("--test", required=True, help="the data file that they are scored on")
    options = parser.parse_args()
    from adapters.artefact.artefact import load_artefact
    from adapters.data.batches import tokenise
    from adapters.data.reading import read_data
    from adapters.evaluation.vqa import score
    from adapters.inference.answering import answer_examples
    from adapters.training.controls import SHORT
    from adapters.training.reader_fit import probe_answers
    from qformer.errors import UserError

    try:
        assembly, _ = load_artefact(options.adapter)
        train, test = (read_data(file, task="vqa") for file in (options.train, options.test))
        pictures = tokenise(train, assembly.prompts, max_tokens=100_000)
    except UserError as error:
        print(f"probe_stages: {error}", file=sys.stderr)
        return 2
    answers = [example.answers for example in test.examples]
    asked = [(example.images[0], example.question) for example in test.examples]
    for name, look in stages(assembly).items():
        found = probe_answers(assembly, pictures, asked, look=look)
        if found is None:
            print("probe_stages: too few training questions, or too many different answers", file=sys.stderr)
            return 2
        print(f"{name:28} {score(found, answers)['exact_match']:.1%}", flush=True)
    texts = answer_examples(assembly, test.examples, "vqa", decoding=SHORT)
    print(f"{'the adapter':28} {score(texts, answers)['exact_match']:.1%}")
    return 0


def stages(assembly: Assembly) -> dict[str, Look]:
    """By name, what turns pictures into the tokens of a stage, [B, P, D] each."""
    import torch

    model = assembly.model

    def through(stage: Callable[[list[Tensor]], Tensor]) -> Look:
        @torch.no_grad()
        def look(images: Sequence[ImageRef]) -> Sequence[Tensor]:
            chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
            moved = ([tower.float().to(model.device) for tower in assembly.features(chunk)] for chunk in chunks)
            return [torch.cat([stage(towers).float().cpu() for towers in moved])]

        return look

    def norm(towers: list[Tensor]) -> Tensor:
        normed: Tensor = model.feature_norm(towers)
        return normed

    def queries(towers: list[Tensor]) -> Tensor:
        found: Tensor = model.bridge(norm(towers)).queries
        return found

    return {
        "features of the first tower": lambda images: assembly.features(images)[:1],
        "features of all towers": assembly.features,
        "after the norm": through(norm),
        "queries": through(queries),
        "projection": through(lambda towers: model.projection(queries(towers))),
    }


if __name__ == "__main__":
    sys.exit(main())
