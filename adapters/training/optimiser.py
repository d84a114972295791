"""AdamW and its learning rate, as BLIP-2 has them (arXiv 2301.12597, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adapters.training.checkpoint import trainable
from qformer.errors import UserError

WARMUP_SHARE = 0.25  # of a run's steps, at most


def build_optimiser(
    model: nn.Module,
    *,
    learning_rate: float,
    lora_learning_rate: float | None = None,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.98),
    kind: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW over a model's trainable parameters; each group has its peak rate under "peak".

    Args:
        model: LoRA's parameters are the ones below `language`.
        learning_rate: the peak rate of bridge, norm and projection.
        lora_learning_rate: LoRA's; None for the same.
        weight_decay: of matrices; biases, norms and query tokens have none.
        betas: of AdamW.
        kind: "adamw"; or "paged_adamw_8bit", bitsandbytes' AdamW with moments in 8 bits (arXiv 2110.02861) in memory
            that the CPU's is paged into (arXiv 2305.14314, section 3). Of parameters below 4096 it keeps 32 bits.

    Raises:
        UserError: 8-bit moments for parameters that are on no GPU.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        is_lora = name.startswith("language.")
        decays = parameter.dim() > 1 and not name.endswith("query_tokens")
        groups.setdefault((is_lora, decays), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "peak": (lora_learning_rate or learning_rate) if is_lora else learning_rate,
        }
        for (is_lora, decays), parameters in groups.items()
    ]
    if kind == "adamw":
        return torch.optim.AdamW(listed, lr=learning_rate, betas=betas, eps=1e-8, fused=True)  # one pass over weights
    places = {parameter.device.type for group in listed for parameter in group["params"]}
    if places != {"cuda"}:
        raise UserError(
            f"train.optimiser={kind}: it needs an NVIDIA GPU, and this runs on {', '.join(sorted(places))}; take adamw"
        )
    from bitsandbytes.optim import PagedAdamW8bit

    optimiser: torch.optim.Optimizer = PagedAdamW8bit(listed, lr=learning_rate, betas=betas, eps=1e-8)
    return optimiser


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine down to a floor.

    Attributes:
        total: steps of the whole run.
        warmup_steps: as the recipe wants them; at most `WARMUP_SHARE` of the run is taken.
        floor: where the cosine ends, as a share of the peak rate.
    """

    total: int
    warmup_steps: int
    floor: float = 0.0

    @property
    def warmup(self) -> int:
        """The steps that warm-up takes."""
        return min(self.warmup_steps, int(WARMUP_SHARE * self.total))

    def share(self, step: int) -> float:
        """The share of the peak rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def shortened(self) -> str | None:
        """One sentence for a run that is too short for its warm-up; None if it is long enough."""
        if self.warmup == self.warmup_steps:
            return None
        return (
            f"the run has {self.total} steps, so warm-up takes {self.warmup} of them, not {self.warmup_steps}"
            f" (train.warmup_steps): it takes {WARMUP_SHARE:.0%} of a run at most"
        )
