"""Generation against transformers: beams, kept prefixes, probabilities, and a caller that looks on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer.decoding import Decoding
from qformer.generation import generate, generation_options, prefill
from qformer.language import LanguageModel
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings

KINDS = ["llama", "qwen2", "opt", "t5"]


def load(folder: Path) -> LanguageModel:
    return load_language_model(folder, quantize="none", compute_dtype=torch.float32)


class Padded(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor


def pad_left(rows: list[torch.Tensor]) -> Padded:
    padded = [
        torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=0, padding_side="left")
        for part in (rows, [torch.ones_like(row) for row in rows])
    ]
    return Padded(*padded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "decoding", [Decoding(max_new_tokens=6), Decoding.preset("paper-vqa"), Decoding.preset("likeliest")]
)
@pytest.mark.parametrize("lengths", [(7, 4), (1, 1)])
def test_generation_is_that_of_transformers(
    language_folders: dict[str, Path], kind: str, decoding: Decoding, lengths: tuple[int, int]
) -> None:
    """A left-padded batch (right-padded for T5) gives what transformers gives for each prompt alone."""
    language = load(language_folders[kind])
    torch.manual_seed(4)
    prompts = [torch.randint(5, 100, (length,)) for length in lengths]
    side = "right" if language.is_encoder_decoder else "left"
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=0, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(p) for p in prompts], batch_first=True, padding_value=0, padding_side=side
    )
    found = generate(language, language.embed(ids), mask, decoding).ids
    loader = AutoModelForSeq2SeqLM if language.is_encoder_decoder else AutoModelForCausalLM
    reference = loader.from_pretrained(language_folders[kind]).eval()
    extra = {"length_penalty": decoding.length_penalty} if decoding.num_beams > 1 else {}
    for row, prompt in zip(found, prompts, strict=True):
        expected = reference.generate(
            input_ids=prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=decoding.max_new_tokens, num_beams=decoding.num_beams, do_sample=False,
            pad_token_id=0, eos_token_id=language.stop_ids, **extra,
        )[0]  # fmt: skip
        expected = expected[1:] if language.is_encoder_decoder else expected[len(prompt) :]
        assert row[: len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("own", [(2, 5, 3), (1, 1, 1)])
def test_a_prompt_goes_on_from_its_beginning(
    language_folders: dict[str, Path], kind: str, beams: int, own: tuple[int, int, int]
) -> None:
    """Beginnings of several lengths, one row without: the same tokens and numbers as from the whole prompts."""
    language = load(language_folders[kind])
    assert language.can_reuse_prefix
    torch.manual_seed(6)
    decoding = Decoding(max_new_tokens=6, num_beams=beams)
    firsts = [torch.randint(5, 100, (length,)) for length in (7, 4, 0)]
    rests = [torch.randint(5, 100, (length,)) for length in own]
    prefixes = [prefill(language, language.embed(first[None]))[0] if len(first) else None for first in firsts]

    padded = pad_left(rests)
    found = generate(language, language.embed(padded.ids), padded.mask, decoding, prefixes=prefixes)
    whole = pad_left([torch.cat(pair) for pair in zip(firsts, rests, strict=True)])
    expected = generate(language, language.embed(whole.ids), whole.mask, decoding)

    assert found.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
    again = generate(language, language.embed(padded.ids), padded.mask, decoding, prefixes=prefixes)
    assert again.ids.tolist() == found.ids.tolist(), "going on changed the prefix"


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_beams_read_a_prompt_once_where_it_can_be_continued(
    language_folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = load(language_folders[kind])
    ids = pad_left([torch.randint(5, 100, (length,)) for length in (7, 4)])
    shapes: list[torch.Size] = []  # [rows, positions] of each pass through the first layer
    layer = next(module for name, module in language.base.named_modules() if name.endswith("layers.0"))
    layer.register_forward_pre_hook(lambda _, args, kwargs: shapes.append((*args, *kwargs.values())[0].shape[:2]),
                                    with_kwargs=True)  # fmt: skip
    decoding = Decoding(max_new_tokens=5, num_beams=3)
    once = generate(language, language.embed(ids.ids), ids.mask, decoding)
    assert shapes[0] == (2, 6) and {shape for shape in shapes if shape[0] == 6} == {(6, 1)}

    shapes.clear()
    monkeypatch.setattr(LanguageModel, "can_reuse_prefix", False)
    each = generate(language, language.embed(ids.ids), ids.mask, decoding)
    assert shapes[0] == (6, 7)
    assert each.ids.tolist() == once.ids.tolist()
    torch.testing.assert_close(each.log_probs, once.log_probs, rtol=1e-4, atol=1e-5)


def test_what_beams_wrote_is_read_again_in_parts(
    language_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of a whole batch of long answers are never there at once."""
    language = load(language_folders["llama"])
    ids = torch.randint(5, 100, (5, 4))
    decoding = Decoding(max_new_tokens=6, num_beams=2)
    whole = generate(language, language.embed(ids), torch.ones_like(ids), decoding)
    monkeypatch.setattr("qformer.generation._LOGITS_AT_ONCE", 12)
    shapes: list[torch.Size] = []
    language.base.get_output_embeddings().register_forward_hook(lambda _, __, logits: shapes.append(logits.shape[:2]))
    parts = generate(language, language.embed(ids), torch.ones_like(ids), decoding)

    assert max(rows * positions for rows, positions in shapes) <= 12
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)


