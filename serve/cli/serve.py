"""`querybridge serve`: the API for programs."""

from __future__ import annotations

import os
import sys
from typing import Annotated
from urllib.parse import urlsplit

import typer

from qformer.errors import UserError
from serve.cli.common import DeviceOption, DtypeOption, MaxPromptOption, OfflineOption
from serve.limits import MAX_PROMPT, Limits


def serve(
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A run's or artefact's folder, or a shipped adapter's name; may be repeated."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but this machine's own opens it to a network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="QUERYBRIDGE_API_KEY", help="What clients must send as their API key."),
    ] = None,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch pictures from public web addresses in requests.")
    ] = False,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", min=0.1, help="Seconds for a request, its waiting included.")
    ] = Limits.request_timeout,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Requests that may wait; the next one gets status 429.")
    ] = 64,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests answered together.")] = 16,
    max_body: Annotated[
        float, typer.Option("--max-body", min=0.001, max=4096, help="The largest request, in MiB.")
    ] = Limits.max_body / 2**20,
    max_images: Annotated[
        int, typer.Option("--max-images", min=0, help="Pictures of one request.")
    ] = Limits.max_images,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="The longest answer, in tokens.")
    ] = Limits.max_tokens,
    max_per_client: Annotated[
        int | None, typer.Option("--max-per-client", min=1, help="Requests of one address that are handled at a time.")
    ] = Limits.max_per_client,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors-origin", help="The origin of web pages that may ask, as in https://example.org; repeat."),
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="json", help="A line of JSON for each request, on standard error.")
    ] = None,
    max_prompt: MaxPromptOption = MAX_PROMPT,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
) -> None:
    """Serve an OpenAI-compatible API on 127.0.0.1."""
    if api_key is None and "QUERYBRIDGE_API_KEY" in os.environ:  # typer takes an empty variable for none
        raise UserError("QUERYBRIDGE_API_KEY: it is set and empty; give a long random string, or unset it")
    if api_key is not None and not (api_key := api_key.strip()):
        raise UserError("--api-key: it is empty; give a long random string, or leave it out")
    if log not in (None, "json"):
        raise UserError(f"--log {log}: json is the one form there is")
    for origin in cors_origin or ():
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise UserError(f"--cors-origin {origin}: write scheme, name and port alone, as in https://example.org")
    from qformer.malloc import give_back_large_blocks
    from serve.api.server import Listener

    give_back_large_blocks()
    listener = Listener(host, port)
    from serve.api.app import build_app
    from serve.api.server import serve as run
    from serve.engine.engine import Engine
    from serve.web.hosts import LOOPBACK_NAMES

    if not listener.is_loopback and api_key is None:
        print(
            f"querybridge: warning: with --host {host} and no --api-key, whoever reaches this machine can ask",
            file=sys.stderr,
        )
    limits = Limits(
        request_timeout=request_timeout, max_body=int(max_body * 2**20), max_images=max_images, max_tokens=max_tokens,
        max_per_client=max_per_client,
    )  # fmt: skip
    with Engine(
        adapter or (None,), device=device, dtype=dtype, offline=offline, max_batch=max_batch, max_waiting=max_waiting,
        max_prompt=max_prompt,
    ) as engine:  # fmt: skip
        app = build_app(
            engine,
            limits=limits,
            api_key=api_key,
            allow_remote_images=allow_remote_images,
            cors_origins=cors_origin or (),
            log_requests=log == "json",
            hosts=LOOPBACK_NAMES | {host.lower()} if listener.is_loopback else None,
        )
        run(app, listener)
