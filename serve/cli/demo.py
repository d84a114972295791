"""`querybridge demo`: the web page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qformer.errors import UserError
from serve.cli.common import DeviceOption, DtypeOption, MaxPromptOption, OfflineOption
from serve.limits import MAX_PROMPT


def demo(
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A run's or artefact's folder, or a shipped adapter's name; may be repeated."),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")
    ] = 7860,
    search_folder: Annotated[
        Path | None, typer.Option("--search-folder", help="A folder of pictures that the page may search.")
    ] = None,
    votes: Annotated[Path, typer.Option("--votes", help="The file that votes of the Compare tab are kept in.")] = Path(
        "runs/votes.jsonl"
    ),
    allow_training: Annotated[
        bool,
        typer.Option("--allow-training", help="Show the Train tab, which reads data files of this machine."),
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option("--auth", envvar="QUERYBRIDGE_DEMO_AUTH", help="user:password that the page asks for."),
    ] = None,
    max_prompt: MaxPromptOption = MAX_PROMPT,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
) -> None:
    """Open the web page on 127.0.0.1."""
    if auth is None and "QUERYBRIDGE_DEMO_AUTH" in os.environ:  # typer takes an empty variable for none
        raise UserError("QUERYBRIDGE_DEMO_AUTH: it is set and empty; write user:password, or unset it")
    from qformer.malloc import give_back_large_blocks

    give_back_large_blocks()
    from serve.engine.engine import Engine
    from serve.page.app import launch

    with Engine(adapter or (None,), device=device, dtype=dtype, offline=offline, max_prompt=max_prompt) as engine:
        launch(
            engine, port=port, auth=auth, search_folder=search_folder, votes=votes, allow_training=allow_training
        )  # fmt: skip
