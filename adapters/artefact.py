"""The artefact: one folder that holds all that was trained, and nothing else.

    bridge.safetensors     Q-Former, feature norm and projection, bfloat16
    lora/                  LoRA matrices in PEFT's own format, bfloat16
    recipe.yaml            the resolved recipe
    artefact.json          format version, fingerprints of the frozen parts, data, metrics, library versions
    README.md              a model card written from what was measured

Frozen parts are named by fingerprint, never copied. Loading is strict.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.assembly import Assembly, assemble
from adapters.recipe import Recipe, load_recipe
from qformer.errors import UserError
from qformer.strict import describe_differences

FORMAT_VERSION = 1
_BRIDGE = "bridge.safetensors"
_LORA = "lora"
_RECIPE = "recipe.yaml"
_FACTS = "artefact.json"
_SHIPPED = Path(__file__).parent / "shipped"
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True)
class Facts:
    """What is known about an artefact besides its weights.

    Attributes:
        fingerprints: of the frozen parts, by role.
        data: name, fingerprint and size of the training data.
        metrics: what was measured, by name; fractions, not per cent.
        terms: terms of the training data, one a line; inherited from an artefact it started from.
        steps: optimiser steps taken.
        started_from: the artefact it started from, or None.
        versions: of the libraries.
        format_version: of this folder's layout.
    """

    fingerprints: Mapping[str, str]
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    terms: tuple[str, ...] = ()
    steps: int = 0
    started_from: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def trained_state(assembly: Assembly) -> dict[str, Tensor]:
    """Bridge, norm and projection as one flat mapping, `part.name` to tensor."""
    parts = assembly.model.trainable_parts()
    return {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def save_artefact(folder: Path, assembly: Assembly, facts: Facts) -> None:
    """Write an artefact, replacing the one that stands there in a single step.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from adapters.card import write_card

    building = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        state = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in trained_state(assembly).items()}
        save_file(state, building / _BRIDGE, metadata={"format": "pt"})
        if assembly.model.language.has_lora:
            _save_lora(building / _LORA, assembly)
        facts = Facts(**{**asdict(facts), "versions": {name: version(name) for name in _LIBRARIES}})
        (building / _RECIPE).write_text(assembly.recipe.dump(), encoding="utf-8")
        (building / _FACTS).write_text(json.dumps(asdict(facts), indent=2, ensure_ascii=False), encoding="utf-8")
        (building / "README.md").write_text(write_card(assembly.recipe, facts, folder.name), encoding="utf-8")
        replace_folder(building, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(
            f"{folder}: the artefact cannot be written ({error}); free space or name another --out"
        ) from error


def _save_lora(folder: Path, assembly: Assembly) -> None:
    """Write LoRA as PEFT would, but in bfloat16 and without a copy of the base model's path."""
    language = assembly.model.language
    folder.mkdir()
    state = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in language.lora_state().items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = language.model.peft_config["default"]
    values = config.to_dict()
    values["base_model_name_or_path"] = assembly.recipe.language.source
    values["inference_mode"] = True
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, default=_plain, sort_keys=True))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another; at every moment one of the two stands there whole."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def find_artefact(name: str | Path) -> Path:
    """The artefact's folder for a run folder (its `best`), an artefact folder or a shipped adapter's name.

    Raises:
        UserError: there is none.
    """
    path = Path(name).resolve()
    for candidate in (path, path / "best", path / "last", _SHIPPED / str(name)):
        if (candidate / _FACTS).is_file():
            return candidate
        old = candidate.with_name(candidate.name + ".old")  # a run was stopped between two renames
        if (old / _FACTS).is_file():
            return old
    if not path.exists():
        raise UserError(f"--adapter {name}: no such folder, and no shipped adapter of that name")
    raise UserError(
        f"--adapter {name}: this folder holds no artefact ({_FACTS} is missing); name a finished run's folder"
    )


def shipped_adapters() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{_FACTS}"))


def read_facts(folder: Path) -> Facts:
    """The facts of an artefact.

    Raises:
        UserError: they cannot be read, or are of a newer format.
    """
    try:
        values = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if values["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{folder}: format {values['format_version']} is newer than this querybridge reads; update it"
            )
        values["terms"] = tuple(values["terms"])
        return Facts(**values)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{folder / _FACTS}: damaged or not ours ({error}); train again or fetch a fresh copy"
        ) from error


def read_recipe(folder: Path) -> Recipe:
    """The recipe an artefact was made by."""
    return load_recipe(folder / _RECIPE)


def load_artefact(
    name: str | Path, *, device: str = "cpu", dtype: str | None = None, offline: bool = False
) -> tuple[Assembly, Facts]:
    """Load the frozen parts an artefact names, check that they are the very ones, and put its weights in.

    Raises:
        UserError: no artefact there; another base model; a missing, extra or misshapen tensor.
    """
    folder = find_artefact(name)
    facts = read_facts(folder)
    recipe = read_recipe(folder)
    assembly = assemble(recipe, device=device, dtype=dtype, offline=offline, lora=False)
    for role, expected in facts.fingerprints.items():
        found = assembly.fingerprints.get(role)
        if found != expected:
            raise UserError(
                f"{folder}: it was trained on {role} weights {expected[:19]}…, but {_source(recipe, role)} here has"
                f" {(found or 'none')[:19]}…; use the base model it was trained on"
            )
    load_trained(assembly, folder)
    return assembly, facts


def load_trained(assembly: Assembly, folder: Path) -> None:
    """Put an artefact's weights into an assembly of the same shape, strictly. LoRA must not be in place yet."""
    try:
        found = load_file(folder / _BRIDGE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / _BRIDGE}: cannot be read ({error}); fetch a fresh copy") from error
    expected = trained_state(assembly)
    if differences := describe_differences(found, expected):
        raise UserError(f"{folder / _BRIDGE}: does not fit its recipe: {differences}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    if (folder / _LORA).is_dir():
        if assembly.recipe.language.lora is None:
            raise UserError(f"{folder}: there is a folder '{_LORA}', but the recipe has no LoRA; fetch a fresh copy")
        assembly.model.language.load_lora(folder / _LORA)
    elif assembly.recipe.language.lora is not None:
        raise UserError(f"{folder}: the recipe has LoRA, but the folder '{_LORA}' is missing; fetch a fresh copy")
    assembly.model.eval()


def _source(recipe: Recipe, role: str) -> str:
    if role == "language":
        return recipe.language.source
    if role == "bridge.start":
        return str(recipe.bridge.start)
    return recipe.vision.towers[int(role.partition(".")[2])].source
