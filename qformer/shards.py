"""Tensors that stay on disk until they are written: copies, merges and shards as transformers makes them.

What is held in memory is one shard, whatever the size of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qformer.errors import UserError, first_line
from qformer.published import read_tensors

SHARD_SIZE = "5GB"
_PATTERN = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for.

    Attributes:
        shape: its shape.
        dtype: its type.
        read: gives it, on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The same in another type; None, or a tensor of whole numbers, leaves it."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))


def stored_tensors(folder: Path, files: Mapping[str, str]) -> dict[str, LazyTensor]:
    """Tensors in safetensors files, of which only headers are read now.

    Args:
        folder: of the files.
        files: the file of each tensor, by the tensor's name.

    Raises:
        UserError: a file is missing or damaged, or of a type that torch does not have.
    """
    found: dict[str, LazyTensor] = {}
    for file in sorted(set(files.values())):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in (name for name, place in files.items() if place == file):
                    part = opened.get_slice(name)
                    dtype = _TYPES[part.get_dtype()]
                    found[name] = LazyTensor(tuple(part.get_shape()), dtype, _reader(folder, name, file))
        except FileNotFoundError as error:
            raise UserError(f"{folder}: the shard {file} is missing; fetch the model anew") from error
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{folder / file}: cannot be read ({first_line(error)}); fetch a fresh copy") from error
    return found


def _reader(folder: Path, name: str, file: str) -> Callable[[], Tensor]:
    return lambda: read_tensors(folder, {name: file})[name]


def write_shards(folder: Path, tensors: Mapping[str, LazyTensor], shard_size: str = SHARD_SIZE) -> list[str]:
    """Write a model's tensors under the file names, sizes and index that transformers gives them.

    Args:
        folder: an empty one.
        tensors: by name, in the model's order.
        shard_size: the largest, such as "5GB".

    Returns:
        The files' names.

    Raises:
        UserError: the size cannot be read.
        OSError: the disk is full.
    """
    shapes = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()}
    try:
        plan = split_torch_state_dict_into_shards(shapes, filename_pattern=_PATTERN, max_shard_size=shard_size)
    except ValueError as error:
        raise UserError(f"--shard-size {shard_size}: {first_line(error)}; write it as 5GB") from error
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].read().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(plan.filename_to_tensors)


def names_in_order(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """The names, those of `order` first and as they stand there."""
    given = dict.fromkeys(names)
    return [*(name for name in order if name in given), *(name for name in given if name not in set(order))]
