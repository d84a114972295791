"""What every tab has before it: the engine, the shared controls, and the one picture that goes from tab to tab."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from qformer.errors import UserError
from serve.engine.engine import Engine
from serve.engine.pending import Answer, PendingAnswer
from serve.page.examples import ExamplePicture
from serve.page.inputs import for_programs, titled, uploaded

T = TypeVar("T")

_NOTICED = 0.3  # seconds until it is noticed that nobody waits any more: a generator ends at a yield
AT_ONCE = 32  # events that ask the models at a time: they wait in the engine, which knows how many are ahead

# preprocess=False hands over what was sent as it is, files unopened: our own opener sees them first
ASKS_MODELS: dict[str, Any] = {"preprocess": False, "concurrency_id": "model", "concurrency_limit": AT_ONCE}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
IMMEDIATE: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
# as soon, but by way of the queue: an event that does not go by it has no way to show an error
SOON: dict[str, Any] = {**PRIVATE, "concurrency_limit": None, "show_progress": "hidden"}
# A picture that an event puts into its place is noticed a moment later, which ends what was asked before it. What is
# asked about that picture begins after this moment.
_AFTER_CHANGES = "() => new Promise(done => setTimeout(done, 60))"


def _json() -> gr.JSON:
    return gr.JSON(visible=False)


@dataclass(frozen=True)
class Asking:
    """What a tab's button does, for an example to do the same.

    Attributes:
        event: of the button.
        show: asks, and gives what is shown.
        inputs: of `show`.
        answered: the components that show the answer, in the order `show` gives them, each with its value, or its
            update, if there is none.
    """

    event: Any
    show: Callable[..., Any]
    inputs: Sequence[Any]
    answered: Mapping[Any, Any]


@dataclass
class PageContext:
    """What tabs share.

    Attributes:
        engine: what answers.
        adapter: the chooser.
        settings: longest, temperature, top_p and beams, as `Settings.of` takes them.
        examples: by adapter, what its pictures to try are, and these.
        uploads: where the page keeps what is uploaded.
        pictures: the slots of the shared picture, one a tab.
    """

    engine: Engine
    adapter: gr.Dropdown
    settings: list[Any]
    examples: Mapping[str, tuple[str, Sequence[ExamplePicture]]]
    uploads: Path
    pictures: list[gr.Image] = field(default_factory=list)
    _asking: list[Any] = field(default_factory=list)
    _changes: list[tuple[Callable[[str], Sequence[Any]], list[Any]]] = field(default_factory=list)
    _loads: list[tuple[gr.Image, Any]] = field(default_factory=list)
    _tried: dict[gr.Image | None, tuple[list[Any], list[gr.State]]] = field(default_factory=dict)
    _endpoints: list[tuple[str, Callable[..., Any], list[Any], Callable[[], Any]]] = field(default_factory=list)

    def picture_slot(self) -> gr.Image:
        """A place for the shared picture."""
        slot = gr.Image(
            type="filepath", image_mode=None, label="Picture", height=320,
            sources=["upload", "webcam", "clipboard"],
            buttons=["fullscreen"], elem_classes="picture", elem_id=f"picture-{len(self.pictures)}",
        )  # fmt: skip
        # what is to be tried stays for as long as the page does
        slot.keep_in_cache.update(str(example.path) for _, shown in self.examples.values() for example in shown)
        photo: Any = {"path": "photo.jpg", "meta": {"_type": "gradio.FileData"}}
        slot.example_payload = slot.example_value = lambda: photo  # type: ignore[method-assign]  # in API snippets
        self.pictures.append(slot)
        return slot

    def offer_examples(
        self,
        slot: gr.Image,
        *fields: Any,
        fill: Callable[[ExamplePicture], Sequence[str]] = lambda example: (),
        asking: Asking | None = None,
    ) -> None:
        """Pictures to try beside a slot; they are the chosen adapter's.

        Args:
            slot: takes the picture.
            fields: take words.
            fill: the words, a field each.
            asking: what one click asks at once, and `forget` then sees to; None waits for the button.
        """
        number = len(self.pictures) - 1
        where, first = self.examples[self.engine.adapter().name]
        offered = gr.Dataset(
            components=[slot], component_props=[{}], samples=_samples(first), type="index",
            label=f"Try one: {where}", elem_id=f"examples-{number}", elem_classes="examples", visible=bool(first),
        )  # fmt: skip

        tried = gr.State(None)  # the picture that is asked about because it was clicked

        def load(index: Any, adapter: str) -> list[Any]:
            shown = self.examples[self.engine.adapter(adapter).name][1]
            example = shown[int(index) % len(shown)]  # our own: what an event says of itself is anybody's
            return [str(example.path), *fill(example), *cleared.values(), str(example.path)]

        def swap(adapter: str) -> list[Any]:
            where, shown = self.examples[self.engine.adapter(adapter).name]
            return [gr.Dataset(samples=_samples(shown), label=f"Try one: {where}", visible=bool(shown))]

        cleared = {} if asking is None else asking.answered
        self.with_adapter(swap, [offered])
        if asking is not None:
            offered.click(None, None, None, cancels=asking.event, **IMMEDIATE)
        outputs = [slot, *fields, *cleared, tried]
        loaded = offered.click(load, [offered, self.adapter], outputs, show_progress="hidden", **PRIVATE)
        self._loads.append((slot, loaded))
        if asking is not None:
            asked = loaded.success(None, None, None, js=_AFTER_CHANGES, **PRIVATE).success(
                asking.show,
                list(asking.inputs),
                list(cleared),
                api_name=f"tried_{number}",
                show_progress="hidden",
                **ASKS_MODELS,
                **PRIVATE,
            )
            self._tried[slot] = ([asked], [tried])

    def forget(
        self, picture: gr.Image | None, answered: dict[Any, Any], asking: Any, *, follows_adapter: bool = True
    ) -> list[Any]:
        """Take an answer off the page, and end one that is under way, if another picture or adapter comes.

        What does not write (a look, a search) is finished, and not shown.

        Args:
            picture: what was asked about; None if only another adapter changes the answer.
            answered: the components that show the answer, each with its value, or its update, if there is none.
            asking: the event that asks.
            follows_adapter: False for a tab with choosers of its own.

        Returns:
            All events that ask: the one given, and that of the pictures to try.
        """
        asked, tried = self._tried.get(picture, ([], []))
        asks = [asking, *asked]
        if follows_adapter:
            self._asking += asks
            self.with_adapter(lambda _: list(answered.values()), list(answered))

        def take_off(picture: Any, *tried_paths: str | None) -> dict[Any, Any]:
            if isinstance(picture, Mapping) and picture.get("path") in tried_paths:
                return {one: picture["path"] for one in tried}  # what is answered, or will be, is about this one
            return {**answered, **dict.fromkeys(tried)}

        if picture is not None:
            # An event's listeners run one after the other. If the end came second, a question that is asked while the
            # answer is being taken off would be ended too.
            picture.change(None, None, cancels=asks, **IMMEDIATE)
            # the page's own JavaScript would be quicker than the last word of what is ended, which would then stay
            picture.change(take_off, [picture, *tried], [*answered, *tried], preprocess=False, **IMMEDIATE)
        return asks

    def with_adapter(self, change: Callable[[str], Sequence[Any]], outputs: Sequence[Any]) -> None:
        """Have something on the page change with the adapter: `change` gives the outputs' values for its name."""
        self._changes.append((change, list(outputs)))

    def follow_adapter(self) -> None:
        """Have all that depends on the adapter change when another is chosen: one event does it."""

        def change(adapter: str) -> list[Any]:
            return [value for change, _ in self._changes for value in change(adapter)]

        outputs = [output for _, outputs in self._changes for output in outputs]
        self.adapter.change(None, None, cancels=self._asking, **IMMEDIATE)
        self.adapter.change(change, self.adapter, outputs, **IMMEDIATE)

    def endpoint(
        self, name: str, call: Callable[..., Any], inputs: Sequence[Any], outputs: Callable[[], Any] = _json
    ) -> None:
        """Give programs a named endpoint of what a tab does.

        Args:
            name: it is called by.
            call: what is done; its parameters' names are the endpoint's.
            inputs: the components whose values it gets if a program leaves them out.
            outputs: makes unseen components for what comes back: JSON if nothing else is asked for.
        """
        self._endpoints.append((name, call, list(inputs), outputs))

    def open_endpoints(self) -> None:
        """Put the endpoints' unseen components on the page; tabs hold nothing but tabs."""
        for name, call, inputs, outputs in self._endpoints:
            gr.Button(visible=False).click(for_programs(call), inputs, outputs(), api_name=name, **ASKS_MODELS)

    def share_pictures(self) -> None:
        """Have a picture that is put into one slot, or taken out of it, appear in all; report files that are none."""

        def check(picture: Any) -> Any:
            try:
                uploaded(picture, self.uploads)
            except UserError as error:
                gr.Warning(titled("This file can't be used", error))
                return None  # takes the broken picture off the page
            return gr.skip()

        for slot in self.pictures:
            others = [other for other in self.pictures if other is not slot]
            seen = gr.on(
                [slot.upload, slot.input], check, slot, slot, preprocess=False, show_progress="hidden",
                concurrency_id="check", **PRIVATE,
            )  # fmt: skip
            loads = [load for owner, load in self._loads if owner is slot]
            for event in (seen, *loads):
                event.then(None, slot, others, js=f"picture => Array({len(others)}).fill(picture)", **PRIVATE)
            slot.change(
                None, slot, others, js=f"picture => window.querybridge.shared(picture, {len(others)})", **PRIVATE
            )
            slot.clear(None, None, others, js=f"() => Array({len(others)}).fill(null)", **PRIVATE)


