"""The cache folder: what frozen models, packaged data and features take in it, and how to have it back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.features.files import clear_features, features_info, features_root, folder_bytes
from adapters.training.start_memory import start_files
from qformer.errors import UserError
from qformer.sources import PYPI_SOURCES, cache_root
from qformer.wheels import read_manifest

_FETCHED = ("models", "data")  # folders of the cache that hold converted wheels


def cache_info() -> dict[str, Any]:
    """What lies in the cache folder, JSON-able; nothing is loaded.

    Returns:
        `cache`: the folder; `models`: frozen models and packaged data, each with name, bytes and path; `features`: by
        encoder, each with key, encoder, pictures, bytes and path; `indexes`: bytes of the indexes of searched folders,
        of known pictures and of what earlier starts of training worked out; `bytes`: of all together. Models of the hub
        lie in the hub's own cache and are not counted.
    """
    root = cache_root()
    models: list[dict[str, Any]] = [
        {"name": _name(folder), "bytes": folder_bytes(folder), "path": str(folder)} for folder in _fetched(root)
    ]
    features: list[dict[str, Any]] = [
        {
            "key": found.key,
            "encoder": _encoder(found.identity),
            "pictures": found.files,
            "bytes": found.bytes,
            "path": str(features_root(root) / found.key),
        }
        for found in features_info(root)
    ]
    total = sum(model["bytes"] for model in models) + sum(found["bytes"] for found in features)
    indexes = sum(path.stat().st_size for path in _indexes(root))
    return {"cache": str(root), "models": models, "features": features, "indexes": indexes, "bytes": total + indexes}


def describe_cache(info: Mapping[str, Any]) -> str:
    """What `cache_info` found, as lines to read."""
    lines = [f"{info['cache']}: {readable(info['bytes'])}", "", "Frozen models and packaged data"]
    lines += [f"  {readable(model['bytes']):>10}  {model['name']}" for model in info["models"]] or ["  none"]
    lines += ["", "Features of pictures, by image encoder"]
    lines += [
        f"  {readable(found['bytes']):>10}  {found['pictures']:,} pictures  {found['encoder']}  ({found['key'][:8]})"
        for found in info["features"]
    ] or ["  none"]
    lines += ["", f"Indexes of searched folders, known pictures and earlier starts: {readable(info['indexes'])}"]
    return "\n".join(lines)


def clear_cache(*, models: bool = True, features: bool = True) -> dict[str, int]:
    """Remove what was fetched or computed; it is fetched or computed again when it is needed.

    Only what is known as ours is removed, whatever else the cache folder may hold.

    Args:
        models: remove frozen models and packaged data.
        features: remove the features of all encoders, and the indexes of searched folders, known pictures and starts.

    Returns:
        Bytes freed, by "models" and "features".

    Raises:
        UserError: something cannot be removed.
    """
    freed = {"models": 0, "features": 0}
    root = cache_root()
    try:
        for folder in _fetched(root) if models else []:
            freed["models"] += folder_bytes(folder)
            shutil.rmtree(folder)
        if features:
            freed["features"] = clear_features(root)
            for path in _indexes(root):
                freed["features"] += path.stat().st_size
                path.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be removed ({error.strerror}); mend its rights") from error
    return freed


def readable(count: int) -> str:
    """A number of bytes for people, in powers of 1024."""
    size, unit = float(count), "B"
    for following in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, following
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _fetched(root: Path) -> list[Path]:
    """The folders of converted wheels: those that bear our manifest, of older versions too."""
    found = (folder for part in _FETCHED if (root / part).is_dir() for folder in (root / part).iterdir())
    return sorted(folder for folder in found if folder.is_dir() and read_manifest(folder) is not None)


def _indexes(root: Path) -> list[Path]:
    """Files of `serve.retrieval`, half-written ones included; known pictures; earlier starts."""
    folder = root / "indexes"
    found = [path for end in ("safetensors", "lock", "partial", "sqlite3") for path in folder.glob(f"*.{end}")]
    return sorted([*found, *start_files(root)])


def _name(folder: Path) -> str:
    """The name users know a converted wheel by; with the folder's if another version is in use now."""
    for name, source in PYPI_SOURCES.items():
        if folder.name == source.folder_name:
            return name if source.kind == "data" else f"pypi:{name}"
    return f"{folder.name} (no longer used)"


def _encoder(identity: Mapping[str, object]) -> str:
    """An encoder in a few words: features are kept by its weights' hash, which has no name."""
    words = [str(identity["architecture"])] if "architecture" in identity else []
    words += [f"layer {identity['layer']}"] if "layer" in identity else []
    words += [str(identity["dtype"])] if "dtype" in identity else []
    return ", ".join(words) or "an encoder whose description is lost"
