"""Weights, comparisons and counts for the tests against transformers' own classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOLERANCE = 1e-5


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, of a size that keeps the attention soft, and set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        sample_evenly = 0.2 if parameter.ndim == 1 else min(1.0, 1.5 * parameter.shape[-1] ** -0.5)
        parameter.normal_(std=sample_evenly, generator=generator)
        if re.search(r"norm\w*\.weight$", name, re.IGNORECASE):
            parameter.add_(1.0)
    return model.eval()


@torch.no_grad()
def stir_lora(model: nn.Module, *, seed: int, only: str = "lora_") -> None:
    """Draw LoRA's matrices anew: B starts at zero, and what it does could not be seen."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.normal_(std=0.05)


def close(got: Tensor | None, expected: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def padded_text() -> tuple[Tensor, Tensor]:
    """Ids and mask [2, 6], the second padded."""
    ids = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return ids, mask


def linear_memory(model: nn.Module) -> Mapping[str, int]:
    """Bytes of a model's weights: "linear" (quantised or not, quantisation constants included) and "other".

    The embeddings and the LM head count as "other": they are never quantised.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = 0
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight: Any = module.weight
            linear += weight.numel() * weight.element_size()
            seen.add(id(weight))
            state = getattr(weight, "quant_state", None)
            if state is not None:
                linear += state.absmax.numel() * state.absmax.element_size()
                if state.nested:
                    linear += state.state2.absmax.numel() * state.state2.absmax.element_size()
    other = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in seen)
    return {"linear": linear, "other": other}
