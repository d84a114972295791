"""Generation by transformers: prompts that continue a cached prefix, and the probability of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from qformer.decoding import Decoding
from qformer.language import LanguageModel
from qformer.lm_head import logits_at

_LOGITS_AT_ONCE = 512  # positions: those of a whole batch of long answers would take gigabytes
READ_AT_ONCE = 256  # positions of a prompt: between two parts of a long one it is seen whether anybody still waits

OnStep = Callable[[Tensor, Tensor], Tensor | None]
"""Looks on while tokens are generated: ids [B, N] and log-probabilities [B, N] so far; ends rows, bool [B], or none."""


class Stopped(Exception):
    """Nobody waits for the answer any more; raised while its prompt is being read, or before a search has found any."""


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of a prompt's first part: read once, continued as often as one likes.

    Attributes:
        layers: (keys, values) of each layer, each [H, T, D].
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return int(self.layers[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        ids: [B, N] new tokens, padded on the right with the padding token; an end token that was written is kept.
        log_probs: [B, N] of each token under the model, before penalties and temperature.
    """

    ids: Tensor
    log_probs: Tensor


class TokenObserver(StoppingCriteria):
    """Observes transformers' generation: keeps each token's probability, and lets a caller end rows.

    Args:
        on_step: as `generate` takes it.
        skip: tokens before the first new one.
    """

    def __init__(self, on_step: OnStep | None, *, skip: int) -> None:
        self.on_step = on_step
        self.skip = skip
        self.log_probs: list[Tensor] = []  # [B, 1] a token
        self._logits = torch.empty(0)

    @contextmanager
    def over(self, model: Any) -> Iterator[None]:
        """Look at what the model's head computes."""

        def keep(_module: nn.Module, _args: Any, logits: Tensor) -> None:
            self._logits = logits[:, -1]

        hook = model.get_output_embeddings().register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by transformers after each token, with what was written so far."""
        last = self._logits.float().log_softmax(dim=-1)
        self.log_probs.append(last.gather(1, input_ids[:, -1:].to(last.device)))
        ended = None
        if self.on_step is not None:
            ended = self.on_step(input_ids[:, self.skip :], torch.cat(self.log_probs, dim=1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device) if ended is None else ended


class _StopWhenAsked(StoppingCriteria):
    """Ends all rows once the caller says so.

    Args:
        stopped: looked at after each token.
    """

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by transformers after each token."""
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)


class _SeededSampling(LogitsProcessor):
    """Draws each row's token from a random generator of its own, so that it does not depend on the rows beside it.

    What it draws is the only token that it leaves, so that greedy search takes it.

    Args:
        decoding: with a temperature above 0 and a seed, which every row's generator starts from.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self._warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(decoding.temperature)])
        if decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))
        self._generators: list[torch.Generator] = []  # one a row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers before each token, with the scores [B, V] of all."""
        if not self._generators:
            seed = cast(int, self.decoding.seed)
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for _ in scores]
        shares = self._warpers(input_ids, scores).softmax(dim=-1)
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(shares, self._generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


def generation_options(decoding: Decoding, *, pad_id: int, stop_ids: list[int]) -> dict[str, Any]:
    """The options of transformers' `generate` that express a decoding."""
    sampling = decoding.temperature > 0 and decoding.num_beams == 1
    options: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.num_beams,
        "do_sample": sampling and decoding.seed is None,
        "repetition_penalty": decoding.repetition_penalty,
        "pad_token_id": pad_id,
        "eos_token_id": stop_ids,
        "use_cache": True,
    }
    if decoding.num_beams > 1:
        options["length_penalty"] = decoding.length_penalty
    if sampling and decoding.seed is not None:
        options["logits_processor"] = LogitsProcessorList([_SeededSampling(decoding)])
    elif sampling:
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    return options


def _stack_prefixes(prefixes: Sequence[PrefixCache | None], config: PretrainedConfig) -> tuple[DynamicCache, Tensor]:
    """Prefixes as one cache, shorter ones padded on the left, and their mask [B, T] long.

    Args:
        prefixes: one a row, at least one of them there.
        config: the LLM's.
    """
    some = next(prefix for prefix in prefixes if prefix)
    length = max(len(prefix) if prefix else 0 for prefix in prefixes)
    mask = torch.zeros(len(prefixes), length, dtype=torch.long, device=some.layers[0][0].device)
    layers = []
    for number, pair in enumerate(some.layers):
        shapes = [(len(prefixes), part.shape[0], length, part.shape[2]) for part in pair]
        stacked = [part.new_zeros(shape) for part, shape in zip(pair, shapes, strict=True)]
        for row, prefix in enumerate(prefixes):
            if prefix:
                for whole, part in zip(stacked, prefix.layers[number], strict=True):
                    whole[row, :, length - len(prefix) :] = part
        layers.append((stacked[0], stacked[1]))
    for row, prefix in enumerate(prefixes):
        mask[row, length - (len(prefix) if prefix else 0) :] = 1
    return DynamicCache(layers, config=config), mask


