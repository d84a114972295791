"""What the engine's thread does for those it serves: answers that grow side by side, and longer work in slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Literal

import torch

from adapters.data.images import open_image
from adapters.inference.request import Completion, ranked
from qformer.continuous import AnswerBatch, AnswerRow, can_continue, continuation_log_prob, read_prompts
from qformer.errors import UserError
from qformer.generation import Stopped
from qformer.language import LanguageModel
from serve.adapter import LoadedAdapter
from serve.engine.pending import Answer, PendingAnswer, TokenChance

_BEAM_ROWS = 40  # beams that are searched in one pass: more would keep others waiting
_BRIEF = 128  # tokens of a prompt that is read in one pass: on a CPU more would keep others waiting for half a second
_BRIEF_TOGETHER = 256  # of several, padded to the longest: they share what a pass costs however few tokens it reads
_SHORTEST = 512  # tokens: answers that take no more room than this are written in one batch, whatever they take

_Key = tuple[int, int]


def language_of(pending: PendingAnswer) -> LanguageModel:
    """The language model that answers."""
    return pending.adapter.assembly.model.language


def is_brief(pending: PendingAnswer) -> bool:
    """Whether it can be begun in one short pass, between two tokens of others; other work is done in slices."""
    if pending.decoding.num_beams > 1 or not can_continue(language_of(pending)):
        return False
    return _unread(pending) <= _BRIEF


def _unread(pending: PendingAnswer) -> int:
    """Tokens that have still to be read; none of a picture that cannot be read, which is said when it is begun."""
    try:
        return pending.adapter.generator.unread(pending.asked)
    except (UserError, OSError):
        return 0


def batch_key(pending: PendingAnswer) -> tuple[object, ...]:
    """Pending answers with equal keys may be begun together, or, if they are not brief, generated together."""
    if is_brief(pending):
        return ("brief", id(pending.adapter), bool(pending.choices))
    if can_continue(language_of(pending)) and (pending.decoding.num_beams == 1 or pending.choices):
        return ("long", id(pending))
    decoding = pending.decoding if pending.decoding.num_beams > 1 else replace(pending.decoding, max_new_tokens=1)
    return ("whole", id(pending.adapter), decoding, bool(pending.choices))


def fit_together(chosen: Sequence[PendingAnswer], *, most: int) -> bool:
    """Whether requests of one `batch_key` can be begun at once.

    Args:
        chosen: the requests, the oldest first; one always can.
        most: answers that may be under way.
    """
    first = chosen[0]
    if len(chosen) == 1:
        return True
    if batch_key(first)[0] == "brief":
        read = len(chosen) * max(map(_unread, chosen))
        return read <= _BRIEF_TOGETHER and (bool(first.choices) or len(chosen) <= most)
    beams = first.decoding.num_beams
    return len(chosen) <= (most if beams == 1 else max(1, min(most, _BEAM_ROWS // beams))) and _have_room(chosen)


def _have_room(chosen: Sequence[PendingAnswer]) -> bool:
    """Whether every prompt could be followed by the longest of the answers: a row that is done is still counted on."""
    longest = chosen[0].adapter.context_length
    prompt = max(len(pending.asked.prompt.ids) for pending in chosen)
    return longest is None or prompt + max(pending.decoding.max_new_tokens for pending in chosen) <= longest


class Writers:
    """Answers that are being written, a token of each at a time; one may be begun between any two tokens."""

    def __init__(self) -> None:
        self._batches: dict[_Key, AnswerBatch] = {}
        self._writing: dict[_Key, list[PendingAnswer]] = {}

    def __len__(self) -> int:
        return sum(len(writing) for writing in self._writing.values())

    @property
    def clients(self) -> list[str]:
        """Who each of them is for."""
        return [pending.client for writing in self._writing.values() for pending in writing]

    def begin(self, chosen: Sequence[PendingAnswer], stopped: Callable[[], bool] | None = None) -> None:
        """Read prompts of one adapter, and write the first token of each answer.

        Args:
            chosen: with one decoding beam and no choices.
            stopped: looked at between the parts of a long prompt.

        Raises:
            Stopped: `stopped` says so.
        """
        if not (readable := _those_that_can_be_read(chosen)):
            return
        adapter = readable[0].adapter
        language = adapter.assembly.model.language
        started = adapter.generator.start([pending.asked for pending in readable], stopped=stopped)
        read = read_prompts(
            language, [embeds for _, embeds in started], [prefix for prefix, _ in started], stopped=stopped
        )
        for pending, prompt in zip(readable, read, strict=True):
            pending.row = AnswerRow(pending.decoding, pending.rules)
            room = max(_SHORTEST, len(prompt) + pending.decoding.max_new_tokens)
            key = (id(adapter), (room - 1).bit_length())
            self._batches.setdefault(key, AnswerBatch(language)).join([pending.row], [prompt])
            self._writing.setdefault(key, []).append(pending)
            self._look(key, [pending])

    def step(self) -> None:
        """Write one more token of each."""
        for key, writing in list(self._writing.items()):
            self.drop_stopped()
            if not writing:
                continue
            language_of(writing[0]).activate()
            try:
                self._batches[key].step()
            except BaseException as error:  # the engine's thread gets no signals, and the others go on
                self._fail(key, error)
                continue
            self._look(key, list(writing))

    def drop_stopped(self) -> None:
        """End those that nobody waits for any more."""
        for key, writing in self._writing.items():
            self._look(key, [pending for pending in writing if pending.stopped])

    def fail(self, error: BaseException) -> None:
        """End all of them with an error."""
        for key in list(self._writing):
            self._fail(key, error)

    def _look(self, key: _Key, written: Sequence[PendingAnswer]) -> None:
        """Pass on what was written; those that have enough leave."""
        for pending in written:
            assert pending.row is not None
            try:
                pending.row.done = _pass_on(pending, said_in(pending.adapter, pending.row))
            except Exception as error:  # who follows it is at fault, and the others are not to suffer
                pending.row.done = True
                pending._fail(error)
            if pending.row.done:
                self._writing[key].remove(pending)

    def _fail(self, key: _Key, error: BaseException) -> None:
        del self._batches[key]
        for pending in self._writing.pop(key):
            pending._fail(error)


def said_in(adapter: LoadedAdapter, row: AnswerRow) -> Completion:
    """What an answer says so far."""
    stops = set(adapter.assembly.model.language.stop_ids)
    written = list(takewhile(lambda token: token not in stops, row.ids))
    chances = tuple(zip(row.ids, row.log_probs, strict=True))
    return Completion(
        adapter.assembly.prompts.decode(written),
        len(row.ids),
        len(written) < len(row.ids),
        sum(row.log_probs) / len(row.ids),
        chances,
        adapter.assembly.temperature,
    )


def answer_whole(chosen: Sequence[PendingAnswer], stopped: Callable[[], bool]) -> None:
    """Answer requests of one `batch_key` to their ends: a beam search, choices, or what an LLM cannot interleave.

    Args:
        chosen: the requests.
        stopped: looked at between slices, in which it may do other work.
    """
    if not (readable := _those_that_can_be_read(chosen)):
        return
    adapter = readable[0].adapter
    asked = [pending.asked for pending in readable]
    if readable[0].choices:
        found = adapter.generator.choose(asked, [pending.worded for pending in readable], stopped=stopped)
        for pending, each in zip(readable, found, strict=True):
            _finish_choice(pending, each)
        return

    def on_step(said: list[Completion]) -> list[bool]:
        stopped()
        return [_pass_on(pending, one) for pending, one in zip(readable, said, strict=True)]

    decoding = replace(
        readable[0].decoding, max_new_tokens=max(pending.decoding.max_new_tokens for pending in readable)
    )
    for pending, one in zip(
        readable, adapter.generator(asked, decoding, on_step=on_step, stopped=stopped), strict=True
    ):
        if not pending.done:
            _finish(pending, one)


def choose_after_reading(pending: PendingAnswer, stopped: Callable[[], bool]) -> None:
    """Answer a closed question whose prompt is long, and is read in parts; as `Generator.choose` does.

    Args:
        pending: with choices.
        stopped: looked at between slices, in which it may do other work.

    Raises:
        Stopped: `stopped` says so.
    """
    adapter = pending.adapter
    language = adapter.assembly.model.language
    ((prefix, embeds),) = adapter.generator.start([pending.asked], stopped=stopped)
    (read,) = read_prompts(language, [embeds], [prefix], stopped=stopped)
    sums = []
    for worded in pending.worded:
        if stopped():
            raise Stopped
        sums.append(continuation_log_prob(language, read, adapter.assembly.prompts.answer_ids(worded)))
    _finish_choice(pending, torch.tensor(sums).softmax(dim=0).tolist())


def end_unwritten(pending: PendingAnswer) -> None:
    """End a request that was stopped before anything was written."""
    if not pending.done:
        pending._finish(Answer("", pending.adapter.name, "stopped", None, 0, len(pending.asked.prompt.ids)))


def _finish_choice(pending: PendingAnswer, each: Sequence[float]) -> None:
    if pending.stopped:  # the shares may not have been computed
        end_unwritten(pending)
        return
    shares = ranked(pending.choices, each)
    best = next(iter(shares))
    length = len(pending.asked.prompt.ids)
    pending._finish(Answer(best, pending.adapter.name, "stop", shares[best], 0, length, shares))


def _those_that_can_be_read(chosen: Sequence[PendingAnswer]) -> list[PendingAnswer]:
    """Pending answers whose pictures open; the others fail alone, not their company with them."""
    good = []
    for pending in chosen:
        try:
            if len(chosen) > 1 and not pending.adapter.generator.knows(pending.asked):
                for image in pending.asked.images:
                    open_image(image)
            good.append(pending)
        except UserError as error:
            pending._fail(error)
    return good


def _pass_on(pending: PendingAnswer, said: Completion) -> bool:
    """Pass on to a request what was written; whether that is enough."""
    if pending.done:
        return True
    cut = _cut(said.text, pending.stops)
    enough = said.ended or cut is not None or pending.stopped or said.tokens >= pending.decoding.max_new_tokens
    if enough:
        _finish(pending, said)
    else:
        pending._update(said.text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character may want more tokens
    return enough


def _finish(pending: PendingAnswer, said: Completion) -> None:
    cut = _cut(said.text, pending.stops)
    finish: Literal["stop", "length", "stopped"] = (
        "stop" if said.ended or cut is not None else "stopped" if pending.stopped else "length"
    )
    text = said.text if cut is None else cut
    length = len(pending.asked.prompt.ids)
    pending._finish(
        Answer(text, pending.adapter.name, finish, said.confidence, said.tokens, length, chances=chances_of(pending))
    )


def chances_of(pending: PendingAnswer) -> tuple[TokenChance, ...]:
    """The tokens that were written so far, without an end token, if they were asked for."""
    row = pending.row
    if row is None or pending.rules.top is None:
        return ()
    stops = language_of(pending).stop_ids
    return tuple(
        TokenChance(token, log_prob, likeliest)
        for token, log_prob, likeliest in zip(row.ids, row.log_probs, row.likeliest, strict=False)
        if token not in stops
    )


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of the stops; None if none is in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].rstrip() if places else None
