"""One adapter out of several that come from the same weights: their mean.

Wortsman et al. 2022, arXiv 2203.05482 ("model soups"): what was trained from the same weights may be averaged, and
often does better than each.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.artefact.artefact import read_recipe
from adapters.artefact.card import write_card
from adapters.artefact.facts import read_facts, save_facts
from adapters.loading.reader import FILE as READER
from qformer.atomic import whole_folder
from qformer.errors import UserError

_WEIGHTS = ("bridge.safetensors", "lora/adapter_model.safetensors")


def average_artefacts(parts: Mapping[Path, float], out: Path, *, first_reader: bool = False) -> None:
    """Write the weighted mean of artefacts.

    The mean has the terms of all, no figures until they are measured, and everything else from the first one. LoRA's
    two matrices are averaged each by itself, so parts should go on from one another, not from fresh matrices.

    Args:
        parts: artefacts' folders, each with its share; the shares add up to 1.
        out: the new artefact's folder; what is there is replaced.
        first_reader: take the first one's closed-form reader if the others have another of the same kind: what it says
            are words, which an LLM that learned beside another reader knows too.

    Raises:
        UserError: the frozen parts or the weights are not of one kind, or a folder cannot be read or written.
        ValueError: the shares do not add up to 1.
    """
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise ValueError(f"shares of {', '.join(map(str, parts.values()))} do not add up to 1")
    first, facts = next(iter(parts)), {folder: read_facts(folder) for folder in parts}
    for folder, theirs in facts.items():
        if theirs.fingerprints != facts[first].fingerprints:
            raise UserError(f"{folder}: its frozen parts are not those of {first}; average adapters of one kind")
    readers = {folder: (folder / READER).read_bytes() if (folder / READER).is_file() else None for folder in parts}
    if other := next((folder for folder, reader in readers.items() if reader != readers[first]), None):
        kinds = {read_recipe(folder).bridge.reader for folder in parts}
        if not first_reader or len(kinds) > 1:
            raise UserError(
                f"{other}: its closed-form reader is not that of {first}, and readers have no mean; average adapters"
                " that were trained on the same data, or without one (bridge.reader=null)"
            )
    terms = tuple(dict.fromkeys(term for theirs in facts.values() for term in theirs.terms))
    averaged = {str(folder): share for folder, share in parts.items()}
    mean = replace(facts[first], terms=terms, metrics={}, averaged=averaged)
    means = {name: _mean(name, parts) for name in _WEIGHTS if (first / name).is_file()}
    try:
        with whole_folder(out) as building:
            shutil.copytree(first, building, dirs_exist_ok=True)
            for name, tensors in means.items():
                save_file(tensors, building / name, metadata={"format": "pt"})
            save_facts(building, mean)
            (building / "README.md").write_text(write_card(read_recipe(first), mean, out.name), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: the average cannot be written ({error}); free space") from error


def _mean(name: str, parts: Mapping[Path, float]) -> dict[str, Tensor]:
    first = next(iter(parts))
    mean: dict[str, Tensor] = {}
    try:
        loaded = {folder: load_file(folder / name) for folder in parts}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{name}: cannot be read ({error}); fetch the adapter again") from error
    for folder, tensors in loaded.items():
        if {key: t.shape for key, t in tensors.items()} != {key: t.shape for key, t in loaded[first].items()}:
            raise UserError(f"{folder / name}: its tensors are not those of {first}; average adapters of one kind")
        for key, tensor in tensors.items():
            mean[key] = mean.get(key, torch.zeros(())) + parts[folder] * tensor.float()
    return {key: tensor.to(loaded[first][key].dtype) for key, tensor in mean.items()}
