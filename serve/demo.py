"""The web page: put a picture in, ask about it, read the answer. Served on this machine only.

Every picture goes through our own opener, never through the page library's: it takes any format the opener reads and
gives the opener's one-line messages. Nothing is fetched from elsewhere, fonts included.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.data.images import ImageRef, open_image
from adapters.data.readers import read_data
from adapters.recipe import Recipe
from qformer.errors import UserError

if TYPE_CHECKING:
    import gradio as gr

    from serve.engine import Engine

HOST = "127.0.0.1"
MAX_FILE_SIZE = "64mb"
MAX_WAITING = 16  # questions in the queue; the next one is told that the page is busy

_HOUR = 3600
_SHOWN_BY_BROWSERS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
_MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")

_CSS = """
.gradio-container { max-width: 1040px !important; margin: 0 auto !important; }
#head h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
#head .what { font-size: 1.05rem; margin: .3rem 0 0; }
#head .learned { opacity: .75; font-size: .9rem; margin: .25rem 0 0; }
#picture .image-frame img { width: 100%; height: 100%; object-fit: contain; }
#answer textarea { font-size: 1.2rem; line-height: 1.5; }
#examples thead { display: none; }
#examples td { text-align: left; }
#examples td:first-child { width: 110px; }
#about dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; }
#about dt { opacity: .75; }
#about dd { margin: 0; overflow-wrap: anywhere; }
#about p { margin: .8rem 0 0; opacity: .75; font-size: .9rem; }
footer .divider { display: none !important; }
@media (max-width: 640px) {
  #picture { height: 300px !important; }
  #about dl { grid-template-columns: 1fr; gap: .1rem; }
  #about dd { margin-bottom: .5rem; }
}
"""


def build_page(engine: Engine) -> gr.Blocks:
    """The page over a loaded adapter, not served yet. Its endpoints are `/ask` and `/caption`.

    Args:
        engine: what answers; one question at a time, the others wait.
    """
    import gradio as gr

    recipe = engine.assembly.recipe
    examples = example_questions(recipe)
    asked = [text for _, text in examples if text]
    captions_first = recipe.task == "caption"

    def ask(picture: Mapping[str, Any] | None, question: str | None) -> str:
        """Answer a question about a picture."""
        with _told_on_the_page():
            chosen = _uploaded(picture, uploads)
            if not (question or "").strip():
                raise UserError("There is no question yet: write one, then press Ask")
            return engine.ask(chosen, str(question))

    def caption(picture: Mapping[str, Any] | None) -> str:
        """Describe a picture."""
        with _told_on_the_page():
            return engine.caption(_uploaded(picture, uploads))

    def check(picture: Mapping[str, Any] | None) -> Any:
        try:
            open_image(_uploaded(picture, uploads))
        except UserError as error:
            gr.Warning(_toast(error), title="This file can't be used")
            return None  # takes the broken picture off the page
        return gr.skip()

    with gr.Blocks(
        title=f"{_name(engine)} · querybridge", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)
    ) as page:
        gr.HTML(_head(engine), elem_id="head")
        with gr.Row():
            with gr.Column(scale=6, min_width=300):
                picture = gr.Image(
                    type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"], height=400,
                    buttons=["fullscreen"], elem_id="picture",
                )  # fmt: skip
            with gr.Column(scale=5, min_width=300):
                question = gr.Textbox(
                    label="Question", lines=1, max_lines=4, elem_id="question",
                    placeholder=f"For example: {asked[0]}" if asked else "What would you like to know?",
                )  # fmt: skip
                with gr.Row():
                    ask_button = gr.Button("Ask", variant="secondary" if captions_first else "primary", min_width=120)
                    caption_button = gr.Button(
                        "Caption", variant="primary" if captions_first else "secondary", min_width=120
                    )
                answer = gr.Textbox(
                    label="Answer", lines=4, max_lines=12, interactive=False, buttons=["copy"], elem_id="answer",
                    placeholder="The answer comes here.",
                )  # fmt: skip
        if examples:
            gr.Examples(
                [[str(path), text] if asked else [str(path)] for path, text in examples],
                [picture, question] if asked else [picture],
                label=f"Try one, from {_source_name(recipe)}",
                elem_id="examples",
                api_visibility="private",
            )
        with gr.Accordion("About this adapter", open=False):
            gr.HTML(_about(engine), elem_id="about")

        uploads = Path(picture.GRADIO_CACHE).resolve()
        # preprocess=False hands over the uploaded file as it is, unopened
        model: dict[str, Any] = {
            "outputs": answer, "preprocess": False, "concurrency_id": "model", "concurrency_limit": 1,
        }  # fmt: skip
        gr.on([ask_button.click, question.submit], ask, [picture, question], api_name="ask", **model)
        caption_button.click(caption, picture, api_name="caption", **model)
        picture.upload(
            check, picture, picture, preprocess=False, show_progress="hidden", concurrency_id="check",
            api_visibility="private",
        )  # fmt: skip
        picture.change(None, None, answer, js="() => ''", api_visibility="private")  # no answer to another picture
    page.queue(max_size=MAX_WAITING)
    return page


def launch(engine: Engine, port: int = 7860, open_browser: bool = False, *, block: bool = True) -> gr.Blocks:
    """Serve the page on 127.0.0.1 until Ctrl-C.

    Args:
        engine: what answers.
        port: 0 takes a free one.
        open_browser: open the page in the user's browser.
        block: False returns at once, with the page served by a thread; `close()` ends it.

    Returns:
        The page; `local_url` is its address.

    Raises:
        UserError: the port is taken.
        KeyboardInterrupt: Ctrl-C was pressed; the server is closed by then.
    """
    port = _free_port(port)
    page = build_page(engine)
    _keep_proxies_out()
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            max_file_size=MAX_FILE_SIZE,
            allowed_paths=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,  # it would keep people's pictures in the browser
            footer_links=["api"],
            theme=_theme(),
            css=_CSS,
        )
    except OSError as error:  # taken since we looked
        raise UserError(_port_taken(port)) from error
    print(f"querybridge: the page is at {page.local_url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    if not block:
        return page
    try:
        while True:
            time.sleep(1)
    finally:
        page.close(verbose=False)


def example_questions(recipe: Recipe, count: int = 3) -> list[tuple[Path, str]]:
    """Pictures and questions from the data an adapter was trained with, where it lies on this machine.

    Each has a picture of its own and, where there are enough, a question of its own; rows of several pictures are
    passed over. Nothing is fetched.
    """
    try:
        rows = read_data(
            _source(recipe), task=_task(recipe), need_answers=False, skip_bad_rows=True, limit=400, offline=True
        )
    except UserError:
        return []  # the adapter has come without its data, which is the usual case and no mistake
    found: dict[Path, str] = {}
    for new_question_only in (True, False):
        for example in rows.examples:
            path = example.images[0].path if len(example.images) == 1 else None
            if len(found) == count or path is None or path in found or path.suffix.lower() not in _SHOWN_BY_BROWSERS:
                continue
            if not (new_question_only and example.question in found.values()):
                found[path] = example.question
    return list(found.items())


@contextmanager
def _told_on_the_page() -> Iterator[None]:
    """Show a user's mistake on the page, and to a program as its error; ours still reach the terminal."""
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(_toast(error), duration=15, title="That didn't work", print_exception=False) from error


