"""A published BLIP-2 or InstructBLIP on disk: which class it is, its sizes, and single tensors out of its shards.

Its folder holds image encoder, Q-Former and LLM under one index (transformers' `Blip2ForConditionalGeneration`,
`InstructBlipForConditionalGeneration`, `Blip2ForImageTextRetrieval`). Only the tensors that are asked for are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

FAMILY = ("blip-2", "instructblip")
"""The `model_type` in config.json of what this file reads."""

TOWER = ("vision_model.",)
LANGUAGE = ("language_model.",)
BRIDGE = (
    "query_tokens",
    "qformer.",
    "embeddings.",
    "language_projection.",
    "vision_model.post_layernorm.",
    "vision_projection.",
    "text_projection.",
    "itm_head.",
)
"""Beginnings of tensors' names: the frozen tower (with its last norm, which is the bridge's), the LLM, the bridge."""

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"


@dataclass(frozen=True)
class Published:
    """A checkpoint of the family.

    Attributes:
        folder: where it lies.
        config: transformers' configuration of the whole.
        kind: as `qformer.interchange.Kind` names the class.
        files: the file of each tensor, by the tensor's name.
    """

    folder: Path
    config: Any
    kind: str
    files: Mapping[str, str]

    @property
    def has_language(self) -> bool:
        """Whether there is an LLM in it."""
        return self.kind != "blip2-retrieval"

    def names(self, beginnings: Iterable[str]) -> list[str]:
        """The tensors whose names begin so, in the order of names."""
        wanted = tuple(beginnings)
        return sorted(name for name in self.files if name.startswith(wanted))

    def tensors(self, beginnings: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors whose names begin so, and no others.

        Raises:
            UserError: a shard is missing or damaged.
        """
        return read_tensors(self.folder, {name: self.files[name] for name in self.names(beginnings)})


def is_published(folder: Path) -> bool:
    """Whether a folder holds a whole model of the family, by its config.json; False if it cannot be read."""
    return model_type(folder) in FAMILY


def model_type(folder: Path) -> str | None:
    """What config.json says the model is; None if it says nothing."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = values.get("model_type") if isinstance(values, dict) else None
    return found if isinstance(found, str) else None


def open_published(folder: Path) -> Published:
    """Look into a folder of the family: its configuration and its tensors' names, none of its weights.

    Raises:
        UserError: it is another architecture, or has no tensors of the family's.
    """
    found = model_type(folder)
    if found not in FAMILY:
        raise UserError(
            f"{folder}: its config.json says model_type {found!r}; take a BLIP-2 ('blip-2') or an InstructBLIP"
            " ('instructblip')"
        )
    files = tensor_files(folder)
    if "query_tokens" not in files:
        raise UserError(f"{folder}: its weights hold no query_tokens, so they are no {found}'s: name a whole model")
    kind = "instructblip" if found == "instructblip" else "blip2"
    if "itm_head.weight" in files:
        kind = "blip2-retrieval"
    if kind != "blip2-retrieval" and not any(name.startswith(LANGUAGE) for name in files):
        raise UserError(f"{folder}: its weights hold no language_model.*: name a whole model, not a part of one")
    return Published(folder, read_config(folder), kind, files)


def read_config(folder: Path) -> Any:
    """transformers' configuration of the whole model, with what old files leave out put in by transformers.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: it cannot be used ({first_line(error)}); fetch it anew") from error


def text_config(folder: Path) -> Any:
    """The configuration of the LLM in a whole model's folder.

    Raises:
        UserError: as `read_config`.
    """
    return read_config(folder).text_config


def tensor_files(folder: Path) -> dict[str, str]:
    """The file of each tensor of a folder's model.safetensors or its shards, by the tensor's name.

    Raises:
        UserError: there is neither the one nor the others, or the index is damaged.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / _INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not valid JSON with a weight_map: fetch it anew") from error
    try:
        with safe_open(folder / _ONE_FILE, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), _ONE_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / _ONE_FILE}: cannot be read ({first_line(error)}); fetch a fresh copy") from error


def read_tensors(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Read tensors, each out of its file; of the files nothing else is read.

    Args:
        folder: of the files.
        files: the file of each tensor, by the tensor's name.

    Raises:
        UserError: a file is missing or damaged, or lacks the tensor.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in (name for name, place in files.items() if place == file):
                    found[name] = opened.get_tensor(name)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: the shard {file} is missing; fetch the model anew") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file}: cannot be read ({first_line(error)}); fetch a fresh copy") from error
    return found


def needed_files(index: Path, beginnings: Iterable[str]) -> set[str]:
    """The shards that hold tensors whose names begin so, by an index file.

    Raises:
        UserError: the index is damaged.
    """
    wanted = tuple(beginnings)
    return {file for name, file in tensor_files(index.parent).items() if name.startswith(wanted)}
