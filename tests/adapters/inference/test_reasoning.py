"""Two stages over many questions: what each stage is given, who answers, and what the controls take away."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef, blank_image
from adapters.data.prompts import PromptStyle
from adapters.inference import reasoning
from adapters.inference.reasoned_answer import ReasonedAnswer, ballots, elect
from adapters.inference.reasoning import reason_examples, reasoning_mode, validate_reasons
from adapters.inference.reasoning_controls import CONTROLS, blanked, reason_controls, shuffled
from adapters.inference.request import Completion
from adapters.recipe import Recipe, parse_recipe
from qformer.decoding import Decoding
from qformer.errors import UserError


def recipe_of(*stages: str, task: str = "reason") -> Recipe:
    values: dict[str, Any] = {
        "task": task,
        "vision": {"towers": [{"source": "tower"}]},
        "language": {"source": "llm"},
        "reason": {"stages": list(stages or ("rationale", "answer")), "rationale_tokens": 77},
    }
    return parse_recipe(values, "test")


def assembly_of(*stages: str, letters: bool = False, task: str = "reason") -> Any:
    prompts = SimpleNamespace(style=PromptStyle(letters=letters))
    recipe = recipe_of(*stages, task=task)
    return SimpleNamespace(
        recipe=recipe,
        prompts=prompts,
        reasoning_stages=recipe.reasoning_stages,
        rationale_tokens=recipe.reason.rationale_tokens,
    )


@dataclass
class Model:
    """Stands in for the language model: says what it was asked, and of which picture."""

    calls: list[tuple[Any, str, Decoding]] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)

    def think(self, assembly: Any, examples: list[Example], task: str, **options: Any) -> list[str]:
        self._called(assembly, examples, task, **options)
        seed = options["decoding"].seed
        sampled = "" if seed is None else f", {seed}"
        return [f"{example.question} of {example.images[0].label}{sampled}" for example in examples]

    def answer(self, assembly: Any, examples: list[Example], task: str, **options: Any) -> list[Completion]:
        self._called(assembly, examples, task, **options)
        texts = [
            self.answers.get(example.question, f"{example.images[0].label} [{example.rationale}]")
            for example in examples
        ]  # fmt: skip
        return [Completion(text, 1, True, 0.0, ((0, 0.0),)) for text in texts]

    def choose(self, assembly: Any, examples: list[Example], task: str, **options: Any) -> list[list[float]]:
        self._called(assembly, examples, task, decoding=None, **options)
        return [self.shares[example.rationale] for example in examples]

    def _called(self, assembly: Any, examples: list[Example], task: str, **options: Any) -> None:
        assert all(example.task is None for example in examples)  # its own task would go first
        self.calls.append((assembly, task, options["decoding"]))
        if options["on_progress"]:
            options["on_progress"](1, 2)
            options["on_progress"](2, 2)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(reasoning, "answer_examples", model.think)
    monkeypatch.setattr(reasoning, "reply_to_examples", model.answer)
    monkeypatch.setattr(reasoning, "choose_for_examples", model.choose)
    return model


def row(question: str, picture: str, **fields: Any) -> Example:
    ref = ImageRef(picture, data=picture.encode())
    return Example((ref,), question, ("yes",), "", question, task="reason", rationale=f"given {question}", **fields)


ROWS = [row("q1", "a"), row("q2", "b"), row("q3", "a")]


# -- who says what ---------------------------------------------------------------------------------------------------


def test_the_answer_is_given_from_the_model_s_own_reasons(model: Model) -> None:
    assembly = assembly_of()
    assert reason_examples(assembly, ROWS) == [
        ReasonedAnswer("q1 of a", "a [q1 of a]", 1.0),
        ReasonedAnswer("q2 of b", "b [q2 of b]", 1.0),
        ReasonedAnswer("q3 of a", "a [q3 of a]", 1.0),
    ]
    assert [(who is assembly, task) for who, task, _ in model.calls] == [(True, "rationale"), (True, "answer")]
    assert [decoding.max_new_tokens for _, _, decoding in model.calls] == [77, 32]  # the recipe's, and the default


def test_lengths_and_beams_may_be_set(model: Model) -> None:
    reason_examples(assembly_of(), ROWS, decoding=Decoding(max_new_tokens=4, num_beams=3), rationale_tokens=9)
    assert [decoding for *_, decoding in model.calls] == [
        Decoding(max_new_tokens=9, num_beams=3),
        Decoding(max_new_tokens=4, num_beams=3),
    ]


def test_another_adapter_may_answer(model: Model) -> None:
    first, second = assembly_of("rationale"), assembly_of("answer")
    assert reason_examples(first, ROWS[:1], answer_adapter=second) == [ReasonedAnswer("q1 of a", "a [q1 of a]", 1.0)]
    assert [who for who, *_ in model.calls] == [first, second]


def test_one_that_was_taught_to_answer_directly_gives_no_reasons(model: Model) -> None:
    for assembly in (assembly_of("direct"), assembly_of(task="vqa")):
        model.calls.clear()
        assert reason_examples(assembly, ROWS[:1]) == [ReasonedAnswer(None, "a []", 1.0)]
        assert [task for _, task, _ in model.calls] == ["answer"]


def test_given_reasons_take_the_place_of_its_own(model: Model) -> None:
    assert reason_examples(assembly_of("answer"), ROWS[:2], rationales=["So.", ""]) == [
        ReasonedAnswer("So.", "a [So.]", 1.0),
        ReasonedAnswer(None, "b []", 1.0),
    ]
    assert len(model.calls) == 1


def test_of_choices_the_likeliest_is_the_answer(model: Model) -> None:
    rows = [replace(row("q1", "a"), choices=("red", "blue")), ROWS[1]]
    model.shares = {"q1 of a": [0.25, 0.75]}
    assert reason_examples(assembly_of(letters=True), rows) == [
        ReasonedAnswer("q1 of a", "blue", 0.75, {"blue": 0.75, "red": 0.25}),
        ReasonedAnswer("q2 of b", "b [q2 of b]", 1.0),
    ]


def test_several_reasons_are_sampled_and_their_choices_weighed(model: Model) -> None:
    model.shares = {"q1 of a, 0": [0.9, 0.1], "q1 of a, 1": [0.2, 0.8], "q1 of a, 2": [0.3, 0.7]}
    (thought,) = reason_examples(assembly_of(), [replace(row("q1", "a"), choices=("red", "blue"))], votes=3)
    assert (thought.answer, thought.rationale) == ("blue", "q1 of a, 1")  # the reasons that speak most clearly for it
    assert thought.choices == {"blue": pytest.approx(1.6 / 3), "red": pytest.approx(1.4 / 3)}
    assert thought.confidence == thought.choices["blue"]
    sampled = [decoding for _, task, decoding in model.calls if task == "rationale"]
    assert sampled == [Decoding(max_new_tokens=77, temperature=0.7, seed=seed) for seed in (0, 1, 2)]


def test_written_answers_are_counted() -> None:
    votes = [ReasonedAnswer(why, answer, 0.5) for why, answer in (("a", "Two."), ("b", "three"), ("c", "two"))]
    assert elect(votes) == ReasonedAnswer("a", "Two.", 2 / 3)
    assert elect(votes[1:]) == ReasonedAnswer("b", "three", 1 / 2)  # among equals the first
    assert elect(votes[:1]) == votes[0]


@pytest.mark.parametrize(
    ("decoding", "thinks", "says"),
    [
        (Decoding(num_beams=3), True, "--votes 2 samples reasons, and beams do not sample"),
        (Decoding(), False, "--votes 2: the adapter answers directly"),
    ],
)
def test_votes_that_would_be_alike_are_refused(decoding: Decoding, thinks: bool, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ballots(decoding, 2, thinks=thinks)


def test_a_seed_and_a_temperature_of_one_s_own_are_taken() -> None:
    assert ballots(Decoding(seed=5, temperature=1.0), 2, thinks=True) == [
        Decoding(seed=5, temperature=1.0),
        Decoding(seed=6, temperature=1.0),
    ]


def test_progress_counts_both_stages_as_one(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    reason_examples(assembly_of(), [*ROWS, ROWS[0]], on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 8), (4, 8), (6, 8), (8, 8)]
    seen.clear()
    reason_controls(assembly_of(), ROWS, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (21, 21) and seen == sorted(seen)


def test_no_questions_no_thoughts(model: Model) -> None:
    assert reason_examples(assembly_of(), []) == []


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (("rationale",), None, "--adapter: it was taught rationale alone"),
        (("answer",), None, "--adapter: it was taught answer alone"),
        (("direct",), ("answer",), "--adapter: it was taught direct alone (reason.stages), so it gives no reasons"),
        (("rationale",), ("direct",), "--answer-adapter: it was taught direct alone (reason.stages), so it can't"),
    ],
)
def test_a_missing_stage_is_told(first: tuple[str, ...], second: tuple[str, ...] | None, says: str) -> None:
    with pytest.raises(UserError) as caught:
        reasoning_mode(first, second)
    assert str(caught.value).startswith(says) and "name" in str(caught.value)


# -- controls --------------------------------------------------------------------------------------------------------


def test_what_each_control_takes_away(model: Model) -> None:
    found = reason_controls(assembly_of(), ROWS)
    assert list(found) == list(CONTROLS)
    assert {name: thoughts[0] for name, thoughts in found.items()} == {
        "direct": ReasonedAnswer(None, "a []", 1.0),
        "blind_rationale": ReasonedAnswer("q1 of blank", "a [q1 of blank]", 1.0),
        "gold_rationale": ReasonedAnswer("given q1", "a [given q1]", 1.0),
        "blank_images": ReasonedAnswer("q1 of blank", "blank [q1 of blank]", 1.0),
        "shuffled_images": ReasonedAnswer("q1 of b", "b [q1 of b]", 1.0),
    }
    assert found["shuffled_images"][1].answer == "a [q2 of a]"


def test_of_a_direct_adapter_only_pictures_can_be_taken(model: Model) -> None:
    found = reason_controls(assembly_of("direct"), ROWS)
    assert {name: thoughts[0].answer for name, thoughts in found.items()} == {
        "blank_images": "blank []",
        "shuffled_images": "b []",
    }


def test_without_given_reasons_there_is_no_control_of_them(model: Model) -> None:
    assert "gold_rationale" not in reason_controls(assembly_of(), [replace(one, rationale="") for one in ROWS])


def test_shuffling_leaves_no_row_its_picture_and_keeps_pairs_together() -> None:
    names = "abcdefg"
    rows = [row(f"{name}{number}", name) for name in names for number in range(3)]
    swapped = shuffled(rows)
    assert [one.question for one in swapped] == [one.question for one in rows]
    labels = {
        old.images[0].label: new.images[0].label for old, new in zip(rows, swapped, strict=True)
    }  # fmt: skip
    assert sorted(labels.values()) == sorted(names)  # each is used
    assert all(old != new for old, new in labels.items())
    assert all(new.images[0].label == labels[old.images[0].label] for old, new in zip(rows, swapped, strict=True))
    assert shuffled(rows) == swapped


def test_rows_of_several_pictures_change_with_rows_of_as_many() -> None:
    two = [replace(one, images=one.images * 2) for one in ROWS]
    assert [len(one.images) for one in shuffled([*ROWS, *two])] == [1, 1, 1, 2, 2, 2]


def test_one_picture_cannot_be_shuffled(model: Model) -> None:
    with pytest.raises(UserError, match="shuffling needs two"):
        reason_controls(assembly_of(), [ROWS[0], ROWS[2]])
    assert not model.calls  # told before anything is asked


def test_the_grey_picture_is_the_one_of_all_controls() -> None:
    assert blanked(ROWS[0]).images == (blank_image(),)


# -- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "expected", "asked"),
    [
        (("rationale", "answer"), {"accuracy", "rationale_ROUGE-L"}, ["rationale", "answer"]),
        (("rationale",), {"rationale_ROUGE-L"}, ["rationale"]),
        (("answer",), {"accuracy"}, ["answer"]),
        (("direct",), {"accuracy"}, ["answer"]),
    ],
)
def test_validation_scores_what_is_taught(
    model: Model, stages: tuple[str, ...], expected: set[str], asked: list[str]
) -> None:
    rows = [replace(row("q1", "a"), steps=1), replace(row("q2", "b"), steps=3)]
    model.answers = {"q1": "no", "q2": "Yes."}
    scores = validate_reasons(assembly_of(*stages), rows)
    assert set(scores) == {f"{name}{end}" for name in expected for end in ("", "_single_step", "_multi_step")}
    if "accuracy" in expected:
        assert (scores["accuracy"], scores["accuracy_single_step"], scores["accuracy_multi_step"]) == (0.5, 0.0, 1.0)
    if "rationale_ROUGE-L" in expected:  # "q1 of a" against "given q1"
        assert 0 < scores["rationale_ROUGE-L"] < 1
    assert [task for _, task, _ in model.calls] == asked
