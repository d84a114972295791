"""Answers held to a form by a random model: whatever it would write, what comes is of that form, and whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qformer.continuous import AnswerBatch, AnswerRow, read_prompts
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.grammar import AnswerGrammar, choice_grammar, regex_grammar, schema_grammar
from qformer.language import LanguageModel
from qformer.language_loading import load_language_model
from qformer.token_rules import TokenRules

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "note": {"type": "string"},
        "parts": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}},
                                             "required": ["name"], "additionalProperties": False}},
    },
    "required": ["shape", "count", "note", "parts"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def language(language_folders: dict[str, Path]) -> LanguageModel:
    return load_language_model(language_folders["llama"], quantize="none", compute_dtype=torch.float32)


def write(language: LanguageModel, grammar: AnswerGrammar, tokens: int, count: int = 16) -> list[str]:
    """Answers drawn hot by a model that knows nothing."""
    rows = [
        AnswerRow(Decoding(max_new_tokens=tokens, temperature=2.0, seed=seed), TokenRules(grammar=grammar))
        for seed in range(count)
    ]
    batch = AnswerBatch(language)
    ids = torch.randint(5, 100, (count, 4), generator=torch.Generator().manual_seed(0))
    batch.join(rows, read_prompts(language, list(language.embed(ids)), [None] * count))
    while batch.rows:
        for row in rows:
            row.done = row.ids[-1] in language.stop_ids or len(row.ids) == tokens
        batch.step()
    assert all(row.ids[-1] in language.stop_ids for row in rows), "an answer was cut off"
    return [language.tokenizer.decode(row.ids[:-1]).strip() for row in rows]


@pytest.mark.parametrize("spare", [0, 150])
def test_json_of_a_schema_is_whole_however_short_it_must_be(language: LanguageModel, spare: int) -> None:
    grammar = schema_grammar(language, SCHEMA)
    assert grammar.shortest is not None
    found = [json.loads(text) for text in write(language, grammar, grammar.shortest + spare)]

    for value in found:
        assert set(value) == {"shape", "count", "note", "parts"}
        assert value["shape"] in ("circle", "square") and 0 <= value["count"] <= 20
        assert all(set(part) == {"name"} for part in value["parts"])
    if spare:
        assert len({json.dumps(value) for value in found}) > 8


def test_a_regular_expression_and_choices(language: LanguageModel) -> None:
    pattern = r"[a-z]{2,4}/\d{2}"
    assert all(re.fullmatch(pattern, text) for text in write(language, regex_grammar(language, pattern), 20))
    choices = ["a red one", 'the "blue" one', "a red herring"]
    assert set(write(language, choice_grammar(language, choices), 40)) <= set(choices)


@pytest.mark.parametrize(
    ("make", "of", "says"),
    [
        (regex_grammar, "(a", "unclosed group"),
        (regex_grammar, r"(?=a)b", "look-around"),
        (schema_grammar, {"type": "strang"}, "Invalid type: strang"),
        (schema_grammar, {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_form_that_cannot_be_held_is_told(language: LanguageModel, make: Any, of: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(language, of)
