"""4-bit layers unpacked for answering: the same numbers come out, with LoRA and without, beside siblings too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from references import stir_lora

from qformer.language import LanguageModel
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings, merge_lora
from qformer.precision import dequantize_four_bit

EVERYTHING = 2**30


def packed(language: LanguageModel) -> list[torch.nn.Module]:
    return [module for module in language.modules() if isinstance(module, Linear4bit)]


@torch.no_grad()
def logits(language: LanguageModel) -> torch.Tensor:
    language.activate()
    ids = torch.arange(5, 25).reshape(2, 10)
    decoded = {"decoder_input_ids": ids[:, :3]} if language.is_encoder_decoder else {}
    with language.autocast():
        found: torch.Tensor = language.base(inputs_embeds=language.embed(ids), **decoded).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_the_same_numbers_come_out(
    language_folders: dict[str, Path], kind: str, lora: bool, dtype: torch.dtype
) -> None:
    language = load_language_model(language_folders[kind], quantize="nf4", compute_dtype=dtype).eval()
    if lora:
        language.add_lora(LoraSettings(rank=4, alpha=8))
        stir_lora(language, seed=3)
    before = logits(language)

    assert not dequantize_four_bit(language.model, dtype, at_most=1000)
    assert packed(language)
    assert dequantize_four_bit(language.model, dtype, at_most=EVERYTHING)
    assert not packed(language)
    assert torch.equal(logits(language), before)


def test_a_sibling_that_comes_later_stands_on_what_is_unpacked(language_folders: dict[str, Path]) -> None:
    first = load_language_model(language_folders["llama"], quantize="nf4", compute_dtype=torch.float32).eval()
    first.add_lora(LoraSettings(rank=4, alpha=8))
    stir_lora(first, seed=3)
    before = logits(first)
    bare = load_language_model(language_folders["llama"], quantize="nf4", compute_dtype=torch.float32).eval()
    dequantize_four_bit(first.model, torch.float32, at_most=EVERYTHING)
    second = first.sibling()
    second.add_lora(LoraSettings(rank=2, alpha=8))

    assert torch.equal(logits(second), logits(bare))  # its B is zero
    assert torch.equal(logits(first), before)


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_lora_is_added_to_what_was_unpacked_in_float32(language_folders: dict[str, Path], kind: str) -> None:
    plain, language = (
        load_language_model(language_folders[kind], quantize="nf4", compute_dtype=torch.float32).eval()
        for _ in range(2)
    )
    language.add_lora(LoraSettings(rank=4, alpha=8))
    stir_lora(language, seed=3)
    before, matrices = logits(language), {name: one.clone() for name, one in language.state_dict().items()}
    dequantize_four_bit(language.model, torch.float32, at_most=EVERYTHING)
    assert merge_lora(language.model) > 0
    assert merge_lora(language.model) == 0  # once is enough
    assert torch.allclose(logits(language), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, logits(plain), rtol=1e-2, atol=1e-2)
    kept = language.state_dict()
    assert all(torch.equal(kept[name], one) for name, one in matrices.items() if "lora_" in name)


def test_lora_is_not_added_where_it_would_be_rounded_away(language_folders: dict[str, Path]) -> None:
    language = load_language_model(language_folders["llama"], quantize="nf4", compute_dtype=torch.bfloat16).eval()
    language.add_lora(LoraSettings(rank=4, alpha=8))
    assert merge_lora(language.model) == 0
    dequantize_four_bit(language.model, torch.bfloat16, at_most=EVERYTHING)
    assert merge_lora(language.model) == 0
