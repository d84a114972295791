"""What ships with the package: recipes, adapters and differences to published weights, by name; no heavy library."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
_ADAPTERS = _PACKAGE / "shipped"
_WEIGHT_DELTAS = _ADAPTERS / "towers"


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes, by name."""
    return {path.stem: path for path in sorted((_PACKAGE / "recipes").glob("*.yaml"))}


def shipped_adapters() -> dict[str, Path]:
    """The folders of the adapters, by name."""
    return _folders_with(_ADAPTERS, "artefact.json")


def shipped_weight_deltas() -> dict[str, Path]:
    """The folders of the differences to image encoders' weights, by name."""
    return _folders_with(_WEIGHT_DELTAS, "difference.json")


def _folders_with(parent: Path, file: str) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(parent.glob(f"*/{file}"))}
