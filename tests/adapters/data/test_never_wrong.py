"""Rows that could be read wrong without a word: each gives the right value, or is a bad row with the fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import CAPTION, VQA, complaint
from tiny import make_tokenizer

from adapters.data.answers import normalise
from adapters.data.batches import prompt_for
from adapters.data.image_ref import image_ref
from adapters.data.prompts import PromptBuilder, PromptStyle, Turn
from adapters.data.reading import read_data, read_rows
from qformer.errors import UserError

PICTURE = {"image": "a.png"}
ASKED = PICTURE | {"question": "Why?"}


@pytest.fixture
def table(folder: Path) -> Callable[[str], Path]:
    """Writes a CSV file."""

    def write(text: str) -> Path:
        path = folder / "data.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def answers(path: Path, **options: Any) -> list[tuple[str, ...]]:
    return [example.answers for example in read_data(path, **options).examples]


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (VQA | {"question": "what \ud83d?"}, ["'question' holds half a character (\\ud83d) in what \\ud83d?"]),
        (VQA | {"answer": ["red", "\ude00"]}, ["'answer' holds half a character (\\ude00)"]),
        (VQA | {"id": "\ud83d"}, ["'id' holds half a character"]),
        (VQA | {"note": {"by": "\ud83d"}}, ["'note' holds half a character"]),
        (VQA | {"\ud83d": 1}, ["holds half a character"]),
        (VQA | {"answer": float("nan")}, ["'answer' holds NaN", "write text in quotes"]),
        (VQA | {"answer": ["red", float("nan")]}, ["'answer' holds NaN"]),
        (VQA | {"answer": float("-inf")}, ["'answer' holds -Infinity"]),
        (VQA | {"id": float("nan")}, ["'id' holds NaN"]),
        (VQA | {"choices": ["a cat", float("nan")]}, ["'choices' holds NaN"]),
        (VQA | {"id": None}, ["'id' holds null"]),
        (VQA | {"answer": '["red", "red"]'}, ["'answer' holds a list written as text", "write a JSON list"]),
        (VQA | {"answer": "['red', 'red']"}, ["'answer' holds a list written as text (['red', 'red'])"]),
    ],
)
def test_a_value_that_is_none_is_a_bad_row(row: dict[str, Any], words: list[str], jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, json.dumps(row))
    message = complaint(path)
    assert message.startswith(f"{path} row 2 (line 2): ")
    for word in words:
        assert word in message, message
    message.encode()  # it can be printed
    assert answers(path, skip_bad_rows=True) == [("a cat",)]


def test_a_number_that_is_none_is_no_caption(jsonl: Callable[..., Path]) -> None:
    assert "'caption' holds NaN" in complaint(jsonl(json.dumps(CAPTION | {"caption": float("nan")})))
    message = complaint(jsonl(json.dumps({"image": "a.png", "captions": ["A cat.", float("inf")]})))
    assert "'captions' holds Infinity" in message


def test_a_whole_character_written_in_two_halves_is_read(jsonl: Callable[..., Path]) -> None:
    row = '{"image": "a.png", "question": "what \\ud83d\\ude00?", "answer": "red"}'
    assert read_data(jsonl(row)).examples[0].question == "what \U0001f600?"


def test_half_a_character_in_a_list_of_rows_is_a_bad_row(folder: Path) -> None:
    path = folder / "data.json"
    path.write_text(json.dumps([VQA, VQA | {"question": "\ud83d"}]))
    assert "row 2 (line 1): 'question' holds half a character" in complaint(path)
    assert answers(path, skip_bad_rows=True) == [("a cat",)]


def test_a_nested_row_never_ends_a_reading(jsonl: Callable[..., Path]) -> None:
    deep = "[" * 990 + "]" * 990
    found = read_rows(jsonl(VQA, f'{{"image": "a.png", "question": "Why?", "answer": "x", "note": {deep}}}'))
    assert found.rows == 2 and len(found.examples) + len(found.faults) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (VQA | {"answers": ["a dog"]}, "both 'answer' and 'answers'"),
        (VQA | {"file_name": "b.png"}, "both 'image' and 'file_name'"),
        (VQA | {"id": 1, "question_id": 2}, "both 'id' and 'question_id'"),
        (VQA | {"id": None, "question_id": 2}, "both 'id' and 'question_id'"),
    ],
)
def test_two_names_of_one_field_are_a_bad_row(row: dict[str, Any], words: str, jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, row)
    assert words in complaint(path) and "keep one" in complaint(path)
    assert len(read_data(path, skip_bad_rows=True).examples) == 1


def test_two_names_of_captions_and_one_name_twice_are_bad_rows(jsonl: Callable[..., Path]) -> None:
    assert "both 'caption' and 'captions'" in complaint(jsonl(CAPTION | {"captions": ["A dog."]}))
    path = jsonl(VQA, '{"image": "a.png", "question": "Why?", "answer": "red", "answer": "blue"}')
    assert "row 2 (line 2): field 'answer' is there twice: keep one" in complaint(path)


def test_space_around_answers_is_no_part_of_them(jsonl: Callable[..., Path], table: Callable[[str], Path]) -> None:
    assert answers(jsonl(VQA | {"answer": " red"}, VQA | {"answer": ["red ", "\tblue"]})) == [("red",), ("red", "blue")]
    path = table('image, question, answer\na.png, what?, red\na.png , "what, now?", "dark red" \n b.png,why?,red \n')
    message = complaint(path)  # a space after a closing quote
    assert "row 2 (line 3): broken CSV" in message and "1 of 3 rows are bad" in message
    first, third = read_data(path, skip_bad_rows=True).examples
    assert (first.question, first.answers, third.images[0].label) == ("what?", ("red",), "b.png")
    (quoted,) = read_data(table('image,question,answer\na.png, "what, now?", red\n')).examples
    assert (quoted.question, quoted.answers) == ("what, now?", ("red",))


def test_answers_that_look_alike_are_equal(jsonl: Callable[..., Path]) -> None:
    composed, parted = "caf\u00e9", "cafe\u0301"
    assert answers(jsonl(VQA | {"answer": parted}, VQA | {"answer": composed})) == [(composed,), (composed,)]
    assert normalise(parted) == normalise(composed)
    assert normalise("\uff11\uff12") == normalise("12") and normalise("red.") == normalise("Red ") == "red"


# -- choices and context ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_choices_and_context_of_a_question_are_asked(chat: bool, jsonl: Callable[..., Path]) -> None:
    row = VQA | {"choices": ["a cat", "a dog"], "context": "It is noon."}
    (example,) = read_data(jsonl(row | {"answer": "A cat."})).examples
    assert (example.context, example.choices, example.answers) == ("It is noon.", ("a cat", "a dog"), ("a cat",))
    builder = PromptBuilder(make_tokenizer(chat=chat), 1, style=PromptStyle(letters=True))
    own = prompt_for(example, "vqa", builder).own
    said = "".join(builder.tokenizer.decode([token]) for token in own)
    assert "Context: It is noon." in said and "Choices: a cat, a dog" in said  # answered in words, so no letters
    assert len({read_data(jsonl(one)).fingerprint for one in (VQA, row, row | {"context": "x"})}) == 3


def test_an_answer_that_is_no_choice_is_a_bad_row(jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, VQA | {"choices": ["a dog", "a cow"]})
    assert "row 2 (line 2): the answer 'a cat' is none of the choices (a dog, a cow)" in complaint(path)
    assert "'choices' is text" in complaint(jsonl(VQA | {"choices": "a cat, a dog"}))


# -- which task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "vqa"])
@pytest.mark.parametrize(
    ("field", "value"), [("prompt", "what is it"), ("Question", "what"), ("text", "A cat."), ("notiz", "was ist das?")]
)
def test_a_question_under_another_name_is_not_captioned(
    task: str | None, field: str, value: str, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(PICTURE | {field: value})
    message = complaint(path, task=task, need_answers=False)
    assert f"row 1 (line 1): field 'question' is missing, and there is '{field}'" in message
    assert "--task caption" not in message and "--skip-bad-rows" not in message
    assert read_data(path, task="caption", need_answers=False).task == "caption"  # who asks for captions gets them


def test_a_picture_alone_among_questions_lacks_one(jsonl: Callable[..., Path], table: Callable[[str], Path]) -> None:
    path = jsonl(PICTURE, "broken", ASKED, ASKED)
    found = read_data(path, need_answers=False, skip_bad_rows=True)
    assert (found.task, [example.row for example in found.examples]) == ("vqa", [3, 4])
    assert f"row 1 (line 1): field 'question' is missing, which {path} row 3 (line 3) has" in str(found.faults[0])
    assert "row 1 (line 1): field 'question' is missing" in complaint(path, need_answers=False, task="vqa")
    path = table("image,question\na.png,\nb.png,what?\n")
    found = read_data(path, need_answers=False, skip_bad_rows=True)
    assert (found.task, [example.row for example in found.examples]) == ("vqa", [2])
    assert "row 1 (line 2): 'question' is empty" in str(found.faults[0])
    assert len(read_data(path, need_answers=False, limit=1, skip_bad_rows=True).examples) == 1
    path = table("image,question\na.png,\nb.png,\n")
    assert "'question' is empty" in complaint(path, need_answers=False)
    assert len(read_data(path, need_answers=False, task="caption").examples) == 2


def test_pictures_alone_ask_for_captions(jsonl: Callable[..., Path]) -> None:
    path = jsonl(PICTURE | {"width": 8, "split": "train"}, PICTURE, ASKED)
    assert read_data(path, need_answers=False, limit=2).task == "caption"
    assert len(read_data(jsonl(PICTURE, PICTURE), need_answers=False).examples) == 2


# -- tables ----------------------------------------------------------------------------------------------------------


def test_a_list_in_any_cell_of_answers_is_a_list(table: Callable[[str], Path]) -> None:
    path = table('image,question,answer\na.png,q,"[""red"", ""red""]"\na.png,q,"[3, 4]"\na.png,q,[odd]\n')
    assert answers(path) == [("red", "red"), ("3", "4"), ("[odd]",)]
    assert answers(table('image,caption\na.png,"[""A cat."", ""A dog.""]"\n')) == [("A cat.", "A dog.")]
    message = complaint(table("image,question,answer\na.png,q,\"['red', 'red']\"\n"))
    assert "row 1 (line 2): 'answer' holds a list written as text" in message


@pytest.mark.parametrize(
    "first", ['a.png,"q,red', 'a.png,q,"red', 'a.png,"q"s,red', 'a.png,q,"a ""cat', 'a.png,"say \\"hi\\"",red']
)
@pytest.mark.parametrize("others", [["b.png,q2,blue", "b.png,q3,green"], ['b.png,"q2",blue', 'b.png,q3,"green"']])
def test_a_quote_that_is_not_closed_costs_its_own_row(
    first: str, others: list[str], table: Callable[[str], Path]
) -> None:
    path = table("\n".join(["image,question,answer", first, *others]) + "\n")
    message = complaint(path)
    assert message.startswith(f"{path} row 1 (line 2): broken CSV") and "close the quote" in message
    assert "1 of 3 rows are bad" in message
    data = read_data(path, skip_bad_rows=True)
    assert [(example.row, example.question, example.answer) for example in data.examples] == [
        (2, "q2", "blue"),
        (3, "q3", "green"),
    ]
    assert data.examples[1].where == f"{path} row 3 (line 4)"


# -- advice ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_all_bad_are_not_to_be_skipped(jsonl: Callable[..., Path]) -> None:
    message = complaint(jsonl(*[VQA | {"image": "gone.png"}] * 300))
    assert message.endswith("300 of 300 rows are bad") and "skip" not in message


def test_fields_under_other_names_are_pointed_out(jsonl: Callable[..., Path]) -> None:
    message = complaint(jsonl({"file_name": "a.png", "text": "A cat."}))
    assert "'question' or 'caption' is missing" in message and "'text' to 'caption'" in message
    message = complaint(jsonl({"image_path": "a.png", "question": "Why?", "answer": "x"}))
    assert "field 'image' is missing or empty" in message and "rename 'image_path' to 'image'" in message
    assert "rename 'label' to 'answer'" in complaint(jsonl(ASKED | {"label": "x"}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"info": {}, "questions": [{"image_id": 1, "question": "q"}]}, "question"),
        ({"info": {}, "annotations": [{"question_id": 1}]}, "VQAv2's"),
        ({"images": [{}], "annotations": [{"bbox": []}]}, "a file of COCO's"),
        ({"data": [VQA]}, "save the list under 'data' alone"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_well_known_files_are_recognised(suffix: str, value: dict[str, Any], words: str, folder: Path) -> None:
    path = folder / f"data.{suffix}"
    path.write_text(json.dumps(value))
    message = complaint(path)
    assert str(path) in message
    assert words in message or (suffix == "jsonl" and "data" in value)


def test_a_folder_without_a_data_file(tmp_path: Path) -> None:
    assert "is a folder without a data file (.jsonl, " in complaint(tmp_path)


def test_paths_of_other_machines_have_a_hint(jsonl: Callable[..., Path]) -> None:
    message = complaint(jsonl(VQA | {"image": "C:\\pictures\\a.png"}))
    assert "a path of Windows: write where the file is on this machine" in message
    assert "write pictures/a.png" in complaint(jsonl(VQA | {"image": "pictures\\a.png"}))
    assert "write its path alone, /tmp/a b.png" in complaint(jsonl(VQA | {"image": "file:///tmp/a%20b.png"}))
    with pytest.raises(UserError, match="a path of Windows"):
        image_ref("C:\\a.png").open()


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_a_wording_without_a_question_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt\.question is 'Question: \{\} Short answer:', which asks nothing"):
        PromptStyle(question="Question: {} Short answer:")
    with pytest.raises(UserError, match=r"write \{question\}"):
        PromptStyle(question="")


def test_half_a_character_is_refused_by_every_prompt() -> None:
    builder = PromptBuilder(make_tokenizer(chat=True), 1)
    for said in (
        lambda: builder.vqa("what \ud83d?", where="row 3"),
        lambda: builder.rationale("what?", context="\ud83d", where="row 3"),
        lambda: builder.chat([Turn("user", "what \udce4?")]),
        lambda: builder.answer_ids("\ud83d"),
    ):
        with pytest.raises(UserError, match=r"half a character \(\\ud[8c]") as caught:
            said()
        str(caught.value).encode()
