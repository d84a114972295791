"""`querybridge search` and `querybridge classify`: the first stage at work, without a language model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qformer.errors import UserError
from serve.cli.common import (
    AdapterOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    QuietOption,
    progress,
    report,
    split_list,
)


def search(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures; folders in it are searched too.")],
    text: Annotated[str | None, typer.Argument(help="What to look for, in English.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Look for pictures like this one instead.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many pictures to show.")] = 5,
    rerank: Annotated[
        bool, typer.Option("--rerank/--no-rerank", help="Let the matching head rank the best 16 again.")
    ] = True,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find pictures in a folder by words, or by a picture."""
    from adapters.data.image_ref import ImageRef, image_ref
    from adapters.data.images import open_image
    from serve.retrieval import PictureIndex, find_folder, load_retriever

    if (text is None) == (image is None):
        raise UserError('search: write querybridge search FOLDER "TEXT", or querybridge search FOLDER --image PICTURE')
    query: str | ImageRef = text or ""
    if image is not None:
        query = image_ref(str(image))
        open_image(query)  # mistakes are reported before anything is loaded
    find_folder(folder)
    retriever, key = load_retriever(adapter, device=device, offline=offline)
    index = PictureIndex(folder, retriever, key=key)
    found = index.update(on_progress=None if quiet else progress("encoded"))
    for line in found.left_out():
        print(line, file=sys.stderr)
    hits = index.search(query, most=top, rerank=rerank)
    report(
        {"folder": str(folder), "index": vars(found), "hits": [vars(hit) for hit in hits]},
        as_json,
        "\n".join(f"{hit.score:6.3f}  {'' if hit.match is None else f'{hit.match:4.0%}  '}{hit.path}" for hit in hits),
    )


def classify(
    image: Annotated[Path, typer.Argument(help="The picture to name.")],
    labels: Annotated[
        str, typer.Option("--labels", help="Names with commas between them, such as dog,cat,horse, or a JSON list.")
    ],
    template: Annotated[
        list[str] | None, typer.Option("--template", help="A sentence with {label}; may be repeated.")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Name what a picture shows, among labels of your own."""
    from adapters.data.image_ref import image_ref
    from adapters.data.images import open_image
    from serve.retrieval import TEMPLATES, load_retriever
    from serve.retrieval import classify as run

    ref = image_ref(str(image))
    open_image(ref)
    retriever, _ = load_retriever(adapter, device=device, offline=offline)
    shares = run(retriever, ref, split_list(labels, "--labels"), templates=template or TEMPLATES)
    report(
        {"image": str(image), "labels": shares},
        as_json,
        "\n".join(f"{share:6.1%}  {name}" for name, share in shares.items()),
    )
