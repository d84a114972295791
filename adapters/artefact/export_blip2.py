"""An adapter as a BLIP-2 or InstructBLIP that transformers reads, with LoRA merged into the LLM or beside it.

The tower's tensors and the LLM's are copied from where they are; norm, Q-Former and projection are the artefact's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters.artefact.export_language import FrozenLanguage, open_language, write_peft_config
from adapters.loading.bridge_start import bridge_tokenizer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.image_encoders import Blip2Encoder, InstructBlipEncoder
from qformer.interchange import IMAGE_NORM, LANGUAGE_PROJECTION, bridge_names
from qformer.lora_merging import WEIGHTS, read_patches
from qformer.published import TOWER, is_published, model_type, tensor_files
from qformer.shards import LazyTensor, names_in_order, stored_tensors, write_shards
from qformer.sources import resolve
from qformer.transform import image_processor

LORA_FOLDER = "lora"
_IMAGE = "<image>"


@dataclass(frozen=True)
class Blip2Parts:
    """What an adapter consists of, as far as a BLIP-2 can hold it.

    Attributes:
        bridge: the artefact's file of norm, Q-Former and projection.
        lora: its LoRA in PEFT's format, or None.
        config: the Q-Former's sizes.
        tower_source: of the image encoder.
        language_source: of the LLM.
        start_source: of the bridge's own tokenizer, if it reads questions.
        words: table of the bridge's words [V, D], if it reads questions.
    """

    bridge: Path
    lora: Path | None
    config: BridgeConfig
    tower_source: str
    language_source: str
    start_source: str | None = None
    words: torch.Tensor | None = None

    @property
    def instructed(self) -> bool:
        """Whether it is an InstructBLIP."""
        return self.config.instruction_aware


def export_blip2(
    parts: Blip2Parts, out: Path, *, lora_apart: bool, dtype: torch.dtype | None, shard_size: str, offline: bool
) -> str:
    """Write the folder.

    Args:
        parts: of the adapter.
        out: an empty folder.
        lora_apart: leave the LLM as it is and write LoRA into a folder in it, for PEFT on the whole model.
        dtype: of all weights; None keeps that of each.
        shard_size: of the largest file.
        offline: fetch nothing.

    Returns:
        What was done, in words.

    Raises:
        UserError: the adapter is nothing that a BLIP-2 could be.
    """
    if lora_apart and parts.lora is None:
        raise UserError("--lora-apart: this adapter has no LoRA (language.lora); leave the flag out")
    language = open_language(parts.language_source, offline=offline)
    tokenizer = language.tokenizer()
    if not language.inside and getattr(tokenizer, "chat_template", None):
        raise UserError(
            "--to blip2: the LLM has a chat template, with the picture inside a turn, and BLIP-2's processor puts it"
            " before all text; take --to bundle, or --to merged-llm for the LLM alone"
        )
    folder = resolve(parts.tower_source, offline=offline, parts=TOWER)
    vision, pictures = _tower(folder, parts.tower_source)
    processor = _processor(parts, pictures, tokenizer, offline)
    config = _whole_config(parts, vision, language, tokenizer)
    tower = _tower_tensors(folder)
    own = _bridge_tensors(parts)
    patches = read_patches(parts.lora) if parts.lora is not None else None
    llm = language.tensors if patches is None or lora_apart else patches.merge_into(language.tensors)
    given = {**tower, **own, **{f"language_model.{name}": tensor for name, tensor in llm.items()}}
    made, expected = _names_of(config, parts.instructed)
    _check_names(given, expected)
    tensors = {name: given[name].to(dtype) for name in names_in_order(given, expected)}
    write_shards(out, tensors, shard_size)
    config.architectures = [made]
    config.dtype = dtype or max((one.dtype for one in tensors.values()), key=lambda kind: kind.itemsize)
    config.save_pretrained(out)
    processor.save_pretrained(out)
    if not lora_apart or patches is None or parts.lora is None:
        return made + (" with LoRA merged" if patches is not None else "")
    (out / LORA_FOLDER).mkdir()
    prefix = "base_model.model."
    state = {
        name.replace(prefix, f"{prefix}language_model.", 1): t for name, t in load_file(parts.lora / WEIGHTS).items()
    }
    save_file(state, out / LORA_FOLDER / WEIGHTS, metadata={"format": "pt"})
    # whole names: "q_proj" alone would patch an image encoder that has such layers too
    targets = sorted(f"language_model.{module}" for module in patches.pairs)
    changes = {"base_model_name_or_path": "..", "target_modules": targets, "task_type": None}
    write_peft_config(out / LORA_FOLDER, patches.config, changes)
    return f"{made} with LoRA in {LORA_FOLDER}/"


def _tower(folder: Path, source: str) -> tuple[Any, Any]:
    """The tower's configuration and the processor of its pictures."""
    kinds = {name: kind for kind in (Blip2Encoder, InstructBlipEncoder) for name in kind.model_types}
    kind = kinds.get(str(model_type(folder)))
    if kind is None:
        raise UserError(
            f"--to blip2: the image encoder {source} is a {model_type(folder)}, and a BLIP-2 holds its own ViT alone;"
            " take --to bundle"
        )
    config = kind.read_config(folder)
    size = {"height": config.image_size, "width": config.image_size}
    default = {**kind.preprocessing, "size": size, "do_center_crop": False}
    return config, image_processor(folder, default, None, whole_image=True)


