"""What a request asks of the engine: one request or, if it wants reasons, one for them and one for the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.inference.reasoning import ReasoningMode, trained_reasoning_mode
from qformer.continuous import can_continue
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.grammar import choice_grammar, regex_grammar, schema_grammar
from qformer.language import LanguageModel
from qformer.token_rules import TokenRules
from serve.adapter import LoadedAdapter, checked_choices
from serve.api.errors import ApiError, unsupported
from serve.api.schemas import ChatRequest, turns_of
from serve.engine.engine import Engine
from serve.engine.pending import PendingAnswer
from serve.reasoning import asked_answer, asked_rationale, question_example


@dataclass(frozen=True)
class Plan:
    """How a request is put to the engine.

    Attributes:
        begin: each asks for an answer or, if there is something to conclude, for the reasons.
        conclude: asks for the answer from the reasons.
    """

    begin: Sequence[Callable[[], PendingAnswer]]
    conclude: Callable[[str], PendingAnswer] | None = None


def plan_of(request: ChatRequest, engine: Engine, pictures: Sequence[ImageRef], *, model: str, max_tokens: int) -> Plan:
    """Plan how a request is answered; nothing is asked yet.

    Args:
        request: as it was sent.
        engine: what answers.
        pictures: of all messages, in reading order.
        model: the adapter's name.
        max_tokens: the longest that any answer, or its reasons, may be.

    Raises:
        ApiError: the choices or the form are none, or the adapter cannot give reasons and an answer.
        UserError: the question cannot be put.
    """
    turns = turns_of(request.messages, pictures)
    choices = () if request.answer_choices is None else _checked(request.answer_choices)
    decoding = Decoding(
        max_new_tokens=min(request.max_completion_tokens or request.max_tokens or max_tokens, max_tokens),
        temperature=request.temperature or 0.0,
        top_p=request.top_p or 1.0,
        seed=request.seed if request.temperature else None,  # greedy answers are gathered whatever their seeds
    )
    if request.reason:
        (turn,) = turns
        example = question_example(turn.images, turn.text, context=request.context or "", choices=choices)
        return _reasoned(engine, engine.adapter(model), example, decoding, model=model, max_tokens=max_tokens)
    if choices:
        return Plan([partial(engine.choose, turns, choices, adapter=model)])
    options: dict[str, Any] = {"adapter": model, "stops": request.stop or ()}
    rules = rules_of(request, engine.adapter(model).assembly.model.language if request.forms else None)
    if rules != TokenRules():
        options["rules"] = rules
    return Plan([partial(engine.chat, turns, decoding=each, **options) for each in _drawn(decoding, request.n or 1)])


def rules_of(request: ChatRequest, language: LanguageModel | None) -> TokenRules:
    """What a request asks of the answer's tokens.

    Args:
        request: as it was sent.
        language: of the adapter; needed if the answer has a form.

    Raises:
        ApiError: the form is none, or cannot be kept to.
    """
    grammar = None
    for field in request.forms:
        assert language is not None
        if not can_continue(language):
            raise unsupported(field, "this model's answers cannot be held to a form; leave it out")
        try:
            if field == "regex":
                grammar = regex_grammar(language, request.regex or "")
            elif field == "choices":
                grammar = choice_grammar(language, _checked(request.choices or (), "choices"))
            else:
                assert request.response_format is not None
                grammar = schema_grammar(language, request.response_format.schema_of_answer or {})
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from error
    return TokenRules(
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        grammar=grammar,
        top=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _drawn(decoding: Decoding, count: int) -> list[Decoding]:
    """The decodings of several answers: each is drawn from a seed of its own, if there is one."""
    if decoding.seed is None or count == 1:
        return [decoding] * count
    return [replace(decoding, seed=(decoding.seed + number + 2**63) % 2**64 - 2**63) for number in range(count)]


def _reasoned(
    engine: Engine, loaded: LoadedAdapter, example: Example, decoding: Decoding, *, model: str, max_tokens: int
) -> Plan:
    """As `serve.reasoning.reason`: in two stages, or directly if that is what the adapter was taught."""

    def reasons() -> PendingAnswer:
        longest = min(loaded.assembly.rationale_tokens, max_tokens)
        asked = asked_rationale(loaded, example, longest=longest)
        return engine.submit(asked, adapter=model, decoding=replace(decoding, max_new_tokens=longest))

    def answer(rationale: str, *, admitted: bool = False) -> PendingAnswer:
        asked = asked_answer(loaded, example, rationale)
        return engine.submit(asked, adapter=model, decoding=decoding, choices=example.choices, admitted=admitted)

    if _way(loaded, model) == "direct":
        return Plan([partial(answer, "")])
    return Plan([reasons], partial(answer, admitted=True))


def _way(loaded: LoadedAdapter, model: str) -> ReasoningMode:
    try:
        return trained_reasoning_mode(loaded.assembly)
    except UserError as error:  # names flags that a client does not have
        taught = " and ".join(loaded.assembly.reasoning_stages)
        raise ApiError(
            400,
            f"reason: the model '{model}' was taught {taught} alone (reason.stages), and it takes rationale and answer;"
            " take another, or leave reason out",
            param="reason",
        ) from error


def _checked(choices: Sequence[str], field: str = "answer_choices") -> tuple[str, ...]:
    try:
        return checked_choices(choices, where=field)
    except UserError as error:
        raise ApiError(400, str(error), param=field) from error
