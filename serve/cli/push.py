"""`querybridge push`: an adapter to a hub's repository."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.cli.common import JsonOption, report


def push(
    adapter: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, an artefact's, or a bundle's.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; made if it is not there.")],
    license: Annotated[
        str, typer.Option("--license", help="The hub's short name, such as apache-2.0; other points to the card.")
    ] = "other",
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="A data set of the hub it learned from; may be repeated.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter to a hub, with a card that the hub can read."""
    from serve.push import push as run

    found = run(adapter, repository, license=license, datasets=dataset or (), private=private)
    report(found, as_json, f"pushed {len(found['files'])} files: {found['url']}")
