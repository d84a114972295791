"""The artefact: one folder that holds all that was trained, and nothing else.

    bridge.safetensors     Q-Former, feature norm and projection, bfloat16; imported or left frozen, as they were
    lora/                  LoRA matrices in PEFT's own format, bfloat16; the first stage, which has no LLM, leaves none
    towers/0/              what is added to the image encoder's weights, if that does not ship with the package
    recipe.yaml            the resolved recipe
    artefact.json          format version, fingerprints of the frozen parts, data, metrics, library versions
    README.md              a model card written from what was measured

Frozen parts are named by fingerprint, never copied. Loading is strict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters.artefact.card import write_card
from adapters.artefact.facts import FACTS, Facts, read_facts, save_facts
from adapters.catalogue import shipped_adapters
from adapters.loading.assembly import Assembly, assemble
from adapters.loading.reader import Reader
from adapters.loading.vision_side import FrozenModels, VisionSide, load_vision_side
from adapters.loading.weight_deltas import keep_weight_deltas
from adapters.recipe import Recipe, load_recipe, parse_recipe
from qformer.atomic import earlier_folder, whole_folder
from qformer.errors import UserError
from qformer.precision import default_compute_dtype, has_bfloat16
from qformer.tensor_names import describe_differences

BRIDGE_FILE = "bridge.safetensors"
LORA_FOLDER = "lora"
RECIPE = "recipe.yaml"
# keys of the bridge that came later: left out, they do not count in an adapter's fingerprint
_LATER = (
    "reader", "hidden_size", "num_heads", "intermediate_size", "cross_attention_every", "vocab_size",
    "max_text_positions", "layer_norm_eps",
)  # fmt: skip
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def trained_state(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Norm, bridge, projection and heads as one flat mapping, `part.name` to tensor.

    All of them, though a run may leave them frozen (`train.bridge`); but not the words of a text side, which are known
    by the fingerprint of what they are from.
    """
    return {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if f"{part}.{name}" != "bridge.embeddings.words.weight"
    }


