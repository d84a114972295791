"""The Q-Former: learned queries that read frozen image features, and the text branch beside them.

BLIP-2 (arXiv 2301.12597, section 3.1) and InstructBLIP (arXiv 2305.06500, section 2.3). BERT's layout with
the norm after each block: self-attention shared by queries and text, cross-attention to the image for the
queries in every `cross_attention_every`-th layer, and a feed-forward block for queries and one for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.attention import AttentionOutput, KeysValues, MultiHeadAttention
from qformer.config import BridgeConfig

INIT_STD = 0.02
"""Standard deviation of fresh weights, queries and embeddings: BERT's and BLIP-2's."""


@dataclass
class QFormerOutput:
    """What a pass gives; None for a part that it did not have.

    Attributes:
        queries: [B, Q, D].
        text: [B, T, D].
        cross_attentions: for each layer that looks at the image, [B, H, Q, P]; if asked for.
        keys_values: for each layer, the self-attention's over [queries; text]; if asked for.
    """

    queries: Tensor | None = None
    text: Tensor | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    keys_values: tuple[KeysValues, ...] | None = None


class TextEmbeddings(nn.Module):
    """Word plus position embeddings; positions start at 0. The norm after them is the bridge's own."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_text_positions, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed `ids` [B, T] as [B, T, D]; ValueError if T is over the table of positions."""
        length, longest = ids.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ValueError(f"a text of {length} tokens is longer than max_text_positions ({longest})")
        return self.words(ids) + self.positions.weight[:length]


class AttentionBlock(nn.Module):
    """Attention, dropout, sum with its input, norm."""

    def __init__(self, config: BridgeConfig, *, kv_width: int | None = None) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            config.hidden_size, config.num_heads, kv_width=kv_width, dropout=config.dropout
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        *,
        projected: KeysValues | None = None,
        mask: Tensor | None = None,
        past: KeysValues | None = None,
        return_weights: bool = False,
    ) -> AttentionOutput:
        """As `MultiHeadAttention.forward`; `hidden` of the result is the block's output [B, N, D]."""
        attended = self.attention(hidden, projected=projected, mask=mask, past=past, return_weights=return_weights)
        return attended._replace(hidden=self.norm(self.dropout(attended.hidden) + hidden))


