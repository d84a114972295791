"""Chain of thought through the API, on tiny adapters that learned it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from api_server import PNG, openai_client, said, served, shown, user
from openai import BadRequestError, OpenAI
from reason_client import LONGEST, ask
from reason_data import draw_reasons
from tiny import tiny_values

from adapters.finetune import finetune
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from serve.adapter import ImageInput
from serve.engine.engine import Engine
from serve.reasoning import asked_answer, asked_rationale, question_example, reason

TOKENS = 24  # of its reasons
COLOUR = "what colour?"


@pytest.fixture(scope="module")
def reasons_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_reasons(tmp_path_factory.mktemp("reasons"))


@pytest.fixture(scope="module")
def hall(
    clip_folder: Path,
    language_folders: dict[str, Path],
    reasons_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    cache_folder: Path,
) -> Iterator[Engine]:
    """An engine with an adapter of each kind; the first has learned something."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"both": ["rationale", "answer"], "thinks": ["rationale"], "direct": ["direct"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        for kind, stages in kinds.items():
            steps = 30 if kind == "both" else 1
            train = {"max_steps": steps, "validate_every": steps, "row_tokens": 500, "micro_batch_tokens": 2000}
            values = tiny_values(clip_folder, language_folders["llama"], reasons_file, **train, learning_rate=5e-3)
            values |= {"task": "reason", "reason": {"stages": stages, "rationale_tokens": TOKENS}}
            finetune(parse_recipe(values, "test"), folder / kind, device="cpu", dtype="float32", quiet=True)
        with Engine([folder / kind for kind in kinds], device="cpu", dtype="float32", offline=True) as engine:
            yield engine


@pytest.fixture(scope="module")
def client(hall: Engine) -> Iterator[OpenAI]:
    with served(hall) as url:
        yield openai_client(url)


@pytest.fixture
def red(reasons_file: Path) -> Path:
    return reasons_file.parent / "red0.png"


def expected(
    hall: Engine, pictures: ImageInput | list[Path], question: str, model: str = "both", **options: Any
) -> Any:
    return reason(hall.adapter(model), pictures, question, decoding=Decoding(max_new_tokens=LONGEST), **options)


@pytest.mark.parametrize("stream", [False, True])
def test_reasons_come_first_then_the_answer(client: OpenAI, hall: Engine, red: Path, stream: bool) -> None:
    told = ask(client, shown(red), said(COLOUR), stream=stream)
    thought = expected(hall, red, COLOUR)

    assert (told.rationale, told.text) == (thought.rationale, thought.answer)
    loaded, example = hall.adapter(), question_example(red, COLOUR)
    first = hall.submit(
        asked_rationale(loaded, example, longest=TOKENS), decoding=Decoding(max_new_tokens=TOKENS)
    ).result(60)
    asked = asked_answer(loaded, example, first.text)
    second = hall.submit(asked, decoding=Decoding(max_new_tokens=LONGEST)).result(60)
    assert told.confidence == pytest.approx(second.confidence, rel=1e-4)
    assert told.usage.completion_tokens == first.tokens + second.tokens
    assert told.usage.prompt_tokens == first.prompt_tokens + second.prompt_tokens
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_choices_and_context_belong_to_the_question(client: OpenAI, hall: Engine, red: Path, stream: bool) -> None:
    extra = {"answer_choices": ["red", " green ", "blue", "black"], "context": "A square."}
    told = ask(client, shown(red), said(COLOUR), stream=stream, extra=extra)
    thought = expected(hall, red, COLOUR, choices=["red", "green", "blue", "black"], context="A square.")
    plain = ask(client, shown(red), said(COLOUR))

    assert thought.rationale.startswith("It")  # it was asked as it has learned to be
    assert (told.rationale, told.text) == (thought.rationale, thought.answer)
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 2 * len(
        "Choices: red, green, blue Context: A square."
    )


def test_several_pictures_keep_their_places(client: OpenAI, hall: Engine, reasons_file: Path) -> None:
    first, second = (reasons_file.parent / name for name in ("red0.png", "blue1.png"))
    told = ask(client, said("is"), shown(first), said("like"), shown(second), said("?"))
    thought = expected(hall, [first, second], "is<image>like<image>?")

    assert (told.rationale, told.text) == (thought.rationale, thought.answer)


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_that_answers_directly_gives_no_reasons(
    client: OpenAI, hall: Engine, red: Path, stream: bool
) -> None:
    extra = {"answer_choices": ["yes", "no"]}
    told = ask(client, shown(red), said("is it red?"), model="direct", stream=stream, extra=extra)
    thought = expected(hall, red, "is it red?", "direct", choices=["yes", "no"])

    assert thought.rationale is None
    assert (told.rationale, told.text) == (None, thought.answer)
    assert told.usage.completion_tokens <= LONGEST


def test_who_asks_together_is_answered_as_alone(client: OpenAI, reasons_file: Path) -> None:
    asked = [
        (reasons_file.parent / f"{colour}{shade}.png", f"{COLOUR}{'?' * shade}")
        for colour in ("red", "blue")
        for shade in range(3)
    ]

    def one(number: int) -> tuple[str | None, str]:
        picture, question = asked[number]
        told = ask(client, shown(picture), said(question), stream=number % 2 == 0)
        return told.rationale, told.text

    single = [one(number) for number in range(len(asked))]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(one, range(len(asked)))) == single


@pytest.mark.parametrize(
    ("changes", "extra", "param", "says"),
    [
        ({"model": "thinks"}, {}, "reason", "'thinks' was taught rationale alone"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")]}, {}, "messages", "there is one"),
        ({"messages": [{"role": "system", "content": "a"}, user("b")]}, {}, "messages", "goes in context"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, "messages", "the user's"),
        ({"messages": [user(said("a<image>b<image>"), shown(PNG))]}, {}, "messages", "2 <image> marks but 1 images"),
        ({"messages": [user("x" * 10_000)]}, {}, "messages", "begin anew"),
        ({"stop": "."}, {}, "stop", "leave it out"),
        ({}, {"answer_choices": ["red"]}, "answer_choices", "1 given"),
        ({}, {"context": "x" * 200_000}, "messages", "more than 200,000 characters"),
        ({}, {"context": ["x"]}, "context", "valid string"),
        ({}, {"reason": "yes"}, "reason", "valid boolean"),
        ({}, {"reason": False, "context": "A square."}, "context", "only where reason is true"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_told(
    client: OpenAI, changes: dict[str, Any], extra: dict[str, Any], param: str, says: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError, match=says) as caught:
        ask(client, "what?", extra=extra, stream=stream, **changes)

    assert caught.value.param == param
