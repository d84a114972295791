"""What there is to work with: frozen models, recipes and shipped adapters, and which of them are on this machine.

No model is loaded and torch is not imported, so the list comes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.catalogue import shipped_adapters, shipped_recipes
from adapters.memory.known_models import KNOWN_MODELS
from adapters.recipe import describe_keys, load_recipe
from qformer.sources import PYPI_SOURCES, cache_root, find_cached


def list_models() -> dict[str, Any]:
    """What can be used, JSON-able.

    Returns:
        `cache` (the cache folder); `frozen`: what the recipes' frozen parts and packaged data are, each with name,
        what, size, licence, cached and path; `recipes`: name, command, task, description, image encoders, language
        model, needs and path; `adapters`: names of the shipped ones.
    """
    return {
        "cache": str(cache_root()),
        "frozen": [*map(_packaged, PYPI_SOURCES), *(_on_hub(name) for name in KNOWN_MODELS if ":" not in name)],
        "recipes": [_recipe(name, path) for name, path in shipped_recipes().items()],
        "adapters": list(shipped_adapters()),
    }


def describe_models(found: Mapping[str, Any]) -> str:
    """The list as tables to read."""
    frozen = [
        (entry["name"], entry["what"], entry["size"], entry["licence"], "here" if entry["cached"] else "to be fetched")
        for entry in found["frozen"]
    ]
    recipes = [
        (entry["name"], entry["command"], entry["task"], entry["needs"], entry["description"])
        for entry in found["recipes"]
    ]
    lines = [f"Frozen models and data (kept in {found['cache']}, hub models in the hub's cache)"]
    lines += _table(("name", "what", "size", "licence", "state"), frozen)
    lines += ["", "Recipes: querybridge COMMAND NAME --set data.train=FILE"]
    lines += _table(("name", "command", "task", "needs", "description"), recipes)
    lines += ["", "Shipped adapters: --adapter NAME"]
    lines += [f"  {name}" for name in found["adapters"]] or ["  none with this version; train one with a recipe"]
    return "\n".join(lines)


def list_recipe_keys() -> list[dict[str, Any]]:
    """All keys of a recipe, each with key, default and what."""
    return describe_keys()


def describe_recipe_keys(keys: Sequence[Mapping[str, Any]]) -> str:
    """What `list_recipe_keys` gives as a table to read."""
    rows = [(entry["key"], _as_set(entry["default"]), entry["what"]) for entry in keys]
    return "\n".join(_table(("key", "default", "what"), rows))


def _as_set(value: object) -> str:
    """A default as `--set` takes it; nothing if there is none."""
    if value is None:
        return ""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (tuple, list)) else str(value)


def _packaged(name: str) -> dict[str, Any]:
    source, folder = PYPI_SOURCES[name], find_cached(name)
    # a data set is named as `finetune` and `evaluate` take it, with the part to use after the colon
    shown = f"{name}:train, {name}:test" if source.kind == "data" else f"pypi:{name}"
    return {
        "name": shown,
        "what": source.kind,
        "size": f"{source.megabytes} MB",
        "licence": source.license,
        "cached": folder is not None,
        "path": str(folder) if folder else None,
    }


def _on_hub(name: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    folder = Path(config).parent if isinstance(config, str) else None
    if folder is not None and not any(folder.glob("*.safetensors")):
        folder = None  # its description alone was fetched
    published = KNOWN_MODELS[name]
    return {
        "name": name,
        "what": published.what,
        "size": _count(published.parameters),
        "licence": published.licence,
        "cached": folder is not None,
        "path": str(folder) if folder else None,
    }


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _recipe(name: str, path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    return {
        "name": name,
        "command": recipe.command if recipe.stage is None else f"{recipe.command} --stage {recipe.stage}",
        "task": recipe.task,
        "description": recipe.summary or recipe.description,
        "image_encoders": [tower.source for tower in recipe.vision.towers],
        "language": recipe.language.source,
        "needs": recipe.needs,
        "path": str(path),
    }


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
