"""A trained artefact put where it ships from, with what was measured on it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from adapters.artefact.artefact import RECIPE, read_recipe, without_folders
from adapters.artefact.card import write_card
from adapters.artefact.facts import Facts, read_facts, save_facts
from adapters.loading.grounding_head import read_grounding_facts
from adapters.loading.vision_side import GROUNDING_FILE
from qformer.atomic import whole_folder
from qformer.errors import UserError


def publish(source: Path, target: Path, metrics: Mapping[str, float]) -> Facts:
    """Copy a trained artefact to where it ships from, with what was measured on it, and a card that says so.

    Args:
        source: the artefact.
        target: its new folder, whose name it is called by; what is there is replaced, but for a head for phrases, which
            is trained apart and reads the frozen parts alone.
        metrics: what was measured, in place of the last validation's.

    Raises:
        UserError: it cannot be read or written.
    """
    facts, recipe = replace(read_facts(source), metrics=dict(metrics)), without_folders(read_recipe(source))
    try:
        with whole_folder(target) as building:
            shutil.copytree(source, building, dirs_exist_ok=True)
            head = building / GROUNDING_FILE
            if not head.exists() and (target / GROUNDING_FILE).is_file():
                shutil.copy(target / GROUNDING_FILE, head)
            (building / RECIPE).write_text(recipe.dump(), encoding="utf-8")
            save_facts(building, facts)
            terms = read_grounding_facts(head).terms if head.exists() else None
            card = write_card(recipe, facts, target.name, grounding_terms=terms)
            (building / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: the adapter cannot be written ({error}); free space") from error
    return facts
