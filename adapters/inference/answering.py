"""Answers for many questions at once: the loop that validation, evaluation and batch jobs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adapters.data.batches import prompt_for
from adapters.data.examples import Example
from adapters.inference.generator import Generator
from adapters.inference.request import Completion, Request
from adapters.loading.assembly import Assembly
from qformer.decoding import Decoding


def answer_examples(
    assembly: Assembly,
    examples: Sequence[Example],
    task: str,
    *,
    decoding: Decoding,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer questions about pictures.

    A question asked twice about one picture is answered once, and a picture goes through the bridge and the first part
    of the prompt through the LLM once, however many questions there are about it.

    Args:
        assembly: the loaded model.
        examples: what is asked; answers they may hold are not looked at.
        task: "vqa" or "caption".
        decoding: how tokens are chosen.
        batch_size: prompts generated together, each beam counted as one.
        on_progress: called with (done, total) after each batch.

    Returns:
        One text an example, in their order.
    """
    said = reply_to_examples(
        assembly, examples, task, decoding=decoding, batch_size=batch_size, on_progress=on_progress
    )
    return [one.text for one in said]


def reply_to_examples(
    assembly: Assembly,
    examples: Sequence[Example],
    task: str,
    *,
    decoding: Decoding,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """As `answer_examples`, with what is known of each answer."""
    asked = [Request(prompt_for(example, task, assembly.prompts), example.images) for example in examples]
    return answer_all(assembly, asked, decoding, batch_size=batch_size, on_progress=on_progress)


def choose_for_examples(
    assembly: Assembly,
    examples: Sequence[Example],
    task: str,
    *,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """The probability of each of an example's choices as its answer, a list an example, in their order.

    Args:
        assembly: the loaded model.
        examples: what is asked, each with its choices.
        task: as for `answer_examples`.
        batch_size: questions whose pictures are looked at together.
        on_progress: called with (done, total) after each batch.
    """
    prompts = assembly.prompts
    generator = Generator(assembly)
    shares: list[list[float]] = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        asked = [Request(prompt_for(example, task, prompts), example.images) for example in part]
        worded = [[prompts.choice(choice, example.choices) for choice in example.choices] for example in part]
        shares += generator.choose(asked, worded)
        if on_progress:
            on_progress(min(start + batch_size, len(examples)), len(examples))
    return shares


def answer_all(
    assembly: Assembly,
    asked: Sequence[Request],
    decoding: Decoding,
    *,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """As `reply_to_examples`, from prompts that are made already."""
    keys = [(tuple(image.digest() for image in one.images), one.prompt.ids) for one in asked]
    first: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    # Questions about one picture follow each other, so that it is read once; pictures with questions of like length too
    longest: dict[tuple[str, ...], int] = {}
    for pictures, ids in first:
        longest[pictures] = max(longest.get(pictures, 0), len(ids))
    order = sorted(
        first.values(), key=lambda index: (longest[keys[index][0]], keys[index][0], len(keys[index][1]), keys[index][1])
    )
    generator = Generator(assembly)
    found: dict[int, Completion] = {}
    size = max(1, batch_size // decoding.num_beams)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        found |= zip(chosen, generator([asked[index] for index in chosen], decoding), strict=True)
        if on_progress:
            on_progress(min(start + size, len(order)), len(order))
    return [found[first[key]] for key in keys]
