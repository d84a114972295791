"""Answers do not depend on their batch: mixed lengths, padding on either side, several pictures, duplicates."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.inference.answering import answer_examples
from adapters.inference.generator import Generator
from adapters.inference.request import Request
from adapters.loading.assembly import Assembly, assemble
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from qformer.generation import Generated
from qformer.model import TokenBatch

GREEDY = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answering")


@pytest.fixture(scope="module")
def clip_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    return folder / "clip"


@pytest.fixture(scope="module", params=["llama", "opt", "t5"])
def assembly(
    request: pytest.FixtureRequest, folder: Path, clip_folder: Path, language_folders: dict[str, Path]
) -> Assembly:
    """Padding is on the left for llama (chat template) and opt (learned positions), on the right for t5."""
    recipe = parse_recipe(
        {
            "vision": {"towers": [{"source": str(clip_folder)}]},
            "bridge": {"preset": "tiny"},
            "language": {"source": str(language_folders[request.param]), "quantize": "none", "lora": None},
            "train": {"seed": 5},  # random weights that tell pictures, orders and questions apart for all three LLMs
        },
        "test",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(folder / "cache"))
        assembly = assemble(recipe, dtype="float32")
    with torch.no_grad():  # a fresh model says the same about everything: make it sensitive to what it sees
        for module, factor in (
            (assembly.model.language, 6),
            (assembly.model.bridge, 8),
            (assembly.model.projection, 8),
        ):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(factor)
    return assembly


@pytest.fixture(scope="module")
def pictures(folder: Path) -> list[ImageRef]:
    refs = []
    for number in range(5):
        noise = Image.effect_noise((32, 32), 30 + 40 * number).convert("RGB")
        noise.putpixel((number, 3), (255, 0, 0))
        noise.save(folder / f"{number}.png")
        refs.append(ImageRef(f"{number}.png", path=folder / f"{number}.png"))
    return refs


@pytest.fixture(scope="module")
def examples(pictures: list[ImageRef]) -> list[Example]:
    """Questions of 1 to 40 characters about one, two or three pictures, with and without marks."""
    rng = random.Random(0)
    rows = []
    for number in range(14):
        count = (1, 1, 2, 3)[number % 4]
        question = "".join(rng.choices("abcdefgh ?", k=1 + 3 * number))
        if count == 2:
            question = f"x <image> {question} <image> y"
        rows.append(Example(tuple(rng.choices(pictures, k=count)), question, (), f"row {number}", str(number)))
    return rows


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_each_alone(assembly: Assembly, examples: list[Example], beams: int) -> None:
    decoding = replace(GREEDY, num_beams=beams)

    alone = [answer_examples(assembly, [example], "vqa", decoding=decoding)[0] for example in examples]
    together = answer_examples(assembly, examples, "vqa", decoding=decoding, batch_size=8)

    assert together == alone
    assert len(set(alone)) > 10, "the answers are too much alike to tell rows apart"


def test_the_logits_of_a_batch_are_those_of_each_alone(assembly: Assembly, examples: list[Example]) -> None:
    """Texts could agree by luck: the numbers behind them must."""
    recorded: list[torch.Tensor] = []
    head = assembly.model.language.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, __, logits: recorded.append(logits[:, -1]))
    one = replace(GREEDY, max_new_tokens=1)
    prompts = [assembly.prompts.vqa(example.question, len(example.images)) for example in examples]
    asked = [Request(prompt, example.images) for prompt, example in zip(prompts, examples, strict=True)]
    try:
        Generator(assembly)(asked, one)
        together = recorded.pop()
        alone = []
        for prompt in asked:
            Generator(assembly)([prompt], one)
            alone.append(recorded.pop())
    finally:
        hook.remove()
    expected = torch.cat(alone)

    # In fp32, sums in another order: about 1e-6 of the values.
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    apart = (expected.amax(dim=0) - expected.amin(dim=0)).max()  # between rows
    assert apart > 0.1 * expected.abs().max()


def test_a_second_question_reads_only_itself(assembly: Assembly, pictures: list[ImageRef]) -> None:
    """What a picture became is kept, within the memory allowed; answers are the same with and without."""
    read: list[int] = []
    encoded: list[int] = []
    real_read, real_vectors = assembly.model.prefill, assembly.image_embeddings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            assembly.model,
            "prefill",
            lambda batch, *rest, **more: read.append(len(batch.ids)) or real_read(batch, *rest, **more),
        )
        patch.setattr(
            assembly,
            "image_embeddings",
            lambda images, *rest: encoded.append(len(images)) or real_vectors(images, *rest),
        )

        def ask(generator: Generator, question: str, *shown: ImageRef) -> str:
            return generator([Request(assembly.prompts.vqa(question, len(shown)), shown)], GREEDY)[0].text

        keeping, forgetting = Generator(assembly), Generator(assembly, keep_bytes=0)
        first = ask(keeping, "what is it?", pictures[0])
        second = ask(keeping, "who is it?", pictures[0])
        both = ask(keeping, "who is it?", pictures[0], pictures[1])
        assert encoded == [1, 1], "a picture went through the bridge again"
        assert len(read) == (2 if assembly.model.language.can_reuse_prefix else 0)
        assert ask(forgetting, "what is it?", pictures[0]) == first
        assert ask(forgetting, "who is it?", pictures[0]) == second
        assert ask(forgetting, "who is it?", pictures[0], pictures[1]) == both
        assert sum(encoded) == 2 + 4


def test_choices_share_one_probability(assembly: Assembly, pictures: list[ImageRef]) -> None:
    """A softmax over whole answers' log-probabilities, computed here from generation's own numbers."""
    generator = Generator(assembly)
    asked = Request(assembly.prompts.vqa("what is it?"), (pictures[0],))
    said = generator([asked], GREEDY)[0]
    named = [said.text or "a", "zq", "qz"]
    (shares,) = generator.choose([asked], [named])

    assert sum(shares) == pytest.approx(1, abs=1e-5)
    ((first, second),) = generator.choose([asked], [["qz", "zq"]])
    assert first / second == pytest.approx(shares[2] / shares[1], rel=1e-3)
    assert [shares] != generator.choose([Request(asked.prompt, (pictures[1],))], [named])


def test_choices_do_not_depend_on_their_batch_nor_on_what_is_looked_at_in_one_pass(
    assembly: Assembly, pictures: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(assembly)
    asked = [
        Request(assembly.prompts.vqa(text), (pictures[n],)) for n, text in enumerate(["what?", "who was it then?"])
    ]
    choices = [["a", "long answer", "b"], ["yes", "no"]]
    alone = [generator.choose([one], [named])[0] for one, named in zip(asked, choices, strict=True)]
    for together in (generator.choose(asked, choices), generator.choose(asked[::-1], choices[::-1])[::-1]):
        for found, expected in zip(together, alone, strict=True):
            assert found == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr("adapters.inference.generator._CHOICE_TOKENS", 1)  # a row a choice, a pass a row
    for found, expected in zip(generator.choose(asked, choices), alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_prompt_is_read_once_for_all_its_choices(
    assembly: Assembly, pictures: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    if assembly.model.language.is_encoder_decoder:
        pytest.skip("an encoder-decoder reads a prompt for each choice")
    asked = Request(assembly.prompts.vqa("what is it, and what has it been before it was painted red?"), (pictures[0],))
    shapes = []
    place = assembly.model.place
    monkeypatch.setattr(
        assembly.model, "place", lambda batch, *rest: shapes.append(batch.ids.shape) or place(batch, *rest)
    )
    Generator(assembly).choose([asked], [[f"choice {number}" for number in range(8)]])
    ((rows, length),) = shapes
    assert rows == 1 and length < 3 * len(asked.prompt.ids)


def test_choosing_stops_where_nobody_waits(
    assembly: Assembly, pictures: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(assembly)
    asked = Request(assembly.prompts.vqa("what is it?"), (pictures[0],))
    monkeypatch.setattr("adapters.inference.generator._CHOICE_TOKENS", 1)
    passes: list[int] = []
    monkeypatch.setattr(generator, "_log_probs", lambda rows, _: passes.append(1) or [[0.0] * len(rows)])
    assert generator.choose([asked], [["a", "b", "c"]], stopped=lambda: len(passes) == 1) == [[1 / 3] * 3]
    assert len(passes) == 1


def test_a_beam_search_stops_where_nobody_waits(assembly: Assembly, pictures: list[ImageRef]) -> None:
    asked = Request(assembly.prompts.vqa("what is it?"), (pictures[0],))
    beams = Decoding(max_new_tokens=40, num_beams=3)
    steps: list[int] = []
    (whole,) = Generator(assembly)([asked], beams)
    (cut,) = Generator(assembly)([asked], beams, stopped=lambda: steps.append(1) or len(steps) == 3)
    assert len(steps) <= 4 and cut.tokens <= 4 < whole.tokens


def test_a_picture_that_is_forgotten_meanwhile_is_answered_about_all_the_same(
    assembly: Assembly, pictures: list[ImageRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two layers of a prompt others are answered, whose pictures may take the room of what is known."""
    if not assembly.model.language.can_reuse_prefix:
        pytest.skip("it reads each prompt whole")
    asked = [Request(assembly.prompts.vqa("what is it?"), (picture,)) for picture in pictures[:2]]
    alone = Generator(assembly)(asked, GREEDY)
    generator = Generator(assembly)
    generator([asked[0]], GREEDY)
    read = assembly.model.prefill

    def forgetful(*given: Any, **options: Any) -> Any:
        generator._kept.clear()
        return read(*given, **options)

    monkeypatch.setattr(assembly.model, "prefill", forgetful)
    assert all(prefix is not None for prefix in generator._prefixes(asked))
    generator([asked[0]], GREEDY)
    assert [one.text for one in generator(asked, GREEDY)] == [one.text for one in alone]


