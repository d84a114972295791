"""A recipe's whole model on the meta device: every module with its shape and dtype, and no weights.

It is built from configurations alone, by the code that loads the real one, so it needs neither a hub nor memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from adapters.loading.assembly import lora_settings
from adapters.loading.reader import names_read
from adapters.loading.vision_side import build_bridge
from adapters.memory.known_models import find_config
from adapters.recipe import LanguageSection, Recipe, TowerSection
from qformer.efficientnet import MODEL_TYPE, EfficientNetLiteConfig
from qformer.errors import UserError, first_line
from qformer.feature_norm import FeatureNorm
from qformer.image_encoders import ENCODERS, ImageEncoder
from qformer.language import LanguageModel
from qformer.language_loading import without_dropout
from qformer.model import VisionLanguageModel
from qformer.objectives import Heads
from qformer.precision import int8_config, nf4_config
from qformer.published import FAMILY
from qformer.vision_loading import build_image_encoder


def build_meta_model(
    recipe: Recipe,
    *,
    compute_dtype: torch.dtype,
    tower_dtype: torch.dtype,
    quantized: bool = True,
    attention: str = "sdpa",
) -> VisionLanguageModel:
    """The model that `adapters.loading.assembly.assemble` would load, on the meta device.

    Args:
        recipe: what to build.
        compute_dtype: of the LLM's computation, and of its weights if they are not in 4-bit.
        tower_dtype: of the image encoders whose recipe names none.
        quantized: False leaves 4-bit layers as plain ones, which can be run on fake tensors.
        attention: of the LLM, as transformers names it; `load_language_model` takes "eager" on the CPU.

    Raises:
        UserError: a configuration is not to be had, or parts do not fit.
    """
    encoders = [
        _image_encoder(
            tower, f"vision.towers.{index}.source", getattr(torch, tower.dtype) if tower.dtype else tower_dtype
        )
        for index, tower in enumerate(recipe.vision.towers)
    ]
    language = _language_model(recipe.language, compute_dtype, quantized, attention)
    with torch.device("meta"):
        feature_norm = FeatureNorm(encoders)
        bridge = build_bridge(recipe.bridge, feature_norm)
        projection = nn.Linear(bridge.config.hidden_size, language.width)
        heads = Heads(bridge.config) if recipe.bridge.text_branch else None
    if bridge.embeddings is not None and recipe.bridge.start is not None:
        bridge.embeddings.words.requires_grad_(False)  # as when they are loaded
    model = VisionLanguageModel(
        encoders,
        feature_norm,
        bridge,
        projection,
        language,
        heads=heads,
        read_vectors=names_read(recipe.bridge.reader),
    )
    if not recipe.train.bridge:
        for part in model.trainable_parts().values():
            part.requires_grad_(False)
    return model


def _image_encoder(section: TowerSection, key: str, dtype: torch.dtype) -> ImageEncoder:
    found = find_config(section.source, key)
    config = _config_in(found) if isinstance(found, Path) else _image_config(found)
    return build_image_encoder(
        config,
        layer=section.layer,
        class_token=section.class_token,
        image_size=section.image_size,
        dtype=dtype,
    )


def _config_in(folder: Path) -> Any:
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: it names no model_type; fetch or save the model again") from error
    for kind in ENCODERS:
        if model_type in kind.model_types:
            return kind.read_config(folder)
    known = ", ".join(kind.architecture for kind in ENCODERS)
    raise UserError(f"{folder}: no image encoder is known for model_type {model_type!r}; take one of {known}")


def _image_config(values: Mapping[str, Any]) -> Any:
    if values["model_type"] == MODEL_TYPE:
        return EfficientNetLiteConfig.from_dict(values)
    return _transformers_config(values)


def _transformers_config(values: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[values["model_type"]](**{k: v for k, v in values.items() if k != "model_type"})


def _language_model(
    section: LanguageSection, compute_dtype: torch.dtype, quantized: bool, attention: str
) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    found = find_config(section.source, "language.source")
    try:
        config = _config_of(found) if isinstance(found, Path) else _transformers_config(found)
        loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model = loader.from_config(without_dropout(config), dtype=compute_dtype, attn_implementation=attention)
    except (OSError, ValueError) as error:
        raise UserError(f"language.source {section.source!r}: no language model ({first_line(error)})") from error
    if not isinstance(found, Path) and found.get("tie_word_embeddings") is False:
        _untie(model)
    if quantized and section.quantize != "none":
        from transformers.quantizers import AutoHfQuantizer

        # what from_pretrained does before it loads weights, the choice of layers left alone included
        packing = nf4_config(compute_dtype) if section.quantize == "nf4" else int8_config()
        AutoHfQuantizer.from_config(packing).preprocess_model(model=model, device_map=None)
        for module in model.modules():
            if getattr(module, "bias", None) is not None:  # made in float32 here, cast when weights are loaded
                module.bias = nn.Parameter(module.bias.to(compute_dtype), requires_grad=False)
    # no text passes through here, so the tokenizer is its special tokens
    language = LanguageModel(model, SimpleNamespace(pad_token_id=0, eos_token_id=1), compute_dtype)  # type: ignore[arg-type]
    if section.lora is not None:
        with torch.device("meta"):
            language.add_lora(lora_settings(section.lora))
    if section.gradient_checkpointing:
        language.enable_checkpointing()
    return language


def _config_of(folder: Path) -> Any:
    """The configuration of the LLM in a folder, out of a whole BLIP-2 or InstructBLIP too."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder))
    return config.text_config if config.model_type in FAMILY else config


def _untie(model: Any) -> None:
    """Give the head a matrix of its own.

    transformers builds every T5 with tied words and unties them while it loads a checkpoint that holds both.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is words.weight:
        head.weight = nn.Parameter(torch.empty_like(words.weight), requires_grad=False)
