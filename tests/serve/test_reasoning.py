"""`querybridge reason`, its scores, and the calls behind them, on tiny adapters that learned from rows with reasons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import FAST, Call
from data_rows import write_jsonl
from reason_data import draw_reasons, write_scienceqa
from tiny import tiny_values

from adapters.data.examples import Example
from adapters.data.reading import read_data
from adapters.finetune import finetune
from adapters.inference.reasoning import reason_examples
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import load_adapter
from serve.engine.engine import Engine
from serve.evaluation.reasons import evaluate_reasons
from serve.reasoning import asked_answer, asked_rationale, question_example, reason

TOKENS = 30  # of a thought


@pytest.fixture(scope="module")
def reasons_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_reasons(tmp_path_factory.mktemp("reasons"))


@pytest.fixture(scope="module")
def tiny(clip_folder: Path, language_folders: dict[str, Path], reasons_file: Path) -> dict[str, Any]:
    """A recipe, as a mapping."""
    train = {"max_steps": 30, "validate_every": 30, "row_tokens": 500, "micro_batch_tokens": 2000}
    values = tiny_values(clip_folder, language_folders["llama"], reasons_file, **train, learning_rate=5e-3)
    return values | {"task": "reason", "reason": {"rationale_tokens": TOKENS}}


@pytest.fixture(scope="module")
def runs(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> dict[str, Path]:
    """An adapter of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"both": ["rationale", "answer"], "thinks": ["rationale"], "concludes": ["answer"], "direct": ["direct"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        for kind, stages in kinds.items():
            recipe = parse_recipe(tiny | {"reason": {"stages": stages, "rationale_tokens": TOKENS}}, "test")
            finetune(recipe, folder / kind, device="cpu", dtype="float32", quiet=True)
    return {kind: folder / kind for kind in kinds}


@pytest.fixture
def picture(reasons_file: Path) -> Path:
    return reasons_file.parent / "red0.png"


# -- asking ----------------------------------------------------------------------------------------------------------


def test_the_thought_is_printed_and_then_the_answer(call: Call, runs: dict[str, Path], picture: Path) -> None:
    asked = ["reason", picture, "what colour?", "--choices", "red, green,blue ,black", "--context", "A square."]
    found = call(*asked, "--json", "--adapter", runs["both"], *FAST).values
    plain = call(*asked, "--adapter", runs["both"], *FAST)
    shares = "".join(f"{share:6.1%}  {choice}\n" for choice, share in found["choices"].items())
    assert plain.out == f"Thought: {found['rationale']}\nAnswer: {found['answer']}\n{shares}"
    assert plain.err == ""
    assert found["rationale"].startswith("It")  # it has learned how reasons begin
    assert found == {
        "images": [str(picture)],
        "question": "what colour?",
        "context": "A square.",
        "choices": found["choices"],
        "rationale": found["rationale"],
        "answer": found["answer"],
        "confidence": found["choices"][found["answer"]],
    }
    assert set(found["choices"]) == {"red", "green", "blue", "black"}
    assert sum(found["choices"].values()) == pytest.approx(1)
    assert found["answer"] == next(iter(found["choices"])) == max(found["choices"], key=found["choices"].__getitem__)


def test_lengths_are_kept(call: Call, runs: dict[str, Path], picture: Path) -> None:
    short = ["--rationale-tokens", 4, "--max-new-tokens", 2]
    found = call("reason", picture, "what colour?", *short, "--json", "--adapter", runs["both"], *FAST).values
    assert len(found["rationale"]) <= 4 and len(found["answer"]) <= 2  # a token is a character here


def test_a_second_adapter_answers(call: Call, runs: dict[str, Path], picture: Path) -> None:
    pair = ["--adapter", runs["thinks"], "--answer-adapter", runs["concludes"], *FAST]
    found = call("reason", picture, "is it red?", "--choices", "yes,no", "--json", *pair).values
    first, second = (load_adapter(runs[kind], device="cpu", dtype="float32") for kind in ("thinks", "concludes"))
    thought = reason(first, picture, "is it red?", choices=["yes", "no"], answer_adapter=second)
    assert (found["rationale"], found["answer"]) == (thought.rationale, thought.answer)
    alone = load_adapter(runs["both"], device="cpu", dtype="float32")
    assert reason(alone, picture, "is it red?", choices=["yes", "no"]) != thought


def test_an_adapter_that_answers_directly_says_so(call: Call, runs: dict[str, Path], picture: Path) -> None:
    asked = ["reason", picture, "is it red?", "--choices", "yes,no", "--adapter", runs["direct"], *FAST]
    plain, found = call(*asked), call(*asked, "--json").values
    assert plain.out.startswith(f"Answer: {found['answer']}\n")
    assert plain.err == "this adapter was taught to answer directly: it gives no reasons\n"
    assert found["rationale"] is None


def test_the_stages_can_be_submitted_one_by_one(runs: dict[str, Path], picture: Path) -> None:
    loaded = load_adapter(runs["both"], device="cpu", dtype="float32")
    example = question_example(picture, "what colour?", choices=["red", "blue"])
    with Engine([loaded]) as engine:
        thought = engine.submit(
            asked_rationale(loaded, example, longest=TOKENS), decoding=Decoding(max_new_tokens=TOKENS)
        ).result()
        second = asked_answer(loaded, example, thought.text)
        chosen = engine.submit(second, choices=example.choices).result()
        written = engine.submit(second).result()
    expected = reason(loaded, picture, "what colour?", choices=["red", "blue"])
    assert (thought.text, chosen.text) == (expected.rationale, expected.answer)
    assert chosen.choices == pytest.approx(expected.choices)
    assert written.choices is None
    freely = reason(loaded, picture, "what colour?")
    assert freely.confidence is not None and 0 < freely.confidence <= 1 and freely.choices is None


def test_choices_that_go_by_letters_are_weighed_by_their_letters(runs: dict[str, Path], picture: Path) -> None:
    loaded = load_adapter(runs["both"], device="cpu", dtype="float32")
    prompts = loaded.assembly.prompts
    prompts.style = replace(prompts.style, letters=True)
    example = question_example(picture, "what colour?", choices=["red", "blue"])
    second = asked_answer(loaded, example, "It is red.")
    (by_letters,), (by_words,) = (
        loaded.generator.choose([second], [words]) for words in (["(A)", "(B)"], ["red", "blue"])
    )
    with Engine([loaded]) as engine:
        found = engine.submit(second, choices=example.choices).result().choices
    assert found == pytest.approx(dict(zip(["red", "blue"], by_letters, strict=True)))
    assert found != pytest.approx(dict(zip(["red", "blue"], by_words, strict=True)))
    assert set(reason(loaded, picture, "what colour?", choices=["red", "blue"]).choices or {}) == {"red", "blue"}


def test_what_is_too_long_is_told_before_there_are_reasons(
    runs: dict[str, Path], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_adapter(runs["both"], device="cpu", dtype="float32")
    monkeypatch.setattr(loaded, "generator", None)
    with pytest.raises(UserError, match="shorten it"):
        reason(loaded, picture, "what colour?", context="word " * 10_000)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reason", "PICTURE"], "write querybridge reason IMAGE"),
        (["reason", "gone.png", "what?"], "image 'gone.png' is not there"),
        (["reason", "PICTURE", "what?", "--choices", "one"], "--choices: 1 given"),
        (["reason", "PICTURE", " "], "QUESTION: it is empty"),
        (
            ["reason", "PICTURE", "what?", "--choices", "a,b", "--max-new-tokens", "9"],
            "--max-new-tokens: with --choices",
        ),
        (["reason", "PICTURE", "what?", "--adapter", "thinks"], "--answer-adapter RUN"),
        (["reason", "PICTURE", "what?", "--adapter", "concludes"], "it was taught answer alone"),
        (["reason", "PICTURE", "what?", "--adapter", "both", "--answer-adapter", "direct"], "--answer-adapter: it was"),
        (["evaluate", "DATA", "--task", "reason", "--adapter", "thinks"], "--answer-adapter RUN"),
        (["evaluate", "DATA", "--task", "reason", "--adapter", "both", "--controls", "--blank-images"], "leave it out"),
        (["evaluate", "DATA", "--task", "reason", "--adapter", "both", "--controls", "--limit", 1], "needs two"),
        (
            ["evaluate", "DATA", "--task", "vqa", "--adapter", "both", "--rationale-tokens", 8],
            "goes with --task reason",
        ),
        (["reason", "PICTURE", "what?", "--adapter", "direct", "--votes", 2], "the adapter answers directly"),
        (["reason", "PICTURE", "what?", "--adapter", "both", "--votes", 2, "--beams", 3], "beams do not sample"),
        (["evaluate", "DATA", "--task", "reason", "--adapter", "direct", "--votes", 2], "the adapter answers directly"),
        (["evaluate", "DATA", "--adapter", "both", "--votes", 2], "--votes goes with --task reason"),
        (["batch", "DATA", "--out", "OUT", "--adapter", "both"], "--task vqa answers their questions"),
    ],
)
def test_mistakes_get_one_line(
    call: Call, runs: dict[str, Path], picture: Path, reasons_file: Path, arguments: list[Any], says: str
) -> None:
    words = {"PICTURE": picture, "DATA": reasons_file, "OUT": reasons_file.with_name("out.jsonl"), **runs}
    assert says in call(*[words.get(word, word) for word in arguments], *FAST).mistake()


