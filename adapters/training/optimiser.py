"""AdamW and its learning rate, as BLIP-2 has them (arXiv 2301.12597, section 4)."""

from __future__ import annotations

import math

import torch
from torch import nn

from adapters.recipe import TrainSection
from adapters.training.checkpoint import trainable


def build_optimiser(model: nn.Module, train: TrainSection) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases and other one-dimensional parameters; LoRA may have a rate of its own."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        is_lora = name.startswith("language.")
        decays = parameter.dim() > 1 and not name.endswith("query_tokens")
        groups.setdefault((is_lora, decays), []).append(parameter)
    lora_rate = train.lora_learning_rate or train.learning_rate
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": train.weight_decay if decays else 0.0,
                "peak": lora_rate if is_lora else train.learning_rate,
            }
            for (is_lora, decays), parameters in groups.items()
        ],
        lr=train.learning_rate,
        betas=train.betas,
        eps=1e-8,
        fused=True,  # one pass over the weights
    )


def learning_rate(step: int, total: int, train: TrainSection) -> float:
    """The share of the peak rate at a step: linear warm-up, then a cosine down to `min_learning_rate`."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    return train.min_learning_rate + (1 - train.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
