"""Controls of a chain of thought: what is answered if the reasons, or the picture, are taken away or changed.

An answer that does not come from the reasons, or reasons that do not come from the picture, look just as well; these
are the rows of the paper's tables that tell them apart (Zhang et al. 2023, arXiv 2302.00923, sections 3 and 6).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef, blank_image
from adapters.inference.reasoned_answer import ReasonedAnswer
from adapters.inference.reasoning import Passes, reason_examples, trained_reasoning_mode
from adapters.loading.assembly import Assembly
from qformer.decoding import Decoding
from qformer.errors import UserError

CONTROLS = ("direct", "blind_rationale", "gold_rationale", "blank_images", "shuffled_images")


def reason_controls(
    assembly: Assembly,
    examples: Sequence[Example],
    *,
    answer_adapter: Assembly | None = None,
    votes: int = 1,
    decoding: Decoding | None = None,
    rationale_tokens: int | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[ReasonedAnswer]]:
    """What the same adapter answers if something is taken from it.

    Args:
        assembly: as for `reason_examples`, and so are the others.
        examples: rows with their given reasons.
        answer_adapter: as above.
        votes: as above, wherever reasons are written.
        decoding: as above.
        rationale_tokens: as above.
        batch_size: as above.
        on_progress: called with (done, total) over all controls.

    Returns:
        For each control the thoughts, in the order of the examples. "direct": asked for the answer without reasons,
        which says most if `reason.stages` names it too; "blind_rationale": the reasons are made from a grey
        picture, and the answer is given with the true one; "gold_rationale": the rows' own reasons are given;
        "blank_images": a grey picture in both stages; "shuffled_images": another row's picture in both. An adapter
        that answers directly has the last two, and rows without reasons no "gold_rationale".

    Raises:
        UserError: there are no two pictures to shuffle, or a stage is missing.
    """
    two = trained_reasoning_mode(assembly, answer_adapter) == "two-stage"
    swapped = shuffled(examples)
    blank = [blanked(example) for example in examples]
    gold = [example.rationale for example in examples]
    passes = Passes(on_progress, len(examples), (4 * votes + 2 + any(gold)) if two else 2)

    def run(asked: Sequence[Example], rationales: Sequence[str] | None = None) -> list[ReasonedAnswer]:
        thinks = two and rationales is None
        return reason_examples(
            assembly, asked, answer_adapter=answer_adapter, rationales=rationales, votes=votes if thinks else 1,
            decoding=decoding, rationale_tokens=rationale_tokens, batch_size=batch_size,
            on_progress=passes.next(2 * votes if thinks else 1),
        )  # fmt: skip

    found = {"blank_images": run(blank), "shuffled_images": run(swapped)}
    if two:
        found["direct"] = run(examples, [""] * len(examples))
        found["blind_rationale"] = run(examples, [thought.rationale or "" for thought in found["blank_images"]])
        if any(gold):
            found["gold_rationale"] = run(examples, gold)
    return {name: found[name] for name in CONTROLS if name in found}


def blanked(example: Example) -> Example:
    """The same question about grey pictures."""
    return replace(example, images=(blank_image(),) * len(example.images))


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """The same questions, each about another row's pictures; rows that shared theirs share them still.

    Raises:
        UserError: all rows of as many pictures have the same ones.
    """
    groups: dict[int, dict[tuple[str, ...], tuple[ImageRef, ...]]] = {}
    keys = [tuple(image.digest() for image in example.images) for example in examples]
    for key, example in zip(keys, examples, strict=True):
        groups.setdefault(len(key), {}).setdefault(key, example.images)
    others: dict[tuple[str, ...], tuple[ImageRef, ...]] = {}
    for distinct in groups.values():
        if len(distinct) < 2:
            raise UserError("--controls: there is one picture, and shuffling needs two; score more rows")
        order = list(distinct)
        random.Random(0).shuffle(order)
        others |= {key: distinct[order[place - 1]] for place, key in enumerate(order)}  # the one before, in a ring
    return [replace(example, images=others[key]) for key, example in zip(keys, examples, strict=True)]
