"""Answers that are written side by side, a token each at a time: one may join at any token, and leave at any.

Rows of one batch share a pass through the model, and nothing else: each has its own decoding, its own rules and its
own random generator, so that its tokens are those that `qformer.generation.generate` gives its prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from qformer.decoding import Decoding
from qformer.generation import PartlyRead, PrefixCache
from qformer.language import LanguageModel
from qformer.lm_head import logits_at
from qformer.token_rules import TokenRules

# What a model's generation_config may ask of every answer, which only transformers' own loop does.
_ONLY_THERE = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "force_words_ids", "constraints",
    "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty", "guidance_scale", "min_p",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config", "encoder_repetition_penalty",
)  # fmt: skip
_CAN_CONTINUE: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()  # it takes a while to find out


def can_continue(language: LanguageModel) -> bool:
    """Whether a model's answers can be written side by side, joining and leaving at any token.

    It takes a causal model of full attention that takes positions, and whose own configuration of generation asks for
    nothing beyond the choice of the likeliest token, or a draw.
    """
    if language not in _CAN_CONTINUE:
        asked = language.base.generation_config
        neutral: tuple[object, ...] = (None, 0, 1.0, False)
        plain = all(getattr(asked, name, None) in neutral for name in _ONLY_THERE)
        _CAN_CONTINUE[language] = language.can_pack and language.can_reuse_prefix and plain
    return _CAN_CONTINUE[language]


@contextmanager
def looking_up_between_layers(language: LanguageModel, look: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Have `look` called before every layer of each pass through a model: it may end the pass, or let others go first.

    A part of a long prompt, or a token of a search with many beams, may take a second on a busy machine; one layer of
    it takes a thirtieth of that.

    Args:
        language: its layers are looked at; of a model that has no list of them, none is.
        look: raises `Stopped` to end the pass. What it has models do itself is not looked at, and done as outside of
            the pass: without its autocast, and with the attention that the model had before.

    Yields:
        The same look, to be called between two passes.
    """
    config = language.config
    plain, looking = config._attn_implementation, False

    def look_up(*_: object) -> None:
        nonlocal looking
        if looking:
            return
        looking, config._attn_implementation, mine = True, plain, config._attn_implementation
        try:
            with torch.autocast(language.device.type, enabled=False):
                look()
        finally:
            looking, config._attn_implementation = False, mine

    hooks = [layer.register_forward_pre_hook(look_up) for layer in _layers_of(language)]
    try:
        yield look_up
    finally:
        for each in hooks:
            each.remove()


