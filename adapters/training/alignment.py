"""A head start for the bridge: pictures learn to name the words of their answers before the LLM is run.

BLIP-2 teaches its bridge what text says about a picture before the LLM joins (arXiv 2301.12597, section 3.1). This is
that idea in miniature, for a domain set alone, or behind a first stage, whose projection to the LLM is fresh: one of a
picture's vectors is to lie nearest to the LLM's own embedding of each word in the picture's answers. Two words that
often stand together, such as "red circle", are a name too, which lies between theirs: words alone would not say that
the circle is what is red. It costs no pass through the LLM, and the LLM then meets vectors that resemble words it
knows, instead of noise that it first learns to ignore.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters.data.tokenised import TokenisedPicture
from adapters.loading.assembly import Assembly

TEMPERATURE = 0.07  # fixed; that of ITC is learned, and starts here as well (`qformer.objectives`)
COMMON = 0.5  # a word in the answers of more than this share of the pictures tells nothing about any of them
RARE = 0.01  # two words that stand together with fewer of the pictures are no name

Name = tuple[int, ...]  # a token of the LLM, or two in a row


def align_words(
    assembly: Assembly,
    pictures: Sequence[TokenisedPicture],
    *,
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 5e-4,
    on_step: Callable[[int, float], None] | None = None,
) -> float:
    """Train norm, bridge and projection to name what answers say; the LLM gives its embeddings and nothing else.

    Args:
        assembly: its trainable parts, LoRA apart, are changed.
        pictures: tokenised training data; those of several images are left out.
        steps: optimiser steps.
        seed: of the order of the pictures.
        batch_size: pictures a step.
        learning_rate: of AdamW, falling linearly to 0.
        on_step: called with (steps done, loss).

    Returns:
        The last step's loss; 0.0 if no name tells pictures apart, so that there was nothing to learn.
    """
    single = (picture for picture in pictures if len(picture.images) == 1)
    bags = list(dict.fromkeys((picture.images[0], names_in(assembly, picture)) for picture in single))
    names = distinctive_names([bag for _, bag in bags], partial(is_word, assembly.prompts.tokenizer))
    column = {name: index for index, name in enumerate(names)}
    chosen = [(image, bag) for image, bag in bags if any(name in column for name in bag)]
    if len(names) < 2 or not chosen:
        return 0.0
    model = assembly.model
    table = model.language.base.get_input_embeddings().weight.detach().float()  # [V, D_l]
    mean = table.mean(dim=0)
    sums = [F.normalize(table[list(name)] - mean, dim=-1).sum(dim=0) for name in names]
    targets = F.normalize(torch.stack(sums), dim=-1)  # [W, D_l]
    parameters = [p for part in model.trainable_parts().values() for p in part.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(seed)
    model.train()
    value = 0.0
    for step in range(steps):
        batch = rng.sample(chosen, min(batch_size, len(chosen)))
        vectors = assembly.image_embeddings([image for image, _ in batch]).float()  # [B, Q, D_l]
        vectors = vectors[:, : model.bridge.config.num_queries]  # names that are read are not learned
        wanted = torch.zeros(len(batch), len(names), device=table.device)
        for row, (_, bag) in enumerate(batch):
            wanted[row, [column[name] for name in bag if name in column]] = 1.0
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


def names_in(assembly: Assembly, picture: TokenisedPicture) -> frozenset[Name]:
    """Tokens of the answers to a picture's questions, and each two in a row; special tokens left out."""
    special = set(assembly.prompts.tokenizer.all_special_ids)
    names: set[Name] = set()
    for question in picture.questions:
        for answer in question.answers:
            tokens = [token for token in answer if token not in special]
            names |= {(token,) for token in tokens} | set(pairwise(tokens))
    return frozenset(names)


def distinctive_names(bags: Sequence[frozenset[Name]], is_word: Callable[[int], bool]) -> list[Name]:
    """Names that tell pictures apart: not of most; of two words only if they stand together often, but not always."""
    seen = Counter(name for bag in bags for name in bag)
    most, fewest = COMMON * len(bags), RARE * len(bags)

    def is_pair(name: Name) -> bool:
        return fewest <= seen[name] < min(seen[(token,)] for token in name) and all(map(is_word, name))

    return sorted(name for name in seen if seen[name] <= most and (len(name) == 1 or is_pair(name)))


def is_word(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token holds a letter or a digit."""
    return any(character.isalnum() for character in tokenizer.decode([token]))
