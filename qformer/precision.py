"""Numbers: which dtype computes, and what 4-bit means."""

from __future__ import annotations

import logging
import os
import platform
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

# On some CPUs bitsandbytes logs at its import that it lacks a faster kernel, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# It says at every call of an 8-bit layer that bfloat16 is cast to float16 on the way.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as QLoRA trains (arXiv 2305.14314, section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def int8_config() -> BitsAndBytesConfig:
    """LLM.int8 (arXiv 2208.07339): weights in 8 bits a row, columns with outliers computed in 16."""
    return BitsAndBytesConfig(load_in_8bit=True)


def keep_four_bit_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on the CPU in an evaluation pass.

    On processors with AVX512-BF16, `Linear4bit` repacks its weight in place for a fused kernel that has no backward;
    the training that follows would lose its gradient without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (torch types every attribute of a module)


def dequantize_four_bit(model: nn.Module, dtype: torch.dtype, *, at_most: int) -> bool:
    """Replace 4-bit layers by ones that hold the same numbers unpacked: the same answers, half again as fast on a CPU.

    A CPU unpacks a 4-bit weight again for every token. Not for training, where a step has so many tokens that it does
    not matter, and memory does.

    Args:
        model: an LLM on a CPU, with LoRA or without.
        dtype: of its computation.
        at_most: bytes; a model whose unpacked layers take more stays as it is.

    Returns:
        Whether it was done.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    packed = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    if sum(child.in_features * child.out_features for *_, child in packed) * dtype.itemsize > at_most:
        return False
    for parent, name, child in packed:
        weight: Any = child.weight
        whole = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        setattr(parent, name, _Dequantized(whole, child.bias))
    return True


class _Dequantized(nn.Linear):
    """A linear layer that computes in its weight's dtype and answers in its input's, as a 4-bit one does."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), self.weight, bias).to(x.dtype)


def limit_kernel_cache() -> None:
    """Let oneDNN keep 128 kernels instead of 1024; it must be called before the first operation.

    Each kernel is made for one shape and keeps memory. Over 60 training batches of varying length the process grew by
    0.7 GiB with the default and by 0.15 GiB with this, at the same speed. A value that the user set is kept.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def default_compute_dtype(device: str | torch.device, *, four_bit: bool = True) -> torch.dtype:
    """bfloat16 on a GPU that has it; on the CPU whichever of float32 and bfloat16 a short measurement finds faster.

    Args:
        device: where it computes.
        four_bit: whether what is computed is in 4-bit, as an LLM is and the first stage is not.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return _faster_on_cpu(four_bit) if kind == "cpu" else torch.float32


def has_bfloat16(device: str | torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them a CPU takes several times as long as in float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return kind != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@lru_cache(maxsize=2)
def _faster_on_cpu(four_bit: bool) -> torch.dtype:
    """Time a feed-forward block, forward and backward, in both dtypes (about 0.2 s).

    A bare matrix product would mislead: bfloat16 can lose there and still win the step, since what lies between the
    products is bound by memory.
    """
    from bitsandbytes.nn import Linear4bit

    times: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        layers: list[nn.Module] = [
            Linear4bit(i, o, bias=False, compute_dtype=dtype, quant_type="nf4")
            if four_bit
            else nn.Linear(i, o, bias=False)
            for i, o in ((576, 1536), (1536, 576))
        ]
        block = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.RMSNorm(576)).to(dtype).to("cpu")
        keep_four_bit_trainable(block)
        inputs = torch.ones(512, 576, dtype=dtype, requires_grad=True)
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            block(inputs).sum().backward()
            runs.append(time.perf_counter() - start)
        times[dtype] = sorted(runs)[1]
    return min(times, key=lambda dtype: times[dtype])
