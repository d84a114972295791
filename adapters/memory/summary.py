"""What a model consists of: each group of weights with dtype, quantised or not, trainable or not, count and bytes.

It reads a loaded model and one on the meta device alike, so that what `estimate` calculates and what `doctor` finds
are the same list.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from torch import nn

from qformer.model import VisionLanguageModel

ABSMAX_BLOCK = 64  # weights that share one 8-bit scale in NF4 (arXiv 2305.14314, section 3)
NESTED_BLOCK = 256  # scales that share one fp32 scale of their own: double quantisation
_LINEAR = "LLM linear layers"
_WORDS = "LLM embeddings and head"
_SMALL = "LLM norms and biases"


@dataclass(frozen=True)
class ModuleSummary:
    """Weights of one kind.

    Attributes:
        name: of the group; it comes more than once if its weights differ in what follows.
        dtype: as torch calls it, "nf4", or "int8" of LLM.int8.
        quantized: whether they are held in 4 or 8 bits.
        trainable: whether training changes them.
        parameters: how many, unpacked and each counted once.
        bytes: what they occupy, quantisation constants included.
    """

    name: str
    dtype: str
    quantized: bool
    trainable: bool
    parameters: int
    bytes: int


def summarise_modules(model: VisionLanguageModel) -> list[ModuleSummary]:
    """The groups of a model's weights, from the picture to the answer."""
    found: dict[tuple[str, str, bool, bool], list[int]] = {}
    seen: set[int] = set()
    head = model.language.base.get_output_embeddings()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue  # tied weights are held once
            seen.add(id(parameter))
            four, eight = is_four_bit(parameter), is_eight_bit(parameter)
            quantized = four or eight
            count = module.in_features * module.out_features if quantized else parameter.numel()
            size = four_bit_bytes(count) if four else parameter.numel() * parameter.element_size()
            if eight:  # a byte each, and a float32 scale a row
                size = count + 4 * module.out_features
            dtype = "nf4" if four else "int8" if eight else str(parameter.dtype).removeprefix("torch.")
            key = (_group(path, name, module, head), dtype, quantized, parameter.requires_grad)
            total = found.setdefault(key, [0, 0])
            total[0] += count
            total[1] += size
    parts = [ModuleSummary(*key, parameters, size) for key, (parameters, size) in found.items()]
    order = list(dict.fromkeys(part.name for part in parts if not part.name.startswith(("LLM", "LoRA"))))
    order += [_WORDS, _LINEAR, _SMALL, "LoRA"]
    return sorted(parts, key=lambda part: (order.index(part.name), not part.quantized))


def is_four_bit(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes holds this weight, or will hold it once loaded, in 4-bit."""
    return type(parameter).__name__ == "Params4bit"


def is_eight_bit(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes holds this weight, or will hold it once loaded, in 8-bit."""
    return type(parameter).__name__ == "Int8Params"


def four_bit_bytes(parameters: int) -> int:
    """Bytes of a weight in NF4 with double quantisation: half a byte each, and 0.127 bit each for the two scales.

    The code tables (1 KiB a layer) are left out. Equal to `qformer.precision.linear_memory` of a loaded layer (tested).
    """
    scales = ceil(parameters / ABSMAX_BLOCK)
    return ceil(parameters / 2) + scales + 4 * ceil(scales / NESTED_BLOCK)


def _group(path: str, name: str, module: nn.Module, head: Any) -> str:
    room, _, rest = path.partition(".")
    if room == "encoders":
        return f"image encoder {rest.partition('.')[0]}"
    if room == "feature_norm":
        return "feature norm"
    if room != "language":
        return room  # bridge, projection
    if "lora_" in path:
        return "LoRA"
    if module is head or isinstance(module, nn.Embedding):
        return _WORDS
    return _LINEAR if isinstance(module, nn.Linear) and name == "weight" else _SMALL
