"""torch.compile for the blocks of a frozen LLM: the many small operations between its products become few."""

from __future__ import annotations

import torch
from torch import nn

from qformer.errors import UserError, first_line


def compile_blocks(model: nn.Module) -> int:
    """Have each block of a transformers model compiled once it runs; alike ones share one compilation.

    Args:
        model: a model that names its blocks' classes in `_no_split_modules`, as those of transformers do.

    Returns:
        How many blocks there are.

    Raises:
        UserError: torch.compile does not work on this machine, or the model names no blocks.
    """
    device = next(model.parameters()).device
    try:  # at once, on something small, rather than in the first step
        torch.compile(lambda x: x.sin() + x.cos())(torch.ones(64, device=device))
    except Exception as error:
        raise UserError(
            f"train.compile: torch.compile does not work here ({first_line(error)}); on a CPU it needs a C++ compiler"
            " such as g++. Install one, or --set train.compile=false"
        ) from error
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise UserError(f"train.compile: {type(model).__name__} names no blocks to compile; --set train.compile=false")
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
