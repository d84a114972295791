"""Tiny models and data shared by the tests of every room: random weights, no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """One token a byte-like character: every text can be written, nothing has to be learned."""
    specials = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>" if chat else "</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_language_model(kind: str) -> torch.nn.Module:
    """A random two-layer LLM, 64 wide: 4-bit layers need widths of 64 and multiples of 32."""
    torch.manual_seed(0)
    common = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    llama = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, **llama))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, **llama))
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(
                **common,
                hidden_size=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=64,
            )
        )
    if kind == "t5":
        config = T5Config(
            **common, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    raise ValueError(kind)


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny LLMs as `qformer.sources.resolve` would return them; llama and qwen2 have a chat template."""
    folders = {}
    for kind in ("llama", "qwen2", "opt", "t5"):
        folder = tmp_path_factory.mktemp("language") / kind
        tiny_language_model(kind).save_pretrained(folder)
        make_tokenizer(chat=kind in ("llama", "qwen2")).save_pretrained(folder)
        folders[kind] = folder
    return folders
