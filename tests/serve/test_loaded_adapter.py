"""A loaded adapter, real and tiny: kinds of pictures, several at once, and what a wrong call is told."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import torch
from PIL import Image

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef, image_ref
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import ImageInput, LoadedAdapter, default_adapter, load_adapter, picture_ref

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture
def picture(data_file: Path) -> Path:
    return data_file.parent / "1.png"


def test_a_loaded_adapter_knows_its_name_and_its_facts(engine: LoadedAdapter, run_folder: Path) -> None:
    assert engine.name == str(run_folder)
    assert engine.facts.steps == 3
    assert engine.facts.data["pictures"] == 10  # of 12, 2 were held out
    assert 0 <= engine.facts.metrics["val_exact_match"] <= 1
    assert set(engine.facts.fingerprints) == {"vision.0", "language"}
    assert not engine.assembly.model.training


def vectors(engine: LoadedAdapter, picture: ImageInput) -> torch.Tensor:
    with torch.no_grad():
        return engine.assembly.image_embeddings([picture_ref(picture)])


def test_every_way_to_give_a_picture_gives_one_answer(
    engine: LoadedAdapter, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(picture.parent)
    uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    ways = [str(picture), "1.png", picture, picture.read_bytes(), Image.open(picture), image_ref(str(picture)), uri]

    answers = [engine.ask(way, "what colour is it?", decoding=SHORT) for way in ways]

    assert len(set(answers)) == 1
    assert all(torch.equal(vectors(engine, way), vectors(engine, picture)) for way in ways)
    assert not torch.equal(vectors(engine, picture.parent / "2.png"), vectors(engine, picture))


def draw(kind: str) -> tuple[Image.Image, dict[str, object]]:
    """A picture of a kind that needs more than a plain conversion, and how to save it so that a file is the same."""
    if kind == "transparent":
        picture = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
        picture.paste((0, 0, 200, 255), (4, 4, 20, 14))
        return picture, {"format": "PNG"}
    if kind == "16 bit":
        return Image.linear_gradient("L").resize((32, 32)).convert("I").point(lambda v: v * 257).convert("I;16"), {
            "format": "PNG"
        }
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    picture.getexif()[274] = 6  # held on its side
    return picture, {"format": "PNG", "exif": picture.getexif()}


@pytest.mark.parametrize("kind", ["transparent", "16 bit", "on its side"])
def test_a_pillow_image_is_seen_as_its_file_is(engine: LoadedAdapter, tmp_path: Path, kind: str) -> None:
    picture, options = draw(kind)
    picture.save(tmp_path / "saved.png", **options)

    assert torch.equal(vectors(engine, picture), vectors(engine, tmp_path / "saved.png"))


def test_asking_through_the_engine_is_asking_the_model(engine: LoadedAdapter, picture: Path) -> None:
    """The reference takes the walk by hand: features, bridge, placing, generation."""
    assembly = engine.assembly
    prompt = assembly.prompts.vqa("what colour is it?")
    ids = torch.tensor([[max(i, 0) for i in prompt.ids]])
    slots = torch.tensor([[i < 0 for i in prompt.ids]])
    with torch.no_grad():
        features = assembly.caches[0].load([picture_ref(picture)])
        embeds = assembly.model.language.embed(ids).clone()
        embeds[slots] = assembly.model.image_embeddings([features])[0]
        words: list[int] = []
        for _ in range(SHORT.max_new_tokens):
            word = int(assembly.model.language.model(inputs_embeds=embeds).logits[0, -1].argmax())
            if word in assembly.model.language.stop_ids:
                break
            words.append(word)
            embeds = torch.cat([embeds, assembly.model.language.embed(torch.tensor([[word]]))], dim=1)

    assert int(slots.sum()) == 4  # the tiny bridge has four queries
    assert engine.ask(picture, "what colour is it?", decoding=SHORT) == assembly.prompts.decode(words)


def test_a_caption_is_asked_for_in_its_language(engine: LoadedAdapter, picture: Path) -> None:
    assert isinstance(engine.caption(picture, decoding=SHORT), str)
    assert isinstance(engine.caption(picture, language="zh", decoding=SHORT), str)
    with pytest.raises(UserError, match="--language: 'xx' is not known"):
        engine.caption(picture, language="xx")


def test_several_pictures_stand_where_the_question_marks_them(engine: LoadedAdapter, data_file: Path) -> None:
    two = [data_file.parent / "0.png", data_file.parent / "1.png"]
    question = "first <image> then <image>?"

    prompt = engine.assembly.prompts.vqa(question, 2)
    runs = "".join("#" if i < 0 else "." for i in prompt.ids).strip(".").split("#" * 4)

    assert [len(part) > 0 for part in runs] == [False, True, False]  # text between the two runs of slots
    assert isinstance(engine.ask(two, question, decoding=SHORT), str)
    assert isinstance(engine.ask(two, "what differs?", decoding=SHORT), str)


@pytest.mark.parametrize(
    ("pictures", "question", "says"),
    [
        (2, "only <image>?", "1 <image> marks but 2 images"),
        (1, "<image> and <image>?", "2 <image> marks but 1 images"),
        (1, " \n", "QUESTION: it is empty"),
    ],
)
def test_marks_that_do_not_fit_and_an_empty_question_are_told(
    engine: LoadedAdapter, picture: Path, pictures: int, question: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        engine.ask([picture] * pictures, question)


def test_a_picture_that_cannot_be_read_is_named(engine: LoadedAdapter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png' is not there"):
        engine.ask(tmp_path / "nowhere.png", "what is it?")
    with pytest.raises(UserError, match="is not a picture"):
        engine.ask(b"these are no pixels", "what is it?")
    with pytest.raises(UserError, match="is a web address"):
        engine.ask("https://example.org/a.png", "what is it?")


def test_many_examples_report_their_progress(engine: LoadedAdapter, data_file: Path) -> None:
    examples = [
        Example((ImageRef(f"{n}.png", path=data_file.parent / f"{n}.png"),), "is it a circle?", (), "", str(n))
        for n in range(5)
    ]
    seen: list[tuple[int, int]] = []

    said = engine.answer(
        examples, decoding=SHORT, batch_size=2, on_progress=lambda done, total: seen.append((done, total))
    )

    assert len(said) == 5
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_there_is_no_default_adapter_until_one_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.adapter.shipped_adapters", lambda: [])
    with pytest.raises(UserError, match="--adapter: no adapter ships with this version"):
        load_adapter()
    monkeypatch.setattr("serve.adapter.shipped_adapters", lambda: ["photo"])
    assert default_adapter() == "photo"
