"""What only a GPU can show: the CPU's numbers, gradients after an evaluation, weights on the device that is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_data, tiny_values

from adapters.data.batches import plan_epoch, tokenise
from adapters.finetune import finetune, model_inputs
from adapters.inference.answering import answer_examples
from adapters.loading.assembly import assemble
from adapters.memory.summary import summarise_modules
from adapters.recipe import Recipe, parse_recipe
from adapters.training.setup import read_split
from qformer.decoding import Decoding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("cache_here"),
]
LAST = f"cuda:{max(torch.cuda.device_count() - 1, 0)}"


@pytest.fixture
def recipe(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Recipe:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"))
    values["vision"]["towers"][0] |= {"dtype": "float32", "features": "float32"}
    values["bridge"]["dropout"] = 0.0
    return parse_recipe(values, "test")


def packed(recipe: Recipe, quantize: str) -> Recipe:
    return recipe.model_copy(update={"language": recipe.language.model_copy(update={"quantize": quantize})})


def losses(result: Any) -> list[float]:
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_training_has_the_losses_of_the_cpu(recipe: Recipe, tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    there, here = (
        losses(finetune(recipe, tmp_path / name, device=device, dtype="float32", quiet=True))
        for name, device in (("gpu", LAST), ("cpu", "cpu"))
    )
    assert there == pytest.approx(here, rel=1e-3)
    assert torch.cuda.max_memory_allocated(LAST) > 0


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_an_evaluation_changes_no_gradient(recipe: Recipe, quantize: str) -> None:
    made = assemble(packed(recipe, quantize), device=LAST, dtype="bfloat16")
    train, val = read_split(recipe)
    pictures = tokenise(train, made.prompts, max_tokens=320)
    rows = plan_epoch(pictures, seed=0, epoch=0, batch_size=6, row_tokens=0)[0].rows

    def gradients() -> dict[str, torch.Tensor]:
        made.model.train()
        made.model(*model_inputs(made, rows))[0].backward()
        found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
        made.model.zero_grad(set_to_none=True)
        return found

    torch.manual_seed(0)
    before = gradients()
    made.model.eval()
    answer_examples(made, val.examples, "vqa", decoding=Decoding(max_new_tokens=4))
    torch.manual_seed(0)
    after = gradients()
    assert before.keys() == after.keys() and before
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_packed_weights_lie_on_the_named_device(recipe: Recipe, quantize: str) -> None:
    made = assemble(packed(recipe, quantize), device=LAST)
    assert {str(parameter.device) for parameter in made.model.parameters()} == {LAST}
    assert any(part.quantized for part in summarise_modules(made.model))


def test_greedy_answers_are_those_of_the_cpu(recipe: Recipe) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    _, val = read_split(recipe)
    there, here = (
        answer_examples(
            assemble(recipe, device=device, dtype="float32"), val.examples, "vqa", decoding=Decoding(max_new_tokens=6)
        )
        for device in (LAST, "cpu")
    )
    assert sum(mine == theirs for mine, theirs in zip(there, here, strict=True)) >= 0.9 * len(here)
