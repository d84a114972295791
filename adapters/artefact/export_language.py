"""An adapter's LLM as others take it: LoRA alone, as PEFT reads it, or the whole LLM with LoRA merged into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qformer.errors import UserError, first_line
from qformer.lora_merging import CONFIG, WEIGHTS, read_patches
from qformer.published import LANGUAGE, is_published, read_config, tensor_files
from qformer.shards import LazyTensor, stored_tensors, write_shards
from qformer.sources import resolve


@dataclass(frozen=True)
class FrozenLanguage:
    """An LLM on disk, as a plain one or inside a BLIP-2 or an InstructBLIP.

    Attributes:
        folder: where it lies.
        config: transformers' configuration of the LLM alone.
        model_class: transformers' class, such as "OPTForCausalLM".
        tensors: by the LLM's own names, in its order; tied ones once.
        inside: whether the folder holds more than the LLM.
    """

    folder: Path
    config: Any
    model_class: str
    tensors: dict[str, LazyTensor]
    inside: bool

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.folder))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: no tokenizer can be read there ({first_line(error)})") from error


def open_language(source: str, *, offline: bool) -> FrozenLanguage:
    """Find an LLM's tensors under the names that transformers' model has for them; none is read yet.

    Raises:
        UserError: it cannot be had, or tensors are missing.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder = resolve(source, offline=offline)
    inside = is_published(folder)
    files = tensor_files(folder)
    if inside:
        files = {name.removeprefix(LANGUAGE[0]): file for name, file in files.items() if name.startswith(LANGUAGE)}
    whole = read_config(folder)
    config = whole.text_config if inside else whole
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(config)
    shared = set(getattr(model, "all_tied_weights_keys", None) or {})
    prefix = LANGUAGE[0] if inside else ""
    places: dict[str, str] = {}
    for name in model.state_dict():
        # files of some older models lack the first part of their names
        stored = next((candidate for candidate in (name, name.partition(".")[2]) if candidate in files), None)
        if stored is not None:
            places[name] = stored
        elif name not in shared:
            raise UserError(f"{folder}: {prefix}{name} is not in its weights; fetch the LLM anew")
    found = stored_tensors(folder, {prefix + stored: files[stored] for stored in places.values()})
    tensors = {name: found[prefix + stored] for name, stored in places.items()}
    return FrozenLanguage(folder, config, type(model).__name__, tensors, inside)


def export_merged(
    lora: Path | None, source: str, out: Path, *, dtype: torch.dtype, shard_size: str, offline: bool
) -> str:
    """Write the LLM with LoRA merged into it, and its tokenizer, as transformers reads them.

    Args:
        lora: in PEFT's format; None if the adapter has none.
        source: of the LLM.
        out: an empty folder.
        dtype: of the weights.
        shard_size: of the largest file.
        offline: fetch nothing.

    Returns:
        What was done, in words.
    """
    from transformers import GenerationConfig

    if lora is None:
        raise UserError("--to merged-llm: this adapter has no LoRA, so its LLM is its source as it is; name that")
    language = open_language(source, offline=offline)
    tensors = read_patches(lora).merge_into(language.tensors)
    write_shards(out, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shard_size)
    config = language.config
    config.architectures, config.dtype = [language.model_class], dtype
    config.save_pretrained(out)
    if language.inside or not (language.folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(config).save_pretrained(out)
    else:
        shutil.copy(language.folder / "generation_config.json", out)
    language.tokenizer().save_pretrained(out)
    return f"{language.model_class} with LoRA merged, {str(dtype).removeprefix('torch.')}"


def export_peft(lora: Path | None, source: str, out: Path) -> str:
    """Write LoRA alone, as PEFT puts it on the plain LLM.

    Args:
        lora: in PEFT's format; None if the adapter has none.
        source: of the LLM, which the configuration names.
        out: an empty folder.

    Returns:
        What was done, in words.
    """
    if lora is None:
        raise UserError("--to peft: this adapter has no LoRA (language.lora), so there is nothing that PEFT could read")
    patches = read_patches(lora)
    shutil.copy(lora / WEIGHTS, out)
    write_peft_config(out, patches.config, {"base_model_name_or_path": source})
    return f"LoRA of {len(patches.pairs)} layers, for {source}"


def write_peft_config(folder: Path, config: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Write PEFT's adapter_config.json."""
    values = {**config, "inference_mode": True, **changes}
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
