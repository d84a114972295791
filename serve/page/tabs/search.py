"""The tab for search: a folder's pictures, or uploaded ones, by words or by a picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from adapters.artefact.artefact import vision_side_fingerprint
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.inference.retrieval import Retriever
from qformer.errors import UserError
from serve.adapter import LoadedAdapter
from serve.engine.engine import Engine
from serve.limits import MAX_SEARCHED_UPLOADS
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, PageContext
from serve.page.inputs import plain_words, show_user_errors, titled, uploaded, whole
from serve.page.notes import can_search, search_note, shown_note
from serve.retrieval import Hit, IndexReport, PictureIndex, rank

MOST = MAX_SEARCHED_UPLOADS  # pictures shown: all that were uploaded can be
_TOGETHER = 16  # pictures embedded before whoever else asks has a turn
_THUMBNAIL = 480  # pixels, the longest side
_MANY, _SMALLER = 24, 200  # if more are shown, each has fewer pixels
_UPLOADS_LABEL = "Pictures to search among"
_FRESH = 10.0  # seconds that an index is taken for up to date: pictures come and go while the page is open
_FOLDER, _UPLOADS = "folder", "uploads"
_NAMED = 5  # files that a message names


@dataclass(frozen=True)
class LeftOut:
    """An uploaded file that is not searched.

    Attributes:
        name: as its owner knows it.
        why: in words.
    """

    name: str
    why: str


class ImageFinder:
    """Searches with whichever adapter is chosen; models run in the engine's thread, a few pictures at a time.

    Args:
        engine: holds the adapters.
        folder: the folder that may be searched, or None.
    """

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        self.engine = engine
        self.folder = folder
        self._retrievers = {
            name: Retriever(adapter.assembly.vision_side)
            for name in engine.names
            if can_search(adapter := engine.adapter(name))
        }
        self._indexes: dict[str, PictureIndex] = {}
        self._looked: dict[str, float] = {}  # when each adapter's index was brought up to date
        self._updating = {name: threading.Lock() for name in self._retrievers}

    def index_folder(self, on_progress: Callable[[str, int, int], None] | None = None) -> dict[str, IndexReport]:
        """Bring the folder's index up to date, for every adapter that can search; what was done, by adapter.

        Args:
            on_progress: called with (adapter, done, files to encode).

        Raises:
            UserError: there is a folder, but no adapter can search.
        """
        found = {}
        for name in self._retrievers if self.folder is not None else ():
            tell = None if on_progress is None else partial(on_progress, name)
            found[name] = self._index(self.engine.adapter(name), tell)
        if self.folder is not None and not found:
            raise UserError(
                "--search-folder: no adapter here has its text side (bridge.text_branch), so none can search"
            )
        return found

    def in_folder(self, query: str | ImageRef, most: int, adapter: str) -> list[tuple[Hit, ImageRef]]:
        """The folder's best pictures.

        Raises:
            UserError: there is no folder, or the adapter cannot search.
            Busy: too many wait.
        """
        loaded = self._checked(adapter)
        if self.folder is None:
            raise UserError("There is no folder to search: start the page with --search-folder FOLDER, or upload some")
        self.engine.run(lambda _: None, adapter=loaded.name).result()  # let in now, with all that follows
        index = self._fresh_index(loaded)
        hits = self.engine.run(lambda _: index.search(query, most=most), adapter=loaded.name, admitted=True).result()
        return [(hit, ImageRef(hit.path, path=self.folder / hit.path)) for hit in hits]

    def among(
        self, pictures: Sequence[ImageRef], query: str | ImageRef, most: int, adapter: str
    ) -> list[tuple[Hit, ImageRef]]:
        """The best of some pictures; raises as `in_folder`."""
        embedded = self._embed(self._checked(adapter), pictures)

        def best(loaded: LoadedAdapter) -> list[tuple[Hit, ImageRef]]:
            hits = rank(self._retrievers[loaded.name], pictures, embedded, query, most=most)
            return [(hit, pictures[place]) for place, hit in hits]

        return self.engine.run(best, adapter=adapter, admitted=True).result()

    def _embed(self, adapter: LoadedAdapter, pictures: Sequence[ImageRef], *, admitted: bool = False) -> Tensor:
        """Vectors of pictures; whoever else asks has a turn in between."""

        def embed(part: Sequence[ImageRef], loaded: LoadedAdapter) -> Tensor:
            return self._retrievers[loaded.name].embed_images(part)

        parts = [pictures[start : start + _TOGETHER] for start in range(0, len(pictures), _TOGETHER)]
        return torch.cat(
            [
                self.engine.run(partial(embed, part), adapter=adapter.name, admitted=admitted or number > 0).result()
                for number, part in enumerate(parts)
            ]
        )

    def _checked(self, name: str) -> LoadedAdapter:
        adapter = self.engine.adapter(name)
        if not can_search(adapter):
            raise UserError(
                f"{adapter.name} was trained without its text side (bridge.text_branch), so it cannot search"
            )
        return adapter

    def _fresh_index(self, adapter: LoadedAdapter) -> PictureIndex:
        """The folder's index, brought up to date if that is due; as it was, while another visitor sees to it."""
        known, updating = self._indexes.get(adapter.name), self._updating[adapter.name]
        if known is not None and not self._due(adapter):
            return known
        if not updating.acquire(blocking=known is None):
            assert known is not None
            return known
        try:
            if self._due(adapter):  # else another visitor was first
                self._index(adapter)
        except UserError:  # what was found before still can be
            if known is None:
                raise
            self._looked[adapter.name] = time.monotonic()
        finally:
            updating.release()
        return self._indexes[adapter.name]

    def _due(self, adapter: LoadedAdapter) -> bool:
        return time.monotonic() - self._looked.get(adapter.name, -_FRESH) >= _FRESH

    def _index(self, adapter: LoadedAdapter, on_progress: Callable[[int, int], None] | None = None) -> IndexReport:
        assert self.folder is not None
        key = vision_side_fingerprint(adapter.assembly.vision_side)
        index = PictureIndex(self.folder, self._retrievers[adapter.name], key=key)
        report = index.update(on_progress, embed=partial(self._embed, adapter, admitted=True))
        self._indexes[adapter.name], self._looked[adapter.name] = index, time.monotonic()
        return report