def _toast(error: UserError) -> str:
    return escape(str(error), quote=False)  # the page shows messages as HTML, and a file's name is anybody's


def _uploaded(picture: Mapping[str, Any] | None, folder: Path) -> ImageRef:
    """The uploaded file under the name its owner knows it by.

    Raises:
        UserError: there is none, or it was not uploaded: a program may send any path of this machine.
    """
    if not picture or not picture.get("path"):
        raise UserError("There is no picture yet: drop one on the page, or press it to choose a file")
    path = Path(picture["path"])
    if not path.resolve().is_relative_to(folder):
        raise UserError("The picture was not uploaded: send the file itself, not a path on this machine")
    return ImageRef(Path(picture.get("orig_name") or path.name).name, path=path)


def _source(recipe: Recipe) -> str:
    """The data that examples come from: what the adapter did not learn from, where the recipe names such."""
    source = recipe.data.val or recipe.data.train
    return source if isinstance(source, str) else source[0].file


def _task(recipe: Recipe) -> str | None:
    """The task of that data; None where its rows tell."""
    return None if recipe.task == "mixed" else recipe.task


def _source_name(recipe: Recipe) -> str:
    return f"its {'validation' if recipe.data.val else 'training'} data"


def _name(engine: Engine) -> str:
    """The adapter's name for people: the run's, where it is a folder of a run."""
    path = Path(engine.name)
    return (path.parent.name if path.name in ("best", "last") else path.name) or engine.name


def _head(engine: Engine) -> str:
    recipe, facts = engine.assembly.recipe, engine.facts
    kind = {
        "vqa": "Answers questions about pictures.",
        "caption": "Describes pictures.",
        "mixed": "Describes pictures and answers questions about them.",
    }[recipe.task]
    learned = []
    if {"answers", "pictures", "train"} <= facts.data.keys():
        learned.append(
            f"Learned from {facts.data['answers']:,} answers about {facts.data['pictures']:,} pictures"
            f" ({facts.data['train']})"
        )
    if "val_exact_match" in facts.metrics:
        learned.append(f"{facts.metrics['val_exact_match']:.1%} right on its validation questions")
    return (
        f"<h1>{escape(_name(engine))}</h1><p class='what'>{escape(recipe.description or kind)}</p>"
        f"<p class='learned'>{escape(' · '.join(learned))}</p>"
    )


def _about(engine: Engine) -> str:
    recipe, facts = engine.assembly.recipe, engine.facts
    bits = {"nf4": "4-bit NF4", "none": "unquantised"}[recipe.language.quantize]
    rows = {
        "Trained for": {
            "vqa": "questions; captions are outside what it practised",
            "caption": "captions",
            "mixed": "captions and questions",
        }[recipe.task],
        "Image encoder": " and ".join(tower.source for tower in recipe.vision.towers) + ", frozen",
        "Language model": f"{recipe.language.source}, frozen, {bits}",
        "Steps": f"{facts.steps:,}",
        "Terms of its data": "; ".join(facts.terms) or "not stated",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return (
        f"<dl>{listed}</dl><p>Pictures stay on this machine, and what is uploaded is deleted within two"
        " hours. Answers can be wrong: check what matters.</p>"
    )


def _theme() -> Any:
    """The look, with fonts that every system has: the library's own come from elsewhere."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=_FONTS,
        font_mono=_MONO_FONTS,
    ).set(  # the theme's own colours are too pale to read well
        background_fill_primary="*neutral_50",
        background_fill_secondary="*neutral_50",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
        input_placeholder_color="*neutral_500",
    )


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


def _keep_proxies_out() -> None:
    """Have the server's call to itself, by which it starts, go past the proxy that the environment may name."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if HOST not in hosts and "*" not in hosts:
            os.environ[name] = ",".join([*hosts, HOST])
