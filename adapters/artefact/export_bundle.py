"""A bundle: the artefact with a copy of every frozen model that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from adapters.artefact.artefact import read_recipe
from adapters.artefact.facts import read_facts
from adapters.loading.bundled import MODELS, SOURCES, bundled
from qformer.published import BRIDGE, LANGUAGE, TOWER, is_published, tensor_files
from qformer.shards import stored_tensors, write_shards
from qformer.sources import resolve

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
_FOLDERS = ("qformer_tokenizer",)
_PARTS = {"vision": TOWER, "bridge": BRIDGE, "language": LANGUAGE}


def export_bundle(artefact: Path, out: Path, *, offline: bool) -> str:
    """Copy an artefact and its frozen models.

    Of a published BLIP-2 or InstructBLIP only the parts that the adapter uses are copied. Fingerprints stay what they
    are, so that the copies are checked like the originals.

    Args:
        artefact: its folder; a bundle may be bundled again.
        out: an empty folder.
        offline: fetch nothing.

    Returns:
        What was done, in words.

    Raises:
        UserError: a frozen model cannot be had.
        OSError: no room.
    """
    for path in artefact.iterdir():
        if path.name != MODELS:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, out / path.name)
    names: dict[str, str] = {}
    for source, roles in _sources(artefact).items():
        names[source] = str(len(names))
        parts = tuple(beginning for role in roles for beginning in _PARTS[role])
        _copy_model(
            resolve(bundled(source, artefact), offline=offline, parts=parts), out / MODELS / names[source], parts
        )
    (out / MODELS / SOURCES).write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"the adapter with {len(names)} frozen models"


def _sources(artefact: Path) -> dict[str, list[str]]:
    """Each source that an artefact names, with what is taken of it."""
    recipe = read_recipe(artefact)
    named = [(tower.source, "vision") for tower in recipe.vision.towers]
    if recipe.bridge.start is not None:
        named.append((recipe.bridge.start, "bridge"))
    if read_facts(artefact).kind == "language":
        named.append((recipe.language.source, "language"))
    found: dict[str, list[str]] = {}
    for source, role in named:
        found.setdefault(source, []).append(role)
    return found


def _copy_model(folder: Path, target: Path, parts: tuple[str, ...]) -> None:
    target.mkdir(parents=True)
    for pattern in _COPIED:
        for path in folder.glob(pattern):
            if not path.name.endswith(".safetensors.index.json"):
                shutil.copy(path, target)
    for name in _FOLDERS:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
    if is_published(folder):
        files = {name: file for name, file in tensor_files(folder).items() if name.startswith(parts)}
        write_shards(target, stored_tensors(folder, files))
        return
    for path in folder.glob("*.safetensors*"):
        shutil.copy(path, target)