class FeedForward(nn.Module):
    """Two linear maps with an exact GELU between, dropout, sum with the input, norm."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.intermediate_size)
        self.outer = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        return self.norm(self.dropout(self.outer(F.gelu(self.inner(hidden)))) + hidden)


class QFormerLayer(nn.Module):
    """One layer; `cross_attention` is None if the layer does not look at the image."""

    def __init__(self, config: BridgeConfig, index: int) -> None:
        super().__init__()
        looks = index % config.cross_attention_every == 0
        self.self_attention = AttentionBlock(config)
        self.cross_attention = AttentionBlock(config, kv_width=config.encoder_width) if looks else None
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if config.has_text else None

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        image: KeysValues | None,
        *,
        self_mask: Tensor | None,
        image_mask: Tensor | None,
        past: KeysValues | None,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None, KeysValues]:
        """Run the layer over [queries; text].

        Args:
            hidden: [B, N, D], of which the first `num_queries` rows are queries and the rest text.
            num_queries: Q, or 0 in a text-only pass.
            image: keys and values of the picture, [B, H, P, D/H]; needed if there are queries and the layer looks.
            self_mask: bool, broadcastable to [B, 1, N, past + N].
            image_mask: bool [B, 1, 1, P].
            past: keys and values in front of this pass's.
            return_weights: compute the cross-attention weights.

        Returns:
            hidden [B, N, D], cross-attention weights [B, H, Q, P] or None, this pass's keys and values.
        """
        attended = self.self_attention(hidden, mask=self_mask, past=past)
        parts, weights = [], None
        if num_queries:
            queries = attended.hidden[:, :num_queries]  # [B, Q, D]
            if self.cross_attention is not None:
                looked = self.cross_attention(queries, projected=image, mask=image_mask, return_weights=return_weights)
                queries, weights = looked.hidden, looked.weights
            parts.append(self.query_feed_forward(queries))
        if hidden.shape[1] > num_queries and self.text_feed_forward is not None:
            parts.append(self.text_feed_forward(attended.hidden[:, num_queries:]))  # [B, T, D]
        return _join(parts), weights, attended.keys_values


class QFormer(nn.Module):
    """The bridge. Queries come out as [B, Q, D] whatever the number of image features.

    Fresh weights are drawn from N(0, 0.02), biases are 0 and norms 1, as in BERT. `torch.manual_seed` governs
    the draw, or `generator` if one is given.

    Args:
        config: the sizes.
        generator: source of the fresh weights, on the device of the parameters.
    """

    def __init__(self, config: BridgeConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.embeddings = TextEmbeddings(config) if config.has_text else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(QFormerLayer(config, index) for index in range(config.num_layers))
        self._draw(generator)

    def forward(
        self,
        image_features: Tensor | None,
        *,
        image_keys_values: Sequence[KeysValues] | None = None,
        image_mask: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        past: Sequence[KeysValues] | None = None,
        return_attentions: bool = False,
        return_keys_values: bool = False,
    ) -> QFormerOutput:
        """One pass: queries only, queries and text, or text only (`image_features` None).

        Args:
            image_features: [B, P, encoder_width].
            image_keys_values: what `image_keys_values` made of the features, in their place.
            image_mask: [B, P], true where a row has a feature; all true if left out. It does not go together with
                `patch_dropout` in training.
            text_ids: [B, T] token ids: the caption in stage 1, the instruction if `instruction_aware`.
            text_mask: [B, T], true for a token, false for padding; all true if left out.
            self_mask: bool, broadcastable to [B, 1, N, N] over [queries; text], True = may attend. Given, it
                alone decides (`qformer.attention` has stage 1's three); else everything but padding is seen.
            past: `keys_values` of a queries-only pass, for a text-only pass to look at in front of itself
                (the caption loss reuses the contrastive pass so). `self_mask` is then over [T, past + T]:
                `generation_mask(...)[:, :, Q:]`. Text positions start at 0 all the same.
            return_attentions: give the cross-attention weights; the outputs stay the same.
            return_keys_values: give each layer's keys and values, not detached.

        Raises:
            ValueError: arguments that do not go together, or shapes that do not fit the configuration.
        """
        self._check(image_features, image_keys_values, image_mask, text_ids, past)
        if image_features is not None:
            image_keys_values = self.image_keys_values(image_features)
        parts, num_queries = [], 0
        if image_keys_values is not None:
            num_queries = self.config.num_queries
            parts.append(self.query_tokens.expand(image_keys_values[0].keys.shape[0], -1, -1))  # [B, Q, D]
        if text_ids is not None and self.embeddings is not None:
            parts.append(self.embeddings(text_ids))  # [B, T, D]
        hidden = self.dropout(self.norm(_join(parts)))  # [B, N, D]

        if self_mask is None and text_mask is not None and text_ids is not None:
            before = num_queries if past is None else past[0].keys.shape[2]
            self_mask = F.pad(text_mask.bool(), (before, 0), value=True)[:, None, None, :]  # [B, 1, 1, before + T]
        if image_mask is not None:
            image_mask = image_mask.bool()[:, None, None, :]  # [B, P] → [B, 1, 1, P]

        attentions: list[Tensor] = []
        keys_values: list[KeysValues] = []
        of_image = iter(image_keys_values or ())
        for index, layer in enumerate(self.layers):
            hidden, weights, own = layer(
                hidden,
                num_queries,
                next(of_image, None) if layer.cross_attention is not None else None,
                self_mask=self_mask,
                image_mask=image_mask,
                past=None if past is None else past[index],
                return_weights=return_attentions,
            )
            if weights is not None:
                attentions.append(weights)
            if return_keys_values:
                keys_values.append(own)
        return QFormerOutput(
            queries=hidden[:, :num_queries] if num_queries else None,
            text=hidden[:, num_queries:] if text_ids is not None else None,
            cross_attentions=tuple(attentions) if return_attentions and num_queries else None,
            keys_values=tuple(keys_values) if return_keys_values else None,
        )

    def image_keys_values(self, image_features: Tensor) -> list[KeysValues]:
        """The picture as each layer that looks at it sees it, for several passes over one picture.

        In training `patch_dropout` leaves some patches out, P - K of them.

        Args:
            image_features: [B, P, encoder_width].

        Returns:
            One [B, H, K, D/H] of keys and of values for each layer with cross-attention.
        """
        # Cached features may be half precision; outside autocast a linear map takes its own type only.
        features = self._some(image_features).to(self.query_tokens.dtype)
        blocks = [layer.cross_attention for layer in self.layers if isinstance(layer, QFormerLayer)]
        return [block.attention.project(features) for block in blocks if block is not None]

    def _some(self, features: Tensor) -> Tensor:
        """[B, P, D] → [B, K, D]: in training a picture's patches without those that are dropped, at least one."""
        if not self.training or not self.config.patch_dropout:
            return features
        count = max(1, round(features.shape[1] * (1 - self.config.patch_dropout)))
        kept = torch.rand(features.shape[:2], device=features.device).topk(count, dim=1).indices  # [B, K]
        return features.gather(1, kept.unsqueeze(-1).expand(-1, -1, features.shape[2]))

    def _check(
        self,
        image_features: Tensor | None,
        image_keys_values: Sequence[KeysValues] | None,
        image_mask: Tensor | None,
        text_ids: Tensor | None,
        past: Sequence[KeysValues] | None,
    ) -> None:
        if image_features is not None and image_keys_values is not None:
            raise ValueError("give image_features or image_keys_values, not both")
        has_image = image_features is not None or image_keys_values is not None
        if not has_image and text_ids is None:
            raise ValueError("a pass needs image_features, text_ids or both")
        if image_features is not None and image_features.shape[-1] != self.config.encoder_width:
            width = image_features.shape[-1]
            raise ValueError(f"image_features are {width} wide; encoder_width is {self.config.encoder_width}")
        if text_ids is not None and not self.config.has_text:
            raise ValueError("text_ids need a bridge with text_branch or instruction_aware")
        if image_mask is not None and self.training and self.config.patch_dropout:
            raise ValueError("image_mask says nothing of patches that patch_dropout leaves out: set it to 0")
        if past is not None and has_image:
            raise ValueError("past is for a text-only pass: leave image_features out")
        if past is not None and len(past) != len(self.layers):
            raise ValueError(f"past has {len(past)} layers; the bridge has {len(self.layers)}")

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.query_tokens, std=INIT_STD, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
