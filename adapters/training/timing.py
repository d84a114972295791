"""How long a run takes: one measured step before the first, and how many steps fit in a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from adapters.data.collate import PackedSequence

TRAINING_SHARE = 0.8  # of a budget is for steps, the rest for validations and saving
FEWEST_STEPS = 8


def measure_step(
    model: nn.Module, batches: Sequence[Sequence[PackedSequence]], inputs: Callable[..., tuple[object, ...]]
) -> float:
    """Seconds of a step's passes forward and backward; weights, gradients and generators are left as they were.

    Args:
        model: whose forward gives (summed loss, number of tokens).
        batches: the micro-batches of one step.
        inputs: gives the forward's arguments for one.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    generators = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    model.train()
    timed: list[float] = []
    for rows in (batches[0], *batches):  # the first pass makes kernels, so it is not counted
        began = time.monotonic()
        loss, _ = model(*inputs(rows))
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize(device)
        timed.append(time.monotonic() - began)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(generators[0])
    if generators[1] is not None:
        torch.cuda.set_rng_state(generators[1], device)
    return sum(timed[1:])


def steps_within(minutes: float, *, elapsed: float, step: float) -> int:
    """How many steps of `step` seconds fit in a budget of which `elapsed` seconds are gone; `FEWEST_STEPS` at least."""
    return max(FEWEST_STEPS, int((TRAINING_SHARE * 60 * minutes - elapsed) / max(step, 1e-6)))


def in_words(seconds: float) -> str:
    """A time to read: "40 s" or "6 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
