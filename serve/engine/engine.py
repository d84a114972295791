"""The engine behind the page, the API and the command: several adapters over frozen models that are loaded once.

One thread works for all who ask. Answers are written side by side, a token of each at a time: a request joins at the
next token, and leaves when it is answered. What takes longer (beams, long prompts, other work with the models) is done
one after the other, in slices, and between two slices the others get on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from adapters.data.prompts import Turn
from adapters.inference.request import Request
from adapters.loading.vision_side import FrozenModels
from qformer.continuous import can_continue, looking_up_between_layers
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.generation import Stopped
from qformer.token_rules import TokenRules
from serve.adapter import ImageInput, LoadedAdapter, checked_choices, load_adapter, short_name
from serve.engine.pending import Busy, PendingAnswer
from serve.engine.queue import Job, Queue, Waiting
from serve.engine.writing import Writers, answer_whole, batch_key, choose_after_reading, end_unwritten, language_of
from serve.limits import MAX_PROMPT

T = TypeVar("T")

_GATHER = 0.01  # seconds that a first request waits for company
_SLICE = 0.05  # seconds of longer work before the others get on
_OTHERS = 0.4  # seconds that they get at a time, if so many are waiting, and what was begun then
_LONGER_SHARE = 0.25  # of their time is what longer work gets next at the least: a fifth of the engine's
_COMES_BACK = 0.005  # seconds in which who has just got an answer may ask again


class Engine:
    """Several adapters over frozen models that are loaded once; one thread works for all who ask.

    Requests that are answered at the same time share their passes through the models, each being answered as it would
    be alone. Who asks for much doesn't keep others waiting: each client of `serve.engine.pending.CLIENT` gets a turn.
    Every method may be called from any thread.

    Args:
        adapters: loaded ones, or names as `load_adapter` takes them; the default first. None is the shipped default.
        device: "cpu", "cuda", …; a GPU if there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        max_batch: requests answered together.
        max_waiting: requests that may wait; the next one is refused.
        max_prompt: tokens that a request may have a model read; longer ones are refused.

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
        max_prompt: int = MAX_PROMPT,
    ) -> None:
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.max_prompt = max_prompt
        self._adapters: dict[str, LoadedAdapter] = {}
        frozen = FrozenModels() if len(adapters) > 1 else None
        for named in adapters:
            loaded = (
                named
                if isinstance(named, LoadedAdapter)
                else load_adapter(named, device=device, dtype=dtype, offline=offline, frozen=frozen)
            )
            name = short_name(loaded.name)
            if name in self._adapters:
                raise UserError(f"--adapter {loaded.name}: another is called '{name}' too; rename one of the folders")
            self._adapters[name] = LoadedAdapter(loaded.assembly, loaded.facts, name)
        self._queue = Queue()
        self._writers = Writers()
        self._arrived = threading.Condition()
        self._closed = False
        self._slice_ends = 0.0  # when longer work lets the others on
        self._thread = threading.Thread(target=self._work, name="querybridge-engine", daemon=True)
        self._thread.start()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, the default first."""
        return list(self._adapters)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def capabilities(self, name: str) -> dict[str, object]:
        """What an adapter can do, for programs."""
        loaded = self.adapter(name)
        assembly = loaded.assembly
        free = can_continue(assembly.model.language)
        return {
            "task": assembly.task,
            "pictures": True,
            "longest_prompt": min(self.max_prompt, loaded.context_length or self.max_prompt),
            "reasons": "rationale" in assembly.reasoning_stages,
            "embeddings": assembly.vision_side.has_text_side,
            "forms": free,
            "logprobs": free,
        }

    def ahead_of(self, pending: PendingAnswer) -> int:
        """How many requests came before one and wait still; 0 once it is being answered."""
        with self._arrived:
            return self._queue.ahead_of(pending)

    def adapter(self, name: str | None = None) -> LoadedAdapter:
        """A loaded adapter; the default if no name is given.

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
        rules: TokenRules | None = None,
    ) -> PendingAnswer:
        """Go on with a conversation; one user's turn is a plain question.

        Args:
            turns: the last is the user's; pictures belong to the turns they were shown in.
            adapter: which one answers; the default if left out.
            decoding: how tokens are chosen; greedy if left out.
            stops: the answer ends before any of these strings.
            rules: what else is asked of its tokens; not in a beam search.

        Raises:
            UserError: the conversation cannot be put to the model, or the model takes no rules.
            Busy: too many wait.
        """
        loaded = self.adapter(adapter)
        pending = _pending_answer(
            loaded, self._checked(loaded, loaded.chat_request(turns)), decoding or Decoding(), rules
        )
        pending.stops = tuple(stops)
        if rules is not None and (pending.decoding.num_beams > 1 or not can_continue(language_of(pending))):
            raise UserError(
                f"adapter '{loaded.name}': penalties, forms of answers and their tokens' probabilities are not for beam"
                " searches, nor for its kind of language model; leave them out"
            )
        return self._submit(pending)

    def caption(
        self,
        picture: ImageInput,
        *,
        language: str = "en",
        adapter: str | None = None,
        decoding: Decoding | None = None,
    ) -> PendingAnswer:
        """Describe a picture; raises as `chat`."""
        loaded = self.adapter(adapter)
        return self._submit(
            _pending_answer(loaded, loaded.caption_request(picture, language), decoding or Decoding.preset("caption"))
        )

    def choose(self, turns: Sequence[Turn], choices: Sequence[str], *, adapter: str | None = None) -> PendingAnswer:
        """Answer with one of the choices; raises as `chat`, and if there are fewer than two choices."""
        loaded = self.adapter(adapter)
        return self._submit(
            PendingAnswer(
                loaded, self._checked(loaded, loaded.chat_request(turns)), Decoding(), checked_choices(choices)
            )
        )

    def submit(
        self,
        asked: Request,
        *,
        adapter: str | None = None,
        decoding: Decoding | None = None,
        choices: Sequence[str] = (),
        admitted: bool = False,
    ) -> PendingAnswer:
        """Answer a prompt that is made already; raises as `chat`.

        Args:
            asked: the prompt, with its pictures.
            adapter: which one answers; the default if left out.
            decoding: how tokens are chosen; greedy if left out.
            choices: one of these is the answer, which the prompt lists; none leaves it open.
            admitted: it goes on with what was let in before, and is not refused half way, however many wait.
        """
        loaded = self.adapter(adapter)
        if choices:
            worded = tuple(loaded.assembly.prompts.choice(choice, choices) for choice in choices)
            return self._submit(
                PendingAnswer(loaded, self._checked(loaded, asked), Decoding(), tuple(choices), worded), admitted
            )
        return self._submit(_pending_answer(loaded, self._checked(loaded, asked), decoding or Decoding()), admitted)

    def run(
        self, job: Callable[[LoadedAdapter], T], *, adapter: str | None = None, admitted: bool = False
    ) -> Future[T]:
        """Have the engine's thread do something else with an adapter's models, in its turn.

        Args:
            job: what is done.
            adapter: with which models; the default's if left out.
            admitted: as in `submit`.

        Raises:
            Busy: too many wait.
        """
        waiting = Job(self.adapter(adapter), job)
        self._submit(waiting, admitted)
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

    def _checked(self, loaded: LoadedAdapter, asked: Request) -> Request:
        length = len(loaded.check_length(asked).prompt.ids)
        if length > self.max_prompt:
            raise UserError(
                f"what is asked is {length} tokens, and --max-prompt is {self.max_prompt}: shorten it, or begin anew"
            )
        return asked

    def _submit(self, request: Waiting, admitted: bool = False) -> Waiting:
        with self._arrived:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self._queue) >= self.max_waiting:
                self._drop_stopped()
            if len(self._queue) >= self.max_waiting and not admitted:
                raise Busy(f"{self.max_waiting} requests wait already; try again in a moment")
            self._queue.put(request)
            self._arrived.notify_all()
        return request

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: len(self._queue) or len(self._writers) or self._closed)
            if not self._closed and not len(self._writers):
                time.sleep(_GATHER)
            if not self._closed:
                self._long_turn()
                self._brief_turn()
            if self._closed:
                self._end_all(RuntimeError("the engine was closed"))
                return

    def _let_others_on(self) -> None:
        """Between two slices of longer work: begin what is brief, as long as more of it waits, and write on."""
        began = time.monotonic()
        while True:
            before = len(self._writers)
            self._brief_turn()
            if (took := time.monotonic() - began) > _OTHERS or self._closed:
                break
            with self._arrived:
                if len(self._writers) < before:
                    self._arrived.wait_for(lambda: self._queue.has_brief or self._closed, timeout=_COMES_BACK)
                if not self._queue.has_brief:
                    break
        self._slice_ends = time.monotonic() + max(_SLICE, _LONGER_SHARE * took)

    def _brief_turn(self) -> None:
        """Begin what can be begun in one short pass, and write one more token of each answer."""
        chosen: list[PendingAnswer] = []
        try:
            with self._arrived:
                self._drop_stopped()
                self._writers.drop_stopped()
                chosen = self._queue.next_brief(self._writers.clients, room=self.max_batch - len(self._writers))
            if chosen and chosen[0].choices:
                answer_whole(chosen, lambda: all(pending.stopped for pending in chosen))
            elif chosen:
                self._writers.begin(chosen)
        except BaseException as error:
            for pending in chosen:
                pending._fail(error)
        self._writers.step()

    def _long_turn(self) -> None:
        """Do the oldest work that takes longer, with brief turns for the others between its slices."""
        chosen: list[PendingAnswer] = []
        try:
            with self._arrived:
                self._drop_stopped()
                found = self._queue.next_long(self._writers.clients, room=self.max_batch)
            if isinstance(found, Job):
                found.do()
                return
            if not (chosen := found):
                return
            self._do_in_slices(chosen)
        except Stopped:
            for pending in chosen:
                if pending.stopped:
                    end_unwritten(pending)
                else:
                    pending._fail(RuntimeError("the engine was closed"))
        except BaseException as error:
            for pending in chosen:
                pending._fail(error)

    def _do_in_slices(self, chosen: list[PendingAnswer]) -> None:
        language = language_of(chosen[0])
        self._slice_ends = time.monotonic() + _SLICE

        def look() -> None:
            # what was written of an answer is kept: its writing ends after a token, and not between two layers
            if self._closed or all(pending.stopped and not pending.text for pending in chosen):
                raise Stopped
            if time.monotonic() > self._slice_ends:
                self._let_others_on()
                language.activate()

        with looking_up_between_layers(language, look) as look_up:

            def stopped() -> bool:
                if self._closed:
                    raise Stopped
                if ended := all(pending.stopped for pending in chosen):  # a search says what it has found
                    return ended
                look_up()  # some models have no list of layers
                return all(pending.stopped for pending in chosen)

            if batch_key(chosen[0])[0] == "whole":
                answer_whole(chosen, stopped)
            elif chosen[0].choices:
                choose_after_reading(chosen[0], stopped)
            else:
                self._writers.begin(chosen, stopped)

    def _end_all(self, error: RuntimeError) -> None:
        self._writers.fail(error)
        with self._arrived:
            for request in self._queue.take_all():
                request._fail(error)

    def _drop_stopped(self) -> None:
        """Take those off the queue that nobody waits for any more."""
        for pending in self._queue.take_stopped():
            end_unwritten(pending)


def _pending_answer(
    adapter: LoadedAdapter, asked: Request, decoding: Decoding, rules: TokenRules | None = None
) -> PendingAnswer:
    return PendingAnswer(adapter, asked, adapter.fit_decoding(asked, decoding), rules=rules)
