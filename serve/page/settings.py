"""The sliders under "Settings"; those that would contradict each other cannot both be set."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from serve.page.context import PRIVATE
from serve.page.inputs import MAX_BEAMS, MAX_TOKENS

_BEAMS = "0: as each tab needs; 1: no search"
_TEMPERATURE = "0: the likeliest word; above: drawn at random"
_SAID = {
    "beams": _BEAMS, "temperature": _TEMPERATURE, "drawn": "Words are drawn: set temperature to 0",
    "searched": "There are beams: set them to 0 or 1",
}  # fmt: skip
_ALLOW = (
    f"(temperature, beams) => {{ const said = {json.dumps(_SAID)};"
    + """
  const drawn = temperature > 0, searched = !drawn && beams > 1;
  const update = values => ({ __type__: "update", ...values });
  return [
    update({ interactive: !searched, info: searched ? said.searched : said.temperature }),
    update(drawn ? { value: 0, interactive: false, info: said.drawn } : { interactive: true, info: said.beams }),
  ];
}"""
)


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
    """Put the controls on the page: while words are drawn at random, there is no beam search, and the reverse.

    The page itself sees to that: answers of a server could come in another order than the changes were made.
    """
    for pair in (settings[:2], settings[2:]):
        with gr.Row():
            for control in pair:
                control.render()
    _, temperature, _, beams = settings
    for control in (temperature, beams):
        control.change(None, [temperature, beams], [temperature, beams], js=_ALLOW, **PRIVATE)