def test_beginnings_of_a_sliding_window_are_not_reused(language_folders: dict[str, Path]) -> None:
    assert not load(language_folders["t5"]).can_reuse_prefix
    language = load(language_folders["qwen2"])
    language.config.layer_types = ["sliding_attention"] * language.config.num_hidden_layers
    language.config.sliding_window = 4
    assert not language.can_reuse_prefix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_probabilities_of_what_was_written(language_folders: dict[str, Path], kind: str, beams: int) -> None:
    """Beside the tokens stand their log-probabilities: those of a pass over the finished text."""
    language = load(language_folders[kind])
    torch.manual_seed(4)
    if language.is_encoder_decoder:  # as it is made it writes one token for ever
        language.base.get_input_embeddings().weight.normal_()
        language.base.get_output_embeddings().weight.normal_(std=0.1)
    ids = torch.randint(5, 100, (1, 6))
    decoding = Decoding(max_new_tokens=4, num_beams=beams, repetition_penalty=20.0)
    made = generate(language, language.embed(ids), torch.ones_like(ids), decoding)
    assert len(set(made.ids[0].tolist())) > 2
    if language.is_encoder_decoder:
        logits = language.base(
            input_ids=ids, decoder_input_ids=torch.cat([torch.zeros(1, 1, dtype=torch.long), made.ids[:, :-1]], dim=1)
        ).logits
    else:
        logits = language.base(torch.cat([ids, made.ids[:, :-1]], dim=1)).logits[:, ids.shape[1] - 1 :]
    expected = logits.log_softmax(dim=-1).gather(2, made.ids.unsqueeze(2))[..., 0]
    torch.testing.assert_close(made.log_probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caller_looks_on_and_ends_rows(language_folders: dict[str, Path], kind: str) -> None:
    language = load(language_folders[kind])
    torch.manual_seed(4)
    ids = torch.randint(5, 100, (2, 6))
    seen: list[list[list[int]]] = []

    def on_step(new: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        assert log_probs.shape == new.shape
        seen.append(new.tolist())
        return torch.tensor([new.shape[1] >= 2, False])

    free = generate(language, language.embed(ids), torch.ones_like(ids), Decoding(max_new_tokens=5)).ids
    made = generate(
        language, language.embed(ids), torch.ones_like(ids), Decoding(max_new_tokens=5), on_step=on_step
    ).ids
    assert [len(rows[0]) for rows in seen] == [1, 2, 3, 4, 5]
    assert made[0, :2].tolist() == free[0, :2].tolist()
    assert set(made[0, 2:].tolist()) == {language.tokenizer.pad_token_id}
    assert made[1].tolist() == free[1].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_answer_alone_and_beside_others(language_folders: dict[str, Path], kind: str) -> None:
    language = load(language_folders[kind])
    torch.manual_seed(4)
    if language.is_encoder_decoder:  # as it is made it writes one token for ever
        language.base.get_output_embeddings().weight.normal_(std=0.1)
    ids = torch.randint(5, 100, (2, 6))

    def write(rows: torch.Tensor, seed: int) -> list[list[int]]:
        torch.manual_seed(len(rows))  # torch's own generator has no part in it
        decoding = Decoding(max_new_tokens=8, temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=seed)
        made = generate(language, language.embed(rows), torch.ones_like(rows), decoding).ids.tolist()
        stops = [next((n for n, token in enumerate(row) if token in language.stop_ids), len(row)) for row in made]
        return [row[:stop] for row, stop in zip(made, stops, strict=True)]

    both = write(ids, 7)
    assert both == write(ids, 7) == [*write(ids[:1], 7), *write(ids[1:], 7)]
    assert write(ids[[0, 0]], 7) == [both[0], both[0]]
    assert write(ids, -7) != both


def test_a_seed_draws_from_the_softmax_of_the_warped_logits(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["llama"])
    ids = torch.randint(5, 100, (2, 6), generator=torch.Generator().manual_seed(4))
    options = {"inputs_embeds": language.embed(ids), "attention_mask": torch.ones_like(ids)}
    made = generate(language, *options.values(), Decoding(max_new_tokens=1, temperature=0.7, seed=3))
    with torch.no_grad():
        logits = language.model(**options).logits[:, -1]
    generators = [torch.Generator().manual_seed(3) for _ in ids]
    expected = [
        torch.multinomial((row / 0.7).softmax(-1), 1, generator=generator).item()
        for row, generator in zip(logits, generators, strict=True)
    ]
    assert made.ids[:, 0].tolist() == expected
    torch.testing.assert_close(made.log_probs, logits.log_softmax(-1).gather(1, made.ids), rtol=1e-4, atol=1e-5)
    nucleus = Decoding(max_new_tokens=5, temperature=0.7, top_p=1e-6, seed=3)  # the likeliest token alone
    greedy = generate(language, *options.values(), Decoding(max_new_tokens=5)).ids
    assert generate(language, *options.values(), nucleus).ids.tolist() == greedy.tolist()


def test_without_a_seed_torchs_own_generator_draws(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["llama"])
    ids = torch.randint(5, 100, (2, 6))
    decoding = Decoding(max_new_tokens=8, temperature=1.5)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(generate(language, language.embed(ids), torch.ones_like(ids), decoding).ids.tolist())
    assert found[0] == found[1] != found[2]
    assert "logits_processor" not in generation_options(decoding, pad_id=0, stop_ids=[1])
    beams = Decoding(num_beams=2, temperature=1.0, seed=1)  # beams are searched, not drawn
    assert "logits_processor" not in generation_options(beams, pad_id=0, stop_ids=[1])


def test_training_goes_on_after_an_exception(language_folders: dict[str, Path]) -> None:
    """LoRA's dropout would be off for the rest of a run if a caller's mistake left evaluation mode behind."""
    language = load(language_folders["llama"])
    language.add_lora(LoraSettings(rank=2, alpha=4, dropout=0.5, targets="all-linear"))
    language.train()
    dropouts = [module for name, module in language.named_modules() if "lora_dropout.default" in name]
    embeds = language.embed(torch.randint(5, 100, (1, 4)))

    def broken(ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a caller's mistake")

    with pytest.raises(RuntimeError, match="a caller's mistake"):
        generate(language, embeds, torch.ones(1, 4, dtype=torch.long), Decoding(max_new_tokens=3), on_step=broken)
    assert language.training and dropouts and all(module.training for module in dropouts)

    with pytest.raises(RuntimeError):
        prefill(language, embeds[..., :-1])  # not the model's width
    assert language.training and all(module.training for module in dropouts)
