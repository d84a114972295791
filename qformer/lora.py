"""LoRA's settings, and LoRA on the CPU in as few passes over memory as it takes; the matrices stay PEFT's.

PEFT computes the frozen layer, LoRA's two products, a scaling and a sum one after the other, each a pass over a tensor
as wide as the layer, and asks for CUDA's autocast though it means the device's, so that on a CPU every input also goes
to float32 and back. Here LoRA's second product is added to the frozen one's output in place, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on the LLM (arXiv 2106.09685).

    Attributes:
        rank: rank of the update, r.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout on LoRA's input while training.
        targets: "all-linear" for every linear layer but the LM head, or names of layers, such as ("q_proj", "v_proj").
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"


def speed_up_lora(model: nn.Module) -> None:
    """Let the LoRA layers that PEFT made compute as `_LinearWithLora` does, wherever they are plain LoRA on a CPU."""
    from peft.tuners.lora.bnb import Linear4bit
    from peft.tuners.lora.layer import Linear

    faster: dict[type[Any], type[Any]] = {Linear4bit: _faster(Linear4bit), Linear: _faster(Linear)}
    for module in model.modules():
        if type(module) in faster:
            module.__class__ = faster[type(module)]


def undo_speed_up(model: nn.Module) -> None:
    """Give PEFT's LoRA layers their own forward back, which is the one that a GPU runs."""
    for module in model.modules():
        if (own := getattr(module, "peft_class", None)) is not None:
            module.__class__ = own


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Add LoRA to float32 weights of its layers for answering: W + (alpha / r) B A, section 4.1 of the paper.

    It answers a sixth faster, in the same words to the last rounding. Not for training, nor for an LLM that
    other adapters answer with. Layers in 4 or 8 bits or in bfloat16, where LoRA would be rounded away, stay as they
    are. The matrices stay where they are too.

    Returns:
        How many layers have it now.
    """
    from peft.tuners.lora.layer import LoraLayer

    merged = 0
    layer: Any
    for layer in model.modules():
        name = _plain_lora(layer) if isinstance(layer, LoraLayer) else None
        if name is None or (weight := layer.base_layer.weight).dtype != torch.float32:
            continue
        weight.addmm_(layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
        layer.merged_adapters.append(name)
        merged += 1
    return merged


def _faster(kind: type[Any]) -> type[Any]:
    """A class of PEFT's whose forward takes the short way if there is one; all else is PEFT's own."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and not self.disable_adapters and not args and not kwargs:
            found: Tensor = self.base_layer(x)
            return found
        name = None if args or kwargs else _plain_lora(self)
        if name is None or x.device.type != "cpu" or x.numel() == 0:
            return kind.forward(self, x, *args, **kwargs)
        base = self.base_layer
        state = getattr(base.weight, "quant_state", None)
        dtype = getattr(base, "compute_dtype", None) if state is not None else base.weight.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        dtype = dtype or x.dtype
        down, up = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
        dropout, dropped = self.lora_dropout[name], None
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
            dropped = dropout(x.float()).to(dtype)  # in bfloat16 its scale would be rounded
        with torch.autocast("cpu", enabled=False):
            patched = _LinearWithLora.apply(
                x.to(dtype), dropped, down, up, self.scaling[name], base.weight.detach(), state, base.bias
            )
        return patched.to(x.dtype)

    return type(f"Faster{kind.__name__}", (kind,), {"forward": forward, "peft_class": kind})


def _plain_lora(layer: Any) -> str | None:
    """The one adapter at work in a layer of PEFT, if it is LoRA as the paper has it; else None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return None
    state = getattr(layer.base_layer.weight, "quant_state", None)
    if state is None and not layer.base_layer.weight.is_floating_point():
        return None  # 4-bit weights that have not been quantised yet
    return name


class _LinearWithLora(torch.autograd.Function):
    """x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ, with W frozen, in 4-bit or not.

    LoRA is arXiv 2106.09685, over 4-bit weights 2305.14314, equation 5.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        weight: Tensor,
        state: Any,
        bias: Tensor | None,
    ) -> Tensor:
        """x [..., I], A [r, I], B [O, r], W [O, I] or its 4-bit form with its state; all but W of one dtype.

        `dropped` is x after dropout, which A sees in its place; None if there is no dropout.
        """
        flat = x.reshape(-1, x.shape[-1])  # [N, I]
        seen = flat if dropped is None else dropped.reshape(flat.shape)  # [N, I]
        small = seen @ down.T  # [N, r]
        bias = None if bias is None else bias.to(x.dtype)
        out = nn.functional.linear(flat, _whole(weight, state, x.dtype), bias)  # [N, O]
        out.addmm_(small, up.T, alpha=scaling)
        ctx.save_for_backward(seen, small, down, up, weight)
        ctx.scaling, ctx.state, ctx.apart = scaling, state, dropped is not None
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of x after dropout, A and B; W is dequantised once more rather than kept."""
        seen, small, down, up, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # [N, O]
        of_small = (gradient @ up).mul_(ctx.scaling)  # [N, r]
        of_x = of_dropped = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _whole(weight, ctx.state, gradient.dtype)  # [N, I]
            if not ctx.apart:
                of_x.addmm_(of_small, down)
            of_x = of_x.unflatten(0, gradients[0].shape[:-1])
        if ctx.needs_input_grad[1]:
            of_dropped = (of_small @ down).unflatten(0, gradients[0].shape[:-1])
        if ctx.needs_input_grad[2]:
            of_down = of_small.T @ seen
        if ctx.needs_input_grad[3]:
            of_up = (gradient.T @ small).mul_(ctx.scaling)
        return of_x, of_dropped, of_down, of_up, None, None, None, None


def _whole(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """A frozen weight [O, I] in the dtype of the computation."""
    if state is None:
        return weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state).to(dtype)