def test_the_picture_changes_the_answer(assembly: Assembly, pictures: list[ImageRef]) -> None:
    asked = [Example((picture,), "what?", (), "", str(n)) for n, picture in enumerate(pictures)]

    assert len(set(answer_examples(assembly, asked, "vqa", decoding=GREEDY))) > 1


def test_the_order_of_several_pictures_counts(assembly: Assembly, pictures: list[ImageRef]) -> None:
    def ask(pairs: list[tuple[ImageRef, ...]]) -> list[str]:
        return answer_examples(assembly, [Example(pair, "what?", (), "", "") for pair in pairs], "vqa", decoding=GREEDY)

    forth = list(combinations(pictures, 2))
    back = [(b, a) for a, b in forth]

    assert ask(forth + back)[: len(forth)] == ask(forth)
    assert ask(forth) != ask(back)


def test_captions_are_asked_in_their_row_s_language(assembly: Assembly, pictures: list[ImageRef]) -> None:
    asked = [
        Example((pictures[0],), "", (), "", "1", language="en"),
        Example((pictures[0],), "", (), "", "2", language="zh"),
    ]
    alone = [answer_examples(assembly, [example], "caption", decoding=GREEDY)[0] for example in asked]

    assert answer_examples(assembly, asked, "caption", decoding=GREEDY) == alone