# -- scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_steps_and_kind(call: Call, runs: dict[str, Path], reasons_file: Path) -> None:
    asked = ["evaluate", reasons_file, "--task", "reason", "--adapter", runs["both"], *FAST]
    found = call(*asked, "--json").values
    table = call(*asked, "--limit", 4)
    groups = ("", "_single_step", "_multi_step", "_colour", "_same")
    scores = {f"{name}{group}" for name in ("accuracy", "ROUGE-L") for group in groups}
    assert set(found) == {"n", "no_choice", "commonest_answer", "skipped"} | scores
    assert found["n"] == 24
    # four colours three times each: 3 of 12; nine of twelve are not red
    assert found["commonest_answer"] == pytest.approx((3 + 9) / 24)
    assert found["ROUGE-L"] > 0.2
    assert "accuracy_multi_step" in table.out and "done 2/8" not in table.out
    assert table.err.splitlines()[-1] == "done 8/8"  # both stages of four rows


def test_scores_are_those_of_the_thoughts(runs: dict[str, Path], reasons_file: Path) -> None:
    loaded = load_adapter(runs["both"], device="cpu", dtype="float32")
    rows = read_data(reasons_file, limit=6).examples
    thoughts = reason_examples(loaded.assembly, rows)  # answers as they are written
    right = [thought.answer == row.answer for thought, row in zip(thoughts, rows, strict=True)]
    assert evaluate_reasons(loaded, reasons_file, limit=6)["accuracy"] == pytest.approx(sum(right) / 6)


