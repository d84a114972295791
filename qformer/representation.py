"""BLIP-2's first stage: what text says about pictures, learned by norm, bridge and heads without a language model.

arXiv 2301.12597, section 3.2. A picture's keys and values are computed once a step and its queries once without text;
the three objectives share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qformer.attention import KeysValues, generation_mask, matching_mask
from qformer.bridge import QFormer
from qformer.feature_norm import FeatureNorm
from qformer.gathering import gather_rows, rank, world_size
from qformer.objectives import (
    Heads,
    Losses,
    contrastive_loss,
    generation_loss,
    hard_negatives,
    matching_loss,
    similarity,
)


@dataclass(frozen=True)
class TextBatch:
    """Texts in the bridge's vocabulary.

    Attributes:
        ids: [T, L], `[CLS]` first and `[SEP]` last.
        mask: [T, L] bool, True where there is a token.
        images: [T], the number of each text's picture among the batch's pictures; in rising order, each picture has
            at least one.
    """

    ids: Tensor
    mask: Tensor
    images: Tensor


class RepresentationModel(nn.Module):
    """Norm, bridge with its text branch, and the heads of the objectives.

    Args:
        feature_norm: norm over the towers' features.
        bridge: a Q-Former with text.
        heads: of the objectives.
        decode_id: the token that takes the place of `[CLS]` when text is written (BLIP-2's `[DEC]`).
        compute_dtype: bfloat16 computes under autocast.
    """

    def __init__(
        self,
        feature_norm: FeatureNorm,
        bridge: QFormer,
        heads: Heads,
        *,
        decode_id: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if bridge.embeddings is None:
            raise ValueError("the first stage needs a bridge with text_branch")
        self.feature_norm = feature_norm
        self.bridge = bridge
        self.heads = heads
        self.decode_id = decode_id
        self.compute_dtype = compute_dtype

    @property
    def device(self) -> torch.device:
        """Where the bridge lies."""
        return self.bridge.query_tokens.device

    def forward(
        self,
        features: Sequence[Tensor],
        text: TextBatch,
        image_ids: Tensor,
        *,
        paired: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Losses:
        """The three losses of a batch; with several processes, of all their batches together.

        Each loss is the mean over this process's rows, ITG's weighed by its share of the tokens. If all processes'
        batches are of one size, the mean over processes is the loss of the whole.

        Args:
            features: one [I, P_i, D_i] a tower.
            text: the pictures' texts.
            image_ids: [I] which picture each row is, the same number for the same picture.
            paired: only the first so many pictures go through ITM and ITG, which cost most of a step; ITC, which needs
                many pictures at once, takes all. None for all; 0 leaves the two losses at 0.
            generator: source of the draw of hard negatives.
        """
        with self.autocast():
            seen = self.bridge.image_keys_values(self.feature_norm(self._on_device(features)))
            alone = self.bridge(None, image_keys_values=seen, return_keys_values=True)
            read = self.bridge(None, text_ids=text.ids, text_mask=text.mask)
            own_images = self.heads.image_embeddings(alone.queries)  # [I, Q, E]
            own_texts = self.heads.text_embeddings(read.text, text.mask)  # [T, E]
            text_of = image_ids[text.images]  # [T]
            all_images, all_texts = gather_rows(image_ids), gather_rows(text_of)
            first, first_text = rank() * len(image_ids), rank() * len(text_of)
            with torch.autocast(
                self.device.type, enabled=False
            ):  # cosines lie close together, and 1 / temperature is big
                near = similarity(gather_rows(own_images), gather_rows(own_texts))  # [I', T']
                scores = near / self.heads.temperature
                contrastive = contrastive_loss(
                    scores,
                    all_images,
                    all_texts,
                    rows=slice(first, first + len(image_ids)),
                    text_rows=slice(first_text, first_text + len(text_of)),
                )
            paired = len(image_ids) if paired is None else min(paired, len(image_ids))
            if paired == 0:
                return Losses(contrastive, self.heads.untouched(), self.heads.untouched())
            matching = self._matching(features, seen, text, scores.detach(), all_images, all_texts, paired, generator)
            generation = self._generation(alone.keys_values, text, paired)
        return Losses(contrastive, matching, generation)

    def _matching(
        self,
        features: Sequence[Tensor],
        seen: Sequence[KeysValues],
        text: TextBatch,
        scores: Tensor,
        all_images: Tensor,
        all_texts: Tensor,
        paired: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """ITM over three pairs a picture: its first text, that text with a hard picture, it with a hard text."""
        count = int(text.images.max()) + 1  # I, pictures of this process
        places = torch.arange(paired, device=self.device)
        chosen = torch.searchsorted(text.images, places)  # [paired], each picture's first text
        first, first_text = rank() * count, rank() * len(text.images)
        own = all_images[first : first + paired]
        wrong_text = hard_negatives(scores[first : first + paired], own, all_texts, generator)  # [paired]
        wrong_image = hard_negatives(scores.T[first_text + chosen], own, all_images, generator)  # [paired]
        kept = (wrong_text >= 0) & (wrong_image >= 0)
        if world_size() == 1:
            pool_ids, pool_mask = text.ids, text.mask
        else:  # negatives come from every process; texts may differ in length
            pool_ids, pool_mask = _gather_texts(text)
            gathered = [gather_rows(tower)[wrong_image.clamp_min(0)] for tower in self._on_device(features)]
            others = self.bridge.image_keys_values(self.feature_norm(gathered))
            seen = [
                KeysValues(torch.cat((a.keys, b.keys)), torch.cat((a.values, b.values)))
                for a, b in zip(seen, others, strict=True)
            ]
            wrong_image = torch.where(kept, count + places, -1)
        images = torch.cat((places, wrong_image[kept], places[kept]))
        texts = torch.cat((first_text + chosen, first_text + chosen[kept], wrong_text[kept]))
        matches = torch.zeros(len(images), dtype=torch.long, device=self.device)
        matches[:paired] = 1
        return matching_loss(self.match(_rows(seen, images), pool_ids[texts], pool_mask[texts]), matches)

    def match(self, seen: Sequence[KeysValues], ids: Tensor, mask: Tensor) -> Tensor:
        """(no, yes) logits [B, 2] of pictures, given by their keys and values, and texts [B, L]."""
        mask_all = matching_mask(self.bridge.config.num_queries, mask)
        together = self.bridge(None, image_keys_values=seen, text_ids=ids, self_mask=mask_all)
        return self.heads.matching_logits(together.queries)

    def _generation(self, past: Sequence[KeysValues], text: TextBatch, paired: int) -> Tensor:
        """ITG: each token from the queries and the tokens before it, in the texts of the first `paired` pictures."""
        count = int((text.images < paired).sum())  # [t] of [T]: texts are in their pictures' order
        targets, present = text.ids[:count], text.mask[:count]
        ids = targets.clone()
        ids[:, 0] = self.decode_id
        queries = self.bridge.config.num_queries
        mask = generation_mask(queries, present)[:, :, queries:]  # rows of the text alone
        own = _rows(past, text.images[:count])
        written = self.bridge(None, text_ids=ids, past=own, self_mask=mask).text  # [t, L, D]
        supervised = present[:, 1:]  # position l predicts token l + 1
        assert self.bridge.embeddings is not None
        logits = self.heads.word_logits(written[:, :-1][supervised], self.bridge.embeddings.words.weight)
        loss = generation_loss(logits, targets[:, 1:][supervised])
        if world_size() == 1:
            return loss
        tokens = supervised.sum().unsqueeze(0)  # texts differ in length, and each token of the whole counts alike
        return loss * (tokens / gather_rows(tokens).float().mean()).squeeze(0)

    # What retrieval asks ----------------------------------------------------------------------------------

    def encode_images(self, features: Sequence[Tensor]) -> Tensor:
        """Pictures' unit vectors, [I, Q, E]."""
        with self.autocast():
            normed = self.feature_norm(self._on_device(features))
            return self.heads.image_embeddings(self.bridge(normed).queries)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts' unit vectors, [T, E]."""
        with self.autocast():
            return self.heads.text_embeddings(self.bridge(None, text_ids=ids, text_mask=mask).text, mask)

    def match_scores(self, features: Sequence[Tensor], ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """Log-odds [B] that text b belongs to picture `images[b]` of the features'."""
        with self.autocast():
            seen = self.bridge.image_keys_values(self.feature_norm(self._on_device(features)))
            logits = self.match(_rows(seen, images), ids, mask)
        return logits[:, 1] - logits[:, 0]

    def autocast(self) -> torch.autocast:
        """Half precision if the computation is in it."""
        half = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if half else None, enabled=half)

    def _on_device(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [tower.to(device=self.device, dtype=torch.float32) for tower in features]


def _rows(layers: Sequence[KeysValues], rows: Tensor) -> list[KeysValues]:
    """The same layers' keys and values for the chosen rows of the batch."""
    return [KeysValues(layer.keys[rows], layer.values[rows]) for layer in layers]


def _gather_texts(text: TextBatch) -> tuple[Tensor, Tensor]:
    """All processes' ids and masks, padded to the longest."""
    longest = torch.tensor([text.ids.shape[1]], device=text.ids.device)
    width = int(gather_rows(longest).max())
    missing = (0, width - text.ids.shape[1])
    ids = torch.nn.functional.pad(text.ids, missing)
    return gather_rows(ids), gather_rows(torch.nn.functional.pad(text.mask, missing).long()).bool()
