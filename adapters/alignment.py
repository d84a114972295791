"""A head start for the bridge: pictures learn to name the words of their answers before the LLM is run.

BLIP-2 teaches its bridge what text says about a picture before the LLM joins (arXiv 2301.12597, section 3.1). This is
that idea in miniature, for a domain set alone, or behind a first stage, whose projection to the LLM is fresh: one of a
picture's vectors is to lie nearest to the LLM's own embedding of each word in the picture's answers. It costs no pass
through the LLM, and the LLM then meets vectors that resemble words it knows, instead of noise that it first learns to
ignore.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.assembly import Assembly
from adapters.data.batches import Picture

TEMPERATURE = 0.07  # where CLIP and BLIP-2 start theirs
COMMON = 0.5  # a word in the answers of more than this share of the pictures tells nothing about any of them


def align_words(
    assembly: Assembly,
    pictures: Sequence[Picture],
    *,
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Train norm, bridge and projection to name the answers' words; the LLM gives its embeddings and nothing else.

    Args:
        assembly: its trainable parts, LoRA apart, are changed.
        pictures: tokenised training data; those of several images are left out.
        steps: optimiser steps.
        seed: of the order of the pictures.
        batch_size: pictures a step.
        learning_rate: of AdamW, falling linearly to 0.
        on_step: called with (steps done, loss).

    Returns:
        The last step's loss; 0.0 where no word tells pictures apart, so that there was nothing to learn.
    """
    bags = {picture: answer_words(assembly, picture) for picture in pictures if len(picture.images) == 1}
    seen = Counter(word for bag in bags.values() for word in bag)
    words = sorted(word for word, count in seen.items() if count <= COMMON * len(bags))
    column = {word: index for index, word in enumerate(words)}
    chosen = [picture for picture, bag in bags.items() if any(word in column for word in bag)]
    if len(words) < 2 or not chosen:
        return 0.0
    model = assembly.model
    table = model.language.base.get_input_embeddings().weight.detach().float()  # [V, D_l]
    mean = table.mean(dim=0)
    targets = F.normalize(table[torch.tensor(words, device=table.device)] - mean, dim=-1)  # [W, D_l]
    parameters = [p for part in model.trainable_parts().values() for p in part.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(seed)
    model.train()
    value = 0.0
    for step in range(steps):
        batch = rng.sample(chosen, min(batch_size, len(chosen)))
        vectors = assembly.image_embeddings([picture.images[0] for picture in batch]).float()  # [B, Q, D_l]
        wanted = torch.zeros(len(batch), len(words), device=table.device)
        for row, picture in enumerate(batch):
            wanted[row, [column[word] for word in bags[picture] if word in column]] = 1.0
        loss = naming_loss(vectors - mean, targets, wanted / wanted.sum(dim=1, keepdim=True))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        value = loss.item()
        if on_step:
            on_step(step + 1, value)
    return value


def naming_loss(vectors: Tensor, words: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of naming words, where a picture's similarity to a word is that of its nearest vector.

    Args:
        vectors: [B, Q, D] of pictures.
        words: [W, D], of length 1.
        wanted: [B, W], each row a distribution over the words.
    """
    similarity = (F.normalize(vectors, dim=-1) @ words.T).amax(dim=1)  # [B, Q, W] → [B, W], as BLIP-2's ITC
    return F.cross_entropy(similarity / TEMPERATURE, wanted)


def answer_words(assembly: Assembly, picture: Picture) -> frozenset[int]:
    """Token ids in the answers to a picture's questions, special tokens left out."""
    special = set(assembly.prompts.tokenizer.all_special_ids)
    return frozenset(
        token
        for question in picture.questions
        for answer in question.answers
        for token in answer
        if token not in special
    )
