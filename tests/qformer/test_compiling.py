"""Compiled blocks compute what they did before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references import stir_lora

from qformer.compiling import compile_blocks
from qformer.errors import UserError
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_compiled_blocks_give_the_same_loss_and_gradients(language_folders: dict[str, Path], quantize: str) -> None:
    found = []
    for compiled in (False, True):
        language = load_language_model(language_folders["llama"], quantize=quantize, compute_dtype=torch.float32)
        language.add_lora(LoraSettings(rank=4, alpha=8))
        stir_lora(language, seed=3)
        if compiled:
            try:
                assert compile_blocks(language.base) == language.config.num_hidden_layers
            except UserError as error:
                pytest.skip(str(error))
        language.train()
        for length in (9, 14):  # the second shape needs no second compilation
            ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(length))
            embeds = language.embed(ids).detach().requires_grad_()
            language.zero_grad()
            loss, _ = language.supervised_loss(embeds, torch.ones_like(ids), ids)
            loss.backward()
            assert embeds.grad is not None
            lora = [p.grad.flatten() for p in language.parameters() if p.grad is not None]
            found.append((loss.detach(), embeds.grad, torch.cat(lora)))
    for plain, fast in zip(found[:2], found[2:], strict=True):
        for one, other in zip(plain, fast, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled


def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match=r"train.compile: torch.compile does not work here \(no compiler\).*=false"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_a_model_without_named_blocks_is_told() -> None:
    with pytest.raises(UserError, match="names no blocks"):
        compile_blocks(torch.nn.Linear(2, 2))
