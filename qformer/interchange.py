"""The bridge's weights in and out of transformers' format, and its start from a BERT.

Only the bridge is handled here: queries, Q-Former, and its text embeddings. The other trained parts of a
transformers model are plain modules, whose names are in `LANGUAGE_PROJECTION`, `IMAGE_NORM` and
`RETRIEVAL_HEADS`; `module_part` takes them out of a whole model's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.tensor_names import describe_differences

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig

Kind = Literal["blip2", "blip2-retrieval", "instructblip"]
"""`Blip2ForConditionalGeneration`, `Blip2ForImageTextRetrieval`, `InstructBlipForConditionalGeneration`."""

LANGUAGE_PROJECTION = "language_projection"
"""The Linear from the bridge's width to the language model's, in both conditional-generation classes."""

IMAGE_NORM = "vision_model.post_layernorm"
"""The trainable LayerNorm on the image features (BLIP-2's `ln_vision`), in all three classes."""

RETRIEVAL_HEADS = ("vision_projection", "text_projection", "itm_head")
"""Linears of `Blip2ForImageTextRetrieval`: query side and text side of ITC, and ITM's two-way head."""

_BRIDGE_PREFIXES = ("query_tokens", "qformer.", "embeddings.")
_WORDS = "embeddings.word_embeddings.weight"  # BERT's names
_POSITIONS = "embeddings.position_embeddings.weight"
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class StartReport:
    """What `start_from_bert` copied and what stays freshly drawn, in numbers.

    `parameters_copied` and `parameters_fresh` count the bridge's own parameters and add up to all of them: a
    weight of BERT's that is copied to two places counts twice. Without text, words and positions are 0.
    """

    layers_copied: int
    layers_fresh: int
    words_copied: int
    words_fresh: int
    positions_copied: int
    positions_fresh: int
    parameters_copied: int
    parameters_fresh: int

    def __str__(self) -> str:
        """One line for a log."""
        layers = f"{self.layers_copied} of {self.layers_copied + self.layers_fresh} layers"
        words = f"{self.words_copied} of {self.words_copied + self.words_fresh} words"
        copied, fresh = self.parameters_copied / 1e6, self.parameters_fresh / 1e6
        return f"started from BERT: {layers}, {words}; {copied:.1f} M parameters copied, {fresh:.1f} M fresh"


def bridge_config_from_transformers(
    qformer_config: Blip2QFormerConfig | InstructBlipQFormerConfig, num_query_tokens: int
) -> BridgeConfig:
    """The bridge's sizes for a transformers Q-Former.

    Known approximation: transformers has two dropout probabilities, the bridge one; `hidden_dropout_prob` is
    taken (the two are equal by default). Outputs in eval mode do not depend on it.

    Args:
        qformer_config: `Blip2Config.qformer_config` or `InstructBlipConfig.qformer_config`.
        num_query_tokens: `num_query_tokens` of the configuration around it.

    Raises:
        UserError: an activation other than the exact GELU.
    """
    if qformer_config.hidden_act != "gelu":
        raise UserError(f"qformer_config.hidden_act is {qformer_config.hidden_act!r}; the bridge has 'gelu' only")
    return BridgeConfig(
        num_queries=num_query_tokens,
        hidden_size=qformer_config.hidden_size,
        num_layers=qformer_config.num_hidden_layers,
        num_heads=qformer_config.num_attention_heads,
        intermediate_size=qformer_config.intermediate_size,
        encoder_width=qformer_config.encoder_hidden_size,
        cross_attention_every=qformer_config.cross_attention_frequency,
        vocab_size=qformer_config.vocab_size,
        max_text_positions=qformer_config.max_position_embeddings,
        dropout=qformer_config.hidden_dropout_prob,
        layer_norm_eps=qformer_config.layer_norm_eps,
        text_branch=getattr(qformer_config, "use_qformer_text_input", False),
        instruction_aware=qformer_config.model_type == "instructblip_qformer",
    )


def bridge_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the bridge in a whole transformers model's state, names unchanged.

    `position_ids`, a table of 0, 1, 2, … that older checkpoints hold, is no weight and is left out.
    """
    return {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(_BRIDGE_PREFIXES) and not name.endswith(".position_ids")
    }


def module_part(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The tensors under `module` (such as `LANGUAGE_PROJECTION`) in a model's state, without that prefix.

    Raises:
        UserError: there are none.
    """
    prefix = f"{module}."
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not part:
        raise UserError(f"these weights hold no {module}.*: check which model class they were saved from")
    return part


def bridge_to_transformers(bridge: QFormer, kind: Kind) -> dict[str, Tensor]:
    """The bridge's weights under transformers' names, sharing memory with the bridge.

    `blip2` holds no text part, so a text branch is left behind, as BLIP-2 does after stage 1 (section 3.2).

    Raises:
        UserError: an unknown kind; a kind with text for a bridge without; `blip2` for one that is
            instruction-aware.
    """
    names = bridge_names(bridge.config, kind)
    if kind == "blip2" and bridge.config.instruction_aware:
        raise UserError("kind 'blip2' cannot hold an instruction-aware bridge: use 'instructblip'")
    own = bridge.state_dict()
    return {theirs: own[ours].detach() for ours, theirs in names.items()}


def bridge_from_transformers(state: Mapping[str, Tensor], config: BridgeConfig, kind: Kind) -> QFormer:
    """Build a bridge from transformers' weights, strictly: the names and shapes must be exactly the kind's.

    Args:
        state: the bridge's tensors; of a whole model's, `bridge_part` leaves the others out. They are copied,
            as float32, the type that the bridge trains in.
        config: sizes, such as `bridge_config_from_transformers` gives.
        kind: which class the weights are of.

    Raises:
        UserError: missing, unexpected or wrongly shaped tensors (three of each are named); an unknown kind; a
            kind that does not go with `config`.
    """
    names = bridge_names(config, kind)
    if kind == "blip2" and config.has_text:
        raise UserError("kind 'blip2' holds no text branch: use 'blip2-retrieval', or a config without one")
    with torch.device("meta"):  # no time or memory for weights that are replaced at once
        bridge = QFormer(config)
    expected = {names[ours]: tensor for ours, tensor in bridge.state_dict().items()}
    _check_fit(state, expected, f"not the weights of a {kind!r} bridge of this configuration")
    copies = {ours: state[theirs].detach().to(torch.float32, copy=True) for ours, theirs in names.items()}
    bridge.load_state_dict(copies, assign=True)
    return bridge


@torch.no_grad()
def start_from_bert(bridge: QFormer, bert_state: Mapping[str, Tensor]) -> StartReport:
    """Copy a BERT's weights into a fresh bridge, as BLIP-2 starts (section 3.1).

    Copied: self-attention, feed-forward (into the query block and, if there is one, the text block), their
    norms, and the norm of the embeddings; with a text branch also words and positions. BERT adds its first
    token type to every token of a single sentence, so that row is added to every position and nothing is
    lost: text alone gives BERT's own last hidden state if the layers are as many. Of a deeper BERT the
    first layers are taken. Queries, cross-attention, layers beyond BERT's, and words or positions beyond BERT's,
    such as `[DEC]`, stay as `QFormer` drew them.

    Args:
        bridge: changed in place, on its own device and in its own type; untouched if an error is raised.
        bert_state: of `BertModel`, or of a class around it (`bert.` in front of the names); heads, pooler and
            the like are ignored. The head count is not in the weights: `num_heads` must be BERT's (12 for
            BERT-base and MiniLM). RoBERTa, which counts positions from 2, is not a BERT here.

    Raises:
        UserError: not a BERT, another width, or more words than the bridge has.
    """
    config = bridge.config
    bert = _bert_names(bert_state)
    layers = 1 + max((int(name.split(".")[2]) for name in bert if name.startswith("encoder.layer.")), default=-1)
    words = bert.get(_WORDS)
    if not layers or words is None:
        raise UserError("these weights are not a BERT's: no encoder.layer.* and embeddings.word_embeddings in them")
    if words.shape[1] != config.hidden_size:
        width = words.shape[1]
        raise UserError(f"the BERT is {width} wide, the bridge {config.hidden_size}: set hidden_size to {width}")
    if config.has_text and words.shape[0] > config.vocab_size:
        raise UserError(f"the BERT has {words.shape[0]} words, vocab_size is {config.vocab_size}: raise vocab_size")

    own = bridge.state_dict()  # shares memory with the bridge
    sources = _bert_sources(config, min(layers, config.num_layers))
    expected = {theirs: own[ours] for ours, theirs in sources.items()}
    if config.has_text:  # their rows may be fewer or more than ours, their width may not
        for table in (_POSITIONS, _TOKEN_TYPES):
            expected[table] = torch.empty(len(bert.get(table, ())), config.hidden_size, device="meta")
    found = {name: tensor for name, tensor in bert.items() if name in expected}
    _check_fit(found, expected, "this BERT does not fit the bridge")

    copied = 0
    for ours, theirs in sources.items():
        own[ours].copy_(bert[theirs])
        copied += own[ours].numel()
    word_rows = position_rows = 0
    if bridge.embeddings is not None:
        positions = bert[_POSITIONS]
        token_type = bert[_TOKEN_TYPES][0]
        word_rows, position_rows = len(words), min(len(positions), config.max_text_positions)
        own["embeddings.words.weight"][:word_rows].copy_(words)
        own["embeddings.positions.weight"][:position_rows].copy_(positions[:position_rows] + token_type)
        copied += (word_rows + position_rows) * config.hidden_size
    return StartReport(
        layers_copied=min(layers, config.num_layers),
        layers_fresh=max(config.num_layers - layers, 0),
        words_copied=word_rows,
        words_fresh=config.vocab_size - word_rows if config.has_text else 0,
        positions_copied=position_rows,
        positions_fresh=config.max_text_positions - position_rows if config.has_text else 0,
        parameters_copied=copied,
        parameters_fresh=sum(tensor.numel() for tensor in own.values()) - copied,
    )


def bridge_names(config: BridgeConfig, kind: str) -> dict[str, str]:
    """Our tensor names and transformers', for every tensor of the bridge that `kind` holds.

    Raises:
        UserError: an unknown kind, or one with text for a bridge without.
    """
    if kind not in get_args(Kind):
        raise UserError(f"unknown kind {kind!r}: choose one of {', '.join(get_args(Kind))}")
    with_text = kind != "blip2"
    if with_text and not config.has_text:
        raise UserError(f"kind {kind!r} holds a text branch and the bridge has none: use 'blip2', or text_branch")
    modules = {"norm": "qformer.embeddings.layernorm" if kind == "instructblip" else "qformer.layernorm"}
    for index in range(config.num_layers):
        parts = _attention_names("self_attention", "attention", "attention")
        if index % config.cross_attention_every == 0:
            parts |= _attention_names("cross_attention", "crossattention", "attention")
        parts |= _feed_forward_names("query_feed_forward", "intermediate_query", "output_query")
        if with_text:
            parts |= _feed_forward_names("text_feed_forward", "intermediate", "output")
        modules |= _in_layer(index, parts, "qformer.encoder.layer")
    names = {"query_tokens": "query_tokens"} | _affine(modules)
    if with_text:
        table = "qformer.embeddings" if kind == "instructblip" else "embeddings"
        names["embeddings.words.weight"] = f"{table}.word_embeddings.weight"
        names["embeddings.positions.weight"] = f"{table}.position_embeddings.weight"
    return names


def _bert_sources(config: BridgeConfig, layers: int) -> dict[str, str]:
    """Our tensor names and BERT's, for what is copied as it is; one of BERT's may be the source of two of ours."""
    modules = {"norm": "embeddings.LayerNorm"}
    blocks = ("query_feed_forward", "text_feed_forward") if config.has_text else ("query_feed_forward",)
    for index in range(layers):
        parts = _attention_names("self_attention", "attention", "self")
        for block in blocks:
            parts |= _feed_forward_names(block, "intermediate", "output")
        modules |= _in_layer(index, parts, "encoder.layer")
    return _affine(modules)


def _attention_names(ours: str, theirs: str, inner: str) -> dict[str, str]:
    maps = {f"{ours}.attention.{part}": f"{theirs}.{inner}.{part}" for part in ("query", "key", "value")}
    maps[f"{ours}.attention.output"] = f"{theirs}.output.dense"
    maps[f"{ours}.norm"] = f"{theirs}.output.LayerNorm"
    return maps


def _feed_forward_names(ours: str, inner: str, outer: str) -> dict[str, str]:
    return {
        f"{ours}.inner": f"{inner}.dense",
        f"{ours}.outer": f"{outer}.dense",
        f"{ours}.norm": f"{outer}.LayerNorm",
    }


def _in_layer(index: int, parts: Mapping[str, str], theirs: str) -> dict[str, str]:
    return {f"layers.{index}.{part}": f"{theirs}.{index}.{name}" for part, name in parts.items()}


def _affine(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{their}.{part}" for ours, their in modules.items() for part in ("weight", "bias")}


def _bert_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's tensors without `bert.`, and with today's names for a norm's two tensors."""
    prefixed = any(name.startswith("bert.") for name in state)
    renamed = {}
    for name, tensor in state.items():
        if prefixed and not name.startswith("bert."):
            continue  # a head beside the BERT
        # google-bert's own files still say gamma and beta.
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        renamed[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    return renamed


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], problem: str) -> None:
    """Raise a UserError if names or shapes of the tensors `found` are not those `expected`."""
    if differences := describe_differences(found, expected):
        raise UserError(f"{problem}: {differences}; check the configuration and where the weights come from")
