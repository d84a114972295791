"""A bundle: an artefact that carries its frozen models, so that it is loaded with no network and no cache.

    models/sources.json    source, as the recipe names it, to folder below models/
    models/0, models/1, …  each in transformers' layout

The recipe names its sources as ever; an artefact that has the file is looked at first.
"""

from __future__ import annotations

import json
from pathlib import Path

from qformer.errors import UserError

MODELS = "models"
SOURCES = "sources.json"


def bundled(source: str, artefact: Path | None) -> str:
    """The folder of a source in an artefact that carries it; else the source itself.

    Raises:
        UserError: the artefact's list of sources is damaged, or what it names is missing.
    """
    if artefact is None or not (artefact / MODELS / SOURCES).is_file():
        return source
    try:
        listed = json.loads((artefact / MODELS / SOURCES).read_text(encoding="utf-8"))
        name = listed.get(source)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{artefact / MODELS / SOURCES}: damaged ({error}); export the bundle anew") from error
    if name is None:
        return source
    folder = artefact / MODELS / str(name)
    if not folder.is_dir():
        raise UserError(f"{artefact}: the bundle lacks {MODELS}/{name}, which is {source}; export it anew")
    return str(folder)
