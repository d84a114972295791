"""A tiny grounding head with the frozen parts it reads: random weights, no network."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import save_tiny_bert, save_tiny_efficientnet

from adapters.loading.grounding_head import (
    GROUNDING_FILE,
    GroundingFacts,
    PhraseEncoder,
    TowerMaps,
    load_tower,
    save_grounding_head,
)
from qformer.grounding import GroundingConfig, GroundingHead

LAYERS = (5, 8)


def tiny_parts(folder: Path) -> tuple[TowerMaps, PhraseEncoder]:
    """A tower of 33 pixels and a text encoder, below a folder."""
    for name, save in (("tower", save_tiny_efficientnet), ("bert", save_tiny_bert)):
        if not (folder / name).exists():
            save(folder / name)
    return load_tower(str(folder / "tower"), None, 33, LAYERS), PhraseEncoder(str(folder / "bert"))


def tiny_config(maps: TowerMaps, phrases: PhraseEncoder) -> GroundingConfig:
    """The smallest head that fits."""
    found = maps(torch.zeros(1, 3, 33, 33))
    return GroundingConfig(
        widths=tuple(part.shape[1] for part in found), text_width=phrases.width, rows=found[0].shape[2], width=8,
        heads=2, layers=1, mixing=1, dropout=0.0,
    )  # fmt: skip


def save_tiny_head(folder: Path, artefact: Path) -> Path:
    """Put a random head into an artefact's folder; its frozen parts lie below another."""
    maps, phrases = tiny_parts(folder)
    torch.manual_seed(3)
    head = GroundingHead(tiny_config(maps, phrases))
    facts = GroundingFacts(
        config=head.config, tower=str(folder / "tower"), difference=None, image_size=33, layers=LAYERS,
        text=str(folder / "bert"), fingerprints={"tower": str(maps.encoder.weights), "text": phrases.fingerprint},
        terms=("made up - for tests",),
    )  # fmt: skip
    path = artefact / GROUNDING_FILE
    save_grounding_head(path, head, facts)
    return path