def search_tab(context: PageContext, finder: ImageFinder) -> gr.HTML:
    """Build the tab and its endpoint `/search`; returns the note that depends on the adapter."""
    places = {f"The folder {finder.folder.name}": _FOLDER} if finder.folder else {}
    places["Pictures that I upload"] = _UPLOADS
    first = next(iter(places.values()))
    with gr.Tab("Search", id="search"):
        note = gr.HTML(**shown_note(search_note(context.engine.adapter())), elem_id="search-note")
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                text = gr.Textbox(
                    label="Words, in English", lines=1, elem_id="search-text", placeholder="two dogs on a beach",
                )  # fmt: skip
                like = gr.Image(
                    type="filepath", image_mode=None, label="Or a picture like this one", height=230,
                    sources=["upload", "clipboard"], buttons=[], elem_id="search-like",
                )  # fmt: skip
                where = gr.Radio(
                    list(places.items()),
                    value=first,
                    label="Search in",
                    visible=len(places) > 1,
                    elem_id="search-where",
                )
                most = gr.Slider(1, MOST, 6, step=1, label="How many to show", elem_id="search-most")
                button = gr.Button("Search", variant="primary", elem_id="search-ask")
                files = gr.File(
                    label=_UPLOADS_LABEL, file_count="multiple", file_types=["image"], visible=first == _UPLOADS,
                    elem_id="search-files",
                )  # fmt: skip
            with gr.Column(scale=7, min_width=280):
                gallery = gr.Gallery(
                    show_label=False, label="Found", columns=3, object_fit="contain", buttons=["fullscreen"],
                    interactive=False, elem_id="found",
                )  # fmt: skip
                gr.HTML(
                    "<p>The score is the cosine of picture and query; per cent is how far the matching head believes"
                    " that words and picture belong together. Searched by words, the best are put in order by both"
                    " together. The best of a bad lot still comes first.</p>",
                    elem_classes="hint",
                )

    def run(
        text: str | None, like: Any, where: str, files: Any, most: Any, adapter: str
    ) -> tuple[list[tuple[Hit, ImageRef]], list[LeftOut]]:
        with show_user_errors():
            query = _query(text, like, context.uploads)
            count = max(1, min(whole(most, "most"), MOST))
            if where == _FOLDER:
                return finder.in_folder(query, count, adapter), []
            pictures, left_out = readable(files, context.uploads)
            return finder.among(pictures, query, count, adapter), left_out

    def show(text: str, like: Any, where: str, files: Any, most: Any, adapter: str) -> list[tuple[Image.Image, str]]:
        found, left_out = run(text, like, where, files, most, adapter)
        if left_out:
            said = "; ".join(one.why for one in left_out[:_NAMED])
            more = len(left_out) - _NAMED
            gr.Warning(titled(_count_left_out(len(left_out)), said + (f"; and {more} more" if more > 0 else "")))
        with show_user_errors():
            side = _THUMBNAIL if len(found) <= _MANY else _SMALLER
            return [(_thumbnail(ref, side), f"{Path(hit.path).name} · {_scores(hit)}") for hit, ref in found]

    def search(
        text: str | None = None,
        like: Any = None,
        where: str = first,
        files: Any = None,
        most: int = 6,
        adapter: str = "",
    ) -> list[dict[str, Any]]:
        """Find pictures in the page's folder ("folder") or among uploaded ones ("uploads"), by words or a picture.

        Uploaded files that are no pictures come last, each with its "error" and no score.
        """
        found, left_out = run(text, like, where, files, most, adapter)
        # no "path": clients take what is called so for a file to fetch
        hits: list[dict[str, Any]] = [{"picture": hit.path, "score": hit.score, "match": hit.match} for hit, _ in found]
        return hits + [{"picture": one.name, "score": None, "match": None, "error": one.why} for one in left_out]

    def count(files: Any) -> Any:
        number = len(files) if isinstance(files, list) else 0
        return gr.File(label=f"{_UPLOADS_LABEL} ({number})" if number else _UPLOADS_LABEL)

    inputs = [text, like, where, files, most, context.adapter]
    asking = gr.on([button.click, text.submit], show, inputs, gallery, **ASKS_MODELS, **PRIVATE)
    context.forget(None, {gallery: []}, asking)
    where.change(
        None, where, files, js=f"chosen => ({{ __type__: 'update', visible: chosen === '{_UPLOADS}' }})", **PRIVATE
    )
    files.change(count, files, files, preprocess=False, **IMMEDIATE)
    context.endpoint("search", search, inputs)
    return note


