"""Starting a run from another adapter's weights: what must be equal, and what may be left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.artefact import find_artefact, load_sight_weights, load_trained, read_facts, read_recipe
from adapters.assembly import Assembly
from adapters.recipe import BridgeSection, TowerSection, VisionSection
from adapters.sight import Sight
from adapters.tower_difference import read_difference
from qformer.errors import UserError


def start_from_artefact(assembly: Assembly | Sight, name: str) -> list[str]:
    """Load an adapter's weights as the start of a run.

    From the first stage an Assembly takes norm and bridge, and keeps its own fresh projection and LoRA. The text side
    is left behind where the run's recipe has none. A tower may see through another difference to the same published
    weights (`other_differences`), or at another size: the bridge gets used to it.

    Args:
        assembly: what is to be trained; without LoRA in place where the adapter brings its own.
        name: as `adapters.artefact.find_artefact` takes it.

    Returns:
        Its data's terms, which what is trained inherits.

    Raises:
        UserError: recipe or frozen weights differ from the adapter's.
    """
    folder = find_artefact(name)
    facts = read_facts(folder)
    theirs, ours = read_recipe(folder), assembly.recipe
    has_language = isinstance(assembly, Assembly) and facts.kind == "language"
    for part, differs in (
        ("vision", _kinds(theirs.vision) != _kinds(ours.vision)),
        ("bridge", not _fits(theirs.bridge, ours.bridge)),
        ("language.lora", has_language and theirs.language.lora not in (None, ours.language.lora)),
    ):
        if differs:
            raise UserError(f"--start-from {name}: its '{part}' differs from the recipe's; make the two sections equal")
    sight = assembly.sight if isinstance(assembly, Assembly) else assembly
    free = other_differences(sight, name)
    for role, expected in facts.fingerprints.items():
        if role in free or (role == "language" and not has_language):
            continue
        if role in assembly.fingerprints and assembly.fingerprints[role] != expected:
            raise UserError(f"--start-from {name}: it was trained with other {role} weights than the recipe names")
    if has_language:
        assert isinstance(assembly, Assembly)
        load_trained(assembly, folder, drop_text_side=True, lora=theirs.language.lora is not None)
    else:
        load_sight_weights(sight, folder, drop_text_side=True)
    return list(facts.terms)


def other_differences(sight: Sight, name: str) -> list[str]:
    """The towers, by role, that see through another difference to the published weights than an adapter's do.

    Args:
        sight: what is to be trained.
        name: as `adapters.artefact.find_artefact` takes it.

    Raises:
        UserError: there is no such adapter.
    """
    folder = find_artefact(name)
    theirs, ours = read_facts(folder).fingerprints, sight.fingerprints
    found = []
    for place, tower in enumerate(read_recipe(folder).vision.towers):
        role = f"vision.{place}"
        if theirs.get(role) == ours.get(role):
            continue
        their_base = theirs.get(role) if tower.difference is None else read_difference(tower.difference, folder).base
        added = sight.differences.get(place)
        if their_base is not None and their_base == (ours.get(role) if added is None else added.base):
            found.append(role)
    return found


def describe_start(sight: Sight, name: str) -> str:
    """One line for who trains: where the run starts from, the terms it inherits, and towers that see otherwise."""
    line = f"starting from {name}; terms: {'; '.join(read_facts(find_artefact(name)).terms) or 'not stated'}"
    others = [f"{role} with another difference" for role in other_differences(sight, name)]
    towers = zip(sight.recipe.vision.towers, read_recipe(find_artefact(name)).vision.towers, strict=True)
    others += [
        f"vision.{place} with pictures of {ours.image_size or 'its own'} px"
        for place, (ours, theirs) in enumerate(towers)
        if ours.image_size != theirs.image_size
    ]
    if others:
        line += f"; its bridge was not trained with this: {', '.join(others)}"
    return line


def _kinds(vision: VisionSection) -> list[TowerSection]:
    """Towers without what may change: their differences, which fingerprints tell, and how large they see a picture."""
    return [tower.model_copy(update={"difference": None, "image_size": None}) for tower in vision.towers]


def _fits(theirs: BridgeSection, ours: BridgeSection) -> bool:
    """Equal but for dropout and the text side, which may be left behind, or read instructions, but not come fresh."""
    reads, has = ours.text_branch or ours.instruction_aware, theirs.text_branch or theirs.instruction_aware
    if (reads and not has) or (ours.text_branch and not theirs.text_branch):
        return False
    free: dict[str, Any] = {"dropout": None, "patch_dropout": 0.0, "text_branch": False, "instruction_aware": False}
    if not ours.text_branch:
        free["text_pooling"] = "first"  # nothing is left to pool
    return theirs.model_copy(update=free) == ours.model_copy(update=free)


def has_lora(folder: Path) -> bool:
    """Whether an artefact brings LoRA matrices; where not, a run that starts from it begins with fresh ones."""
    return read_facts(folder).kind == "language" and read_recipe(folder).language.lora is not None


def sections_of(name: str) -> dict[str, dict[str, Any]]:
    """What a run must share of an adapter's recipe to start from it: sections, without text side and patch dropout.

    Args:
        name: as `adapters.artefact.find_artefact` takes it.

    Raises:
        UserError: there is no such adapter.
    """
    folder = find_artefact(name)
    recipe = read_recipe(folder).model_dump(mode="json")
    for tower in recipe["vision"]["towers"]:
        if tower["difference"] is not None:
            found = read_difference(tower["difference"], folder)
            tower["difference"] = tower["difference"] if found.ships else str(found.folder)
    recipe["bridge"] |= {"text_branch": False, "patch_dropout": 0.0}
    return {key: recipe[key] for key in ("vision", "bridge", "language", "prompt")}
