"""Loading a language model: from a local folder, in 4-bit or not, with nothing drawn at random and no dropout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)

from qformer.errors import UserError, first_line
from qformer.language import LanguageModel
from qformer.malloc import large_blocks_given_back
from qformer.precision import default_compute_dtype, int8_config, nf4_config
from qformer.published import LANGUAGE, is_published
from qformer.quiet import quiet_transformers

# Names under which the configurations of transformers keep their dropout rates. Frozen means no dropout.
_DROPOUT_NAMES = (
    "dropout",
    "dropout_rate",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layerdrop",
)


def load_language_model(
    folder: str | Path,
    *,
    quantize: str = "nf4",
    compute_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> LanguageModel:
    """Load a frozen LLM from a local folder in transformers' layout.

    Out of a published BLIP-2 or InstructBLIP the LLM in it is loaded, and of its files nothing else is read. It ends an
    answer at the tokens that its part of the configuration names, as in transformers, and has no chat template.

    Args:
        folder: what `qformer.sources.resolve` returned.
        quantize: "nf4" (4-bit with double quantisation), "int8" (LLM.int8) or "none"; linear layers only, the LM head
            stays as it is.
        compute_dtype: dtype of the computation; `default_compute_dtype` of the device if left out.
        device: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        UserError: no tokenizer or no model there, or 4-bit is asked for on a machine that cannot run it.
    """
    if quantize not in ("nf4", "int8", "none"):
        raise UserError(f"language.quantize: '{quantize}' is not known; take nf4, int8 or none")
    dtype = compute_dtype or default_compute_dtype(device, four_bit=quantize == "nf4")
    published = is_published(Path(folder))
    try:
        whole = AutoConfig.from_pretrained(str(folder))
        config = without_dropout(whole.text_config if published else whole)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no language model is described there ({first_line(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer can be read there ({first_line(error)})") from error
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {}
    if published:
        options["key_mapping"] = {rf"^{re.escape(LANGUAGE[0])}": ""}
    if quantize != "none":
        options["quantization_config"] = nf4_config(dtype) if quantize == "nf4" else int8_config()
    try:
        with quiet_transformers(), large_blocks_given_back():
            model, report = loader.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                device_map={"": str(device)},
                attn_implementation=_attention_for(device),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: the language model cannot be loaded ({first_line(error)})") from error
    if report["missing_keys"]:  # transformers would draw them at random
        missing = sorted(report["missing_keys"])
        raise UserError(f"{folder}: {len(missing)} tensors of the LLM are missing, such as {missing[0]}; fetch it anew")
    if not published:
        return LanguageModel(model, tokenizer, dtype)
    # the folder's generation_config.json is the whole model's, which transformers does not ask either
    model.generation_config = GenerationConfig.from_model_config(config)
    tokenizer.chat_template = None  # these models were trained on bare text
    ends = model.generation_config.eos_token_id
    return LanguageModel(model, tokenizer, dtype, end_ids=[ends] if isinstance(ends, int) else ends)


def _attention_for(device: str | torch.device) -> str:
    """The attention of transformers that is fastest there.

    On the CPU plain matrix products beat the fused kernel: 8.0 against 18.4 ms for a forward and backward pass over
    4 rows of 200 tokens, 9 heads, bfloat16, two cores.
    """
    return "eager" if torch.device(device).type == "cpu" else "sdpa"


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout rate of a configuration to 0: a frozen model has none, whatever its training flag says."""
    for name in _DROPOUT_NAMES:
        if isinstance(getattr(config, name, None), int | float):
            setattr(config, name, 0.0)
    return config