def test_controls(call: Call, runs: dict[str, Path], reasons_file: Path) -> None:
    asked = ["evaluate", reasons_file, "--task", "reason", "--json", "--limit", 8, "--quiet", *FAST]
    found = call(*asked, "--controls", "--adapter", runs["both"]).values
    own = call(*asked, "--adapter", runs["both"]).values
    blank = call(*asked, "--blank-images", "--adapter", runs["both"]).values
    ends = ("", "_single_step", "_multi_step")
    with_reasons = ("blind_rationale", "blank_images", "shuffled_images")
    names = {
        *(f"{control}_accuracy{end}" for control in ("direct", "gold_rationale", *with_reasons) for end in ends),
        *(f"{control}_ROUGE-L{end}" for control in with_reasons for end in ends),
    }
    assert set(found) == set(own) | names
    assert {name: found[name] for name in own} == own
    assert found["blank_images_accuracy"] == blank["accuracy"] and found["blank_images_ROUGE-L"] == blank["ROUGE-L"]
    direct = call(*asked, "--controls", "--adapter", runs["direct"]).values
    assert {name for name in direct if name.endswith("_accuracy")} == {
        "blank_images_accuracy",
        "shuffled_images_accuracy",
    }
    assert "ROUGE-L" not in direct


def test_two_adapters_are_scored_together(call: Call, runs: dict[str, Path], reasons_file: Path) -> None:
    pair = ["--adapter", runs["thinks"], "--answer-adapter", runs["concludes"]]
    found = call("evaluate", reasons_file, "--task", "reason", "--json", "--limit", 4, *pair, *FAST).values
    assert 0 <= found["accuracy"] <= 1 and found["ROUGE-L"] > 0.2


def test_one_language_a_file(runs: dict[str, Path], reasons_file: Path) -> None:
    rows = [json.loads(line) for line in reasons_file.read_text().splitlines()[:2]]
    mixed = write_jsonl(reasons_file.parent / "mixed.jsonl", [rows[0], rows[1] | {"language": "zh"}])
    with pytest.raises(UserError, match="reasons in en, zh"):
        evaluate_reasons(load_adapter(runs["both"], device="cpu", dtype="float32"), mixed)


# -- from a data file, and ScienceQA -----------------------------------------------------------------------------------


