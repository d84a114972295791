"""The trained parts of a published BLIP-2 or InstructBLIP, by this project's names: norm, Q-Former, projection, heads.

`qformer.published` finds the tensors, `qformer.interchange` knows the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn

from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.interchange import (
    IMAGE_NORM,
    LANGUAGE_PROJECTION,
    Kind,
    bridge_config_from_transformers,
    bridge_names,
    bridge_part,
    module_part,
)
from qformer.published import BRIDGE, Published
from qformer.tensor_names import describe_differences

HEADS = {"vision_projection": "image_projection", "text_projection": "text_projection", "itm_head": "matching"}
"""Heads of `Blip2ForImageTextRetrieval` and this project's names for them (`qformer.objectives.Heads`)."""

_TEXT_SIZES = {"vocab_size", "max_text_positions"}
_NO_SIZES = {"dropout", "patch_dropout", "text_branch", "instruction_aware", "text_pooling"}


@dataclass(frozen=True)
class PublishedBridge:
    """The bridge of a published checkpoint, each tensor in the type that it is stored in.

    Attributes:
        kind: the class that it is from.
        config: its sizes; `text_branch` or `instruction_aware` if it reads text.
        norm: weight and bias of the norm on the features, [D_v].
        bridge: of `QFormer`, by its names.
        projection: weight [D_l, D_q] and bias [D_l] to the LLM; None if there is no LLM.
        heads: of `qformer.objectives.Heads`, what there is of it; None if there are none.
    """

    kind: Kind
    config: BridgeConfig
    norm: dict[str, Tensor]
    bridge: dict[str, Tensor]
    projection: dict[str, Tensor] | None
    heads: dict[str, Tensor] | None

    def state(self) -> dict[str, Tensor]:
        """All of it as an artefact keeps it, `part.name` to tensor; words of a text side are not among it."""
        parts = {"feature_norm.norms.0": self.norm, "bridge": self.bridge, "projection": self.projection}
        found = {f"{part}.{name}": t for part, named in parts.items() if named for name, t in named.items()}
        found.pop("bridge.embeddings.words.weight", None)
        return found


def read_bridge(published: Published) -> PublishedBridge:
    """Read the trained parts out of a checkpoint's shards, and nothing else.

    Raises:
        UserError: tensors are missing, left over or of other shapes than config.json says.
    """
    state = published.tensors(BRIDGE)
    kind = cast(Kind, published.kind)
    tokens = state["query_tokens"]
    if tokens.ndim != 3:
        raise UserError(f"{published.folder}: its query_tokens are {list(tokens.shape)}, not [1, Q, D]; fetch it anew")
    # what the weights say: the configuration of old checkpoints does not hold it
    config = bridge_config_from_transformers(published.config.qformer_config, tokens.shape[1])
    config = replace(
        config, encoder_width=published.config.vision_config.hidden_size, text_branch=kind == "blip2-retrieval"
    )
    names = bridge_names(config, kind)
    with torch.device("meta"):
        expected = {names[ours]: tensor for ours, tensor in QFormer(config).state_dict().items()}
    found = bridge_part(state)
    if differences := describe_differences(found, expected):
        raise UserError(f"{published.folder}: its Q-Former is not the one of its config.json: {differences}")
    heads = None
    if kind == "blip2-retrieval":
        heads = {
            f"{ours}.{name}": tensor
            for theirs, ours in HEADS.items()
            for name, tensor in module_part(state, theirs).items()
        }
    projection = module_part(state, LANGUAGE_PROJECTION) if kind != "blip2-retrieval" else None
    bridge = {ours: found[theirs] for ours, theirs in names.items()}
    return PublishedBridge(kind, config, module_part(state, IMAGE_NORM), bridge, projection, heads)


def check_sizes(found: BridgeConfig, own: BridgeConfig, source: str) -> None:
    """Compare a checkpoint's Q-Former with the one that a recipe asks for.

    Raises:
        UserError: sizes differ; each is named with both values.
    """
    passed_over = _NO_SIZES | (set() if own.has_text else _TEXT_SIZES)
    differing = [
        f"bridge.{field.name} is {getattr(own, field.name)}, there it is {getattr(found, field.name)}"
        for field in fields(BridgeConfig)
        if field.name not in passed_over and getattr(own, field.name) != getattr(found, field.name)
    ]
    if differing:
        line = "; ".join(differing).replace("bridge.encoder_width", "the towers' width")
        raise UserError(
            f"bridge.start {source}: its Q-Former has other sizes than the recipe's: {line}; set the recipe's keys to"
            " the checkpoint's, and take its own image encoder"
        )
    if own.has_text and not found.has_text:
        raise UserError(f"bridge.start {source}: it has no text side; set bridge.text_branch and instruction_aware to"
                        " false, or name a checkpoint for retrieval or an InstructBLIP")  # fmt: skip


@torch.no_grad()
def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors into a module's parameters of the same names; those it has besides stay.

    Raises:
        UserError: a name or a shape does not fit; `what` says whose tensors they are.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if name in tensors}
    if differences := describe_differences(tensors, own):
        raise UserError(f"{what} does not fit: {differences}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