def _stored(parameter: Tensor) -> Tensor:
    """A tensor as an artefact keeps it: what was trained in bfloat16, what was left frozen without any rounding."""
    tensor = parameter.detach().cpu().contiguous()
    if parameter.requires_grad:
        return tensor.to(torch.bfloat16)
    halves = (tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((half for half in halves if torch.equal(half.to(tensor.dtype), tensor)), tensor)


def adapter_fingerprint(assembly: Assembly) -> str:
    """`sha256:…` over what a loaded adapter's answers depend on: its weights, its prompts and the frozen parts.

    Weights count as they are stored, in bfloat16, so it is the same on every device and in every folder.
    """
    recipe = _described(assembly.recipe, {"vision", "bridge", "language", "prompt"})
    state = trained_state(assembly.parts()) | assembly.model.language.lora_state()
    if assembly.reader is not None:
        state |= {f"reader.{name}": tensor for name, tensor in assembly.reader.state().items()}
    return _fingerprint_of([recipe, assembly.fingerprints], state)


def vision_side_fingerprint(vision_side: VisionSide) -> str:
    """`sha256:…` over what a first stage's embeddings depend on, as `adapter_fingerprint`."""
    recipe = _described(vision_side.recipe, {"vision", "bridge"})
    return _fingerprint_of([recipe, vision_side.fingerprints], trained_state(vision_side.parts()))


def _described(recipe: Recipe, sections: set[str]) -> dict[str, Any]:
    """Sections of a recipe, without the names of towers' differences: the towers' own fingerprints tell those."""
    found = recipe.model_dump(mode="json", include=sections)
    for tower in found["vision"]["towers"]:
        tower["difference"] = None
        if tower["features"] == "float16":
            tower.pop("features")
    bridge = found["bridge"]
    bridge.pop("hide_queries")  # a matter of training
    for name in _LATER:
        if bridge[name] is None:
            bridge.pop(name)
    return found


def _fingerprint_of(described: object, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        stored = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(stored.shape)}\n".encode())
        digest.update(stored.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def save_artefact(folder: Path, assembly: Assembly | VisionSide, facts: Facts) -> None:
    """Write an artefact, replacing the earlier one in a single step.

    A VisionSide is saved as the first stage's. It has no compute dtype, so that one stays as `facts` says; an
    Assembly's is its LLM's.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    trained = trained_state(assembly.parts())
    state = {name: _stored(parameter) for name, parameter in trained.items()}
    kind: Literal["representation", "language"] = "language" if isinstance(assembly, Assembly) else "representation"
    facts = replace(facts, versions={name: version(name) for name in _LIBRARIES}, kind=kind)
    if isinstance(assembly, Assembly):
        facts = replace(facts, compute_dtype=str(assembly.model.language.compute_dtype).removeprefix("torch."))
    vision_side = assembly.vision_side if isinstance(assembly, Assembly) else assembly
    try:
        with whole_folder(folder) as building:
            save_file(state, building / BRIDGE_FILE, metadata={"format": "pt"})
            if isinstance(assembly, Assembly) and assembly.model.language.has_lora:
                _save_lora(building / LORA_FOLDER, assembly)
            if isinstance(assembly, Assembly) and assembly.reader is not None:
                assembly.reader.save(building)
            recipe = assembly.recipe.naming_weight_deltas(keep_weight_deltas(vision_side.differences, building))
            (building / RECIPE).write_text(recipe.dump(), encoding="utf-8")
            save_facts(building, facts)
            (building / "README.md").write_text(write_card(recipe, facts, folder.name), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the artefact cannot be written ({error}); free space or name another --out"
        ) from error


def save_imported(folder: Path, values: dict[str, Any], state: Mapping[str, Tensor], facts: Facts) -> None:
    """Write an artefact of weights that were trained elsewhere, each tensor in the type that it has.

    Args:
        folder: new, or empty.
        values: the recipe, as a mapping.
        state: the weights by the names of `trained_state`.
        facts: with the frozen parts' fingerprints.

    Raises:
        UserError: there is something in the folder, or it cannot be written.
    """
    recipe = parse_recipe(values, RECIPE)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: there is something already; name another folder")
    facts = replace(facts, versions={name: version(name) for name in _LIBRARIES})
    try:
        with whole_folder(folder) as building:
            save_file(dict(state), building / BRIDGE_FILE, metadata={"format": "pt"})
            (building / RECIPE).write_text(recipe.dump(), encoding="utf-8")
            save_facts(building, facts)
            (building / "README.md").write_text(write_card(recipe, facts, folder.name), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the adapter cannot be written ({error}); free space or name another --out"
        ) from error


def without_folders(recipe: Recipe) -> Recipe:
    """The recipe with its data files' names alone: their folders are private. Sources of weights stay."""
    values = recipe.model_dump(mode="json")
    for part in ("train", "val"):
        named = values["data"][part]
        if isinstance(named, str):
            values["data"][part] = Path(named).name
        for entry in named if isinstance(named, list) else ():
            entry["file"] = Path(entry["file"]).name
    return parse_recipe(values, RECIPE)


def _save_lora(folder: Path, assembly: Assembly) -> None:
    """Write LoRA as PEFT would, but in bfloat16 and without a copy of the base model's path."""
    language = assembly.model.language
    folder.mkdir()
    state = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in language.lora_state().items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = language.lora_config.to_dict()
    values["base_model_name_or_path"] = assembly.recipe.language.source
    values["inference_mode"] = True
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, default=_plain, sort_keys=True))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def find_artefact(name: str | Path) -> Path:
    """The artefact's folder for a run folder (its `best`), an artefact folder or a shipped adapter's name.

    Raises:
        UserError: there is none.
    """
    path = Path(name).resolve()
    shipped = shipped_adapters()
    ships = [shipped[str(name)]] if str(name) in shipped else []
    for candidate in (path, path / "best", path / "last", *ships):
        if (candidate / FACTS).is_file():
            return candidate
        old = earlier_folder(candidate)  # a run was stopped between two renames
        if (old / FACTS).is_file():
            return old
    if not path.exists():
        raise UserError(f"--adapter {name}: no such folder, and no shipped adapter of that name")
    raise UserError(
        f"--adapter {name}: this folder holds no artefact ({FACTS} is missing); name a finished run's folder"
    )


def read_recipe(folder: Path) -> Recipe:
    """The recipe an artefact was made by."""
    return load_recipe(folder / RECIPE)


def load_artefact(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = False,
    frozen: FrozenModels | None = None,
) -> tuple[Assembly, Facts]:
    """Load the frozen parts an artefact names, check that they are the very ones, and put its weights in.

    Args:
        name: as `find_artefact` takes it.
        device: where the model runs.
        dtype: "float32" or "bfloat16" for the LLM's computation; left out, `answering_dtype`.
        offline: take frozen weights from the cache only.
        frozen: what is loaded already; what this adapter shares with others is taken from there.

    Raises:
        UserError: no artefact there; another base model; a missing, extra or misshapen tensor.
    """
    folder = find_artefact(name)
    facts = read_facts(folder)
    recipe = read_recipe(folder)
    if facts.kind == "representation":
        raise UserError(
            f"--adapter {name}: this is the first stage, which can search and classify; no language model can read it"
            f" yet: querybridge pretrain RECIPE --stage 2 --start-from {name}"
        )
    dtype = dtype or answering_dtype(facts, device)
    assembly = assemble(recipe, device=device, dtype=dtype, offline=offline, lora=False, frozen=frozen, artefact=folder)
    _check_fingerprints(folder, recipe, facts.fingerprints, assembly.fingerprints)
    load_trained(assembly, folder)
    assembly.temperature = facts.temperature
    classifier = assembly.vision_side.encoders[0].classifier
    assembly.reader = Reader.load(folder, classifier, assembly.word_vectors, assembly.spell)
    return assembly, facts