def test_a_question_asked_twice_is_generated_once(
    assembly: Assembly, pictures: list[ImageRef], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []
    encoded: list[int] = []
    real_generate, real_vectors = assembly.model.generate, assembly.image_embeddings

    def generate(batch: TokenBatch, *rest: object, **options: object) -> Generated:
        generated.append(len(batch.ids))
        return real_generate(batch, *rest, **options)  # type: ignore[arg-type]

    def vectors(images: list, *rest: object) -> torch.Tensor:
        encoded.append(len(images))
        return real_vectors(images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(assembly.model, "generate", generate)
    monkeypatch.setattr(assembly, "image_embeddings", vectors)
    assert pictures[0].path is not None
    copy = ImageRef("copy", data=pictures[0].path.read_bytes())  # the same bytes under another name
    asked = [
        Example((pictures[0],), "what is it?", ("a",), "", "1"),
        Example((pictures[1],), "what is it?", (), "", "2"),
        Example((copy,), "what is it?", ("b",), "", "3"),
        Example((pictures[0],), "who is it??", (), "", "4"),  # as long as the others, so it shares their batch
    ]

    first, second, third, _ = answer_examples(assembly, asked, "vqa", decoding=GREEDY)

    assert generated == [3]
    assert encoded == [2]  # two pictures went through the bridge
    assert first == third
    assert first != second


def test_progress_counts_distinct_questions(assembly: Assembly, examples: list[Example]) -> None:
    seen: list[tuple[int, int]] = []

    answer_examples(
        assembly, [*examples[:5], examples[0]], "vqa", decoding=replace(GREEDY, max_new_tokens=1), batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip

    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_no_questions_no_answers(assembly: Assembly) -> None:
    assert answer_examples(assembly, [], "vqa", decoding=GREEDY) == []


def test_a_question_without_a_picture_is_answered_by_the_language_model_alone(assembly: Assembly) -> None:
    asked = [Example((), text, (), "", text) for text in ("abc", "a longer question", "abc")]
    first, _, third = answer_examples(assembly, asked, "vqa", decoding=GREEDY)

    assert first == third
