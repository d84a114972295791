"""`querybridge import`: an adapter out of a published BLIP-2 or InstructBLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qformer.errors import UserError
from serve.cli.common import JsonOption, OfflineOption, report


def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE[@REVISION]", help="A BLIP-2 or InstructBLIP: a hub's org/name, or a folder."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The adapter's folder, which must not be there yet.")],
    quantize: Annotated[
        str, typer.Option("--quantize", help="How the LLM is kept: none (transformers' very answers), nf4 or int8.")
    ] = "none",
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make an adapter of a published BLIP-2 or InstructBLIP; nothing is trained."""
    from adapters.artefact.importing import import_published

    if quantize not in ("none", "nf4", "int8"):
        raise UserError(f"--quantize {quantize}: take none, nf4 or int8")
    found = import_published(source, out, quantize=quantize, offline=offline)
    then = (
        f'ask it: querybridge ask PICTURE "QUESTION" --adapter {out}'
        if found["language"]
        else f'search with it: querybridge search FOLDER "TEXT" --adapter {out}'
    )
    llm = f", LLM {found['language']}" if found["language"] else ""
    said = f"imported {source}: {found['class']}, {found['queries']} queries{llm}; the adapter is {out}\n{then}"
    report(found, as_json, said)
