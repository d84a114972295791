"""`querybridge look`: where the bridge looks, drawn over a picture, without a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qformer.errors import UserError
from serve.cli.common import AdapterOption, DeviceOption, JsonOption, OfflineOption, report


def look(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    out: Annotated[Path, typer.Option("--out", help="The picture to write: .png or .jpg.")],
    query: Annotated[int, typer.Option("--query", min=0, help="Only this query, from 1; 0 takes all together.")] = 0,
    layer: Annotated[int, typer.Option("--layer", min=0, help="Only this layer, from 1; 0 takes all together.")] = 0,
    question: Annotated[
        str, typer.Option("--question", help="What is asked, for a bridge that reads the question.")
    ] = "",
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw where the bridge looks in a picture: the attention of its queries."""
    from adapters.data.image_ref import image_ref
    from adapters.data.images import open_image

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--out {out}: name a .png or .jpg file")
    ref = image_ref(str(image))
    picture = open_image(ref)  # mistakes are reported before anything is loaded
    from adapters.artefact.artefact import load_vision_side_artefact
    from adapters.loading.vision_side import default_device
    from serve.adapter import default_adapter
    from serve.looking.attention import describe, draw
    from serve.looking.attention import look as run

    vision_side, _ = load_vision_side_artefact(
        adapter or default_adapter(), device=device or default_device(), offline=offline, need_text=False
    )
    found = run(vision_side, ref, question)
    drawn = draw(picture, found, query, layer)
    try:
        drawn.save(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); name another file") from error
    report(
        {
            "image": str(image),
            "out": str(out),
            "query": query,
            "queries": found.queries,
            "layer": layer,
            "layers": found.layers,
            "strongest": found.strongest(query, layer),
            "shares": found.shares(query, layer),
        },
        as_json,
        f"{out}: {describe(found, query, layer)}",
    )