@pytest.fixture
def shipped(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder of the test's own, with the tiny recipe in the place of the ones that ship."""
    values = tiny | {"data": {"train": "data/scenes/train.jsonl", "val": "nowhere.jsonl", "val_fraction": 0.25}}
    values["train"] = tiny["train"] | {"max_steps": 2, "validate_every": 2}
    (tmp_path / "reason_cpu.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr(
        "adapters.recipe.shipped_recipes",
        lambda: {"reason_cpu": tmp_path / "reason_cpu.yaml", "domain_cpu": tmp_path / "reason_cpu.yaml"},
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_finetune_learns_reasons_from_a_bare_data_file(call: Call, shipped: Path, reasons_file: Path) -> None:
    done = call("finetune", reasons_file, "--task", "reason", "--out", "runs/mine", "--quiet", *FAST)
    recipe = yaml.safe_load(Path("runs/mine/recipe.yaml").read_text(encoding="utf-8"))
    assert done.out.splitlines()[-1] == 'ask it: querybridge reason PICTURE "QUESTION" --adapter runs/mine'
    assert (recipe["task"], recipe["data"]["train"], recipe["data"]["val"]) == ("reason", str(reasons_file), None)
    told = call("finetune", reasons_file, "--out", "runs/told", "--json", "--quiet", *FAST).values
    assert "val_accuracy" in told  # the rows say what they are


def test_scienceqa_is_learned_by_letters_and_scored_by_its_columns(call: Call, shipped: Path) -> None:
    write_scienceqa(shipped / "scienceqa")
    done = call("finetune", "scienceqa:train", "--task", "reason", "--json", "--quiet", *FAST).values
    recipe = yaml.safe_load(Path("runs/scienceqa-train/recipe.yaml").read_text(encoding="utf-8"))
    assert done["out"] == "runs/scienceqa-train"
    assert recipe["prompt"]["letters"] is True
    assert recipe["data"]["val"] == f"{shipped / 'scienceqa'}:val"
    found = call(
        "evaluate", "scienceqa:test", "--task", "reason", "--adapter", done["out"], "--json", "--quiet", *FAST
    ).values  # fmt: skip
    assert found["n"] == 3 and found["Avg"] == pytest.approx(100 * found["accuracy"], abs=0.01)
    assert {"NAT", "TXT", "IMG", "G1-6"} <= set(found) and "G7-12" not in found


def test_votes(call: Call, runs: dict[str, Path], picture: Path, reasons_file: Path) -> None:
    asked = ["reason", picture, "what color is it?", "--choices", "red,blue", "--json", *FAST]
    one, again = (call(*asked, "--votes", 3, "--adapter", runs["both"]).values for _ in range(2))
    assert one == again and one["rationale"] and sum(one["choices"].values()) == pytest.approx(1)
    scored = ["evaluate", reasons_file, "--task", "reason", "--votes", 2, "--limit", 4, "--quiet", *FAST]
    assert 0 <= call(*scored, "--json", "--adapter", runs["both"]).values["accuracy"] <= 1


def test_answers_and_reasons_are_kept_and_reported(
    call: Call, runs: dict[str, Path], reasons_file: Path, tmp_path: Path
) -> None:
    kept, page = tmp_path / "answers.jsonl", tmp_path / "report.html"
    asked = ["evaluate", reasons_file, "--task", "reason", "--adapter", runs["both"], "--json", "--quiet", *FAST]
    found = call(*asked, "--controls", "--limit", 8, "--save-predictions", kept, "--report", page).values
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(lines) == 8 and all(line["rationale"] for line in lines)
    assert sum(line["right"] for line in lines) / 8 == pytest.approx(found["accuracy"])
    text = page.read_text()
    assert "its reasons: " + lines[0]["rationale"].split()[0] in text and "given reasons: " in text
    assert "grey pictures would score" in text and "By kind" in text


def test_scienceqa_s_columns_count_the_choices_that_are_named(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_scienceqa(tmp_path / "scienceqa")
    said = iter(["iron", "iron", "wood"])  # right answers: iron, wood, iron

    def choose(_: object, rows: list[Example], *__: object, **___: object) -> list[list[float]]:
        chosen = [next(said) for _ in rows]
        return [
            [0.9 if choice == one else 0.1 for choice in row.choices] for one, row in zip(chosen, rows, strict=True)
        ]

    monkeypatch.setattr("adapters.inference.reasoning.choose_for_examples", choose)
    found = evaluate_reasons(load_adapter(runs["both"], device="cpu", dtype="float32"), f"{folder}:test")
    assert (found["accuracy"], found["no_choice"]) == (pytest.approx(1 / 3), 0)
    assert (found["Avg"], found["IMG"], found["TXT"]) == (33.33, 50.0, 0.0)