def answering_dtype(facts: Facts, device: str) -> str:
    """The dtype that an adapter answers in if none is named.

    It is the one that it was trained in, but float32 on a device without instructions for bfloat16, which is much
    faster there. If its facts do not hold it, it is what suits the device.
    """
    trained = facts.compute_dtype
    if trained is None:
        return str(default_compute_dtype(device)).removeprefix("torch.")
    return trained if has_bfloat16(device) else "float32"


def load_vision_side_artefact(
    name: str | Path, *, device: str = "cpu", offline: bool = False, need_text: bool = True
) -> tuple[VisionSide, Facts]:
    """Load everything up to the bridge, text side included, of an artefact of either kind: all that search needs.

    Args:
        name: as `find_artefact` takes it.
        device: where it runs.
        offline: take frozen weights from the cache only.
        need_text: whether the text side has to be there.

    Raises:
        UserError: as in `load_artefact`; or the adapter was trained without its text side.
    """
    folder = find_artefact(name)
    facts = read_facts(folder)
    recipe = read_recipe(folder)
    if need_text and not recipe.bridge.text_branch:
        raise UserError(f"--adapter {name}: it has no text side (bridge.text_branch), so it cannot compare words")
    vision_side = load_vision_side(recipe, device=device, offline=offline, artefact=folder)
    theirs = {role: value for role, value in facts.fingerprints.items() if role != "language"}
    _check_fingerprints(folder, recipe, theirs, vision_side.fingerprints)
    load_vision_side_weights(vision_side, folder)
    return vision_side, facts


def _check_fingerprints(folder: Path, recipe: Recipe, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    for role, value in expected.items():
        if found.get(role) != value:
            raise UserError(
                f"{folder}: it was trained on {role} weights {value[:19]}…, but {_source(recipe, role)} here has"
                f" {found.get(role, 'none')[:19]}…; use the base model it was trained on"
            )


def load_vision_side_weights(vision_side: VisionSide, folder: Path, *, drop_text_side: bool = False) -> None:
    """Put an artefact's norm, bridge and heads into a VisionSide, strictly.

    The projection of one with an LLM is left alone.

    Args:
        vision_side: changed in place.
        folder: the artefact's.
        drop_text_side: what the VisionSide has no place for of the text side is left, as BLIP-2 drops it after stage 1.
    """
    found = _read_bridge(folder)
    if read_facts(folder).kind == "language":
        found = {name: tensor for name, tensor in found.items() if not name.startswith("projection.")}
    _put(found, trained_state(vision_side.parts()), folder, drop_text_side=drop_text_side)


def _of_text_side(name: str) -> bool:
    return name.startswith(("heads.", "bridge.embeddings.")) or ".text_feed_forward." in name


def _read_bridge(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / BRIDGE_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / BRIDGE_FILE}: cannot be read ({error}); fetch a fresh copy") from error


@torch.no_grad()
def _put(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path, *, drop_text_side: bool) -> None:
    if drop_text_side:
        found = {name: tensor for name, tensor in found.items() if name in expected or not _of_text_side(name)}
    if differences := describe_differences(found, expected):
        raise UserError(f"{folder / BRIDGE_FILE}: does not fit its recipe: {differences}")
    for name, tensor in expected.items():
        tensor.copy_(found[name])


def load_trained(assembly: Assembly, folder: Path, *, drop_text_side: bool = False, lora: bool = True) -> None:
    """Put an artefact's weights into an assembly of the same shape, strictly.

    Args:
        assembly: changed in place; if LoRA is loaded, without any in place yet. Its recipe says LoRA's dropout.
        folder: the artefact's.
        drop_text_side: as in `load_vision_side_weights`.
        lora: False leaves the assembly's own LoRA, for an artefact that was trained without.
    """
    _put(_read_bridge(folder), trained_state(assembly.parts()), folder, drop_text_side=drop_text_side)
    if not lora:
        return
    if (folder / LORA_FOLDER).is_dir():
        if assembly.recipe.language.lora is None:
            raise UserError(
                f"{folder}: there is a folder '{LORA_FOLDER}', but the recipe has no LoRA; fetch a fresh copy"
            )
        assembly.model.language.load_lora(folder / LORA_FOLDER, assembly.recipe.language.lora.dropout)
    elif assembly.recipe.language.lora is not None:
        raise UserError(f"{folder}: the recipe has LoRA, but the folder '{LORA_FOLDER}' is missing; fetch a fresh copy")
    assembly.model.eval()


def _source(recipe: Recipe, role: str) -> str:
    if role == "language":
        return recipe.language.source
    if role == "bridge.start":
        return str(recipe.bridge.start)
    return recipe.vision.towers[int(role.partition(".")[2])].source
