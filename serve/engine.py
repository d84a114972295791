"""The engine behind the command, the page, the API and batch jobs: adapters loaded once, questions answered.

`LoadedAdapter` answers in the caller's thread, many questions at a time. `Engine` holds several adapters over the same
frozen models and has one thread of its own, which gathers what arrives together into batches and streams.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from adapters.answering import Answerer, Asked, Said, reply_to_examples
from adapters.artefact import Facts, adapter_fingerprint, find_artefact, load_artefact, shipped_adapters
from adapters.assembly import Assembly
from adapters.data.examples import Example
from adapters.data.images import ImageRef, image_ref, open_image
from adapters.data.prompts import Turn
from adapters.sight import FrozenModels, default_device
from qformer.decoding import Decoding
from qformer.errors import UserError

Picture = str | Path | bytes | Image.Image | ImageRef
"""What may be given as a picture: a path, the bytes of a file, a Pillow image, or an ImageRef."""

T = TypeVar("T")

DEFAULT_ADAPTER = "photo"
KEPT_BYTES = 256 * 2**20  # of pictures that were asked about, an adapter
_GATHER = 0.01  # seconds that a first request waits for company


class LoadedAdapter:
    """A loaded adapter that answers questions about pictures.

    Args:
        assembly: the loaded model.
        facts: what is known about the adapter.
        name: what it is called.
    """

    def __init__(self, assembly: Assembly, facts: Facts, name: str) -> None:
        self.assembly = assembly
        self.facts = facts
        self.name = name
        self.answerer = Answerer(assembly, keep_bytes=KEPT_BYTES)

    def fingerprint(self) -> str:
        """`sha256:…` of the adapter: another one means that the same question may get another answer."""
        return adapter_fingerprint(self.assembly)

    def ask(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        *,
        decoding: Decoding | None = None,
    ) -> str:
        """Answer one question about one picture, or about several at once.

        Args:
            pictures: one, or a list; `<image>` marks in the question say where each belongs, else they come first.
            question: in words.
            decoding: how tokens are chosen; greedy where left out.

        Raises:
            UserError: a picture cannot be read, or the question is empty.
        """
        return self.say(pictures, question, decoding=decoding).text

    def say(self, pictures: Picture | Sequence[Picture], question: str, *, decoding: Decoding | None = None) -> Said:
        """As `ask`, with the answer's confidence."""
        return self.answerer([self.asked([user_turn(pictures, question)])], decoding or Decoding())[0]

    def choose(self, pictures: Picture | Sequence[Picture], question: str, choices: Sequence[str]) -> dict[str, float]:
        """The probability of each choice as the answer, the likeliest first; they add up to 1.

        Raises:
            UserError: a picture cannot be read, the question is empty, or there are fewer than two choices.
        """
        return self._choose(self.asked([user_turn(pictures, question)]), checked_choices(choices))

    def caption(self, picture: Picture, *, language: str = "en", decoding: Decoding | None = None) -> str:
        """Describe a picture in English ("en") or Chinese ("zh").

        Raises:
            UserError: the picture cannot be read, or the language is not known.
        """
        return self.answerer([self.asked_caption(picture, language)], decoding or Decoding.preset("caption"))[0].text

    def answer(
        self,
        examples: Sequence[Example],
        task: str = "vqa",
        *,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Answer many examples, in batches; an answer does not depend on its batch."""
        said = self.reply(examples, task, decoding=decoding, batch_size=batch_size, on_progress=on_progress)
        return [one.text for one in said]

    def reply(
        self,
        examples: Sequence[Example],
        task: str = "vqa",
        *,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Said]:
        """As `answer`, with the confidence of each."""
        return reply_to_examples(
            self.assembly,
            examples,
            task,
            decoding=decoding or Decoding(),
            batch_size=batch_size,
            on_progress=on_progress,
        )

    def asked(self, turns: Sequence[Turn]) -> Asked:
        """A conversation as a prompt.

        Raises:
            UserError: it does not end with the user's turn, or is longer than the language model reads.
        """
        prompt = self.assembly.prompts.chat(turns)
        images = tuple(image for turn in turns for image in turn.images)
        return self._checked(Asked(prompt, images, turns[-1].text))

    def asked_caption(self, picture: Picture, language: str = "en") -> Asked:
        """The request for a caption as a prompt."""
        return Asked(self.assembly.prompts.caption(language), (picture_ref(picture),))

    def _checked(self, asked: Asked) -> Asked:
        longest = getattr(self.assembly.model.language.config, "max_position_embeddings", None)
        if longest is not None and len(asked.prompt.ids) >= longest:
            length = len(asked.prompt.ids)
            raise UserError(f"the conversation is {length} tokens, and this language model reads {longest}; begin anew")
        return asked

    def _choose(self, asked: Asked, choices: Sequence[str]) -> dict[str, float]:
        shares = self.answerer.choose(asked, choices)
        return dict(sorted(zip(choices, shares, strict=True), key=lambda pair: -pair[1]))


@dataclass(frozen=True)
class Answer:
    """What the engine answered.

    Attributes:
        text: in words.
        adapter: the name of the adapter that answered.
        finish: "stop" came to its end; "length" reached its longest; "stopped" was stopped by the one who asked.
        confidence: the geometric mean of its tokens' probabilities or, of a choice, its probability among the choices;
            None for beam search.
        tokens: written, the end token included.
        prompt_tokens: read, the pictures' included.
        choices: each choice's probability, the likeliest first, where there were any.
    """

    text: str
    adapter: str
    finish: Literal["stop", "length", "stopped"]
    confidence: float | None
    tokens: int
    prompt_tokens: int
    choices: dict[str, float] | None = None


class Busy(Exception):
    """As many requests wait as may: try again later."""


class Ticket:
    """A request on its way: iterate to read along, or wait for `result`."""

    def __init__(self, adapter: LoadedAdapter, asked: Asked, decoding: Decoding, choices: tuple[str, ...]) -> None:
        self.adapter = adapter
        self.asked = asked
        self.decoding = decoding
        self.choices = choices
        self.stops: tuple[str, ...] = ()
        self._changed = threading.Condition()
        self._text = ""
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._stopped = False

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._answer is not None or self._error is not None

    @property
    def stopped(self) -> bool:
        """Whether the one who asked does not want more."""
        return self._stopped

    def stop(self) -> None:
        """End it after the token that is being written; the result holds what was written until then."""
        self._stopped = True

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer.

        Raises:
            TimeoutError: it took longer than `timeout` seconds; the request is stopped then.
            Exception: what went wrong in answering.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                self.stop()
                raise TimeoutError(f"no answer within {timeout:g} s")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def __iter__(self) -> Iterator[str]:
        """The whole text so far, each time it has grown; ends with the answer's text.

        Raises:
            Exception: what went wrong in answering.
        """
        seen: str | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda known=seen: self.done or (self._text not in ("", known)))  # type: ignore[misc]
                text, done = self._text, self.done
            if self._error is not None:
                raise self._error
            if text and text != seen:
                seen = text
                yield text
            if done:
                return

    def _told(self, text: str) -> None:
        with self._changed:
            self._text = text
            self._changed.notify_all()

    def _finish(self, answer: Answer) -> None:
        with self._changed:
            self._text, self._answer = answer.text, answer
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


class Engine:
    """Several adapters over frozen models that are loaded once; one thread works for all who ask.

    Requests that arrive together, or while others are being answered, are answered in one batch, each as it would be
    alone. Every method may be called from any thread.

    Args:
        adapters: loaded ones, or names as `load_adapter` takes them; the default first. None is the shipped default.
        device: "cpu", "cuda", …; a GPU where there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        max_batch: requests answered together.
        max_waiting: requests that may wait; the next one is refused.

    Raises:
        UserError: there is no such adapter, it does not fit its frozen models, or two have the same name.
    """

    def __init__(
        self,
        adapters: Sequence[LoadedAdapter | str | Path | None] = (None,),
        *,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool = False,
        max_batch: int = 16,
        max_waiting: int = 64,
    ) -> None:
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self._adapters: dict[str, LoadedAdapter] = {}
        frozen = FrozenModels()
        for named in adapters:
            loaded = (
                named
                if isinstance(named, LoadedAdapter)
                else load_adapter(named, device=device, dtype=dtype, offline=offline, frozen=frozen)
            )
            name = short_name(loaded.name)
            if name in self._adapters:
                raise UserError(f"--adapter {loaded.name}: another is called '{name}' too; rename one of the folders")
            loaded.name = name
            self._adapters[name] = loaded
        self._waiting: deque[Ticket | _Errand] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="querybridge-engine", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, the default first."""
        return list(self._adapters)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def adapter(self, name: str | None = None) -> LoadedAdapter:
        """A loaded adapter; the default where no name is given.

        Raises:
            UserError: none of that name is loaded.
        """
        if name is None:
            return next(iter(self._adapters.values()))
        if name not in self._adapters:
            raise UserError(f"adapter '{name}': not loaded; take one of {', '.join(self._adapters)}")
        return self._adapters[name]

    def chat(
        self,
        turns: Sequence[Turn],
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        stops: Sequence[str] = (),
    ) -> Ticket:
        """Go on with a conversation; one user's turn is a plain question.

        Args:
            turns: the last is the user's; pictures belong to the turns they were shown in.
            adapter: which one answers; the default where left out.
            decoding: how tokens are chosen; greedy where left out.
            stops: the answer ends before any of these strings.

        Raises:
            UserError: the conversation cannot be put to the model.
            Busy: too many wait.
        """
        loaded = self.adapter(adapter)
        ticket = Ticket(loaded, loaded.asked(turns), decoding or Decoding(), ())
        ticket.stops = tuple(stops)
        return self._submit(ticket)

    def caption(
        self,
        picture: Picture,
        *,
        language: str = "en",
        adapter: str | None = None,
        decoding: Decoding | None = None,
    ) -> Ticket:
        """Describe a picture; raises as `chat`."""
        loaded = self.adapter(adapter)
        return self._submit(
            Ticket(loaded, loaded.asked_caption(picture, language), decoding or Decoding.preset("caption"), ())
        )

    def choose(self, turns: Sequence[Turn], choices: Sequence[str], *, adapter: str | None = None) -> Ticket:
        """Answer with one of the choices; raises as `chat`, and where there are fewer than two choices."""
        loaded = self.adapter(adapter)
        return self._submit(Ticket(loaded, loaded.asked(turns), Decoding(), checked_choices(choices)))

    def submit(self, asked: Asked, *, adapter: str | None = None, decoding: Decoding | None = None) -> Ticket:
        """Answer a prompt that is made already; raises as `chat`."""
        return self._submit(Ticket(self.adapter(adapter), asked, decoding or Decoding(), ()))

    def run(self, errand: Callable[[LoadedAdapter], T], *, adapter: str | None = None) -> Future[T]:
        """Have the engine's thread do something else with an adapter's models, in its turn.

        Raises:
            Busy: too many wait.
        """
        waiting = _Errand(self.adapter(adapter), errand)
        self._submit(waiting)
        return waiting.future

    def close(self) -> None:
        """End the thread; what waits fails."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, request: _Request) -> _Request:
        with self._arrived:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests wait already; try again in a moment")
            self._waiting.append(request)
            self._arrived.notify_all()
        return request

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    for request in self._waiting:
                        request._fail(RuntimeError("the engine was closed"))
                    return
            time.sleep(_GATHER)
            with self._arrived:
                chosen = self._next()
            try:
                if isinstance(chosen, _Errand):
                    chosen.do()
                else:
                    _answer(chosen)
            except BaseException as error:
                for request in [chosen] if isinstance(chosen, _Errand) else chosen:
                    request._fail(error)

    def _next(self) -> _Errand | list[Ticket]:
        """The oldest request and those that can be answered with it, taken off the queue."""
        first = self._waiting.popleft()
        if isinstance(first, _Errand):
            return first
        alike = [
            request
            for request in self._waiting
            if isinstance(request, Ticket) and not first.choices and _batch_key(request) == _batch_key(first)
        ][: self.max_batch - 1]
        for request in alike:
            self._waiting.remove(request)
        return [first, *alike]


class _Errand:
    """Something else that is done in the engine's thread."""

    def __init__(self, adapter: LoadedAdapter, errand: Callable[[LoadedAdapter], Any]) -> None:
        self.adapter = adapter
        self.errand = errand
        self.future: Future[Any] = Future()

    def do(self) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(self.errand(self.adapter))

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


_Request = TypeVar("_Request", Ticket, _Errand)


def _batch_key(ticket: Ticket) -> tuple[object, ...]:
    """Tickets with equal keys are generated together: lengths may differ, unless beams are searched."""
    decoding = ticket.decoding if ticket.decoding.num_beams > 1 else replace(ticket.decoding, max_new_tokens=1)
    return (id(ticket.adapter), decoding, bool(ticket.choices))


def _answer(tickets: Sequence[Ticket]) -> None:
    """Answer tickets that belong together."""
    adapter = tickets[0].adapter
    if tickets[0].choices:
        for ticket in tickets:
            shares = adapter._choose(ticket.asked, ticket.choices)
            best = next(iter(shares))
            length = len(ticket.asked.prompt.ids)
            ticket._finish(Answer(best, adapter.name, "stop", shares[best], 0, length, shares))
        return
    readable = _those_that_can_be_read(tickets)
    if not readable:
        return

    def on_step(said: list[Said]) -> list[bool]:
        return [_look(ticket, one) for ticket, one in zip(readable, said, strict=True)]

    decoding = replace(tickets[0].decoding, max_new_tokens=max(ticket.decoding.max_new_tokens for ticket in readable))
    said = adapter.answerer([ticket.asked for ticket in readable], decoding, on_step=on_step)
    for ticket, one in zip(readable, said, strict=True):
        if not ticket.done:
            _finish(ticket, one)


def _those_that_can_be_read(tickets: Sequence[Ticket]) -> list[Ticket]:
    """Tickets whose pictures open; the others fail alone, not their company with them."""
    good = []
    for ticket in tickets:
        try:
            if len(tickets) > 1:
                for image in ticket.asked.images:
                    open_image(image)
            good.append(ticket)
        except UserError as error:
            ticket._fail(error)
    return good


def _look(ticket: Ticket, said: Said) -> bool:
    """Tell a ticket what was written; whether that is enough."""
    if ticket.done:
        return True
    cut = _cut(said.text, ticket.stops)
    enough = said.ended or cut is not None or ticket.stopped or said.tokens >= ticket.decoding.max_new_tokens
    if enough:
        _finish(ticket, said)
    else:
        ticket._told(said.text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character may want more tokens
    return enough


def _finish(ticket: Ticket, said: Said) -> None:
    cut = _cut(said.text, ticket.stops)
    finish: Literal["stop", "length", "stopped"] = (
        "stop" if said.ended or cut is not None else "stopped" if ticket.stopped else "length"
    )
    text = said.text if cut is None else cut
    length = len(ticket.asked.prompt.ids)
    ticket._finish(Answer(text, ticket.adapter.name, finish, said.confidence, said.tokens, length))


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stops; None where none is in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].rstrip() if places else None


def user_turn(pictures: Picture | Sequence[Picture], text: str) -> Turn:
    """A user's turn from pictures and words.

    Raises:
        UserError: something given as a picture is none, or there are no words.
    """
    chosen = [pictures] if isinstance(pictures, Picture) else list(pictures)
    if not text.strip():
        raise UserError("QUESTION: it is empty; ask something about the picture")
    return Turn("user", text, tuple(picture_ref(picture) for picture in chosen))


def checked_choices(choices: Sequence[str], *, where: str = "choices") -> tuple[str, ...]:
    """Choices without blanks around them; `where` names them in errors.

    Raises:
        UserError: there are fewer than two, or one twice.
    """
    names = tuple(choice.strip() for choice in choices if choice.strip())
    if len(names) < 2:
        raise UserError(f"{where}: {len(names)} given; name at least two")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: one stands there twice; name each once")
    return names


def short_name(name: str) -> str:
    """What people call an adapter: a run's folder by its own name, not by that of its `best`."""
    path = Path(name)
    return (path.parent.name if path.name in ("best", "last") else path.name) or name


def picture_ref(picture: Picture) -> ImageRef:
    """What was given as a picture, as the reference that the rest of the code takes.

    Raises:
        UserError: it is nothing that could be one, or a Pillow image that cannot be decoded.
    """
    if isinstance(picture, ImageRef):
        return picture
    if isinstance(picture, str):
        return image_ref(picture)
    if isinstance(picture, Path):
        return ImageRef(str(picture), path=picture)
    if isinstance(picture, bytes):
        return ImageRef("picture", data=picture)
    if not isinstance(picture, Image.Image):
        raise UserError(f"a picture is {type(picture).__name__}; give a path, a file's bytes or a Pillow image")
    buffer = io.BytesIO()
    open_image(picture).save(buffer, format="PNG")  # its bytes are its key in the cache
    return ImageRef("picture", data=buffer.getvalue())


def load_adapter(
    name: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    frozen: FrozenModels | None = None,
) -> LoadedAdapter:
    """Load an adapter with the frozen models it stands on.

    Args:
        name: a run's folder, an artefact's folder, or a shipped adapter's name; left out, the default adapter.
        device: "cpu", "cuda", …; a GPU where there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        frozen: models that are loaded already, for adapters that stand on the same ones.

    Raises:
        UserError: there is no such adapter, or it does not fit its frozen models.
    """
    folder = find_artefact(name if name is not None else default_adapter())
    assembly, facts = load_artefact(
        folder, device=device or default_device(), dtype=dtype, offline=offline, frozen=frozen
    )
    return LoadedAdapter(assembly, facts, str(name or folder.name))


def default_adapter() -> str:
    """The adapter that is used where none is named: the shipped one.

    Raises:
        UserError: none ships yet.
    """
    if DEFAULT_ADAPTER in shipped_adapters():
        return DEFAULT_ADAPTER
    raise UserError(
        "--adapter: no adapter ships with this version, so name one: train it with ./scripts/quickstart.sh"
        " or querybridge finetune RECIPE, then pass --adapter runs/quickstart or your run's folder"
    )
