"""The bridge's sizes: one frozen dataclass, checked once, and three presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # BLIP-2, section 3.1: BERT-base with 32 queries on ViT-g's features. The defaults below.
    "blip2": {},
    # The embedded size: MiniLM's widths, so that it can start from MiniLM as BLIP-2's starts from BERT.
    "small": {
        "num_queries": 16,
        "hidden_size": 384,
        "num_layers": 4,
        "intermediate_size": 1536,
    },
    # For tests: runs in milliseconds.
    "tiny": {
        "num_queries": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 64,
        "encoder_width": 24,
        "vocab_size": 61,
        "max_text_positions": 16,
    },
}

_SIZES = (
    "num_queries",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "encoder_width",
    "cross_attention_every",
    "vocab_size",
    "max_text_positions",
)


@dataclass(frozen=True)
class BridgeConfig:
    """Sizes of a Q-Former; the defaults are BLIP-2's (arXiv 2301.12597, section 3.1).

    Args:
        num_queries: learned queries, and so vectors handed to the language model an image.
        hidden_size: width of the bridge.
        num_layers: transformer layers.
        num_heads: attention heads; must divide `hidden_size`.
        intermediate_size: inner width of the feed-forward blocks.
        encoder_width: width of the image features.
        cross_attention_every: layers 0, n, 2n, … look at the image.
        vocab_size: BERT's 30 522 words and `[DEC]`. Used with text only.
        max_text_positions: longest text in tokens. Used with text only.
        dropout: probability, for embeddings, attention weights and block outputs alike.
        patch_dropout: share of a picture's patches (a class token is one) that the bridge does not see in training,
            others each time (Liu et al. 2022, arXiv 2208.07220), so that pictures seen often are not memorised.
        layer_norm_eps: epsilon of every LayerNorm.
        text_branch: has word and position embeddings and a feed-forward block for text (stage 1).
        instruction_aware: the instruction's tokens go beside the queries (InstructBLIP, arXiv 2305.06500,
            section 2.3). Brings the same text parts as `text_branch`.
        text_pooling: what represents a text when ITC compares it: its "first" token's output, which is BLIP-2's
            [CLS], or the "mean" over its tokens, for which sentence encoders such as MiniLM are trained.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    num_queries: int = 32
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    encoder_width: int = 1408
    cross_attention_every: int = 2
    vocab_size: int = 30523
    max_text_positions: int = 512
    dropout: float = 0.1
    patch_dropout: float = 0.0
    layer_norm_eps: float = 1e-12
    text_branch: bool = False
    instruction_aware: bool = False
    text_pooling: Literal["first", "mean"] = "first"

    def __post_init__(self) -> None:
        """Check every field, so that a configuration that exists is a sound one."""
        for name in _SIZES:
            value = getattr(self, name)
            # bool is an int to Python, and `num_layers: true` in a recipe is a slip.
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size})")
        for name in ("dropout", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)!r}")
        if self.text_pooling not in ("first", "mean"):
            raise ValueError(f"text_pooling must be 'first' or 'mean', not {self.text_pooling!r}")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be above 0, not {self.layer_norm_eps!r}")

    @property
    def has_text(self) -> bool:
        """Whether the bridge has text embeddings and a text feed-forward block in every layer."""
        return self.text_branch or self.instruction_aware

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The sizes called `name`: `blip2`, `small` (16 queries, 4 layers 384 wide) or `tiny` (tests).

        `overrides` are fields of this class and win over the preset's.

        Raises:
            ValueError: an unknown preset, or a field out of range.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}")
        return cls(**{**_PRESETS[name], **overrides})
