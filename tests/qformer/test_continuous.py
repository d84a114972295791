"""Answers written side by side against those that transformers' own loop gives each prompt alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qformer import generation
from qformer.continuous import (
    AnswerBatch,
    AnswerRow,
    can_continue,
    continuation_log_prob,
    looking_up_between_layers,
    read_prompts,
)
from qformer.decoding import Decoding
from qformer.generation import PrefixCache, Stopped, fused_attention, generate, prefill
from qformer.language import LanguageModel
from qformer.language_loading import load_language_model
from qformer.token_rules import TokenRules

KINDS = ["llama", "qwen2", "opt"]
DECODINGS = [
    Decoding(max_new_tokens=9),
    Decoding(max_new_tokens=5, repetition_penalty=3.0),
    Decoding(max_new_tokens=8, temperature=1.5, top_p=0.9, seed=7),
    Decoding(max_new_tokens=6, temperature=0.7, seed=-1, repetition_penalty=1.2),
]


def load(folder: Path) -> LanguageModel:
    return load_language_model(folder, quantize="none", compute_dtype=torch.float32)


def write(batch: AnswerBatch, row: AnswerRow, longest: int) -> bool:
    """Whether a row has had enough."""
    return len(row.ids) >= longest or row.ids[-1] in batch.language.stop_ids


@pytest.mark.parametrize("kind", KINDS)
def test_who_joins_and_leaves_at_any_token_is_answered_as_alone(language_folders: dict[str, Path], kind: str) -> None:
    language = load(language_folders[kind])
    assert can_continue(language)
    torch.manual_seed(4)
    firsts = [torch.randint(5, 100, (length,)) for length in (7, 0, 12, 3)]
    rests = [torch.randint(5, 100, (length,)) for length in (3, 5, 1, 2)]
    prefixes: list[PrefixCache | None] = [
        prefill(language, language.embed(first[None]))[0] if len(first) else None for first in firsts
    ]
    batch = AnswerBatch(language)
    rows = [AnswerRow(decoding) for decoding in DECODINGS]
    for steps, joining in enumerate(([0, 1], [2], [3], [], [], [], [], [], [], [], [])):
        if steps:
            batch.step()
        if joining:  # two are read at once, with beginnings and rests of different lengths
            read = read_prompts(
                language, [language.embed(rests[n][None])[0] for n in joining], [prefixes[n] for n in joining]
            )
            batch.join([rows[n] for n in joining], read)
        for number, row in enumerate(rows):
            row.done = bool(row.ids) and write(batch, row, DECODINGS[number].max_new_tokens)
    batch.step()

    assert batch.rows == []
    for row, decoding, first, rest in zip(rows, DECODINGS, firsts, rests, strict=True):
        whole = torch.cat([first, rest])[None]
        alone = generate(language, language.embed(whole), torch.ones_like(whole), decoding)
        assert row.ids == alone.ids[0].tolist()
        torch.testing.assert_close(torch.tensor([row.log_probs]), alone.log_probs, rtol=1e-4, atol=1e-5)


def test_a_model_that_asks_for_more_of_its_answers_is_left_to_transformers(language_folders: dict[str, Path]) -> None:
    assert not can_continue(load(language_folders["t5"]))
    language = load(language_folders["llama"])
    language.base.generation_config.no_repeat_ngram_size = 2
    assert not can_continue(language)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_read_in_parts(
    language_folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fused kernel behind the first part; logits and cache are those of one pass."""
    language = load(language_folders[kind])
    ids = torch.randint(5, 100, (1, 50))
    (whole,) = read_prompts(language, [language.embed(ids)[0]], [None])
    monkeypatch.setattr(generation, "READ_AT_ONCE", 16)
    kernels: list[str] = []
    layer = next(module for name, module in language.base.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(lambda *_: kernels.append(language.config._attn_implementation))
    looks: list[int] = []
    (parts,) = read_prompts(
        language, [language.embed(ids[:, 10:])[0]], prefill(language, language.embed(ids[:, :10])),
        stopped=lambda: bool(looks.append(1)),
    )  # fmt: skip

    assert kernels == ["eager", "sdpa", "sdpa", "sdpa"] and language.config._attn_implementation == "eager"
    assert len(looks) == 2
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(parts.layers, whole.layers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(Stopped):
        read_prompts(language, [language.embed(ids)[0]], [None], stopped=lambda: True)
    with pytest.raises(Stopped):
        prefill(language, language.embed(ids), stopped=lambda: True)
    with pytest.raises(Stopped):
        beams = Decoding(num_beams=2)
        generate(language, language.embed(ids), torch.ones_like(ids), beams, stopped=lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_may_be_left_for_another_between_two_layers(
    language_folders: dict[str, Path], dtype: torch.dtype
) -> None:
    """The other one is not looked at, and computes as if it were alone; then the first goes on as it was."""
    language = load_language_model(language_folders["llama"], quantize="none", compute_dtype=dtype)
    one, other = (language.embed(torch.randint(5, 100, (1, length)))[0] for length in (12, 7))
    with fused_attention(language, True):
        (first_alone,) = read_prompts(language, [one], [None])
    (other_alone,) = read_prompts(language, [other], [None])
    between: list[tuple[str, Tensor]] = []

    def look() -> None:
        assert not torch.is_autocast_enabled("cpu")
        (read,) = read_prompts(language, [other], [None])
        between.append((language.config._attn_implementation, read.logits))

    with looking_up_between_layers(language, look) as look_up, fused_attention(language, True):
        (first,) = read_prompts(language, [one], [None])
        look_up()
        assert language.config._attn_implementation == "sdpa"
    assert len(between) == language.config.num_hidden_layers + 1
    torch.testing.assert_close(first.logits, first_alone.logits, rtol=0, atol=0)
    for attention, logits in between:
        assert attention == "eager"
        torch.testing.assert_close(logits, other_alone.logits, rtol=0, atol=0)
    read_prompts(language, [one], [None])
    assert len(between) == language.config.num_hidden_layers + 1


def test_a_continuation_weighs_by_all_its_tokens(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["llama"])
    ids, more = torch.randint(5, 100, (1, 9)), [7, 30, 9]
    (read,) = read_prompts(language, [language.embed(ids)[0]], [None])
    logits = language.base(torch.cat([ids, torch.tensor([more])], dim=1)).logits[0, 8:11].log_softmax(-1)

    assert continuation_log_prob(language, read, more) == pytest.approx(
        float(logits[[0, 1, 2], more].sum().detach()), rel=1e-4
    )
    assert continuation_log_prob(language, read, [7]) == pytest.approx(float(logits[0, 7].detach()), rel=1e-4)
    assert len(read) == 9


def test_penalties_and_the_likeliest_others(language_folders: dict[str, Path]) -> None:
    """OpenAI's formula, computed by hand from whole passes."""
    language = load(language_folders["llama"])
    ids = torch.randint(5, 100, (1, 6), generator=torch.Generator().manual_seed(1))
    rules = TokenRules(frequency_penalty=1.5, presence_penalty=0.5, top=3)
    row, batch = AnswerRow(Decoding(), rules), AnswerBatch(language)
    batch.join([row], read_prompts(language, [language.embed(ids)[0]], [None]))
    for _ in range(11):
        batch.step()
    expected: list[int] = []
    for place in range(12):
        with torch.no_grad():
            logits = language.base(torch.cat([ids, torch.tensor([expected], dtype=torch.long)], dim=1)).logits[0, -1]
        best = logits.log_softmax(-1).topk(3)
        assert [token for token, _ in row.likeliest[place]] == best.indices.tolist()
        assert [chance for _, chance in row.likeliest[place]] == pytest.approx(best.values.tolist(), abs=1e-4)
        for token in set(expected):
            logits[token] -= 1.5 * expected.count(token) + 0.5
        expected.append(int(logits.argmax()))

    assert row.ids == expected
