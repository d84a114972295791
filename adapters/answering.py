"""Answers for many questions at once: the loop that validation, evaluation, batch jobs and the page share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from adapters.assembly import Assembly
from adapters.data.batches import prompt_for
from adapters.data.collate import collate_prompts
from adapters.data.examples import Example
from adapters.data.images import ImageRef
from adapters.data.prompts import Prompt
from qformer.decoding import Decoding


@torch.no_grad()
def answer_examples(
    assembly: Assembly,
    examples: Sequence[Example],
    task: str,
    *,
    decoding: Decoding,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer questions about pictures.

    A question asked twice about one picture is answered once, and a picture goes through the bridge once a batch,
    however many questions it has there. Batches hold prompts of like length; an answer does not depend on its batch.

    Args:
        assembly: the loaded model.
        examples: what is asked; answers they may hold are not looked at.
        task: "vqa" or "caption".
        decoding: how tokens are chosen.
        batch_size: prompts generated together.
        on_progress: called with (done, total) after each batch.

    Returns:
        One text an example, in their order.
    """
    prompts = [prompt_for(example, task, assembly.prompts) for example in examples]
    keys = [
        (tuple(image.digest() for image in example.images), prompt.ids)
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    first: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    order = sorted(first.values(), key=lambda index: (len(prompts[index].ids), keys[index]))
    texts: dict[int, str] = {}
    assembly.model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[index] for index in chosen]
        embeddings = _embeddings(assembly, [examples[index] for index in chosen])
        for index, text in zip(chosen, generate_texts(assembly, batch, embeddings, decoding), strict=True):
            texts[index] = text
        if on_progress:
            on_progress(min(start + batch_size, len(order)), len(order))
    return [texts[first[key]] for key in keys]


def generate_texts(
    assembly: Assembly, prompts: Sequence[Prompt], image_embeddings: Tensor, decoding: Decoding
) -> list[str]:
    """Generate from prompts whose images' vectors are at hand, [I, Q, D_l] in reading order."""
    side = "right" if assembly.model.language.is_encoder_decoder else "left"
    batch = collate_prompts(prompts, assembly.prompts.tokenizer.pad_token_id, side=side).to(assembly.model.device)
    ids = assembly.model.generate(batch, image_embeddings, decoding)
    # What stands behind a stop is filling, and its kind depends on the rows beside it
    stops = set(assembly.model.language.stop_ids)
    rows = [list(takewhile(lambda token: token not in stops, row)) for row in ids.tolist()]
    return [assembly.prompts.decode(row) for row in rows]


def _embeddings(assembly: Assembly, examples: Sequence[Example]) -> Tensor:
    """Vectors of all the pictures of a batch, [I, Q, D_l]; each distinct (picture, instruction) is computed once."""
    reads_question = assembly.reads_instructions
    places: dict[tuple[str, str], int] = {}
    images: list[ImageRef] = []
    instructions: list[str] = []
    wanted: list[int] = []
    for example in examples:
        instruction = example.question if reads_question else ""
        for image in example.images:
            key = (image.digest(), instruction)
            if key not in places:
                places[key] = len(images)
                images.append(image)
                instructions.append(instruction)
            wanted.append(places[key])
    if not images:
        return torch.empty(0, assembly.model.num_queries, assembly.model.language.width, device=assembly.model.device)
    return assembly.image_embeddings(images, instructions)[wanted]
