"""An adapter in the formats of others: transformers' BLIP-2, PEFT, a plain LLM, or a bundle that needs no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError

from adapters.artefact.artefact import BRIDGE_FILE, LORA_FOLDER, find_artefact, read_recipe
from adapters.artefact.export_blip2 import Blip2Parts, export_blip2
from adapters.artefact.export_bundle import export_bundle
from adapters.artefact.export_language import export_merged, export_peft
from adapters.artefact.facts import read_facts
from adapters.loading.bundled import bundled
from adapters.loading.vision_side import bridge_config, load_vision_side
from qformer.atomic import whole_folder
from qformer.errors import UserError
from qformer.published import BRIDGE, is_published, open_published
from qformer.published_bridge import read_bridge
from qformer.shards import SHARD_SIZE
from qformer.sources import resolve

Format = Literal["blip2", "peft", "merged-llm", "bundle"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_adapter(
    name: str,
    to: str,
    out: Path,
    *,
    lora_apart: bool = False,
    dtype: str | None = None,
    shard_size: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Write an adapter in another format, whole or not at all.

    Args:
        name: as `adapters.artefact.artefact.find_artefact` takes it.
        to: "blip2" (a folder of transformers' BLIP-2 or InstructBLIP with LoRA merged), "peft" (LoRA alone),
            "merged-llm" (the LLM with LoRA merged) or "bundle" (the adapter with all its frozen parts).
        out: the folder, which must not be there.
        lora_apart: with "blip2", LoRA beside the model, as PEFT's.
        dtype: of the weights of "blip2" (left out, each as it is) and "merged-llm" (left out, bfloat16).
        shard_size: the largest file of "blip2" and "merged-llm", such as "5GB".
        offline: fetch nothing.

    Returns:
        `out`, `format`, `what` (one line) and `bytes`.

    Raises:
        UserError: the format cannot hold the adapter, a flag goes with another format, or there is no room.
    """
    if to not in get_args(Format):
        raise UserError(f"--to {to}: take one of {', '.join(get_args(Format))}")
    if lora_apart and to != "blip2":
        raise UserError(f"--lora-apart goes with --to blip2, not {to}")
    if (dtype is not None or shard_size is not None) and to not in ("blip2", "merged-llm"):
        raise UserError(f"--dtype and --shard-size go with --to blip2 or merged-llm, not {to}")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: take one of {', '.join(_DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name another folder")
    folder = find_artefact(name)
    write = _writer(folder, to, lora_apart=lora_apart, dtype=dtype, shard_size=shard_size, offline=offline)
    try:
        with whole_folder(out) as building:
            what = write(building)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: it cannot be written ({error}); free space or name another --out") from error
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"out": str(out), "format": to, "what": what, "bytes": size}


def _writer(
    folder: Path, to: str, *, lora_apart: bool, dtype: str | None, shard_size: str | None, offline: bool
) -> Callable[[Path], str]:
    """What writes the format into an empty folder and says what it wrote."""
    if to == "bundle":
        return lambda out: export_bundle(folder, out, offline=offline)
    if read_facts(folder).kind == "representation":
        raise UserError(f"--to {to}: this adapter is the first stage and has no LLM; take --to bundle")
    recipe = read_recipe(folder)
    language = bundled(recipe.language.source, folder)
    lora = folder / LORA_FOLDER if (folder / LORA_FOLDER).is_dir() else None
    size = shard_size or SHARD_SIZE
    if to == "peft":
        return lambda out: export_peft(lora, recipe.language.source, out)
    if to == "merged-llm":
        kind = _DTYPES[dtype or "bfloat16"]
        return lambda out: export_merged(lora, language, out, dtype=kind, shard_size=size, offline=offline)
    parts = _blip2_parts(folder, lora, language, offline)
    kept = None if dtype is None else _DTYPES[dtype]
    return lambda out: export_blip2(parts, out, lora_apart=lora_apart, dtype=kept, shard_size=size, offline=offline)


def _blip2_parts(folder: Path, lora: Path | None, language: str, offline: bool) -> Blip2Parts:
    """What there is of an adapter.

    Raises:
        UserError: there is something in it that a BLIP-2 has no place for.
    """
    recipe = read_recipe(folder)
    towers, bridge = recipe.vision.towers, recipe.bridge
    tower = towers[0]
    for odd, why in (
        (len(towers) > 1, "it has two image encoders"),
        (tower.difference is not None, "its image encoder was trained further (vision.towers.difference)"),
        (tower.layer != -2 or not tower.class_token, "it reads another layer, or no class token"),
        (tower.image_size is not None, "it sees pictures at a size of its own (vision.towers.image_size)"),
        (bridge.kind != "qformer", f"its bridge is no Q-Former but {bridge.kind}"),
        (bridge.reader is not None, "it has a closed-form reader (bridge.reader)"),
    ):
        if odd:
            raise UserError(f"--to blip2: {why}, which a BLIP-2 has no place for; take --to bundle")
    from_here = bundled(tower.source, folder)
    encoder_folder = resolve(from_here, offline=offline, parts=("vision_model.",))
    width = _tower_width(encoder_folder)
    config, words, start = bridge_config(bridge, width), None, None
    if bridge.instruction_aware:
        assert bridge.start is not None
        start = bundled(bridge.start, folder)
        words = _words(folder, start, offline)
    return Blip2Parts(folder / BRIDGE_FILE, lora, config, from_here, language, start, words)


def _tower_width(folder: Path) -> int:
    from qformer.published import read_config

    config = read_config(folder)
    found = getattr(config, "vision_config", config)
    return int(getattr(found, "hidden_size", 0) or 1)


def _words(folder: Path, start: str, offline: bool) -> torch.Tensor:
    """The bridge's table of words, which an artefact does not hold."""
    source = resolve(start, offline=offline, parts=BRIDGE)
    if is_published(source):
        return read_bridge(open_published(source)).bridge["embeddings.words.weight"]
    bridge: Any = load_vision_side(read_recipe(folder), offline=offline, artefact=folder).bridge
    words: torch.Tensor = bridge.embeddings.words.weight.detach()
    return words
