"""The whole path of a picture: frozen image encoder → norm → Q-Former → projection → frozen language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qformer.bridge import QFormer
from qformer.decoding import Decoding
from qformer.feature_norm import FeatureNorm
from qformer.generation import Generated, OnStep, PrefixCache, generate, prefill
from qformer.image_encoders import ImageEncoder
from qformer.language import LanguageModel
from qformer.objectives import Heads
from qformer.simple_bridges import SimpleBridge


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with places for images.

    Attributes:
        ids: [B, T], any valid id where `image_slots` is True.
        attention_mask: [B, T] long, or bool [B, 1, T, T] if several answers share a sequence.
        image_slots: [B, T] bool, True where a vector of an image goes; read row by row, they are filled in order.
        labels: [B, T] (causal) or [B, S] (encoder-decoder), or None when only asking.
        position_ids: [B, T], or None for 0, 1, 2, …
        weights: [B, T], what each label's loss counts, or None if all count alike.
        answer_slots: [B, T] bool, True where a vector of a read answer goes, filled as `image_slots` are; None if there
            is none.
    """

    ids: Tensor
    attention_mask: Tensor
    image_slots: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    weights: Tensor | None = None
    answer_slots: Tensor | None = None

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class VisionLanguageModel(nn.Module):
    """BLIP-2's second stage (arXiv 2301.12597, section 3.3), with LoRA on the language model.

    Args:
        encoders: the frozen image towers, one or two; may be empty if features come from a cache.
        feature_norm: trainable norm over the towers' features.
        bridge: the Q-Former.
        projection: linear layer from the bridge's width to the LLM's.
        language: the LLM.
        heads: of the first stage, if the adapter keeps its text side; no pass here uses them.
        read_vectors: how many vectors of each image come from elsewhere, behind the queries (`image_embeddings`).
        hide_queries: in training, the share of images with a reader whose queries are zeros; 1.0 hides all always.
    """

    def __init__(
        self,
        encoders: Sequence[ImageEncoder],
        feature_norm: FeatureNorm,
        bridge: QFormer | SimpleBridge,
        projection: nn.Linear,
        language: LanguageModel,
        *,
        heads: Heads | None = None,
        read_vectors: int = 0,
        hide_queries: float = 0.0,
    ) -> None:
        super().__init__()
        self.read_vectors = read_vectors
        self.hide_queries = hide_queries
        self.encoders = nn.ModuleList(encoders)
        self.feature_norm = feature_norm
        self.bridge = bridge
        self.projection = projection
        self.language = language
        self.heads = heads

    @property
    def device(self) -> torch.device:
        """Where the bridge lies."""
        return self.projection.weight.device

    @property
    def num_queries(self) -> int:
        """Vectors an image becomes, Q: the bridge's queries and what is read beside them."""
        return self.bridge.config.num_queries + self.read_vectors

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Training mode for what is trained; frozen towers stay in evaluation mode."""
        super().train(mode)
        self.encoders.train(False)
        for part in self.trainable_parts().values():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.train(False)  # frozen means no dropout
        return self

    def image_embeddings(
        self,
        features: Sequence[Tensor],
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Features of the towers, each [B, P_i, D_i], to vectors the LLM treats as words, [B, Q, D_l].

        Args:
            features: one tensor a tower.
            text_ids: [B, T] the instruction in the bridge's own vocabulary, if it is instruction-aware.
            text_mask: [B, T] bool, True where `text_ids` holds a token.
            read: [B, read_vectors, D_l], what was read of the pictures beside the queries; zeros if left out.
        """
        weight = self.projection.weight
        # moved as they are kept, which is half as much, and beside the GPU's work if their memory is pinned
        on_device = [tower.to(weight.device, non_blocking=True).float() for tower in features]
        with self.language.autocast():
            normed = self.feature_norm(on_device)  # [B, P, D_v]
            queries = self.bridge(normed, text_ids=text_ids, text_mask=text_mask).queries  # [B, Q, D_q]
            projected: Tensor = self.projection(queries)  # [B, Q, D_l]
        # without a reader there is nothing else to see
        if read is not None and self.hide_queries and (self.training or self.hide_queries == 1.0):
            projected = projected * (torch.rand(len(projected), 1, 1, device=weight.device) >= self.hide_queries)
        if not self.read_vectors:
            return projected
        if read is None:
            read = projected.new_zeros(len(projected), self.read_vectors, projected.shape[2])
        return torch.cat([projected, read.to(projected)], dim=1)

    def place(self, batch: TokenBatch, image_embeddings: Tensor, answers: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, D_l] with other vectors in their slots.

        Args:
            batch: B sequences.
            image_embeddings: [I, Q, D_l] of the images in reading order.
            answers: [A, S, D_l], what was read as answers, in reading order; zeros if left out.
        """
        embeds = self.language.embed(batch.ids)  # [B, T, D_l]
        flat = image_embeddings.to(embeds.dtype).flatten(0, 1)  # [I * Q, D_l]
        # [B, T, D_l]; out of place, so that gradients reach the projection
        placed = embeds.masked_scatter(batch.image_slots.unsqueeze(-1), flat)
        if batch.answer_slots is None:
            return placed
        slots = batch.answer_slots.unsqueeze(-1)
        if answers is None:
            return placed.masked_fill(slots, 0.0)
        return placed.masked_scatter(slots, answers.to(embeds).flatten(0, 1))

    def forward(
        self,
        batch: TokenBatch,
        features: Sequence[Tensor],
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        read: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Cross-entropy summed over the supervised tokens, and their number.

        Arguments as in `image_embeddings` and `place`.
        """
        if batch.labels is None:
            raise ValueError("a batch to learn from needs labels")
        return self.language.supervised_loss(
            self.place(batch, self.image_embeddings(features, text_ids, text_mask, read), answers),
            batch.attention_mask,
            batch.labels,
            position_ids=batch.position_ids,
            weights=batch.weights,
        )

    @torch.no_grad()
    def prefill(
        self, batch: TokenBatch, image_embeddings: Tensor, *, stopped: Callable[[], bool] | None = None
    ) -> list[PrefixCache]:
        """Read the first parts of prompts, all of one length; images' vectors [I, Q, D_l] in reading order.

        Raises:
            Stopped: `stopped`, which is looked at between parts of a long prompt, says so.
        """
        return prefill(self.language, self.place(batch, image_embeddings), stopped=stopped)

    @torch.no_grad()
    def generate(
        self,
        batch: TokenBatch,
        image_embeddings: Tensor,
        decoding: Decoding,
        *,
        prefixes: Sequence[PrefixCache | None] | None = None,
        answers: Tensor | None = None,
        on_step: OnStep | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Generated:
        """Answers to prompts, or to what comes after their prefixes; see `place` and `qformer.generation.generate`."""
        return generate(
            self.language,
            self.place(batch, image_embeddings, answers),
            batch.attention_mask,
            decoding,
            prefixes=prefixes,
            on_step=on_step,
            stopped=stopped,
        )

    def trainable_parts(self) -> dict[str, nn.Module]:
        """What an artefact holds besides LoRA: module by name."""
        parts: dict[str, nn.Module] = {
            "feature_norm": self.feature_norm,
            "bridge": self.bridge,
            "projection": self.projection,
        }
        return parts if self.heads is None else parts | {"heads": self.heads}
