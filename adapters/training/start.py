"""Starting a run from another adapter's weights: what must be equal, and what may be left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.artefact.artefact import find_artefact, load_trained, load_vision_side_weights, read_recipe
from adapters.artefact.facts import read_facts
from adapters.loading.assembly import Assembly
from adapters.loading.vision_side import VisionSide
from adapters.loading.weight_deltas import read_weight_delta
from adapters.recipe import BridgeSection, LoraSection, VisionSection
from qformer.errors import UserError


@dataclass(frozen=True)
class Start:
    """What a run takes over from the adapter it starts from, beside weights.

    Attributes:
        name: as it was given.
        terms: of its data, which what is trained inherits.
        changes: what its bridge was not trained with and has to get used to.
    """

    name: str
    terms: tuple[str, ...]
    changes: tuple[str, ...]

    def __str__(self) -> str:
        line = f"starting from {self.name}; terms: {'; '.join(self.terms) or 'not stated'}"
        return line + (f"; new to its bridge: {', '.join(self.changes)}" if self.changes else "")


def start_from_artefact(assembly: Assembly | VisionSide, name: str) -> Start:
    """Load an adapter's weights as the start of a run.

    From the first stage an Assembly takes norm and bridge, and keeps its own fresh projection and LoRA. The text side
    is left behind if the run's recipe has none, and the bridge's and LoRA's dropout may differ. A tower may see
    through another difference to the same published weights, or see pictures at another size if the run's recipe
    names one: the bridge gets used to it.

    Args:
        assembly: what is to be trained; without LoRA in place if the adapter brings its own.
        name: as `adapters.artefact.artefact.find_artefact` takes it.

    Raises:
        UserError: recipe or frozen weights differ from the adapter's otherwise.
    """
    folder = find_artefact(name)
    facts = read_facts(folder)
    theirs, ours = read_recipe(folder), assembly.recipe
    has_language = isinstance(assembly, Assembly) and facts.kind == "language"
    for part, differs in (
        ("vision", not _sees_alike(theirs.vision, ours.vision)),
        ("bridge", not _fits(theirs.bridge, ours.bridge)),
        ("language.lora", has_language and not _is_patched_alike(theirs.language.lora, ours.language.lora)),
    ):
        if differs:
            but = "" if part == "vision" else ", dropout apart"
            raise UserError(
                f"--start-from {name}: its '{part}' differs from the recipe's; make the two sections equal{but}"
            )
    vision_side = assembly.vision_side if isinstance(assembly, Assembly) else assembly
    free = _other_weight_deltas(vision_side, folder, theirs.vision, facts.fingerprints)
    for role, expected in facts.fingerprints.items():
        if role in free or (role == "language" and not has_language):
            continue
        if role in assembly.fingerprints and assembly.fingerprints[role] != expected:
            raise UserError(f"--start-from {name}: it was trained with other {role} weights than the recipe names")
    if has_language:
        assert isinstance(assembly, Assembly)
        load_trained(assembly, folder, drop_text_side=True, lora=theirs.language.lora is not None)
    else:
        load_vision_side_weights(vision_side, folder, drop_text_side=True)
    sizes = [
        f"vision.{place} sees {new.image_size} px"
        for place, (old, new) in enumerate(zip(theirs.vision.towers, ours.vision.towers, strict=True))
        if old.image_size != new.image_size
    ]
    return Start(name, tuple(facts.terms), (*(f"the difference of {role}" for role in free), *sizes))


def _other_weight_deltas(
    vision_side: VisionSide, folder: Path, vision: VisionSection, theirs: Mapping[str, str]
) -> list[str]:
    """The towers, by role, that see through another difference to the published weights than an adapter's do.

    Args:
        vision_side: what is to be trained.
        folder: of the adapter.
        vision: the adapter's towers.
        theirs: the adapter's fingerprints, by role.
    """
    ours = vision_side.fingerprints
    found = []
    for place, tower in enumerate(vision.towers):
        role = f"vision.{place}"
        if theirs.get(role) == ours[role]:
            continue
        their_base = theirs.get(role) if tower.difference is None else read_weight_delta(tower.difference, folder).base
        added = vision_side.differences.get(place)
        if their_base == (ours[role] if added is None else added.base):
            found.append(role)
    return found


def _sees_alike(theirs: VisionSection, ours: VisionSection) -> bool:
    """Equal but for differences, which fingerprints tell, and sizes of pictures that our recipe sets itself."""
    if len(theirs.towers) != len(ours.towers):
        return False
    return all(
        old.model_copy(
            update={"difference": None, "image_size": new.image_size or old.image_size, "features": new.features}
        )
        == new.model_copy(update={"difference": None})
        for old, new in zip(theirs.towers, ours.towers, strict=True)
    )


def _is_patched_alike(theirs: LoraSection | None, ours: LoraSection | None) -> bool:
    """Equal but for dropout; theirs may have no LoRA."""
    if theirs is None or ours is None:
        return theirs is None
    return theirs.model_copy(update={"dropout": ours.dropout}) == ours


def _fits(theirs: BridgeSection, ours: BridgeSection) -> bool:
    """Equal but for dropout, a reader, which each run fits for itself, and the text side.

    The text side may be left behind, or read instructions, but not come fresh.
    """
    reads, has = ours.text_branch or ours.instruction_aware, theirs.text_branch or theirs.instruction_aware
    if (reads and not has) or (ours.text_branch and not theirs.text_branch):
        return False
    free: dict[str, Any] = {
        "reader": None,
        "hide_queries": 0.0,
        "dropout": None,
        "patch_dropout": 0.0,
        "text_branch": False,
        "instruction_aware": False,
    }
    if not ours.text_branch:
        free["text_pooling"] = "first"  # nothing is left to pool
    return theirs.model_copy(update=free) == ours.model_copy(update=free)


def freeze_bridge(assembly: Assembly) -> None:
    """Leave norm, bridge, projection and heads as they are: only LoRA is trained."""
    for part in assembly.parts().values():
        part.requires_grad_(False)


def has_lora(folder: Path) -> bool:
    """Whether an artefact brings LoRA matrices; if not, a run that starts from it begins with fresh ones."""
    return read_facts(folder).kind == "language" and read_recipe(folder).language.lora is not None


def is_published(name: str) -> bool:
    """Whether an adapter is a published checkpoint as it was imported: its bridge knows pictures without a reader.

    Args:
        name: as `adapters.artefact.artefact.find_artefact` takes it.
    """
    return read_facts(find_artefact(name)).imported is not None


def sections_of(name: str) -> dict[str, dict[str, Any]]:
    """What a run must share of an adapter's recipe to start from it: sections, without text side and patch dropout.

    Args:
        name: as `adapters.artefact.artefact.find_artefact` takes it.

    Raises:
        UserError: there is no such adapter.
    """
    folder = find_artefact(name)
    recipe = read_recipe(folder).model_dump(mode="json")
    for tower in recipe["vision"]["towers"]:
        if tower["difference"] is not None:
            found = read_weight_delta(tower["difference"], folder)
            tower["difference"] = tower["difference"] if found.ships else str(found.folder)
    recipe["bridge"] |= {"text_branch": False, "patch_dropout": 0.0, "reader": None, "hide_queries": 0.0}
    if read_facts(folder).imported is not None:  # it was not trained here, so that quantisation and LoRA are the run's
        recipe["language"] = {"source": recipe["language"]["source"]}
        for tower in recipe["vision"]["towers"]:
            del tower["features"]
    return {key: recipe[key] for key in ("vision", "bridge", "language", "prompt")}
