"""What the page keeps to: it fetches nothing, reads uploads alone, and leaves none of them behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import gradio as gr
from gradio import processing_utils
from starlette.middleware import Middleware

from serve.limits import MAX_UPLOADS, UPLOAD_SECONDS
from serve.web.guards import BoundedUploads, NoFraming, OwnOriginOnly, SlowedLogin
from serve.web.hosts import OwnNamesOnly

_UPLOADS = "GRADIO_TEMP_DIR"  # where Gradio looks for the place of uploads


def fetch_nothing() -> None:
    """Have Gradio refuse web addresses in the place of files, which it would fetch before any code of ours is asked."""

    async def refuse(url: str, cache_dir: str) -> NoReturn:
        raise gr.Error("A picture is uploaded, not named by its address: send the file itself", print_exception=False)

    processing_utils.async_ssrf_protected_download = refuse


def guards(*, named: bool) -> list[Middleware]:
    """What every request to the page goes through.

    Args:
        named: the page is called by this machine's names alone; one that asks for a password may have others.
    """
    first = [Middleware(OwnNamesOnly)] if named else []
    return [
        *first,
        Middleware(OwnOriginOnly),
        Middleware(NoFraming),
        Middleware(SlowedLogin),
        Middleware(BoundedUploads, folder=_upload_folder, most=MAX_UPLOADS, oldest=UPLOAD_SECONDS),
    ]


def _upload_folder() -> Path | None:
    folder = os.environ.get(_UPLOADS)
    return Path(folder) if folder else None


@contextmanager
def private_uploads() -> Iterator[None]:
    """A folder of this process's own for uploads, which nobody else may read, and which goes with it."""
    before = os.environ.get(_UPLOADS)
    folder = tempfile.mkdtemp(prefix="querybridge-page-", dir=before)
    os.environ[_UPLOADS] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ[_UPLOADS]
        else:
            os.environ[_UPLOADS] = before


@contextmanager
def tidy_ending() -> Iterator[None]:
    """Let what ends services, SIGTERM, end the process by way of its `finally` clauses, with code 143."""

    def end(_: int, __: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def inside(path: str, folder: Path) -> bool:
    """Whether a path, links followed, lies in a folder; a path that cannot be one does not."""
    try:
        return Path(path).resolve().is_relative_to(folder)
    except (ValueError, OSError):  # a NUL in it, or too long
        return False
