"""Bridges simpler than the Q-Former, to measure it against: a mean, every patch, every patch through a gate.

They hand the language model what a projection alone makes of the frozen features, as LLaVA (arXiv 2304.08485) and
Frozen (arXiv 2106.13884) do. They read no text and have no queries.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from qformer.bridge import INIT_STD, QFormerOutput, TextEmbeddings
from qformer.config import BridgeConfig

SimpleKind = Literal["mean", "patches", "gated"]


class SimpleBridge(nn.Module):
    """A linear layer, or a gated one, in place of the Q-Former.

    Args:
        config: `encoder_width`, `hidden_size` and `num_queries` are used; the last is how many vectors come out.
        kind: "mean" averages the features to one vector; "patches" takes each as it is; "gated" multiplies each with a
            gate that it opens itself (arXiv 2002.05202).

    Raises:
        ValueError: `num_queries` is not what the kind gives.
    """

    def __init__(self, config: BridgeConfig, kind: SimpleKind) -> None:
        super().__init__()
        if kind == "mean" and config.num_queries != 1:
            raise ValueError(f"a mean is one vector, num_queries is {config.num_queries}: set it to 1")
        self.config = config
        self.kind = kind
        self.linear = nn.Linear(config.encoder_width, config.hidden_size)
        self.gate = nn.Linear(config.encoder_width, config.hidden_size) if kind == "gated" else None
        self.embeddings: TextEmbeddings | None = None  # no text side; named as the Q-Former's
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        for module in (self.linear, self.gate):
            if module is not None:
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def forward(
        self, image_features: Tensor, *, text_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> QFormerOutput:
        """Features [B, P, encoder_width] to vectors [B, num_queries, hidden_size].

        Raises:
            ValueError: text was given, or the number of features is not `num_queries`.
        """
        if text_ids is not None or text_mask is not None:
            raise ValueError("this bridge reads no text")
        features = image_features.to(self.linear.weight.dtype)
        if self.kind == "mean":
            features = features.mean(dim=1, keepdim=True)  # [B, 1, D_v]
        if features.shape[1] != self.config.num_queries:
            raise ValueError(f"{features.shape[1]} features a picture, num_queries is {self.config.num_queries}")
        mapped = self.linear(features)
        if self.gate is not None:
            mapped = mapped * F.silu(self.gate(features))
        out: Tensor = self.norm(mapped)
        return QFormerOutput(queries=out)


def vectors_of(kind: SimpleKind, num_tokens: int) -> int:
    """How many vectors a picture becomes, given the towers' tokens."""
    return 1 if kind == "mean" else num_tokens
