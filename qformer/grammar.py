"""Answers of a given form: a JSON schema, a regular expression or a list of choices, as masks over the next token.

The masks are llguidance's (https://github.com/guidance-ai/llguidance). An answer that nears its longest length is led
to an end by a short way, so that what was begun is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from qformer.errors import UserError
from qformer.language import LanguageModel
from qformer.token_rules import TokenFilter

_CLOSERS = ("}", "]", '"')  # what ends something that was begun in JSON, the first before the others
_LONGEST_WAY = 400  # tokens of a way to the end that is looked for
_SPARE = 4  # tokens
_SAMPLE = "  a b, c"

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class GrammarTokens:
    """A language model's tokens as llguidance takes them; it takes a few seconds to make."""

    def __init__(self, language: LanguageModel) -> None:
        import llguidance
        import llguidance.hf

        tokenizer, self.stop_ids = language.tokenizer, language.stop_ids
        try:
            self.tokens = llguidance.hf.from_tokenizer(tokenizer, eos_token=self.stop_ids)
        except ValueError:
            single: Any = _SingleTokens(tokenizer, self.stop_ids)
            self.tokens = llguidance.LLTokenizer(single, eos_token=self.stop_ids)
        self.closers = [self._single(text) for text in _CLOSERS]
        self.lengths = np.array([len(self.tokens.decode_bytes([token])) for token in range(self.tokens.vocab_size)])

    def _single(self, text: str) -> int | None:
        ids = self.tokens.tokenize_str(text)
        return ids[0] if len(ids) == 1 else None


class _SingleTokens:
    """A tokenizer whose texts are its tokens' texts one after the other, in the form of llguidance's wrapper."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        single = [tokenizer.decode([token]) for token in range(len(tokenizer))]
        ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        if "".join(single[token] for token in ids) != _SAMPLE:
            raise UserError("this adapter's tokenizer is of a kind for which answers cannot be held to a form")
        self.tokens = [text.encode() for text in single]
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted({*tokenizer.all_special_ids, *stop_ids})
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


_TOKENS: WeakKeyDictionary[LanguageModel, GrammarTokens] = WeakKeyDictionary()


@dataclass(frozen=True)
class AnswerGrammar:
    """What an answer must look like, from `schema_grammar`, `regex_grammar` or `choice_grammar`.

    Attributes:
        text: in llguidance's form of Lark.
        tokens: of the language model that answers.
        shortest: about how many tokens the shortest answer takes, its end token included; None if it was not found.
    """

    text: str
    tokens: GrammarTokens = field(compare=False)
    shortest: int | None = None

    def start(self, longest: int) -> TokenFilter:
        """A filter for one answer of at most so many tokens."""
        return _Matcher(self, longest)


class _Matcher:
    """One answer held to a grammar."""

    def __init__(self, grammar: AnswerGrammar, longest: int) -> None:
        import llguidance

        self._tokens, self._shortest, self._left = grammar.tokens, grammar.shortest, longest
        self._matcher = llguidance.LLMatcher(grammar.tokens.tokens, _lark(grammar.text), log_level=0)
        self._way: list[int] = []  # to the end, once there is no time for another

    def mask(self, scores: Tensor) -> Tensor:
        """Scores [V] with those of forbidden tokens at minus infinity."""
        if self._must_end():
            allowed = np.zeros(len(scores), dtype=bool)
            allowed[self._way[0]] = True
        else:
            allowed = np.resize(_mask(self._matcher, self._tokens), len(scores))
            allowed[self._tokens.tokens.vocab_size :] = False
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Go on by a token that was written."""
        self._left -= 1
        self._way = self._way[1:]
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"a token does not fit the answer's form: {self._matcher.get_error()}")

    def _must_end(self) -> bool:
        """Whether the answer is on its shortest way to the end: one more free token may double what is left to do."""
        if self._way or self._shortest is None:
            return bool(self._way)
        if self._left > 4 * self._shortest + 8 * _SPARE:
            return False
        way = shortest_way(self._matcher, self._tokens)
        if way is not None and self._left <= len(way) + self._shortest + _SPARE:
            self._way = way
        return bool(self._way)


def shortest_way(matcher: Any, tokens: GrammarTokens) -> list[int] | None:
    """Tokens that lead to an end soon, the end token included; None if none were found."""
    matcher = matcher.deep_copy()
    way: list[int] = []
    while len(way) < _LONGEST_WAY:
        allowed = _mask(matcher, tokens)
        if not allowed.any():
            return None
        end = next((stop for stop in tokens.stop_ids if allowed[stop]), None)
        if end is not None:
            return [*way, end]
        closers = [token for token in tokens.closers if token is not None and allowed[token]]
        if closers:  # inside a string all of them are text, but the quote
            token = closers[-1] if len(closers) == len(_CLOSERS) else closers[0]
        else:
            token = int(np.where(allowed[: len(tokens.lengths)], tokens.lengths, -1).argmax())
        way.append(token)
        if not matcher.consume_token(token):
            return None
    return None


def schema_grammar(language: LanguageModel, schema: Mapping[str, Any]) -> AnswerGrammar:
    """JSON of a schema, without blanks between its parts.

    Raises:
        UserError: the schema is wrong, or asks for what cannot be guaranteed.
    """
    options = json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
    return _grammar(language, f"answer: %json {options}")


def regex_grammar(language: LanguageModel, regex: str) -> AnswerGrammar:
    """What a regular expression of Rust's regex crate matches as a whole; no look-around, no references.

    Raises:
        UserError: it is none.
    """
    escaped = regex.replace("/", "\\/").replace("\n", "\\n")
    return _grammar(language, f"answer: /{escaped}/")


def choice_grammar(language: LanguageModel, choices: Sequence[str]) -> AnswerGrammar:
    """One of some texts."""
    return _grammar(language, "answer: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def _grammar(language: LanguageModel, answer: str) -> AnswerGrammar:
    import llguidance

    if language not in _TOKENS:
        _TOKENS[language] = GrammarTokens(language)
    tokens = _TOKENS[language]
    text = f'start: " "? answer\n{answer}'  # models begin a word with its blank; answers come without it
    wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(_lark(text), tokens.tokens)
    if wrong:
        lines = [line.strip() for line in messages[0].splitlines() if line.strip()]
        causes = [line for line in lines[1:] if line.startswith("error:")]
        raise UserError(" ".join([lines[0], *causes]))
    matcher = llguidance.LLMatcher(tokens.tokens, _lark(text), log_level=0)
    if matcher.is_error():
        raise UserError(matcher.get_error().splitlines()[0])
    way = shortest_way(matcher, tokens)
    return AnswerGrammar(text, tokens, None if way is None else len(way))


def _lark(text: str) -> str:
    import llguidance

    return str(llguidance.LLMatcher.grammar_from_lark(text))


def _mask(matcher: Any, tokens: GrammarTokens) -> Mask:
    """Which tokens may come next, bool [V] or a few more."""
    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    allowed = np.unpackbits(packed, bitorder="little").astype(bool)
    allowed[tokens.stop_ids] = matcher.is_accepting()  # a token that ends an answer is no text, whatever it is called
    return allowed
