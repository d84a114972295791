"""The plan of an epoch: nothing lost, nothing twice, within its budgets, the same again."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny import draw_captions, draw_data, tiny_values
from transformers import AutoTokenizer

from adapters.data.batches import plan_epoch, plan_validation, tokenise
from adapters.data.collate import PackedSequence, padded_length, row_length, rows_of
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import PromptBuilder
from adapters.data.reading import read_data
from adapters.data.tokenised import TokenisedPicture, TokenisedQuestion
from adapters.recipe import parse_recipe
from adapters.training.setup import read_split


def pictures(count: int = 20, questions: int = 7) -> list[TokenisedPicture]:
    made = []
    for p in range(count):
        image = ImageRef(str(p), data=bytes([p]))
        asked = tuple(TokenisedQuestion((p, q, *range(q)), ((p, 1),), "") for q in range(questions))
        made.append(TokenisedPicture((image,), (3, -1, -1), asked))
    return made


def test_every_question_once_an_epoch_in_another_order() -> None:
    options = {"seed": 1, "batch_size": 16, "row_tokens": 40}
    first = plan_epoch(pictures(), epoch=0, **options)
    asked = Counter(branch.own for step in first for row in step.rows for branch in row.packed_answers)
    assert set(asked.values()) == {1} and len(asked) == 140
    assert first == plan_epoch(pictures(), epoch=0, **options)
    assert first != plan_epoch(pictures(), epoch=1, **options)
    assert all(step.answers >= 16 for step in first)
    assert all(len(row) <= 40 for step in first for row in step.rows)


def test_an_epoch_s_order_stays_what_it_was() -> None:
    """A resumed run goes on in the plan that it began; these are the plans of the first version."""
    made = []
    for p in range(20):
        answers = [((p, 1), (p, q, 7, 1), (5, 6, 7, 8, 1)) for q in range(7)]
        asked = [TokenisedQuestion((p, q, *range(q)), answers[q], "", None if q % 3 else 1) for q in range(7)]
        made.append(TokenisedPicture((ImageRef(str(p), data=bytes([p])),), (3, -1, -1), tuple(asked), p % 2 == 0))
    options: list[dict[str, Any]] = [
        {"seed": 1, "epoch": 0, "batch_size": 16, "row_tokens": 40, "views": 3},
        {"seed": 1, "epoch": 3, "batch_size": 5, "row_tokens": 0, "views": 1, "world": 3},
        {"seed": 2, "epoch": 1, "batch_size": 1000, "row_tokens": 90, "views": 2},
    ]
    digests = []
    for chosen in options:
        plan = plan_epoch(made, **chosen)
        told = [[_told(row) for row in step.rows] for step in plan]
        assert [[_told(row) for row in plan[place].rows] for place in reversed(range(len(plan)))] == told[::-1]
        digests.append(hashlib.sha256(repr(told).encode()).hexdigest()[:16])
    assert digests == ["50d38c6d758db0fa", "efc04b31a9273798", "9fbb3d42ad457a23"]


def _told(row: PackedSequence) -> Any:
    branches = [(branch.own, branch.answer) for branch in row.packed_answers]
    return [image.view for image in row.images], row.images[0].label, row.shared, branches


def test_zero_row_tokens_gives_each_question_its_own_row() -> None:
    steps = plan_epoch(pictures(), seed=0, epoch=0, batch_size=10, row_tokens=0)
    assert all(len(row.packed_answers) == 1 for step in steps for row in step.rows)


def test_micro_batches_fit_their_budget_and_split_among_processes() -> None:
    step = plan_validation(pictures(), row_tokens=40)
    whole = step.micro_batches(120)
    assert all(len(batch) * max(map(len, batch)) <= 120 for batch in whole)
    assert sum(map(len, whole)) == len(step.rows)
    shares = [step.share(rank, 3).micro_batches(120) for rank in range(3)]
    rows = [row for share in shares for batch in share for row in batch]
    assert Counter(map(id, rows)) == Counter(map(id, step.rows))


def test_micro_batches_are_cut_between_rows_that_pictures_share() -> None:
    """What was counted is what is collated: each micro-batch falls into the same rows again."""
    step = plan_validation(pictures(), row_tokens=0)
    cut = step.micro_batches(240, row_tokens=80)
    assert max(map(len, cut)) > max(map(len, step.micro_batches(240)))
    for batch in cut:
        rows = rows_of(batch, 80)
        assert len(rows) * padded_length(max(map(row_length, rows))) <= 240
    assert Counter(id(row) for batch in cut for row in batch) == Counter(map(id, step.rows))


def test_a_step_has_a_row_for_every_process() -> None:
    steps = plan_epoch(pictures(9, 1), seed=0, epoch=0, batch_size=1, row_tokens=40, world=4)
    assert [len(step.rows) for step in steps] == [4, 5]


def test_answers_are_drawn_by_their_share() -> None:
    image = ImageRef("x", data=b"x")
    many = [TokenisedPicture((image,), (3,), (TokenisedQuestion((5,), ((6,), (6,), (6,), (7,)), ""),))]
    drawn = Counter(
        plan_epoch(many, seed=0, epoch=epoch, batch_size=1, row_tokens=9)[0].rows[0].packed_answers[0].answer
        for epoch in range(400)
    )
    assert 260 < drawn[(6,)] < 340  # three of four people said 6


def test_an_encoder_decoder_gets_a_chance_beginning_of_each_caption() -> None:
    image = ImageRef("0", data=b"0")
    caption = (21, 22, 23, 24, 1)  # 1 ends it
    pictures_ = [TokenisedPicture((image,), (-1, -1), (TokenisedQuestion((7, 8, 1), (caption,), "", 1),))]
    cuts: Counter[int] = Counter()
    for epoch in range(200):
        (step,) = plan_epoch(pictures_, seed=0, epoch=epoch, batch_size=1, row_tokens=0)
        (branch,) = step.rows[0].packed_answers
        cut = len(branch.own) - 3
        assert branch.own == (7, 8, *caption[:cut], 1)  # before the prompt's end token
        assert branch.answer == caption[cut:] and len(branch.answer) >= 2
        cuts[cut] += 1
    assert set(cuts) == {0, 1, 2, 3} and min(cuts.values()) > 25
    (row,) = plan_validation(pictures_, row_tokens=0).rows
    assert row.packed_answers[0].answer == caption  # scored whole


def test_prefixes_are_for_captions_to_encoder_decoders_alone(language_folders: dict[str, Path], tmp_path: Path) -> None:
    data = read_data(draw_captions(tmp_path))
    for kind, expected in (("t5", 1), ("llama", None), ("opt", None)):
        tokenizer = AutoTokenizer.from_pretrained(language_folders[kind])
        prompts = PromptBuilder(tokenizer, 2, is_encoder_decoder=kind == "t5")
        for picture in tokenise(data, prompts, max_tokens=200):
            closing = 1 if kind == "t5" and picture.questions[0].own[-1] == tokenizer.eos_token_id else 0
            assert {question.prefix_end for question in picture.questions} == {None if expected is None else closing}


def test_an_instruction_aware_bridge_reads_in_which_language_a_caption_is_wanted(
    language_folders: dict[str, Path], tmp_path: Path
) -> None:
    data = read_data(draw_captions(tmp_path))
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(language_folders["llama"]), 2)
    for language, words in (("en", "Describe the picture."), ("zh", "用中文描述这张图片。")):
        wanted = replace(data, examples=tuple(replace(example, language=language) for example in data.examples))
        read = {one.instruction for picture in tokenise(wanted, prompts, max_tokens=200) for one in picture.questions}
        assert read == {words}


def test_a_file_may_come_several_times_in_an_epoch(language_folders: dict[str, Path], tmp_path: Path) -> None:
    """Each pass has sequences of its own, at places of their own; what is held out is held out of all, and once."""
    file = str(draw_data(tmp_path, "few.jsonl"))
    values: Any = tiny_values(tmp_path, language_folders["llama"], file)
    values["data"] |= {"train": [{"file": file, "repeat": 3}], "val_fraction": 0.25}
    train, val = read_split(parse_recipe(values, "test"))
    values["data"]["train"] = file
    once, held_out = read_split(parse_recipe(values, "test"))
    assert Counter(example.id for example in train.examples) == {example.id: 3 for example in once.examples}
    assert [example.id for example in val.examples] == [example.id for example in held_out.examples]
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(language_folders["llama"]), 2)
    repeated, single = (tokenise(data, prompts, max_tokens=200) for data in (train, once))
    assert repeated == list(single) * 3
    steps = plan_epoch(repeated, seed=0, epoch=0, batch_size=2, row_tokens=200)
    assert [row.images for step in steps for row in step.rows].count(single[0].images) == 3
