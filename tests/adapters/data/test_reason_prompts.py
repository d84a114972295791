"""How a row with reasons is asked, stage by stage, and what is learned from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from adapters.data.batches import TokenisedPicture, plan_epoch, prompt_for, tokenise
from adapters.data.examples import DataSet, Example, merge, with_stages
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import IMAGE_SLOT, PromptBuilder, PromptStyle
from adapters.data.reading import read_data
from adapters.tasks import Stage
from qformer.errors import UserError

ASKED: Any = {"context": "It is noon. ", "choices": ("yes", "no")}


def builder_of(*, chat: bool, encoder_decoder: bool = False, **style: Any) -> PromptBuilder:
    return PromptBuilder(
        make_tokenizer(chat=chat), 1, is_encoder_decoder=encoder_decoder, style=PromptStyle(**style)
    )  # fmt: skip


def text_of(builder: PromptBuilder, ids: tuple[int, ...]) -> str:
    shown = ["#" if i == IMAGE_SLOT else builder.tokenizer.decode([i]) for i in ids]
    return "".join(shown).removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")


# -- wording ---------------------------------------------------------------------------------------------------------


def test_the_stages_in_a_chat_template() -> None:
    builder = builder_of(chat=True)
    whole = "#Is it awake?\nContext: It is noon.\nChoices: yes, no"
    assert text_of(builder, builder.rationale(" Is it awake?", **ASKED).ids) == f"{whole}\nThink step by step."
    assert text_of(builder, builder.answer("Is it awake?", rationale=" It moves.\n", **ASKED).ids) == (
        f"{whole}\nReasoning: It moves.\nSo what is the answer?"
    )
    assert text_of(builder, builder.answer("Is it awake?", **ASKED).ids) == whole
    assert builder.answer("Is it awake?").ids == builder.vqa("Is it awake?").ids


@pytest.mark.parametrize(("encoder_decoder", "closing"), [(False, "Answer:"), (True, "Short answer:")])
def test_the_stages_without_a_template(encoder_decoder: bool, closing: str) -> None:
    builder = builder_of(chat=False, encoder_decoder=encoder_decoder)
    whole = "#Question: Is it awake? Context: It is noon. Choices: yes, no"
    assert text_of(builder, builder.rationale("Is it awake?", **ASKED).ids) == f"{whole} Reasoning:"
    assert text_of(builder, builder.answer("Is it awake?", rationale="It moves.", **ASKED).ids) == (
        f"{whole} Reasoning: It moves. {closing}"
    )
    assert text_of(builder, builder.answer("Is it awake?", **ASKED).ids) == f"{whole} {closing}"


def test_a_wording_of_questions_holds_for_reasons_too() -> None:
    builder = builder_of(chat=True, question="Part 7. {question}")
    assert text_of(builder, builder.rationale("Is it awake?").ids) == "#Part 7. Is it awake?\nThink step by step."
    assert text_of(builder, builder.answer("Is it awake?", rationale="It moves.").ids).startswith(
        "#Part 7. Is it awake?\n"
    )


def test_a_wording_that_leaves_no_place_for_reasons_is_refused() -> None:
    builder = builder_of(chat=False, question="Q: {question} A:")
    assert text_of(builder, builder.answer("Is it awake?").ids) == "#Q: Is it awake? A:"
    for ask in (builder.rationale, partial(builder.answer, rationale="It moves.")):
        with pytest.raises(UserError, match="which leaves no place for reasons: set it to null"):
            ask("Is it awake?")


def test_letters_are_listed_and_answered_with() -> None:
    builder = builder_of(chat=True, letters=True)
    assert text_of(builder, builder.rationale("Is it?", choices=("yes", "no")).ids) == (
        "#Is it?\nChoices: (A) yes (B) no\nThink step by step."
    )
    assert builder.choice("no", ("yes", "no")) == "(B)"
    assert builder.choice("red", ()) == "red"
    assert builder_of(chat=True).choice("no", ("yes", "no")) == "no"
    with pytest.raises(UserError, match=r"row 3: 27 choices and 26 letters"):
        builder.answer("Is it?", choices=[str(number) for number in range(27)], where="row 3")


def test_a_rationale_that_writes_a_picture_s_mark_moves_no_picture() -> None:
    builder = builder_of(chat=True)
    assert text_of(builder, builder.answer("Is it?", rationale="See <image> there.").ids) == (
        "#Is it?\nReasoning: See  there.\nSo what is the answer?"
    )
    assert builder.answer("Is it?", rationale="<image>").ids == builder.vqa("Is it?").ids


def test_a_prompt_for_each_stage() -> None:
    builder = builder_of(chat=True)
    example = Example((ImageRef("a", data=b"a"),), "Is it?", ("no",), "row 1", "1", choices=("a", "b"), rationale="So.")
    options: Any = {"choices": ("a", "b")}
    for task in ("rationale", "reason"):
        assert prompt_for(example, task, builder) == builder.rationale("Is it?", **options)
    assert prompt_for(example, "answer", builder) == builder.answer("Is it?", rationale="So.", **options)
    assert prompt_for(example, "vqa", builder) == builder.vqa("Is it?", **options)


# -- what is learned -------------------------------------------------------------------------------------------------


@pytest.fixture
def data(jsonl: Callable[..., Path]) -> DataSet:
    row = {"image": "a.png", "question": "Why?", "choices": ["b", "c"], "rationale": "It is so.", "answer": "c"}
    return read_data(jsonl(row, row | {"question": "Who?", "rationale": "", "answer": "b"}))


def learned(pictures: list[TokenisedPicture], builder: PromptBuilder) -> list[tuple[str, str]]:
    """What is asked and answered, as text, in order."""
    return [
        (text_of(builder, question.own), text_of(builder, answer).removesuffix("<|im_end|>"))
        for picture in pictures
        for question in picture.questions
        for answer in question.answers
    ]


DIRECT = ("Why?\nChoices: b, c", "c")
THINK = ("Why?\nChoices: b, c\nThink step by step.", "It is so.")
CONCLUDE = ("Why?\nChoices: b, c\nReasoning: It is so.\nSo what is the answer?", "c")
NONE = [("Who?\nChoices: b, c\nThink step by step.", ""), ("Who?\nChoices: b, c", "b")]  # there are no reasons


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (("rationale", "answer"), [THINK, CONCLUDE, *NONE]),
        (("rationale",), [THINK, NONE[0]]),
        (("answer",), [CONCLUDE, NONE[1]]),
        (("direct",), [DIRECT, NONE[1]]),
        (("direct", "rationale", "answer"), [DIRECT, THINK, CONCLUDE, NONE[1], *NONE]),
    ],
)
def test_each_stage_is_a_question_about_the_same_picture(
    data: DataSet, stages: tuple[Stage, ...], expected: list[tuple[str, str]]
) -> None:
    builder = builder_of(chat=True)
    pictures = tokenise(data, builder, max_tokens=300, stages=stages)
    assert learned(pictures, builder) == expected
    assert len(pictures) == 1 and {question.instruction for question in pictures[0].questions} == {"Why?", "Who?"}


def test_both_stages_share_a_sequence(data: DataSet) -> None:
    pictures = tokenise(data, builder_of(chat=True), max_tokens=600)
    (step,) = plan_epoch(pictures, seed=0, epoch=0, batch_size=4, row_tokens=600)
    assert [len(row.packed_answers) for row in step.rows] == [4]


def test_letters_are_learned_for_answers_and_not_for_reasons(jsonl: Callable[..., Path]) -> None:
    row = {"image": "a.png", "question": "Why?", "choices": ["b", "c"], "rationale": "c", "answer": "c"}
    builder = builder_of(chat=True, letters=True)
    found = learned(tokenise(read_data(jsonl(row)), builder, max_tokens=300), builder)
    assert [answer for _, answer in found] == ["c", "(B)"]


def test_beside_rows_of_other_tasks(jsonl: Callable[..., Path], data: DataSet) -> None:
    plain = read_data(jsonl({"image": "a.png", "question": "Why?", "answer": "x"}))
    builder = builder_of(chat=True)
    found = learned(tokenise(merge([data, plain]), builder, max_tokens=300), builder)
    assert found == [THINK, CONCLUDE, *NONE, ("Why?", "x")]


def test_a_file_s_own_stages_go_before_the_recipe_s(jsonl: Callable[..., Path], data: DataSet) -> None:
    own = read_data(jsonl({"image": "a.png", "question": "How?", "rationale": "Mine.", "answer": "x"}))
    both = merge([data, with_stages(own, ("answer",))])
    builder = builder_of(chat=True)
    concluded = ("How?\nReasoning: Mine.\nSo what is the answer?", "x")
    found = learned(tokenise(both, builder, max_tokens=300, stages=("direct",)), builder)
    assert found == [DIRECT, NONE[1], concluded]


def test_stages_of_rows_without_reasons_are_refused(jsonl: Callable[..., Path]) -> None:
    plain = read_data(jsonl({"image": "a.png", "question": "Why?", "answer": "x"}))
    with pytest.raises(UserError, match=r"stages=\['answer'\] is for rows with reasons"):
        with_stages(plain, ("answer",))
    assert with_stages(plain, None) is plain


def test_without_any_reasons_only_direct_answers_can_be_learned(jsonl: Callable[..., Path]) -> None:
    none = read_data(jsonl({"image": "a.png", "question": "Why?", "rationale": "", "answer": "x"}))
    with pytest.raises(UserError, match=r"data.jsonl: no row has a rationale to learn.*reason.stages=\[direct\]"):
        tokenise(none, builder_of(chat=True), max_tokens=300)
    assert tokenise(none, builder_of(chat=True), max_tokens=300, stages=("direct",))


def test_a_row_that_is_too_long_is_named(data: DataSet) -> None:
    with pytest.raises(UserError, match=r"row 1 \(line 1\): prompt and answer are \d+ tokens"):
        tokenise(data, builder_of(chat=True), max_tokens=30)
