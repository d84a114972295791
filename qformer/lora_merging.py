"""LoRA as PEFT keeps it, put into the weights it belongs to: W + (alpha / r) B A (arXiv 2106.09685, section 4.1).

Merged in float32 into unquantised weights: what is merged into 4-bit ones is rounded away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qformer.errors import UserError, first_line
from qformer.shards import LazyTensor

_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class LoraPatches:
    """LoRA matrices by the module they patch.

    Attributes:
        config: PEFT's, as a mapping.
        pairs: (A [r, I], B [O, r]) by the module's name in the LLM.
    """

    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def scaling(self) -> float:
        """What the product counts: alpha / r."""
        return float(self.config["lora_alpha"]) / int(self.config["r"])

    def merge_into(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The LLM's tensors with the patches in them; the others are the same.

        Raises:
            UserError: a patch belongs to no weight, or to one of another shape.
        """
        merged = dict(tensors)
        for module, (down, up) in self.pairs.items():
            name = f"{module}.weight"
            weight = tensors.get(name)
            if weight is None or weight.shape != (up.shape[0], down.shape[1]):
                found = "there is none" if weight is None else f"it is {list(weight.shape)}"
                raise UserError(f"LoRA patches {name} [{up.shape[0]}, {down.shape[1]}], but in the LLM {found}")
            merged[name] = replace(weight, read=_Merged(weight, down, up, self.scaling))
        return merged


@dataclass(frozen=True)
class _Merged:
    weight: LazyTensor
    down: Tensor
    up: Tensor
    scaling: float

    def __call__(self) -> Tensor:
        whole = self.weight.read()
        return (whole.float() + self.scaling * (self.up.float() @ self.down.float())).to(whole.dtype)


def read_patches(folder: Path) -> LoraPatches:
    """LoRA of a folder in PEFT's format.

    Raises:
        UserError: it cannot be read, or is a kind of LoRA that is not plain.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: its LoRA cannot be read ({first_line(error)}); fetch a fresh copy") from error
    if odd := [name for name in _UNSUPPORTED if config.get(name)]:
        raise UserError(f"{folder / CONFIG}: {odd[0]} is set, and only plain LoRA can be exported")
    modules = [
        name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")
    ]
    pairs = {
        module: (state[f"{_PREFIX}{module}.lora_A.weight"], state[f"{_PREFIX}{module}.lora_B.weight"])
        for module in modules
    }
    return LoraPatches(config, pairs)
