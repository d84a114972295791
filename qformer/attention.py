"""Multi-head attention on torch's scaled_dot_product_attention, and the three masks of stage 1.

ITC needs no mask in practice: its two passes, queries alone and text alone, equal the one with `contrastive_mask`.

Masks are boolean everywhere: True means "may attend". Rows are who looks, columns what is looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeysValues(NamedTuple):
    """One self-attention layer's keys and values, both [B, H, N, D/H], for a later pass to look at."""

    keys: Tensor
    values: Tensor


class AttentionOutput(NamedTuple):
    """What `MultiHeadAttention` returns.

    Attributes:
        hidden: [B, N, D].
        weights: [B, H, N, M] before dropout, if they were asked for.
        keys_values: of this call's `source` alone, without the past.
    """

    hidden: Tensor
    weights: Tensor | None
    keys_values: KeysValues


class MultiHeadAttention(nn.Module):
    """Self- or cross-attention with separate query, key, value and output maps.

    Args:
        width: width of the rows that look, and of the output.
        num_heads: must divide `width`.
        kv_width: width of what is looked at; left out, `width` (self-attention).
        dropout: of the attention weights, in training.
    """

    def __init__(self, width: int, num_heads: int, *, kv_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide width ({width})")
        kv_width = width if kv_width is None else kv_width
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(kv_width, width)
        self.value = nn.Linear(kv_width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor | None = None,
        *,
        projected: KeysValues | None = None,
        mask: Tensor | None = None,
        past: KeysValues | None = None,
        return_weights: bool = False,
    ) -> AttentionOutput:
        """Let `hidden` look at `source`, and at the `past` before it.

        A row that may attend to nothing gets zeros from the attention, whatever the kernel, so that
        neither NaN nor padding reaches the rows beside it in later layers.

        Args:
            hidden: [B, N, D].
            source: [B, M, kv_width]; left out, `hidden` itself.
            projected: what `project` made of the source, in its place.
            mask: bool, broadcastable to [B, H, N, past + M]; True = may attend.
            past: keys and values of an earlier pass, put in front of `source`'s.
            return_weights: also compute the weights; the output stays the same.

        Raises:
            ValueError: the mask is not boolean.
        """
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"an attention mask must be bool (True = may attend), not {mask.dtype}")
        query = self._split(self.query(hidden))
        own = self.project(hidden if source is None else source) if projected is None else projected
        keys, values = own
        if past is not None:
            keys = torch.cat((past.keys, keys), dim=2)  # [B, H, past + M, D/H]
            values = torch.cat((past.values, values), dim=2)

        empty = None
        if mask is not None:
            # Kernels differ on a row with nothing to see (zeros or NaN): open such a row, then zero it.
            empty = ~mask.any(dim=-1, keepdim=True)
            mask = mask | empty

        weights = None
        dropout = self.dropout if self.training else 0.0
        if return_weights:
            scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5  # [B, H, N, M]
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = scores.softmax(dim=-1)
            mixed = F.dropout(weights, dropout) @ values
        else:
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        if empty is not None:
            mixed = mixed.masked_fill(empty, 0.0)
            weights = None if weights is None else weights.masked_fill(empty, 0.0)
        merged = mixed.transpose(1, 2).flatten(2)  # [B, H, N, D/H] → [B, N, D]
        return AttentionOutput(self.output(merged), weights, own)

    def project(self, source: Tensor) -> KeysValues:
        """Keys and values [B, H, M, D/H] of what is looked at, [B, M, kv_width]."""
        return KeysValues(self._split(self.key(source)), self._split(self.value(source)))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, D] → [B, H, N, D/H]


def matching_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Mask of image-text matching (ITM): queries and text all see each other (BLIP-2, figure 2).

    Args:
        num_queries: Q.
        text_mask: [B, T], true for a token and false for padding.

    Returns:
        bool [B, 1, 1, Q + T], the same for every row; only padding is hidden.
    """
    return _keys(num_queries, text_mask)


def contrastive_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Mask of the contrastive loss (ITC): queries see queries, text sees text (BLIP-2, figure 2).

    One pass with this mask equals two separate ones. Arguments as `matching_mask`.

    Returns:
        bool [B, 1, Q + T, Q + T].
    """
    length = num_queries + text_mask.shape[1]
    is_text = torch.arange(length, device=text_mask.device) >= num_queries  # [N]
    same_kind = is_text[:, None] == is_text[None, :]  # [N, N]
    return same_kind & _keys(num_queries, text_mask)


def generation_mask(num_queries: int, text_mask: Tensor) -> Tensor:
    """Mask of caption generation (ITG, BLIP-2's figure 2).

    Queries see queries; token i sees all queries and text ≤ i. Its rows from Q on
    are the mask of a text pass that reuses the queries' keys and values as its past.
    Arguments as `matching_mask`.

    Returns:
        bool [B, 1, Q + T, Q + T].
    """
    length = num_queries + text_mask.shape[1]
    position = torch.arange(length, device=text_mask.device)
    seen = (position[None, :] <= position[:, None]) | (position[None, :] < num_queries)  # [N, N]
    return seen & _keys(num_queries, text_mask)


def _keys(num_queries: int, text_mask: Tensor) -> Tensor:
    """All queries, and the tokens that are not padding: [B, 1, 1, Q + T]."""
    return F.pad(text_mask.bool(), (num_queries, 0), value=True)[:, None, None, :]