def _samples(examples: Sequence[ExamplePicture]) -> list[list[str]]:
    return [[str(example.path)] for example in examples]


def submit_all(asks: Iterable[Callable[[], PendingAnswer]]) -> list[PendingAnswer]:
    """Ask several things at once; if one cannot be asked, none is, and its error is raised."""
    pending_answers: list[PendingAnswer] = []
    try:
        for ask in asks:
            pending_answers.append(ask())
    except BaseException:
        for pending in pending_answers:
            pending.stop()
        raise
    return pending_answers


def read_along(pending: PendingAnswer) -> Iterator[str]:
    """An answer as it grows; whoever stops reading, or leaves, stops the writing."""
    try:
        yield from pending.texts(every=_NOTICED)
    finally:
        pending.stop()


def wait_for(pending_answers: Sequence[PendingAnswer]) -> Iterator[list[Answer | None]]:
    """The answers so far, after each new one and at short intervals; if the visitor leaves, the rest stops."""

    def so_far() -> list[Answer | None]:
        return [pending.result() if pending.done else None for pending in pending_answers]

    try:
        for pending in pending_answers:
            while not pending.wait(_NOTICED):
                yield so_far()
            yield so_far()
    finally:
        for pending in pending_answers:
            pending.stop()


def last(items: Iterable[T]) -> T:
    """The last of some, without keeping the others."""
    (item,) = deque(items, maxlen=1)
    return item
