"""`querybridge cache`: what the cache folder holds, and clearing it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qformer.errors import UserError
from serve.cli.common import JsonOption, report

app = typer.Typer(
    help="See and clear what was fetched and computed once: frozen models and features.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def info(as_json: JsonOption = False) -> None:
    """List frozen models and features in the cache folder, with their sizes."""
    from serve.cache import cache_info, describe_cache

    found = cache_info()
    report(found, as_json, describe_cache(found))


@app.command()
def clear(
    features: Annotated[bool, typer.Option("--features", help="Only the features of pictures.")] = False,
    models: Annotated[bool, typer.Option("--models", help="Only the frozen models and packaged data.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove frozen models and features; they are fetched and computed again when needed."""
    from serve.cache import cache_info, clear_cache, readable

    everything = features == models
    chosen = {"models": models or everything, "features": features or everything}
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("cache clear: there is no terminal to ask on; add --yes to remove without being asked")
        found = cache_info()
        size = sum(entry["bytes"] for part, wanted in chosen.items() if wanted for entry in found[part])
        named = " and ".join(part for part, wanted in chosen.items() if wanted)
        if not typer.confirm(f"Remove {readable(size)} of {named} from {found['cache']}?", err=True):
            chosen = {"models": False, "features": False}
    freed = clear_cache(**chosen)
    report({"freed": freed}, as_json, f"freed {readable(sum(freed.values()))}")
