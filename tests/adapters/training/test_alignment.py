"""The head start: the loss by hand, and pictures that come to name their answers' words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_data, tiny_values

from adapters.data.batches import TokenisedPicture, TokenisedQuestion, tokenise
from adapters.data.reading import read_data
from adapters.loading.assembly import assemble
from adapters.recipe import parse_recipe
from adapters.training.alignment import TEMPERATURE, align_words, distinctive_names, names_in, naming_loss


def test_the_loss_by_hand() -> None:
    words = torch.eye(2)
    vectors = torch.tensor(
        [[[3.0, 0.0], [0.0, -1.0]]]
    )  # the nearest vector counts: 1 to the first word, 0 to the second
    wanted = torch.tensor([[1.0, 0.0]])
    expected = -math.log(math.exp(1 / TEMPERATURE) / (math.exp(1 / TEMPERATURE) + 1))
    assert naming_loss(vectors, words, wanted).item() == pytest.approx(expected, abs=1e-6)
    both = naming_loss(vectors, words, torch.tensor([[0.5, 0.5]])).item()
    assert both == pytest.approx(expected + 0.5 / TEMPERATURE, rel=1e-5)


@pytest.mark.usefixtures("cache_here")
def test_pictures_learn_to_name_their_words(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    file = draw_data(tmp_path / "data", questions=("what colour?",))
    values: Any = tiny_values(vision_folder, language_folders["llama"], file)
    values["bridge"]["dropout"] = 0.0
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    pictures = tokenise(read_data(file), made.prompts, max_tokens=320)
    letters = {made.prompts.tokenizer.decode(list(name)) for name in names_in(made, pictures[0])}
    assert letters == {"r", "e", "d", "re", "ed"}
    frozen = {n: p.clone() for n, p in made.model.language.named_parameters()}
    losses: list[float] = []
    last = align_words(
        made, pictures, steps=60, seed=0, learning_rate=3e-3, on_step=lambda _, value: losses.append(value)
    )
    assert len(losses) == 60 and last == losses[-1]
    assert last < 0.75 * losses[0]
    assert all(torch.equal(frozen[n], p) for n, p in made.model.language.named_parameters())


@pytest.mark.usefixtures("cache_here")
def test_words_that_every_picture_has_teach_nothing(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    file = draw_data(tmp_path / "data")
    values: Any = tiny_values(vision_folder, language_folders["llama"], file)
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    image = read_data(file).examples[0].images[0]
    same = [TokenisedPicture((image,), (3,), (TokenisedQuestion((5, n), ((70, 4),), ""),)) for n in range(4)]
    assert align_words(made, same, steps=3, seed=0) == 0.0


def test_two_words_are_a_name_where_they_often_stand_together_but_not_always() -> None:
    red_circle, red, circle = frozenset({(1,), (2,), (1, 2)}), frozenset({(1,)}), frozenset({(2,)})
    once, always, most = frozenset({(3,), (4,), (3, 4)}), frozenset({(6,), (7,), (6, 7)}), frozenset({(5,)})
    bags = [red_circle] * 20 + [red, circle, once, frozenset({(3,)}), frozenset({(4,)})] + [always] * 9 + [most] * 150
    names = [(1,), (1, 2), (2,), (3,), (4,), (6,), (7,)]
    assert distinctive_names(bags, lambda _: True) == names
    names.remove((1, 2))
    assert distinctive_names(bags, lambda token: token != 2) == names  # a comma, say
