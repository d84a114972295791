"""An adapter out of a published BLIP-2 or InstructBLIP, which answers, or searches, as it is.

Norm, Q-Former and projection become the artefact's weights, bit by bit; image encoder and LLM stay where they are and
are named by source and fingerprint. No model is loaded, and of the LLM nothing is read but for its fingerprint.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.artefact.artefact import save_imported
from adapters.artefact.facts import Facts
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.objectives import EMBEDDING_WIDTH, Heads
from qformer.published import BRIDGE, LANGUAGE, TOWER, Published, open_published
from qformer.published_bridge import PublishedBridge, put_tensors, read_bridge
from qformer.sources import fingerprint, resolve

_CLASSES = {
    "blip2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
    "blip2-retrieval": "Blip2ForImageTextRetrieval",
}
_NOT_SIZES = {"encoder_width", "patch_dropout", "text_branch", "instruction_aware", "text_pooling"}


def import_published(source: str, out: Path, *, quantize: str = "none", offline: bool = False) -> dict[str, Any]:
    """Make an adapter of a published checkpoint.

    With `quantize` "none" it answers in float32 with the tokens of transformers' `generate`. Of a checkpoint for
    retrieval it becomes an adapter of the first stage, for search; what such a checkpoint leaves out, the temperature
    and the head that writes, is fresh.

    Args:
        source: a hub's `org/name` or `org/name@revision`, or a folder.
        out: the adapter's folder, which must not be there.
        quantize: how the LLM is to be kept: "none", "nf4" or "int8".
        offline: fetch nothing.

    Returns:
        `out`, `class` (of transformers), `queries`, `language` (model_type of the LLM, or None) and `bridge_bytes`.

    Raises:
        UserError: another architecture, a missing shard, tensors that do not fit, or no room.
    """
    _check_out(out)
    given = Path(source).expanduser()
    folder = resolve(source, offline=offline)
    published = open_published(folder)
    found = read_bridge(published)
    name = str(given.resolve()) if given.is_dir() else source
    fingerprints = {"vision.0": fingerprint(folder, TOWER), "bridge.start": fingerprint(folder, BRIDGE)}
    state = found.state()
    if published.has_language:
        _check_projection(published, found)
        fingerprints["language"] = fingerprint(folder, LANGUAGE)
    else:
        state |= _heads(found, source)
    facts = Facts(
        fingerprints=fingerprints,
        data={"checkpoint": f"{name} ({_CLASSES[found.kind]})"},
        terms=(f"those of {source}: see its model card",),
        kind="language" if published.has_language else "representation",
        imported=source,
    )
    save_imported(out, _recipe(name, found, quantize), state, facts)
    return {
        "out": str(out),
        "class": _CLASSES[found.kind],
        "queries": found.config.num_queries,
        "language": published.config.text_config.model_type if published.has_language else None,
        "bridge_bytes": sum(tensor.nbytes for tensor in state.values()),
    }


def _check_out(out: Path) -> None:
    """Before anything is fetched or hashed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name another folder")


def _check_projection(published: Published, found: PublishedBridge) -> None:
    assert found.projection is not None
    weight, text = found.projection["weight"], published.config.text_config
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    if list(weight.shape) != [width, found.config.hidden_size]:
        raise UserError(
            f"{published.folder}: its language_projection is {list(weight.shape)}, but its LLM's words are {width} wide"
            f" and its Q-Former {found.config.hidden_size}; fetch it anew"
        )


def _recipe(source: str, found: PublishedBridge, quantize: str) -> dict[str, Any]:
    """The recipe of the adapter: what there is of it is the checkpoint's."""
    preset = BridgeConfig.preset("blip2", encoder_width=found.config.encoder_width)
    sizes = {
        field.name: getattr(found.config, field.name)
        for field in fields(BridgeConfig)
        if field.name not in _NOT_SIZES and getattr(found.config, field.name) != getattr(preset, field.name)
    }
    prompt = {}
    if found.kind == "instructblip":  # its instructions are bare, and its Q-Former reads the same words
        prompt = {"question": "{question}", "caption": "A short image description."}
    return {
        "description": f"{source.rsplit('/', 1)[-1]}, imported as it was published.",
        "task": "caption" if found.kind == "blip2-retrieval" else "vqa",
        "data": {"train": f"that of {source}"},
        "vision": {"towers": [{"source": source, "layer": -2, "features": "float32"}]},
        "bridge": {
            "preset": "blip2",
            "start": source,
            "text_branch": found.config.text_branch,
            "instruction_aware": found.config.instruction_aware,
            **sizes,
        },
        "language": {"source": source, "quantize": quantize, "lora": None},
        "prompt": prompt,
    }


def _heads(found: PublishedBridge, source: str) -> dict[str, Tensor]:
    """The first stage's heads: the checkpoint's, and what it leaves out fresh from seed 0."""
    assert found.heads is not None
    width = found.heads["image_projection.weight"].shape[0]
    if width != EMBEDDING_WIDTH:
        raise UserError(
            f"{source}: it compares pictures and texts in {width} dimensions (image_text_hidden_size), and only"
            f" {EMBEDDING_WIDTH} are known here"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = Heads(found.config)
    put_tensors(heads, found.heads, f"{source}: its heads")
    fresh = {name: parameter.detach() for name, parameter in heads.named_parameters()}
    return {f"heads.{name}": tensor for name, tensor in (fresh | found.heads).items()}