def _query(text: str | None, like: Any, uploads: Path) -> str | ImageRef:
    found = str(text or "").strip()
    if found and like:
        raise UserError("There are words and a picture: take one of them away, and search by the other")
    if not found and not like:
        raise UserError("There is nothing to look for yet: write some words, or put a picture in")
    return found or uploaded(like, uploads)


def readable(files: Any, uploads: Path) -> tuple[list[ImageRef], list[LeftOut]]:
    """The uploaded files that are pictures, and those that are not.

    Args:
        files: as the page's component hands them over, unopened.
        uploads: where uploads lie.

    Raises:
        UserError: there are none, too many, or none that is a picture.
    """
    listed = files if isinstance(files, list) else [files] if files else []
    if not listed:
        raise UserError("There are no pictures to search among yet: upload some")
    if len(listed) > MAX_SEARCHED_UPLOADS:
        raise UserError(
            f"{len(listed)} pictures are too many: upload at most {MAX_SEARCHED_UPLOADS}, or start with --search-folder"
        )
    pictures, left_out = [], []
    for file in listed:
        try:
            pictures.append(uploaded(file, uploads))
        except UserError as error:
            if len(listed) == 1:
                raise
            named = file if isinstance(file, Mapping) else {}
            name = Path(str(named.get("orig_name") or named.get("path") or "?")).name
            left_out.append(LeftOut(name, plain_words(str(error))))
    if not pictures:
        raise UserError(f"None of the {len(listed)} files is a picture: {left_out[0].why}")
    return pictures, left_out


def _count_left_out(number: int) -> str:
    return "1 file was left out" if number == 1 else f"{number} files were left out"


def _thumbnail(ref: ImageRef, side: int) -> Image.Image:
    """A copy with no side longer than that many pixels: the file itself stays where it is, out of the page's reach."""
    picture = open_image(ref)
    picture.thumbnail((side, side))
    return picture


def _scores(hit: Hit) -> str:
    return f"{hit.score:.2f}" + ("" if hit.match is None else f" · {hit.match:.0%}")
