"""The web page: chat, questions, captions, reasons, search, and where the bridge looks. Served on this machine only.

Every picture goes through our own opener, never through the page library's: it takes any format the opener reads and
gives the opener's one-line messages. Nothing is fetched from elsewhere, fonts included. The tabs are in `serve.page`.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gradio as gr

from qformer.errors import UserError
from serve.engine.engine import Engine
from serve.limits import MAX_FILE_SIZE
from serve.page.blocks import Page
from serve.page.context import PageContext
from serve.page.examples import ExamplePicture, copied, find_examples
from serve.page.notes import about, caption_note, head, look_note, reason_note, search_note, shown_note
from serve.page.script import HEAD
from serve.page.security import fetch_nothing, guards, private_uploads, tidy_ending
from serve.page.settings import make_settings, show_settings
from serve.page.styles import CSS
from serve.page.tabs.attention import attention_tab
from serve.page.tabs.batch import batch_tab
from serve.page.tabs.caption import caption_tab
from serve.page.tabs.chat import chat_tab
from serve.page.tabs.compare import compare_tab
from serve.page.tabs.reason import reason_tab
from serve.page.tabs.search import ImageFinder, search_tab
from serve.page.tabs.train import train_tab
from serve.page.tabs.vqa import vqa_tab
from serve.page.theme import make_theme
from serve.page.training import TrainingRuns
from serve.page.votes import VoteFile
from serve.retrieval import find_folder

HOST = "127.0.0.1"
MAX_WAITING = 32  # events in the queue; the next one gets the message that the page is busy

RUNS = Path("runs")  # beside which the command works
DEFAULT_VOTES = RUNS / "votes.jsonl"

_HOUR = 3600


def build_page(
    engine: Engine,
    *,
    finder: ImageFinder | None = None,
    votes: Path = DEFAULT_VOTES,
    training: TrainingRuns | None = None,
) -> gr.Blocks:
    """The page over an engine, not served yet; `docs/demo.md` lists its endpoints.

    Args:
        engine: what answers, with one or several adapters.
        finder: searches the folder that may be searched; left out, uploaded pictures alone can be.
        votes: the file for the votes of the Compare tab.
        training: the runs of the Train tab; left out, there is no such tab.
    """
    finder = finder or ImageFinder(engine, None)
    adapter = engine.adapter()
    title = f"{adapter.name} · querybridge"
    with Page(title=title, analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
        with gr.Row(equal_height=False, elem_id="top"):
            top = gr.HTML(head(adapter), elem_id="head", padding=False)
            chooser = gr.Dropdown(
                engine.names, value=adapter.name, label="Adapter", filterable=False, elem_id="adapter",
                visible=len(engine.names) > 1, container=False, min_width=110, scale=0,
            )  # fmt: skip
        settings = make_settings()
        uploads = Path(chooser.GRADIO_CACHE).resolve()
        context = PageContext(engine, chooser, settings, _examples_of(engine, uploads), uploads)
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
            chat_tab(context, page)
            vqa_tab(context)
            captions = caption_tab(context)
            reasons = reason_tab(context)
            searches = search_tab(context, finder)
            looks, look_question = attention_tab(context)
            compare_tab(context, VoteFile(votes))
            batch_tab(context)
            if training is not None:
                train_tab(context, training, page)
        context.share_pictures()
        context.open_endpoints()
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            show_settings(settings)
        with gr.Accordion("About this adapter", open=False, elem_id="about-adapter"):
            facts = gr.HTML(about(adapter), elem_classes="about", elem_id="about")

        def show_adapter(name: str) -> list[Any]:
            chosen = engine.adapter(name)
            notes = [make(chosen) for make in (caption_note, reason_note, search_note, look_note)]
            boxes = [gr.HTML(**shown_note(text)) for text in notes]
            return [head(chosen), about(chosen), *boxes, gr.Textbox(visible=chosen.assembly.reads_instructions)]

        context.with_adapter(show_adapter, [top, facts, captions, reasons, searches, looks, look_question])
        context.follow_adapter()
    page.queue(max_size=MAX_WAITING)
    return page


def launch(
    engine: Engine,
    port: int = 7860,
    open_browser: bool = False,
    *,
    auth: str | None = None,
    search_folder: str | Path | None = None,
    votes: str | Path = DEFAULT_VOTES,
    allow_training: bool = False,
    block: bool = True,
) -> gr.Blocks:
    """Serve the page on 127.0.0.1 until Ctrl-C.

    Args:
        engine: what answers.
        port: 0 takes a free one.
        open_browser: open the page in the user's browser.
        auth: "user:password" that the page asks for; left out, whoever uses this machine may use it.
        search_folder: a folder of pictures that may be searched on the page; its index is brought up to date first.
        votes: the file for the votes of the Compare tab; it is made with the first one.
        allow_training: show the Train tab, which reads data files of this machine and trains into `runs`.
        block: False returns at once, with the page served by a thread; `close()` ends it, and uploads lie where
            Gradio keeps them. Else they lie in a folder of their own, which goes with the page.

    Returns:
        The page; `local_url` is its address.

    Raises:
        UserError: the port is taken, `auth` is not of that form, there is no such folder, or no adapter can search it.
        KeyboardInterrupt: Ctrl-C was pressed; the server is closed by then.
    """
    login = _login(auth)
    if allow_training and login is not None:
        raise UserError(
            "--allow-training and --auth: whoever trains may read this machine's files, so it is for those alone who"
            " use the machine itself; leave one of the two out"
        )
    training = TrainingRuns(RUNS) if allow_training else None
    with ExitStack() as ending:
        if block:
            ending.enter_context(private_uploads())
            ending.enter_context(tidy_ending())
        page = _open(engine, port, open_browser, login, search_folder, Path(votes), training)
        if not block:
            return page
        try:
            while True:
                time.sleep(1)
        finally:
            page.close(verbose=False)
            if training is not None:
                training.close()


def _open(
    engine: Engine,
    port: int,
    open_browser: bool,
    login: tuple[str, str] | None,
    search_folder: str | Path | None,
    votes: Path,
    training: TrainingRuns | None,
) -> gr.Blocks:
    """Index the folder, build the page and serve it by a thread."""
    finder = ImageFinder(engine, None if search_folder is None else find_folder(search_folder))
    port = _free_port(port)
    for name, report in finder.index_folder(lambda name, done, total: _log(f"{name}: encoded {done}/{total}")).items():
        for line in report.left_out():
            _log(line)
        _log(f"{name}: {report.pictures} pictures may be searched")
    page = build_page(engine, finder=finder, votes=votes, training=training)
    _keep_proxies_out()
    fetch_nothing()
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            auth=login,
            max_file_size=MAX_FILE_SIZE,
            allowed_paths=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,  # it would keep people's pictures in the browser
            footer_links=["api"],
            app_kwargs={"middleware": guards(named=login is None)},
            theme=make_theme(),
            css=CSS,
            head=HEAD,
        )
    except OSError as error:  # taken since we looked
        raise UserError(_port_taken(port)) from error
    _log(f"the page is at {page.local_url} (Ctrl-C ends it)")
    return page


def _examples_of(engine: Engine, uploads: Path) -> dict[str, tuple[str, list[ExamplePicture]]]:
    """Pictures to try, by adapter: copies that the page may show, in a folder beside what is uploaded."""
    uploads.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="examples-", dir=uploads))
    found = {}
    for number, name in enumerate(engine.names):
        learned, own = engine.adapter(name).assembly, folder / str(number)
        own.mkdir()
        words, examples = find_examples(own, task=learned.task, train=learned.train_sources, val=learned.val_sources)
        found[name] = (words, [copied(example, own) for example in examples])
    return found


def _login(auth: str | None) -> tuple[str, str] | None:
    """User and password out of "user:password".

    Raises:
        UserError: there is no colon, or nothing beside it.
    """
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise UserError("--auth: write it as user:password")
    return user, password


def _free_port(port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: something listens there, or the system keeps the port to itself.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that was closed just now is not in the way
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise UserError(f"--port {port}: the system does not give it to this user; take one above 1023") from None
        except OSError:
            raise UserError(_port_taken(port)) from None
        return int(probe.getsockname()[1])


def _port_taken(port: int) -> str:
    return f"--port {port}: something else listens there already; take another, or --port 0 for any free one"


def _log(text: str) -> None:
    print(f"querybridge: {text}", file=sys.stderr, flush=True)


def _keep_proxies_out() -> None:
    """Have the server's call to itself, by which it starts, go past the proxy that the environment may name."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if HOST not in hosts and "*" not in hosts:
            os.environ[name] = ",".join([*hosts, HOST])
