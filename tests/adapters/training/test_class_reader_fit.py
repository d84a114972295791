"""A reader of classes in a run: its names, its left-out scores, and the artefact that answers with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_data, save_tiny_efficientnet, tiny_values

from adapters.artefact.artefact import load_artefact
from adapters.data.batches import tokenise
from adapters.data.reading import read_data
from adapters.finetune import finetune
from adapters.inference.answering import answer_examples
from adapters.loading.assembly import assemble
from adapters.loading.reader import FILE, NAMED, SPELLED
from adapters.recipe import Recipe, parse_recipe
from adapters.training.reader_fit import fit_reader
from qformer.class_reader import ClassNames
from qformer.decoding import Decoding
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")
CLASSES = ("Red", "harp", "cello", "tench", "plate")


@pytest.fixture
def recipe(tmp_path: Path, language_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr("qformer.image_encoders.imagenet_names", lambda: CLASSES)
    data = draw_data(tmp_path / "data")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    blue = [row | {"question": "is it blue?", "answer": "yes"} for row in rows if row["image"].startswith("blue")]
    every = {row["image"] for row in rows}
    rest = [{"image": name, "question": "is it red or blue?", "answer": "blue"} for name in sorted(every)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *blue, *rest]))
    values: Any = tiny_values(save_tiny_efficientnet(tmp_path / "tower"), language_folders["llama"], data, max_steps=3)
    values["vision"]["towers"][0]["layer"] = -1
    values["bridge"] |= {"reader": "classes", "dropout": 0.0}
    return parse_recipe(values, "test")


def test_it_reads_whole_answers_and_the_encoders_classes(recipe: Recipe) -> None:
    assembly = assemble(recipe)
    pictures = tokenise(read_data(str(recipe.data.train)), assembly.prompts, max_tokens=320)
    fitted = fit_reader(assembly, pictures, kind="classes")
    assert fitted is not None and "2 names of 6 pictures, and 5 classes" in str(fitted)
    reader = fitted.reader
    # what is affirmed is a name, yes and no are none, and one class is a colour that questions name
    assert reader.questions is not None and reader.questions.names == ("blue", "red", "harp", "cello", "tench", "plate")
    assert isinstance(reader.names, ClassNames) and reader.names.columns.tolist() == [1, 2, 3, 4, 5]
    own = reader.names(reader.look(assembly.features(pictures[0].images)))
    digest = pictures[0].images[0].digest()
    left_out = fitted.left_out.names[digest]
    assert own.shape == (1, 6) and left_out.shape == (6,)
    assert not torch.allclose(own[0, :2], left_out[:2])
    torch.testing.assert_close(reader.name_vectors[1], assembly.word_vectors(["red"])[0])
    numbers = reader.look(assembly.features(pictures[0].images))
    read = reader.answer(numbers, [(digest, "is it red?")], assembly.prompts.tokenizer)
    (sure,) = [weight for answer, weight in reader.questions.answer("is it red?", own[0]) if answer == "yes"]
    torch.testing.assert_close(read[0], sure * assembly.spell("yes") + (1 - sure) * assembly.spell("no"))
    left = reader.answer(numbers, [(digest, "is it red?")], assembly.prompts.tokenizer, fitted.left_out)
    assert left.shape == (1, SPELLED, assembly.model.language.width) and not torch.allclose(left, read)


def test_an_artefact_answers_with_it(recipe: Recipe, tmp_path: Path) -> None:
    finetune(recipe, tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    assembly, _ = load_artefact(tmp_path / "run" / "last")
    assert assembly.reader is not None and assembly.reader.questions is not None
    assert assembly.reader.questions.names[-1] == "plate" and assembly.prompts.answer_vectors == SPELLED
    assert assembly.model.num_queries == 3 + NAMED
    assert (tmp_path / "run" / "last" / FILE).stat().st_size < 3000  # the classifier is the encoder's, and not in it
    examples = read_data(str(recipe.data.train)).examples
    answers = answer_examples(assembly, examples[:3], "vqa", decoding=Decoding(max_new_tokens=4))
    alone = [answer_examples(assembly, [one], "vqa", decoding=Decoding(max_new_tokens=4))[0] for one in examples[:3]]
    assert answers == alone


def test_an_encoder_without_known_classes_is_refused(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"))
    values["bridge"]["reader"] = "classes"
    with pytest.raises(UserError, match="was not trained as a classifier"):
        finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", quiet=True)


def test_views_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    seen = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": 2})})
    with pytest.raises(UserError, match=r"data\.views=2: .* set data\.views=1"):
        finetune(seen, tmp_path / "run", device="cpu", quiet=True)
