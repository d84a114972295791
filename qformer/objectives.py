"""The three objectives of BLIP-2's first stage (arXiv 2301.12597, section 3.2), and the heads they need.

ITC pulls a picture's queries and its text together, ITM distinguishes pairs that belong together from hard negatives,
and ITG writes the text from the queries. All three share one set of weights; what may see what differs:
`qformer.representation` runs the passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.config import BridgeConfig

_INITIAL_TEMPERATURE = 0.07  # CLIP's and BLIP-2's start
TEMPERATURE_RANGE = (0.001, 0.5)  # kept within it, as ALBEF does
_LABEL_SMOOTHING = 0.1  # in ITC and ITG
EMBEDDING_WIDTH = 256  # of the space that ITC compares in


@dataclass(frozen=True)
class Losses:
    """One loss an objective, each a mean and a scalar; BLIP-2 weighs them alike."""

    contrastive: Tensor
    matching: Tensor
    generation: Tensor

    @property
    def total(self) -> Tensor:
        """The sum that is minimised."""
        return self.contrastive + self.matching + self.generation


class Heads(nn.Module):
    """What the objectives put on top of the bridge.

    Args:
        config: the bridge's sizes.
        embedding_width: E, of the space that ITC compares in.
    """

    def __init__(self, config: BridgeConfig, embedding_width: int = EMBEDDING_WIDTH) -> None:
        super().__init__()
        width = config.hidden_size
        self.text_pooling = config.text_pooling
        self.image_projection = nn.Linear(width, embedding_width)
        self.text_projection = nn.Linear(width, embedding_width)
        self.temperature = nn.Parameter(torch.tensor(_INITIAL_TEMPERATURE))
        self.matching = nn.Linear(width, 2)
        # BERT's masked-word head: its last map is the table of words itself, with a bias of its own
        self.word_map = nn.Linear(width, width)
        self.word_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for module in (self.image_projection, self.text_projection, self.matching, self.word_map):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def image_embeddings(self, queries: Tensor) -> Tensor:
        """Queries [I, Q, D] to unit vectors [I, Q, E]."""
        return F.normalize(self.image_projection(queries).float(), dim=-1)

    def text_embeddings(self, text: Tensor, mask: Tensor) -> Tensor:
        """Text [T, L, D] and where it has tokens, [T, L], to the unit vector of each, [T, E]."""
        if self.text_pooling == "mean":
            present = mask.unsqueeze(-1)
            pooled = (text * present).sum(dim=1) / present.sum(dim=1)
        else:
            pooled = text[:, 0]
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def matching_logits(self, queries: Tensor) -> Tensor:
        """Queries that have seen the text, [B, Q, D], to (no, yes) logits [B, 2]: the mean over the queries'."""
        return self.matching(queries).float().mean(dim=1)

    def word_logits(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Text outputs [N, D] to logits [N, V] over the table of words [V, D]."""
        mapped = self.word_norm(F.gelu(self.word_map(hidden)))
        return F.linear(mapped, words.to(mapped.dtype)).float() + self.word_bias

    def untouched(self) -> Tensor:
        """A loss of 0 that has the heads of ITM and ITG in its graph: several processes wait for all gradients."""
        heads = (self.matching, self.word_map, self.word_norm)
        unused = [self.word_bias, *(parameter for head in heads for parameter in head.parameters())]
        return torch.stack([parameter.sum() for parameter in unused]).sum() * 0.0

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Hold the temperature in its range; to be called after each optimiser step."""
        self.temperature.clamp_(*TEMPERATURE_RANGE)


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine similarity of pictures and texts: that of the query nearest to the text.

    Args:
        images: unit vectors [I, Q, E].
        texts: unit vectors [T, E].

    Returns:
        [I, T].
    """
    return torch.einsum("iqe,te->iqt", images, texts).amax(dim=1)


def soft_targets(ids: Tensor, other_ids: Tensor) -> Tensor:
    """Each row's share over the columns that belong to the same picture, [N, M]; rows sum to 1.

    With one caption a picture this is the identity; several captions of one picture share its mass.
    """
    same = (ids[:, None] == other_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True)


def contrastive_loss(
    scores: Tensor, image_ids: Tensor, text_ids: Tensor, *, rows: slice = slice(None), text_rows: slice = slice(None)
) -> Tensor:
    """ITC: cross-entropy over texts for each picture and over pictures for each text, averaged.

    Args:
        scores: [I, T] similarities over temperature, of all processes' pictures and texts.
        image_ids: [I], which picture each row is; a picture may occur twice.
        text_ids: [T], which picture each text belongs to.
        rows: the pictures whose loss is wanted: this process's.
        text_rows: the texts whose loss is wanted.
    """
    to_text = F.cross_entropy(
        scores[rows], soft_targets(image_ids[rows], text_ids), label_smoothing=_LABEL_SMOOTHING
    )  # over [i, T]
    to_image = F.cross_entropy(
        scores.T[text_rows], soft_targets(text_ids[text_rows], image_ids), label_smoothing=_LABEL_SMOOTHING
    )  # over [t, I]
    return (to_text + to_image) / 2


def hard_negatives(scores: Tensor, ids: Tensor, other_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw for each row a column of another picture, the likelier the more similar the two are.

    Args:
        scores: [N, M] similarities over temperature.
        ids: [N] pictures of the rows.
        other_ids: [M] pictures of the columns.
        generator: source of the draw.

    Returns:
        [N] column numbers. -1 if every column is of the row's own picture: there is no negative.
    """
    own = ids[:, None] == other_ids[None, :]
    # the small addend lets a row be drawn from though its similarities all but vanish
    weights = (
        (scores.float().softmax(dim=1) + 1e-4).nan_to_num(1.0).masked_fill(own, 0.0)
    )  # the loss shows a NaN; the draw must not fail on it
    none = own.all(dim=1)
    drawn = torch.multinomial(weights.masked_fill(none[:, None], 1.0), 1, generator=generator).squeeze(1)
    return drawn.masked_fill(none, -1)


def matching_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """ITM: two-way cross-entropy of [B, 2] logits; `matches` [B] is 1 if picture and text belong together."""
    return F.cross_entropy(logits, matches)


def generation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """ITG: cross-entropy of [N, V] logits at supervised positions with their next tokens [N], smoothed."""
    return F.cross_entropy(logits, labels, label_smoothing=_LABEL_SMOOTHING)