class PartlyRead:
    """A batch of prompts, part of which may have been read already.

    Args:
        language: reads them.
        embeds: [B, T, D_l]; what comes after the prefixes.
        mask: [B, T].
        prefixes: as `generate` takes them.

    Attributes:
        embeds: [B, T, D_l], what is still to be read.
        mask: [B, R + T], of what has been read too.
        cache: keys and values of the R positions that have been read; None if none have.
    """

    def __init__(
        self, language: LanguageModel, embeds: Tensor, mask: Tensor, prefixes: Sequence[PrefixCache | None] | None
    ) -> None:
        self.language, self.embeds, self.mask = language, embeds.to(language.compute_dtype), mask
        self.cache: DynamicCache | None = None
        if prefixes is not None and any(prefixes):
            self.cache, read = _stack_prefixes(prefixes, language.config)
            self.mask = torch.cat([read, mask], dim=1)

    def read_on(self, *, keep: int = 1, stopped: Callable[[], bool] | None = None) -> Tensor | None:
        """Read on, a part of `READ_AT_ONCE` positions after the other.

        Args:
            keep: positions at the end that are left unread. Beams that start from one prompt would read all of it once
                each, so they share all but its last token.
            stopped: looked at between parts.

        Returns:
            Logits [B, 1, V] after the last position that was read; None if there was nothing to read.

        Raises:
            Stopped: `stopped` says so.
        """
        logits, done = None, self.mask.shape[1] - self.embeds.shape[1]
        if self.cache is None and self.embeds.shape[1] > keep:
            self.cache = DynamicCache(config=self.language.config)
        while (left := self.embeds.shape[1] - keep) > 0:
            if logits is not None and stopped is not None and stopped():
                raise Stopped
            part, self.embeds = self.embeds.tensor_split([min(left, READ_AT_ONCE)], dim=1)
            done += part.shape[1]
            with fused_attention(self.language, len(part) == 1 and done > READ_AT_ONCE):
                logits = self._logits(part, self.mask[:, :done], self.cache, slice(-1, None))
        return logits

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, R, D] of each layer over what has been read."""
        return [(layer.keys, layer.values) for layer in cast(Any, self.cache).layers]

    def inputs(self, beams: int) -> dict[str, Any]:
        """What transformers' `generate` takes; beams go on with a copy of the cache."""
        if self.cache is None:
            return {"inputs_embeds": self.embeds, "attention_mask": self.mask}
        cache = self.cache
        if beams > 1:
            cache = self._rows_of_cache(torch.arange(len(self.mask)).repeat_interleave(beams))
        # it wants the whole prompt, and cuts off what the cache holds
        embeds = F.pad(self.embeds, (0, 0, self.mask.shape[1] - self.embeds.shape[1], 0))
        return {"inputs_embeds": embeds, "attention_mask": self.mask, "past_key_values": cache}

    def log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities [B, N] of what beam search wrote, read once more: transformers keeps none of them.

        Args:
            ids: [B, N] as transformers gives them; of an encoder-decoder [B, 1 + N], from its start token on.
        """
        rows = torch.arange(len(ids)).split(max(1, _LOGITS_AT_ONCE // ids.shape[1]))
        return torch.cat([self._log_probs(ids, part) for part in rows])

    def _log_probs(self, ids: Tensor, rows: Tensor) -> Tensor:
        ids, embeds, mask = ids[rows], self.embeds[rows], self.mask[rows]
        if self.language.is_encoder_decoder:
            written = ids[:, 1:]
            with self.language.autocast():
                logits = self.language.model(
                    inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=ids[:, :-1], use_cache=False
                ).logits
        else:
            written = ids
            # what comes after an end token is seen by none before it, so that it needs no mask
            embeds = torch.cat([embeds, self.language.embed(ids[:, :-1]).to(embeds.dtype)], dim=1)
            mask = F.pad(mask, (0, ids.shape[1] - 1), value=1)
            cache = None if self.cache is None else self._rows_of_cache(rows)
            logits = self._logits(embeds, mask, cache, slice(-ids.shape[1], None))
        chosen = logits.gather(2, written[..., None]).squeeze(2).float()
        return chosen - logits.float().logsumexp(dim=-1)

    def _rows_of_cache(self, rows: Tensor) -> DynamicCache:
        """A copy of the cache with these rows, in this order."""
        layers = [(keys[rows.to(keys.device)], values[rows.to(values.device)]) for keys, values in self.layers()]
        return DynamicCache(layers, config=self.language.config)

    def _logits(self, embeds: Tensor, mask: Tensor, cache: DynamicCache | None, wanted: slice) -> Tensor:
        """Logits [B, N, V] at the wanted positions; the cache takes up what was read."""
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": cache}
        if self.language.can_pack:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        with self.language.autocast(), logits_at(self.language.base, (slice(None), wanted)):
            return cast(Tensor, self.language.model(**inputs, use_cache=cache is not None).logits)


@contextmanager
def fused_attention(language: LanguageModel, wanted: bool) -> Iterator[None]:
    """Let a model that is loaded with plain matrix products attend by torch's fused kernel for a while.

    Over the thousands of keys of a long prompt the kernel is faster on a CPU; over few it is slower.
    """
    config = language.config
    plain = config._attn_implementation
    fused = wanted and plain == "eager" and getattr(language.base, "_supports_sdpa", False)
    if fused:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if fused:
            config._attn_implementation = plain


@torch.no_grad()
def prefill(
    language: LanguageModel, inputs_embeds: Tensor, *, stopped: Callable[[], bool] | None = None
) -> list[PrefixCache]:
    """Read the first parts of prompts, all of one length and unpadded, [B, T, D_l], if `can_reuse_prefix`.

    Raises:
        Stopped: `stopped`, which is looked at between parts of `READ_AT_ONCE` positions, says so.
    """
    mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
    with language.evaluating():
        prompts = PartlyRead(language, inputs_embeds, mask, None)
        prompts.read_on(keep=0, stopped=stopped)
    return [
        PrefixCache(tuple((keys[row].clone(), values[row].clone()) for keys, values in prompts.layers()))
        for row in range(len(inputs_embeds))
    ]


@torch.no_grad()
def generate(
    language: LanguageModel,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    decoding: Decoding,
    *,
    prefixes: Sequence[PrefixCache | None] | None = None,
    on_step: OnStep | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generated:
    """Continue prompts that are padded on the left (on the right for an encoder-decoder).

    Args:
        language: writes.
        inputs_embeds: [B, T, D_l]; what comes after the prefixes.
        attention_mask: [B, T].
        decoding: how tokens are chosen.
        prefixes: what `prefill` gave for each row; None for a row that starts with `inputs_embeds`.
        on_step: called after each token with all new ones, [B, N], and their log-probabilities; what it returns,
            bool [B], ends rows. Not in beam search, which may still change its mind.
        stopped: looked at after each token of a beam search, where True ends it with what was found; and between the
            parts of a long prompt that beams share.

    Raises:
        Stopped: `stopped` said so while the prompt was being read.
    """
    options = generation_options(decoding, pad_id=language.tokenizer.pad_token_id, stop_ids=language.stop_ids)
    # a decoder starts from a start token, which is no answer's
    observer = TokenObserver(on_step, skip=int(language.is_encoder_decoder)) if decoding.num_beams == 1 else None
    if observer is not None:
        options["stopping_criteria"] = StoppingCriteriaList([observer])
    elif stopped is not None:
        options["stopping_criteria"] = StoppingCriteriaList([_StopWhenAsked(stopped)])
    with language.evaluating():
        prompts = PartlyRead(language, inputs_embeds, attention_mask, prefixes)
        if observer is None and language.can_reuse_prefix:
            prompts.read_on(stopped=stopped)
        with (
            language.autocast(),
            logits_at(language.base, (slice(None), slice(-1, None))),
            observer.over(language.base) if observer else nullcontext(),
        ):
            ids = language.model.generate(**prompts.inputs(decoding.num_beams), **options)
        log_probs = torch.cat(observer.log_probs, dim=1) if observer is not None else prompts.log_probs(ids)
    return Generated(ids[:, 1:] if language.is_encoder_decoder else ids, log_probs)