def _layers_of(language: LanguageModel) -> list[nn.Module]:
    """The model's layers, one after the other; none if they are in no list of their own."""
    count = getattr(language.config.get_text_config(), "num_hidden_layers", None)
    lists = [module for module in language.base.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if len(lists) == 1 else []


class AnswerRow:
    """One answer while it is written.

    Args:
        decoding: how tokens are chosen; one beam.
        rules: what else is asked of its tokens.

    Attributes:
        ids: the tokens so far.
        log_probs: of each, under the model, before penalties and temperature.
        likeliest: of each, the likeliest tokens in its place with their log-probabilities, if the rules ask for them.
        done: nothing more is to be written; whoever looks on sets it.
    """

    def __init__(self, decoding: Decoding, rules: TokenRules | None = None) -> None:
        self.rules = rules or TokenRules()
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.likeliest: list[tuple[tuple[int, float], ...]] = []
        self.done = False
        self._penalty = decoding.repetition_penalty
        self._draws = decoding.temperature > 0
        self._seed = decoding.seed
        self._generator: torch.Generator | None = None
        self._filter = None if self.rules.grammar is None else self.rules.grammar.start(decoding.max_new_tokens)
        self._warpers: Any = LogitsProcessorList()
        if self._draws:
            self._warpers.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_p < 1:
                self._warpers.append(TopPLogitsWarper(decoding.top_p))

    @property
    def takes_likeliest(self) -> bool:
        """Whether its next token is the likeliest one, whatever was written."""
        return not self._draws and self._penalty == 1 and not self.rules.change_scores

    def choose(self, scores: Tensor) -> int:
        """The next token, of logits [V] in float32."""
        if self._penalty != 1 and self.ids:
            written = torch.tensor([self.ids], device=scores.device)
            processor: Any = RepetitionPenaltyLogitsProcessor(self._penalty)
            scores = processor(written, scores[None].clone())[0]
        scores = self.rules.penalised(scores, self.ids)
        if self._filter is not None:
            scores = self._filter.mask(scores)
        if not self._draws:
            return int(scores.argmax())
        shares = self._warpers(None, scores[None])[0].softmax(dim=-1)
        if self._seed is not None and self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        return int(torch.multinomial(shares, 1, generator=self._generator))

    def take(self, token: int, log_probs: Tensor) -> None:
        """Write a token; `log_probs` [V] are those of all in its place."""
        self.ids.append(token)
        self.log_probs.append(float(log_probs[token]))
        if self.rules.top is not None:
            best = log_probs.topk(min(self.rules.top, len(log_probs)))
            self.likeliest.append(tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        if self._filter is not None:
            self._filter.accept(token)


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that has been read.

    Attributes:
        layers: keys and values of each layer, each [H, T, D].
        logits: [V], of the first token of the answer.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    logits: Tensor

    def __len__(self) -> int:
        return int(self.layers[0][0].shape[1])


@torch.no_grad()
def read_prompts(
    language: LanguageModel,
    embeds: Sequence[Tensor],
    prefixes: Sequence[PrefixCache | None],
    *,
    stopped: Callable[[], bool] | None = None,
) -> list[ReadPrompt]:
    """Read prompts to their ends, all at once; a long one is read alone, in parts.

    Args:
        language: reads them.
        embeds: of each prompt what comes after its prefix, [T, D_l] with a T of at least 1.
        prefixes: what `prefill` gave for each; None for one that starts with its `embeds`.
        stopped: looked at between the parts.

    Raises:
        Stopped: `stopped` says so.
    """
    longest = max(len(one) for one in embeds)
    padded = torch.stack([F.pad(one, (0, 0, longest - len(one), 0)) for one in embeds])
    mask = torch.ones(padded.shape[:2], dtype=torch.long, device=padded.device)
    for row, one in enumerate(embeds):
        mask[row, : longest - len(one)] = 0
    with language.evaluating():
        prompts = PartlyRead(language, padded, mask, prefixes)
        logits = cast(Tensor, prompts.read_on(keep=0, stopped=stopped))[:, -1].float()
    layers, there = prompts.layers(), prompts.mask.bool()  # a shorter prefix or rest leaves holes
    return [
        ReadPrompt(tuple((keys[row][:, own], values[row][:, own]) for keys, values in layers), logits[row])
        for row, own in enumerate(there)
    ]


@torch.no_grad()
def continuation_log_prob(language: LanguageModel, read: ReadPrompt, ids: Sequence[int]) -> float:
    """The log-probability of one continuation as a whole: the sum over its tokens, of which there is at least one."""
    device = language.device
    parts = [read.logits[None].log_softmax(dim=-1)]
    if len(ids) > 1:
        cache = DynamicCache([(keys[None], values[None]) for keys, values in read.layers], config=language.config)
        written = torch.tensor([ids[:-1]], device=device)
        length = len(read) + written.shape[1]
        with language.evaluating(), language.autocast(), logits_at(language.base, (slice(None), slice(None))):
            logits = language.model(
                inputs_embeds=language.embed(written).to(language.compute_dtype),
                attention_mask=torch.ones(1, length, dtype=torch.long, device=device),
                position_ids=torch.arange(len(read), length, device=device)[None],
                past_key_values=cache,
                use_cache=True,
            ).logits
        parts.append(logits[0].float().log_softmax(dim=-1))
    return float(torch.cat(parts).gather(1, torch.tensor(ids, device=device)[:, None]).sum())


class AnswerBatch:
    """Answers of one model that are written side by side.

    Args:
        language: writes; `can_continue` holds for it.

    Attributes:
        rows: the answers, in no order that matters.
    """

    def __init__(self, language: LanguageModel) -> None:
        self.language = language
        self.rows: list[AnswerRow] = []
        self._lengths: list[int] = []  # tokens of each row that have been read
        self._cache = DynamicCache(config=language.config)

    @torch.no_grad()
    def join(self, rows: Sequence[AnswerRow], read: Sequence[ReadPrompt]) -> None:
        """Take up answers whose prompts have been read, and write the first token of each."""
        self._leave()
        held = max(self._lengths, default=0)
        longest = max(held, *(len(one) for one in read))
        for number, layer in enumerate(cast(Any, self._cache).layers):
            for name, place in (("keys", 0), ("values", 1)):
                new = [one.layers[number][place] for one in read]
                parts = [F.pad(part, (0, 0, longest - part.shape[1], 0))[None] for part in new]
                if self.rows:
                    parts.insert(0, F.pad(getattr(layer, name), (0, 0, longest - held, 0)))
                if not layer.is_initialized:
                    layer.lazy_initialization(parts[0], parts[0])
                setattr(layer, name, torch.cat(parts))
        self.rows += rows
        self._lengths += [len(one) for one in read]
        _write(torch.stack([one.logits for one in read]), rows)

    @torch.no_grad()
    def step(self) -> None:
        """Write one more token of each answer that is not done; those that are leave."""
        self._leave()
        if not self.rows:
            return
        language, device = self.language, self.language.device
        lengths = torch.tensor(self._lengths, device=device)
        places = torch.arange(max(self._lengths) + 1, device=device)
        mask = (places >= max(self._lengths) - lengths[:, None]).long()  # [B, T + 1]
        last = torch.tensor([[row.ids[-1]] for row in self.rows], device=device)
        with language.autocast(), logits_at(language.base, (slice(None), slice(-1, None))):
            logits = language.model(
                inputs_embeds=language.embed(last).to(language.compute_dtype),
                attention_mask=mask,
                position_ids=lengths[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        self._lengths = [length + 1 for length in self._lengths]
        _write(logits[:, -1].float(), self.rows)

    def _leave(self) -> None:
        """Let go of the rows that are done, and of the room that only they needed."""
        kept = [number for number, row in enumerate(self.rows) if not row.done]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in kept]
        before, self._lengths = max(self._lengths), [self._lengths[number] for number in kept]
        if not kept:
            self._cache = DynamicCache(config=self.language.config)
            return
        spare = before - max(self._lengths)
        for layer in cast(Any, self._cache).layers:
            layer.keys, layer.values = layer.keys[kept, :, spare:], layer.values[kept, :, spare:]


def _write(logits: Tensor, rows: Sequence[AnswerRow]) -> None:
    """Choose and write each row's next token, of logits [B, V] in float32."""
    log_probs = logits.log_softmax(dim=-1)
    likeliest = logits.argmax(dim=-1).tolist()
    for row, token, scores, chances in zip(rows, likeliest, logits, log_probs, strict=True):
        row.take(token if row.takes_likeliest else row.choose(scores), chances)
