"""The tab that trains on this machine: a data file is checked and looked at, a run started, followed and stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from adapters.data.check import DataCheck, check_data
from adapters.data.preview import preview_data
from serve.page.context import IMMEDIATE, PRIVATE, SOON, PageContext
from serve.page.inputs import show_user_errors, whole, words
from serve.page.training import RunShown, TrainingRuns, draw_curve, draw_validation

_FAULTS = 10  # bad rows that are named
_EVERY = 2.0  # seconds between two looks at a run


def train_tab(context: PageContext, runs: TrainingRuns, page: gr.Blocks) -> None:
    """Build the tab; it has no endpoint: programs have `querybridge finetune`."""
    with gr.Tab("Train", id="train"):
        with gr.Row():
            with gr.Column(scale=5, min_width=280):
                data = gr.Textbox(
                    label="Data file on this machine", lines=1, elem_id="train-data", placeholder="my_data.jsonl",
                    info="JSON lines or CSV, with pictures relative to the file.",
                )  # fmt: skip
                check = gr.Button("Check and preview", elem_id="train-check")
                name = gr.Textbox(label="Name of the run", lines=1, value="mine", elem_id="train-name")
                epochs = gr.Slider(
                    0, 50, 0, step=1, label="Passes over the data", info="0: by how much there is", elem_id="epochs"
                )
                start = gr.Button("Start", variant="primary", elem_id="train-start")
            with gr.Column(scale=6, min_width=280):
                found = gr.HTML(elem_id="train-found", padding=False)
                sheet = gr.Image(
                    label="First rows", interactive=False, visible=False, buttons=["fullscreen"], elem_id="train-sheet"
                )
        with gr.Row():
            chosen = gr.Dropdown(runs.names(), value=None, label="Run", filterable=False, elem_id="train-run")
            stop = gr.Button("Stop", interactive=False, elem_id="train-stop")
            resume = gr.Button("Resume", interactive=False, elem_id="train-resume")
        state = gr.HTML(elem_id="train-state", padding=False)
        curve = gr.HTML(elem_id="train-curve", padding=False)
        validation = gr.HTML(elem_id="train-validation", padding=False)
        clock = gr.Timer(_EVERY, active=False)

    def look(data: str) -> tuple[str, Any]:
        with show_user_errors():
            path = words(data, "There is no data file yet: write its path")
            with tempfile.TemporaryDirectory(dir=context.uploads) as folder:
                preview_data(path, Path(folder) / "preview.png", rows=6, offline=True)
                picture = gr.Image(value=_read(Path(folder) / "preview.png"), visible=True)
            return as_findings(check_data(path, offline=True)), picture

    def follow(name: str | None) -> tuple[Any, ...]:
        if not name:
            return "", "", "", gr.Button(interactive=False), gr.Button(interactive=False), gr.Timer(active=False)
        with show_user_errors():
            shown = runs.show(name)
            return (
                as_state(name, shown),
                draw_curve(shown),
                draw_validation(shown),
                gr.Button(interactive=shown.state == "running"),
                gr.Button(interactive=shown.state == "stopped"),
                gr.Timer(active=shown.state == "running"),
            )

    def changed(act: Callable[..., str]) -> Callable[..., tuple[Any, ...]]:
        def do(*values: Any) -> tuple[Any, ...]:
            with show_user_errors():
                name = act(*values)
            return gr.Dropdown(choices=runs.names(), value=name), *follow(name)

        return do

    def begin(data: str, name: str, epochs: Any) -> str:
        asked = words(name, "The run has no name yet: write one")
        runs.start(words(data, "There is no data file yet: write its path"), asked, whole(epochs, "passes"))
        return asked

    def go_on(name: str) -> str:
        runs.resume(name)
        return name

    followed = [state, curve, validation, stop, resume, clock]
    check.click(look, data, [found, sheet], concurrency_id="check-data", **PRIVATE)
    start.click(changed(begin), [data, name, epochs], [chosen, *followed], **SOON)
    resume.click(changed(go_on), chosen, [chosen, *followed], **SOON)
    stop.click(lambda: runs.stop(), None, None, **SOON)
    chosen.input(follow, chosen, followed, **SOON)
    clock.tick(follow, chosen, followed, **IMMEDIATE)
    page.load(lambda: gr.Dropdown(choices=runs.names()), None, chosen, **IMMEDIATE)


def as_findings(found: DataCheck) -> str:
    """What a check of a data file says, for people."""
    rows = {
        "Task": found.task or "none could be told",
        "Rows": f"{found.rows:,}",
        "Pictures": f"{found.pictures:,}, {found.distinct_pictures:,} distinct",
        "Answers": f"{found.answers:,}, {found.findings.distinct_answers:,} distinct",
        "Bad rows": f"{len(found.faults):,}",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    faults = [escape(str(fault)) for fault in found.faults[:_FAULTS]]
    if len(found.faults) > _FAULTS:
        faults.append(f"… and {len(found.faults) - _FAULTS:,} more")
    notes = [escape(note) for note in found.findings.notes]
    lines = "".join(f"<li>{line}</li>" for line in [*faults, *notes])
    return f"<div class='about'><dl>{listed}</dl><ul>{lines}</ul></div>"


def as_state(name: str, shown: RunShown) -> str:
    """Where a run stands, for people."""
    told = {
        "running": "is being trained",
        "stopped": "was stopped, and can be resumed",
        "finished": "is finished",
        "failed": "failed",
    }[shown.state]
    said = f"<br><span class='others'>{escape(shown.said)}</span>" if shown.said else ""
    return f"<p role='status'><b>{escape(name)}</b> {told}.{said}</p>"


def _read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
