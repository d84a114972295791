"""LoRA's short way on the CPU against PEFT's own: the same outputs and the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from qformer.language import IGNORED, LanguageModel
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings, undo_speed_up


def with_lora(folder: Path, quantize: str, dtype: torch.dtype, dropout: float = 0.0) -> LanguageModel:
    """A language model whose LoRA matrices both differ from zero."""
    language = load_language_model(folder, quantize=quantize, compute_dtype=dtype)
    torch.manual_seed(3)
    language.add_lora(LoraSettings(rank=4, alpha=12, dropout=dropout))
    for name, parameter in language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return language.train()


def found(language: LanguageModel) -> dict[str, torch.Tensor]:
    """The loss, and the gradients of the inputs and of LoRA's matrices."""
    torch.manual_seed(5)
    inputs = torch.randn(2, 9, language.width, requires_grad=True)
    labels = torch.full((2, 9), IGNORED)
    labels[:, 5:] = torch.randint(5, 100, (2, 4))
    language.zero_grad(set_to_none=True)
    decoder = {"labels": labels[:, 5:]} if language.is_encoder_decoder else {"labels": labels}
    loss, _ = language.supervised_loss(inputs, torch.ones(2, 9, dtype=torch.long), **decoder)
    loss.backward()
    gradients = {n: p.grad for n, p in language.named_parameters() if p.requires_grad and p.grad is not None}
    assert inputs.grad is not None
    return {"loss": loss.detach(), "inputs": inputs.grad, **gradients}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Mean over tensors of how far they are apart, as a share of the other's length."""
    assert one.keys() == other.keys() and len(one) > 10
    return sum(float((one[n] - other[n]).norm() / other[n].norm()) for n in one) / len(one)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "t5"])
@pytest.mark.parametrize(("quantize", "dropout"), [("nf4", 0.0), ("none", 0.0), ("nf4", 0.4), ("none", 0.4)])
def test_outputs_and_gradients_are_those_of_peft(
    language_folders: dict[str, Path], kind: str, quantize: str, dropout: float
) -> None:
    """With dropout too: both draw the same chances in the same order."""
    language = with_lora(language_folders[kind], quantize, torch.float32, dropout)
    short = found(language)
    undo_speed_up(language)
    assert distance(short, found(language)) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_half_precision_rounds_no_more_than_in_peft(language_folders: dict[str, Path], dropout: float) -> None:
    short = own = 0.0
    for kind in ("llama", "qwen2", "opt", "t5"):  # rounding is chance, so all of them together
        exact = found(with_lora(language_folders[kind], "nf4", torch.float32, dropout))
        language = with_lora(language_folders[kind], "nf4", torch.bfloat16, dropout)
        short += distance(found(language), exact)
        undo_speed_up(language)
        own += distance(found(language), exact)
    assert 0 < short < 1.1 * own


def test_the_short_way_is_taken_only_by_plain_lora(
    language_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    from qformer import lora

    apply: Any = lora._LinearWithLora.apply
    monkeypatch.setattr(lora._LinearWithLora, "apply", lambda *given: taken.append(1) or apply(*given))

    def count(language: LanguageModel) -> int:
        taken.clear()
        with torch.no_grad():
            language.base.model(inputs_embeds=torch.randn(1, 4, language.width))
        return len(taken)

    language = with_lora(language_folders["llama"], "nf4", torch.float32)
    layers = sum(isinstance(module, LoraLayer) for module in language.modules())
    assert count(language) == layers > 0
    language.model.base_model.disable_adapter_layers()
    assert count(language) == 0
    dropped = with_lora(language_folders["llama"], "none", torch.float32, dropout=0.5)
    assert count(dropped) == count(dropped.eval()) == layers
