"""Which hidden states a language model's head turns into logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, contiguous_format, nn

_ASKED: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()  # of each head, the innermost last


@contextmanager
def logits_at(model: Any, positions: Tensor | tuple[slice, slice]) -> Iterator[None]:
    """Hand the LM head only the hidden states [B, T, D] that `positions` picks: a mask [B, T] gives [N, D].

    Training wants the supervised positions, generation the last; logits of a whole batch of prompts take gigabytes.
    Of contexts inside each other the innermost holds: a search may pause while something else is computed.

    A hook on the head, rather than a call of the parts below it, keeps whatever a model does before its head (T5's
    scaling) and after it (Gemma's soft cap), and works through PEFT's wrapper.
    """
    head = model.get_output_embeddings()
    asked, own = _ASKED.setdefault(head, []), object()

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        # Unless its strides are those of a tensor of its own, torch multiplies batch by batch, with a copy of the head
        # for each; `contiguous` leaves the strides of a slice of one row as they are.
        return (args[0][positions].clone(memory_format=contiguous_format),) if asked[-1] is own else None

    asked.append(own)
    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()
        asked.remove(own)
