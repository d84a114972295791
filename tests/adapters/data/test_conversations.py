"""Conversations of every shape: the same turns, each answer learned, and the very prompts that chat and API run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_rows import complaint
from tiny import draw_data, make_tokenizer, tiny_values

from adapters.data.batches import prompt_for, tokenise
from adapters.data.image_ref import ImageRef, image_ref
from adapters.data.prompts import IMAGE_SLOT, PromptBuilder, PromptStyle, Turn
from adapters.data.reading import read_data, read_rows
from adapters.finetune import finetune
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from serve.adapter import load_adapter
from serve.api.plan import plan_of
from serve.api.schemas import parse_request
from serve.evaluation.run import evaluate
from serve.page.tabs.chat import Conversation

SYSTEM = "Be short."
ROUNDS = (("What is it?", "a cat"), ("And its colour?", "red"), ("Sure?", "yes"))


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def messages(first: object = ROUNDS[0][0], *, system: bool = True) -> list[dict[str, object]]:
    turns = [message("user", first), message("assistant", ROUNDS[0][1])]
    for asked, answered in ROUNDS[1:]:
        turns += [message("user", asked), message("assistant", answered)]
    return [message("system", SYSTEM), *turns] if system else turns


def sharegpt(first: str) -> list[dict[str, object]]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[str(turn["role"])], "value": turn["content"]} for turn in messages(first)]


SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": messages("<image>What is it?"), "images": ["a.png"]},
    "mark at the end": {"messages": messages("What is it?\n<image>"), "images": ["a.png"]},
    "no mark": {"messages": messages(), "images": ["a.png"]},
    "parts": {
        "messages": messages([{"type": "image"}, {"type": "text", "text": "What is it?"}]),
        "images": ["a.png"],
    },
    "image_url": {
        "messages": messages(
            [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
        )
    },
    "sharegpt": {"conversations": sharegpt("<image>\nWhat is it?"), "images": ["a.png"]},
    "llava": {"id": "7", "image": "a.png", "conversations": sharegpt("What is it?\n<image>")},
    "cauldron": {
        "system": SYSTEM,
        "images": ["a.png"],
        "texts": [{"user": asked, "assistant": answered, "source": "x"} for asked, answered in ROUNDS],
    },
    "alpaca": {
        "system": SYSTEM,
        "history": [["<image>What is it?", "a cat"], ["And its colour?", "red"]],
        "instruction": "Sure?",
        "input": "",
        "output": "yes",
        "images": ["a.png"],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_conversation(shape: str, jsonl: Callable[..., Path]) -> None:
    if shape == "cauldron":
        for turn in SHAPES[shape]["texts"]:
            assert turn["source"] == "x"  # the set it came from, which is no turn
    data = read_data(jsonl(SHAPES[shape]))
    assert data.task == "vqa"
    assert [(row.question, row.answers, row.kind) for row in data.examples] == [
        (asked, (answered,), f"turn {number}") for number, (asked, answered) in enumerate(ROUNDS, start=1)
    ]
    picture = data.examples[0].images[0]
    assert all(row.images == (picture,) and row.row == 1 for row in data.examples)
    assert data.examples[0].history == (Turn("system", SYSTEM),)
    assert data.examples[2].history == (
        Turn("system", SYSTEM),
        Turn("user", "What is it?", (picture,)),
        Turn("assistant", "a cat"),
        Turn("user", "And its colour?"),
        Turn("assistant", "red"),
    )
    (asked,) = read_data(jsonl(SHAPES[shape]), need_answers=False).examples
    assert (asked.question, asked.answers, len(asked.history)) == ("Sure?", ("yes",), 5)


def test_single_turns_are_questions(jsonl: Callable[..., Path]) -> None:
    one = [message("user", "<image>Why?"), message("assistant", "So.")]
    plain, told, alpaca, waiting = (
        read_data(jsonl(row), need_answers=row.get("note") is None).examples[0]
        for row in (
            {"messages": one, "images": ["a.png"]},
            {"messages": [message("system", SYSTEM), *one], "images": ["a.png"], "kind": "why"},
            {"instruction": "Read it.", "input": "Slowly.", "output": "So.", "image": "a.png"},
            {"messages": one[:1], "images": ["a.png"], "note": 1},
        )
    )
    assert (plain.question, plain.answers, plain.history, plain.id, plain.kind) == ("Why?", ("So.",), (), "1", None)
    assert (told.history, told.kind) == ((Turn("system", SYSTEM),), "why")
    assert alpaca.question == "Read it.\nSlowly."
    assert (waiting.question, waiting.answers) == ("Why?", ())


def test_pictures_stand_at_their_marks(jsonl: Callable[..., Path]) -> None:
    turns = [
        message("user", "Is <image> like <image>?"), message("assistant", "no"),
        message("user", "<image>\nAnd this?"), message("assistant", "yes"),
    ]  # fmt: skip
    first, second = read_data(jsonl({"messages": turns, "images": ["a.png", "b.png", "c.png"]})).examples
    assert [image.label for image in first.images] == ["a.png", "b.png"]
    assert first.question == "Is <image> like <image>?"
    assert [image.label for image in second.images] == ["a.png", "b.png", "c.png"]
    assert (second.question, [len(turn.images) for turn in second.history]) == ("And this?", [2, 0])
    builder = PromptBuilder(make_tokenizer(chat=True), 2)
    ids = prompt_for(second, "vqa", builder).ids
    text = "".join("#" if one == IMAGE_SLOT else builder.tokenizer.decode([one]) for one in ids)
    assert "Is ## like ##?" in text and "\n##And this?" in text


def test_a_turn_of_weight_zero_is_history_alone(jsonl: Callable[..., Path]) -> None:
    turns = messages(system=False)
    turns[1]["weight"] = 0
    data = read_data(jsonl({"messages": turns, "images": ["a.png"]}))
    assert [row.answer for row in data.examples] == ["red", "yes"]
    assert data.examples[0].history[1].text == "a cat"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hello"}, "'messages' is text: write a list of turns"),
    ({"messages": ["hello"]}, "'messages' turn 1 is text (hello)"),
    ({"messages": [message("tool", "x")]}, "'messages' turn 1 is by tool: the roles that are read"),
    ({"messages": [message("assistant", "x")]}, "turn 1 is the assistant's, and the user's is due"),
    ({"messages": [message("user", "x"), message("user", "y")]}, "turn 2 is the user's, and the assistant's is due"),
    ({"messages": [message("user", "x")]}, "ends with the user's turn, so its answer is missing"),
    ({"messages": messages("<image><image>x")}, "has 2 <image> marks and the row 1 picture:"),
    ({"messages": messages([{"type": "audio"}])}, "a part of the kind audio: only text and pictures are read"),
    ({"messages": messages([{"type": "image"}])}, "turn 2 has no words"),
    ({"messages": messages([{"type": "image"}, "<image>x"])}, "has both parts that are pictures and <image> marks"),
    ({"messages": [message("user", "x"), message("assistant", "<image>")]}, "assistant's and has a picture's mark"),
    ({"messages": [message("user", "x"), message("assistant", "")]}, "turn 2 has no words"),
    ({"messages": [message("user", "x"), {**message("assistant", "y"), "tool_calls": [1]}]}, "has 'tool_calls'"),
    ({"messages": messages(), "question": "x"}, "both 'messages' and 'question'"),
    ({"messages": messages(), "conversations": []}, "both 'messages' and 'conversations'"),
    ({"messages": messages(), "videos": ["x"]}, "'videos' is not read"),
    ({"messages": [{**one, "weight": 0} for one in messages()]}, "weight 0, so nothing is learned"),
    ({"messages": messages(), "images": None}, "the conversation has no picture"),
    ({"messages": messages("<image>x"), "images": ["gone.png"]}, "image 'gone.png' is not there"),
    (
        {"messages": [*messages(system=False), message("user", "<image>y"), message("assistant", "z")]},
        "its first question comes before any picture",
    ),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, "'history' entry 1 is ['a']: write [question, answer]"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_what_is_wrong_with_a_conversation(row: dict[str, Any], words: str, jsonl: Callable[..., Path]) -> None:
    path = jsonl({"images": ["a.png"], **row})
    assert f"{path} row 1 (line 1): " in complaint(path) and words in complaint(path)


def test_a_web_address_is_a_bad_row(jsonl: Callable[..., Path]) -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    row = {"messages": [message("user", [part, {"type": "text", "text": "x"}]), message("assistant", "y")]}
    assert "is a web address: download it first" in complaint(jsonl(row))


def test_a_conversation_is_one_row(jsonl: Callable[..., Path]) -> None:
    found = read_rows(jsonl(SHAPES["messages"], SHAPES["llava"], {"messages": "x"}), limit=2)
    assert len(found.examples) == 6 and found.rows == 2
    assert [row.id for row in found.examples[3:]] == ["7/1", "7/2", "7/3"]
    other = json.loads(json.dumps(SHAPES["messages"]))
    other["messages"][2]["content"] = "a dog"
    prints = {read_data(jsonl(row)).fingerprint for row in (SHAPES["messages"], other, SHAPES["no mark"])}
    assert len(prints) == 2


# -- what is trained is what is run ------------------------------------------------------------------------------------


class Recorder:
    """Stands for the engine: keeps the prompt that a request becomes, as `LoadedAdapter.chat_request` makes it."""

    def __init__(self, builder: PromptBuilder) -> None:
        self.builder = builder
        self.ids: list[tuple[int, ...]] = []

    def chat(self, turns: Any, **_: object) -> Any:
        self.ids.append(self.builder.chat(turns).ids)
        return SimpleNamespace(stop=lambda: None)


def trained(path: Path, builder: PromptBuilder) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The answer's ids by the prompt's, of all that a file teaches."""
    pictures = tokenise(read_data(path), builder, max_tokens=1000)
    return {picture.shared + one.own: one.answers[0] for picture in pictures for one in picture.questions}


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("style", [PromptStyle(), PromptStyle(system="Ours.", question="Q: {question}")])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("shown", ["first", "second", "between"])
def test_training_page_and_api_put_the_same_tokens(
    shown: str, chat: bool, style: PromptStyle, system: bool, jsonl: Callable[..., Path], folder: Path
) -> None:
    builder = PromptBuilder(make_tokenizer(chat=chat), 3, style=style)
    word = {"type": "text", "text": ROUNDS[0][0]}
    picture, other = (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{x}"}} for x in ("YQ==", "Yg==")
    )
    first = {"first": [picture, word], "second": [word, picture], "between": [picture, word, other]}[shown]
    turns = messages(first, system=system)
    if shown == "second":
        turns[-2]["content"] = [{"type": "text", "text": ROUNDS[2][0]}, other]
    learned = trained(jsonl({"messages": turns}), builder)
    assert [builder.decode(answer) for answer in learned.values()] == [answered for _, answered in ROUNDS]

    api, page = Recorder(builder), Recorder(builder)
    spoken: list[Turn] = []
    for number, turn in enumerate(turns):
        parts = turn["content"] if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]
        pictures = [image_ref(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        if turn["role"] == "user":
            request = parse_request(json.dumps({"model": "m", "messages": turns[: number + 1]}).encode())
            sent = [image for one in spoken for image in one.images] + pictures
            engine: Any = api
            (begin,) = plan_of(request, engine, sent, model="m", max_tokens=9).begin
            begin()
            text = "<image>What is it?<image>" if shown == "between" and len(pictures) == 2 else str(parts_text(parts))
            asked = Turn("user", text, tuple(pictures))
            engine = page
            conversation = Conversation(list(spoken))
            next(conversation.answer(engine, asked, "m", Decoding()))
            spoken.append(asked)
        else:
            spoken.append(Turn(turn["role"], str(turn["content"])))  # type: ignore[arg-type]
    assert api.ids == list(learned)
    assert page.ids == list(learned)


def parts_text(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text")


def test_questions_of_one_conversation_share_their_picture(jsonl: Callable[..., Path]) -> None:
    builder = PromptBuilder(make_tokenizer(chat=True), 3)
    (picture,) = tokenise(read_data(jsonl(SHAPES["messages"])), builder, max_tokens=1000)
    assert len(picture.questions) == 3 and picture.images == (ImageRef("a.png", path=picture.images[0].path),)


def test_an_adapter_is_trained_and_scored_by_turn(
    tmp_path: Path, vision_folder: Path, language_folders: dict[str, Path]
) -> None:
    draw_data(tmp_path)
    rows = [
        {
            "image": f"{colour}{shade}.png",
            "conversations": [
                {"from": "human", "value": "<image>what colour?"}, {"from": "gpt", "value": colour},
                {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"},
            ],
        }
        for colour in ("red", "green", "blue", "black")
        for shade in range(3)
    ]  # fmt: skip
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_values(vision_folder, language_folders["llama"], file, max_steps=2)
    made = finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    assert made.finished
    scores = evaluate(load_adapter(tmp_path / "run", device="cpu"), file)
    assert scores["n"] == 24 and set(scores["by_kind"]) == {"turn 1", "turn 2"}
