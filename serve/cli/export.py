"""`querybridge export`: an adapter in the formats that transformers, PEFT and servers read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.cli.common import JsonOption, OfflineOption, report


def export(
    adapter: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, an artefact's, or a shipped name.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="blip2: a BLIP-2 or InstructBLIP of transformers, LoRA merged. peft: LoRA alone. merged-llm: the LLM"
            " with LoRA merged. bundle: the adapter with all its frozen models, for machines without a network.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder, which must not be there yet.")],
    lora_apart: Annotated[
        bool, typer.Option("--lora-apart", help="With blip2: LoRA beside the model in lora/, as PEFT's and vLLM's.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16 or float16; left out, as the weights are (blip2) or bfloat16 (merged-llm).",
        ),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="The largest file of blip2 and merged-llm; left out, 5GB.")
    ] = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter in a format that others read."""
    from adapters.artefact.exporting import export_adapter

    found = export_adapter(adapter, to, out, lora_apart=lora_apart, dtype=dtype, shard_size=shard_size, offline=offline)
    report(found, as_json, f"{found['out']}: {found['what']}, {found['bytes'] / 2**20:,.1f} MiB")
