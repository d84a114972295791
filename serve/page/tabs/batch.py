"""The tab for many rows: a data file, or pictures with questions; answers in a table, to be taken away."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.inference.request import LOW
from qformer.errors import UserError
from serve.limits import MAX_SEARCHED_UPLOADS
from serve.page.batch_job import DATA_FILES, BatchJobShown, answer_files
from serve.page.context import ASKS_MODELS, IMMEDIATE, PRIVATE, SOON, PageContext, last
from serve.page.inputs import check_kept, show_user_errors
from serve.page.security import inside

_SHOWN = 100  # rows in the table; the files have all
_THUMBNAIL = 72  # pixels
_SAVE = "file => { window.querybridge.save(file); return null; }"


def batch_tab(context: PageContext) -> None:
    """Build the tab and its endpoint `/batch`."""
    with gr.Tab("Batch", id="batch"):
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                files = gr.File(
                    label="A data file with its pictures, or pictures alone", file_count="multiple", height=190,
                    file_types=["image", *DATA_FILES], elem_id="batch-files",
                )  # fmt: skip
            with gr.Column(scale=6, min_width=280):
                questions = gr.Textbox(
                    label="Questions about every picture, one a line", lines=3, max_lines=8, elem_id="batch-questions",
                    placeholder="what is in the picture?",
                    info="None: a data file's own questions; pictures alone are described.",
                )  # fmt: skip
                with gr.Row():
                    button = gr.Button("Answer all", variant="primary", elem_id="batch-ask")
                    stop = gr.Button("Stop", elem_id="batch-stop")
        progress = gr.HTML(elem_id="batch-progress", padding=False)
        with gr.Row():
            takes = [gr.Button(f"Download {kind}", size="sm", interactive=False) for kind in ("CSV", "JSONL")]
        table = gr.HTML(elem_id="batch-table", padding=False)
        job = gr.State(None)
        file = gr.JSON(visible=False)

    def run(files: Any, questions: str | None, adapter: str) -> Iterator[BatchJobShown]:
        with show_user_errors():
            named = uploaded_files(files, context.uploads)
            asked = [line.strip() for line in (questions or "").splitlines() if line.strip()]
            yield from answer_files(context.engine, named, asked, adapter)

    def show(files: Any, questions: str, adapter: str) -> Iterator[Any]:
        off = {button: gr.Button(interactive=False) for button in takes}
        yield {progress: as_progress(BatchJobShown()), table: "", job: None, **off}
        thumbnails: dict[str, str] = {}
        places = {name: path for name, path in _named(files)}
        found = BatchJobShown()
        for found in run(files, questions, adapter):
            yield {progress: as_progress(found), table: as_table(found, places, thumbnails)}
        yield {job: found, **{button: gr.Button(interactive=True) for button in takes}}

    def batch(files: Any = None, questions: str | None = None, adapter: str = "") -> list[dict[str, Any]]:
        """Answer a data file's rows, or questions (one a line) about pictures; a line a row, as a batch job has it."""
        return last(run(files, questions, adapter)).lines

    def take(found: BatchJobShown | None, kind: str) -> dict[str, str]:
        with show_user_errors():
            if found is None:
                raise UserError("There is nothing to download yet: answer something first")
            text, mime = (found.csv, "text/csv") if kind == "csv" else (found.jsonl(), "application/x-ndjson")
            return {"name": f"answers.{kind}", "type": mime, "text": text}

    inputs = [files, questions, context.adapter]
    asking = button.click(
        show, inputs, [progress, table, job, *takes], show_progress="hidden", **ASKS_MODELS, **PRIVATE
    )
    stop.click(None, None, cancels=asking, **IMMEDIATE)
    stop.click(lambda: "<p>Stopped.</p>", None, progress, **IMMEDIATE)
    for one, kind in zip(takes, ("csv", "jsonl"), strict=True):
        one.click(lambda found, kind=kind: take(found, kind), job, file, **SOON).success(
            None, file, file, js=_SAVE, **PRIVATE
        )
    context.endpoint("batch", batch, inputs)


def uploaded_files(files: Any, uploads: Path) -> list[tuple[str, Path]]:
    """Names and places of uploaded files of any kind.

    Raises:
        UserError: there are none or too many, or one was not uploaded or has been deleted since.
    """
    if files is not None and not isinstance(files, list):
        raise UserError("files: send a list of files")
    sent: list[Any] = files or []
    if len(sent) > MAX_SEARCHED_UPLOADS:
        raise UserError(f"{len(sent)} files are too many: upload at most {MAX_SEARCHED_UPLOADS}")
    found = _named(files)
    if len(found) < len(sent):
        raise UserError("files: one of them is no uploaded file")
    for name, path in found:
        if not inside(str(path), uploads):
            raise UserError(f"'{name}' was not uploaded: send the file itself, not a path on this machine")
        check_kept(ImageRef(name, path=path))
    return found


def as_progress(job: BatchJobShown) -> str:
    """How far a job has come, for people."""
    share = job.done / job.total if job.total else 0.0
    told = f"{job.done} of {job.total} answered" if job.total else "Reading the rows"
    bad = sum("error" in line for line in job.lines)
    told += f" · {bad} could not be: the table says why" if bad else ""
    return (
        f"<p role='status'>{told}</p><div class='bar' role='progressbar' aria-label='Rows answered' aria-valuemin='0'"
        f" aria-valuemax='100' aria-valuenow='{share * 100:.0f}'><i style='width:{share:.0%}'></i></div>"
    )


def as_table(job: BatchJobShown, places: Mapping[str, Path], thumbnails: dict[str, str]) -> str:
    """The first rows with small pictures; `thumbnails` keeps what was drawn, by name."""
    lines = []
    for line in job.lines[:_SHOWN]:
        name = str(line.get("image") or "")
        if name not in thumbnails:
            thumbnails[name] = _thumbnail(Path(name).name, places.get(Path(name).name))
        sure = line.get("confidence")
        sure = "" if sure is None else f"{sure:.0%}" + (" · check it" if sure < LOW else "")
        said = f"<i>{escape(str(line['error']))}</i>" if "error" in line else escape(str(line.get("answer", "")))
        lines.append(
            f"<tr><td class='small'>{thumbnails[name]}</td><td>{escape(str(line.get('question', '')))}</td>"
            f"<td class='answer'>{said}</td><td class='sure'>{sure}</td></tr>"
        )
    if not lines:
        return ""
    more = len(job.lines) - _SHOWN
    note = f"<p class='more'>{more} more rows are in the files.</p>" if more > 0 else ""
    head = "<tr><th>Picture</th><th>Question</th><th>Answer</th><th class='sure'>Confidence</th></tr>"
    return f"<table class='answers batch'><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>{note}"


def _named(files: Any) -> list[tuple[str, Path]]:
    sent = [file for file in files or [] if isinstance(file, Mapping) and file.get("path")]
    return [(Path(str(file.get("orig_name") or file["path"])).name, Path(str(file["path"]))) for file in sent]


def _thumbnail(name: str, path: Path | None) -> str:
    if path is None:
        return escape(name)
    try:
        picture = open_image(ImageRef(name, path=path))
    except UserError:
        return escape(name)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return f"<img alt='{escape(name)}' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