def _processor(parts: Blip2Parts, pictures: Any, tokenizer: Any, offline: bool) -> Any:
    from transformers import Blip2Processor, InstructBlipProcessor

    if not parts.instructed:
        return Blip2Processor(pictures, tokenizer, num_query_tokens=parts.config.num_queries)
    assert parts.start_source is not None
    words = bridge_tokenizer(resolve(parts.start_source, offline=offline), "instruction_aware").tokenizer
    return InstructBlipProcessor(pictures, tokenizer, words, num_query_tokens=parts.config.num_queries)


def _whole_config(parts: Blip2Parts, vision: Any, language: FrozenLanguage, tokenizer: Any) -> Any:
    """transformers' configuration; the processor has put the image's token into the tokenizer already."""
    import transformers as tf

    text, sizes = language.config, parts.config
    if not language.inside:  # transformers ends answers where this configuration says
        text.eos_token_id = tokenizer.eos_token_id if text.eos_token_id is None else text.eos_token_id
    token = tokenizer.convert_tokens_to_ids(_IMAGE)
    rows = text.vocab_size
    if token >= rows:
        raise UserError(
            f"--to blip2: the LLM has {rows} rows of words and its tokenizer as many tokens, so that none is left for"
            f" {_IMAGE}, which transformers' processor needs; take --to bundle"
        )
    given: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.intermediate_size,
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.dropout,
        "max_position_embeddings": sizes.max_text_positions,
        "layer_norm_eps": sizes.layer_norm_eps,
        "cross_attention_frequency": sizes.cross_attention_every,
        "encoder_hidden_size": sizes.encoder_width,
    }
    shapes = {key: value for key, value in vision.to_dict().items() if key not in ("model_type", "architectures")}
    whole: Any = tf.InstructBlipConfig if parts.instructed else tf.Blip2Config
    tower: Any = tf.InstructBlipVisionConfig if parts.instructed else tf.Blip2VisionConfig
    queries: Any = tf.InstructBlipQFormerConfig if parts.instructed else tf.Blip2QFormerConfig
    return whole(
        vision_config=tower(**shapes),
        qformer_config=queries(**given),
        text_config=text,
        num_query_tokens=sizes.num_queries,
        image_token_index=token,
    )


def _tower_tensors(folder: Path) -> dict[str, LazyTensor]:
    """The tower's, without the norm behind it, under the names of a whole model."""
    prefix = TOWER[0]
    inside = is_published(folder)
    files = {name: file for name, file in tensor_files(folder).items() if name.startswith(TOWER) or not inside}
    found = stored_tensors(folder, files)
    named = {name if inside else prefix + name: tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith(f"{IMAGE_NORM}.")}


def _bridge_tensors(parts: Blip2Parts) -> dict[str, LazyTensor]:
    """Norm, Q-Former and projection under transformers' names, in the types of the artefact."""
    kept = load_file(parts.bridge)
    if parts.words is not None:
        kept["bridge.embeddings.words.weight"] = parts.words
    names = {f"bridge.{ours}": theirs for ours, theirs in bridge_names(parts.config, _kind(parts)).items()}
    for part in ("weight", "bias"):
        names[f"feature_norm.norms.0.{part}"] = f"{IMAGE_NORM}.{part}"
        names[f"projection.{part}"] = f"{LANGUAGE_PROJECTION}.{part}"
    if missing := [ours for ours in names if ours not in kept]:
        raise UserError(f"{parts.bridge}: {missing[0]} is not in it; fetch a fresh copy")
    return {theirs: LazyTensor.of(kept[ours]) for ours, theirs in names.items()}


def _kind(parts: Blip2Parts) -> str:
    return "instructblip" if parts.instructed else "blip2"


def _names_of(config: Any, instructed: bool) -> tuple[str, list[str]]:
    """transformers' class, and the names of its tensors in their order; those that share memory too."""
    import transformers as tf

    made: Any = tf.InstructBlipForConditionalGeneration if instructed else tf.Blip2ForConditionalGeneration
    with torch.device("meta"):
        model = made(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return made.__name__, [*(name for name in model.state_dict() if name not in tied), *sorted(tied)]


def _check_names(given: Mapping[str, LazyTensor], expected: list[str]) -> None:
    """The tied ones at the end of `expected` may be left out, and the LLM's own were looked for before."""
    others = [name for name in expected if not name.startswith("language_model.")]
    missing = [name for name in others if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        raise UserError(f"--to blip2: its tensors are not those of transformers' class, first {(missing + unknown)[0]}")
