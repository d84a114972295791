"""The closed-form reader in a run: fitted before the first step, used left out in training, kept in the artefact."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import draw_data, tiny_values

from adapters import finetune as finetune_module
from adapters.artefact.artefact import load_artefact
from adapters.data.batches import TokenisedPicture, plan_validation, tokenise
from adapters.data.image_ref import ImageRef
from adapters.data.lazy import LazySequence
from adapters.data.reading import read_data
from adapters.data.tokenised import TokenisedQuestion
from adapters.finetune import finetune, model_inputs
from adapters.inference.answering import answer_examples
from adapters.loading.assembly import Assembly, assemble
from adapters.loading.reader import FILE, NAMED, SPELLED, question_numbers
from adapters.recipe import Recipe, parse_recipe
from adapters.training.reader_fit import _gather, fit_reader
from qformer.decoding import Decoding

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def recipe_of(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Any:
    def make(hide: float = 0.0, reader: str = "answers", **train: object) -> Recipe:
        data = draw_data(tmp_path / "data")
        values: Any = tiny_values(vision_folder, language_folders["llama"], data, **train)
        values["bridge"] |= {"reader": reader, "hide_queries": hide, "dropout": 0.0}
        return parse_recipe(values, "test")

    return make


def fitted_on_all(recipe: Recipe) -> tuple[Assembly, list[TokenisedPicture]]:
    assembly = assemble(recipe)
    data = read_data(str(recipe.data.train))
    return assembly, tokenise(data, assembly.prompts, max_tokens=320)


def test_a_run_fits_a_reader_and_its_artefact_answers_with_it(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of(
        max_steps=60, validate_every=60, learning_rate=5e-3, seed=1
    )  # seed 0 holds out all of one colour
    finetune(recipe, tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    assert (tmp_path / "run" / "best" / FILE).is_file()
    assembly, _ = load_artefact(tmp_path / "run" / "best")
    assert assembly.reader is not None and assembly.model.num_queries == 3 + NAMED
    assert assembly.prompts.answer_vectors == SPELLED
    examples = read_data(str(recipe.data.train)).examples
    assert assembly.reader.answers is not None
    assert len(assembly.reader.answers.ridge.pictures) == 12  # the held-out quarter too
    answers = answer_examples(assembly, examples, "vqa", decoding=Decoding(max_new_tokens=8))
    right = sum(answer == example.answers[0] for answer, example in zip(answers, examples, strict=True))
    assert right >= 20  # of 24, with a random LLM of two layers
    alone = [
        answer_examples(assembly, [example], "vqa", decoding=Decoding(max_new_tokens=8))[0] for example in examples
    ]
    assert alone == answers  # whatever else is in the batch


def test_training_sees_left_out_scores_and_answers_see_the_readers_own(recipe_of: Any) -> None:
    assembly, pictures = fitted_on_all(recipe_of())
    fitted = fit_reader(assembly, pictures)
    assert fitted is not None and "of 24 training questions" in str(fitted)
    assembly.reader = fitted.reader
    picture = pictures[0]
    question = picture.questions[0].instruction
    digest = picture.images[0].digest()
    numbers = {digest: fitted.reader.look(assembly.features(picture.images))[0]}
    asked = [(picture.images[0], question), (picture.images[0], "never asked")]
    own = assembly.read_answers(asked, numbers)
    left_out = assembly.read_answers(asked, numbers, fitted.left_out)
    assert own is not None and left_out is not None and own.shape == (2, SPELLED, assembly.model.language.width)
    assert not torch.allclose(own[0], left_out[0])
    assert torch.equal(own[1], left_out[1])  # it was not fitted to that one
    named = [
        assembly.beside_features(picture.images, assembly.features(picture.images), [""], scores)[2]
        for scores in (None, fitted.left_out)
    ]
    assert named[0] is not None and named[1] is not None and not torch.allclose(named[0], named[1])


def test_vectors_name_and_spell(recipe_of: Any) -> None:
    assembly, pictures = fitted_on_all(recipe_of())
    fitted = fit_reader(assembly, pictures)
    assert fitted is not None
    reader = fitted.reader
    assert reader.answers is not None
    ranks = torch.linspace(-1.0, 0.9, len(reader.name_vectors)).unsqueeze(0)  # no two alike
    named = reader.named(ranks)
    assert named.shape == (1, NAMED, assembly.model.language.width)
    torch.testing.assert_close(named[0, 0], 0.9 * reader.name_vectors[-1])
    sure = torch.full((1, len(reader.answers.vectors)), -100.0)
    sure[0, 1] = 100.0
    torch.testing.assert_close(reader.answers.spelled(sure)[0], reader.answers.vectors[1])
    assert reader.answers.vectors.shape[1] == SPELLED


def test_questions_become_bags_of_length_one(recipe_of: Any) -> None:
    assembly, pictures = fitted_on_all(recipe_of())
    fitted = fit_reader(assembly, pictures)
    assert fitted is not None
    reader, tokenizer = fitted.reader, assembly.prompts.tokenizer
    assert reader.answers is not None
    bags = question_numbers(
        ["what colour?", "WHAT COLOUR?", "一"], reader.answers.ngrams, reader.answers.rarity, tokenizer
    )
    torch.testing.assert_close(bags.norm(dim=1)[:2], torch.ones(2))
    assert torch.equal(bags[0], bags[1])


def test_questions_share_a_sequence_and_each_sees_its_own_answer(recipe_of: Any) -> None:
    assembly, pictures = fitted_on_all(recipe_of())
    fitted = fit_reader(assembly, pictures)
    assert fitted is not None
    assembly.reader = fitted.reader
    assert {len(picture.questions) for picture in pictures} == {2}
    losses, sequences = [], []
    for row_tokens in (0, 1000):
        rows = plan_validation(pictures, row_tokens=row_tokens).rows
        sequences.append(len(rows))
        losses.append(assembly.model(*model_inputs(assembly, rows, fitted)))
    assert sequences == [24, 12]
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert losses[0][1] == losses[1][1]


def test_a_run_goes_on_with_the_same_reader(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(0.5, max_steps=4, validate_every=2)
    finetune(recipe, tmp_path / "whole", device="cpu", dtype="float32", quiet=True)
    validate, calls = finetune_module.validate, []

    def press_ctrl_c(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args, **options)

    monkeypatch.setattr(finetune_module, "validate", press_ctrl_c)
    assert not finetune(recipe, tmp_path / "broken", device="cpu", dtype="float32", quiet=True).finished
    monkeypatch.setattr(finetune_module, "validate", validate)
    finetune(recipe, tmp_path / "broken", device="cpu", dtype="float32", quiet=True, resume=True)
    for file in ("best/bridge.safetensors", f"best/{FILE}"):
        first, second = load_file(tmp_path / "whole" / file), load_file(tmp_path / "broken" / file)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_hidden_queries_reach_no_llm(recipe_of: Any) -> None:
    assembly, pictures = fitted_on_all(recipe_of(1.0))
    images = [picture.images[0] for picture in pictures]
    assert assembly.image_embeddings(images[:2])[:, :3].any()  # no reader was fitted: all is shown
    fitted = fit_reader(assembly, pictures)
    assert fitted is not None
    assembly.reader = fitted.reader
    vectors = assembly.image_embeddings(images[:2])
    assert vectors.shape[1] == 3 + NAMED and not vectors[:, :3].any()
    assembly.model.hide_queries = 0.5
    assembly.model.eval()
    assert assembly.image_embeddings(images)[:, :3].abs().sum(dim=(1, 2)).gt(0).all()  # all are shown in answering
    assembly.model.train()
    torch.manual_seed(0)
    shown = assembly.image_embeddings(images)[:, :3].abs().sum(dim=(1, 2)).gt(0)
    assert 0 < shown.sum() < len(shown)


def test_too_few_questions_or_too_many_answers_have_no_reader(recipe_of: Any) -> None:
    assembly, pictures = fitted_on_all(recipe_of())
    assert fit_reader(assembly, pictures[:4]) is None
    images = pictures[0].images
    assert assembly.beside_features(images, assembly.features(images), [""]) == (None, None, None)
    assert assembly.read_answers([(images[0], "what colour?")], {}) is None


def test_names_alone_leave_questions_in_one_sequence(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of(reader="names", max_steps=60, validate_every=60, learning_rate=5e-3)
    finetune(recipe, tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    assembly, _ = load_artefact(tmp_path / "run" / "best")
    assert assembly.model.num_queries == 3 + NAMED and not assembly.reads_instructions
    assert assembly.reader is not None and assembly.reader.answers is None
    examples = read_data(str(recipe.data.train)).examples
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    one, other = (assembly.image_embeddings(examples[0].images, [text]) for text in ("what colour?", "is it red?"))
    assert torch.equal(one, other)


def test_few_pictures_with_very_many_questions_are_sampled_in_both() -> None:
    """Memory and time do not grow with the rows: what is not fitted is not even read."""
    read: list[int] = []

    class Questions(LazySequence[TokenisedQuestion]):
        def __init__(self, first: int, count: int) -> None:
            self.first, self.count = first, count

        def __len__(self) -> int:
            return self.count

        def item(self, index: int) -> TokenisedQuestion:
            read.append(self.first + index)
            return TokenisedQuestion((1,), ((index % 7,),), f"question {index}")

    def gathered(pictures: int, each: int) -> tuple[int, int]:
        read.clear()
        refs = [ImageRef(str(n), data=str(n).encode()) for n in range(pictures)]
        pairs = _gather([TokenisedPicture((ref,), (), Questions(n * each, each)) for n, ref in enumerate(refs)])
        assert pairs is not None and len(read) == len(set(read)) == len(pairs.keys) and pairs.whole == pictures * each
        return len(pairs.images), len(pairs.keys)

    assert gathered(300, 3_333) == (256, 256 * 11)
    assert gathered(2, 500_000) == (2, 3_000)
    assert gathered(4_000, 10) == (300, 3_000)  # many pictures: all questions of some
    assert gathered(100, 20) == (100, 2_000)  # few enough: all
