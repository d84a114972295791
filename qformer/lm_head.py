"""Which hidden states a language model's head turns into logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def logits_at(model: Any, positions: Tensor | tuple[slice, slice]) -> Iterator[None]:
    """Hand the LM head only the hidden states [B, T, D] that `positions` picks: a mask [B, T] gives [N, D].

    Training wants the supervised positions, generation the last; logits of a whole batch of prompts take gigabytes.

    A hook on the head, rather than a call of the parts below it, keeps whatever a model does before its head (T5's
    scaling) and after it (Gemma's soft cap), and works through PEFT's wrapper.
    """
    # A slice that isn't contiguous would have torch multiply batch by batch, with a copy of the head for each
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][positions].contiguous(),))
    try:
        yield
    finally:
        hook.remove()
