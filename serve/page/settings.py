"""The sliders under "Settings"; those that would contradict each other cannot both be set."""

from __future__ import annotations

from typing import Any

import gradio as gr

from serve.page.context import PRIVATE
from serve.page.inputs import MAX_BEAMS, MAX_TOKENS

_BEAMS = "0: as each tab needs; 1: no search"
_TEMPERATURE = "0: the likeliest word; above: drawn at random"


def make_settings() -> list[Any]:
    """The controls of `Settings`, in its order, not on the page yet."""
    return [
        gr.Slider(
            0, MAX_TOKENS, 0, step=8, label="Longest answer", info="In tokens; 0: as each tab needs", render=False,
            elem_id="longest",
        ),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info=_TEMPERATURE, render=False, elem_id="temperature"),
        gr.Slider(
            0.05, 1, 1, step=0.05, label="Top-p", render=False, elem_id="top-p",
            info="The share of the likeliest words that are drawn from, if words are drawn",
        ),
        gr.Slider(0, MAX_BEAMS, 0, step=1, label="Beams", info=_BEAMS, render=False, elem_id="beams"),
    ]  # fmt: skip


def show_settings(settings: list[Any]) -> None:
    """Put the controls on the page: while words are drawn at random, there is no beam search, and the reverse."""
    for pair in (settings[:2], settings[2:]):
        with gr.Row():
            for control in pair:
                control.render()
    _, temperature, _, beams = settings

    def allow(temperature: float, beams: float) -> tuple[Any, Any]:
        drawn, searched = temperature > 0, beams > 1
        if drawn:
            return gr.skip(), gr.Slider(value=0, interactive=False, info="Words are drawn: set temperature to 0")
        return (
            gr.Slider(
                interactive=not searched, info="There are beams: set them to 0 or 1" if searched else _TEMPERATURE
            ),
            gr.Slider(interactive=True, info=_BEAMS),
        )

    for control in (temperature, beams):
        control.change(
            allow, [temperature, beams], [temperature, beams], queue=False, show_progress="hidden",
            trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip
