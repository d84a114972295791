"""Self-critical training: what is sampled, what it is weighed by, and that a run of it can be stopped."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import draw_captions, draw_data, tiny_values

from adapters import finetune as module
from adapters.data.batches import Step, plan_validation, tokenise
from adapters.data.examples import DataSet, merge
from adapters.data.reading import read_data
from adapters.evaluation.caption_tokens import caption_tokens
from adapters.evaluation.captions import cider
from adapters.finetune import finetune
from adapters.loading.assembly import Assembly, assemble
from adapters.recipe import parse_recipe
from adapters.training.self_critical import SelfCriticalSampler, greedy_cider
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def values(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Any:
    given: Any = tiny_values(vision_folder, language_folders["llama"], draw_captions(tmp_path / "data"))
    given["task"] = "caption"
    given["train"] |= {"self_critical": 3, "row_tokens": 256, "micro_batch_tokens": 512}
    return given


@pytest.fixture
def assembly(values: Any) -> Assembly:
    return assemble(parse_recipe(values, "test"), dtype="float32")


@pytest.fixture
def mixed(tmp_path: Path) -> DataSet:
    """Captions, and questions about the same pictures."""
    captions, questions = draw_captions(tmp_path / "data"), draw_data(tmp_path / "data")
    return merge([read_data(captions), read_data(questions)])


def step_of(assembly: Assembly, data: DataSet) -> Step:
    pictures = tokenise(data, assembly.prompts, max_tokens=500)
    return Step(plan_validation(pictures, row_tokens=256).rows[:4])


def test_captions_are_sampled_and_weighed_and_other_answers_stay(assembly: Assembly, mixed: DataSet) -> None:
    torch.manual_seed(3)
    critic = SelfCriticalSampler(assembly, mixed, 3)
    before = step_of(assembly, mixed)
    after, reward = critic.rewrite(before)
    stops = set(assembly.model.language.stop_ids)
    rewards = []
    for old, new in zip(before.rows, after.rows, strict=True):
        sampled = [branch for branch in new.packed_answers if branch.caption is not None]
        assert len(sampled) == 3 and (new.images, new.shared) == (old.images, old.shared)
        assert [one for one in new.packed_answers if one.caption is None] == [
            one for one in old.packed_answers if one.caption is None
        ]
        own = [critic.reward(branch.answer, new.images, "en") for branch in sampled]
        rewards += own
        for branch, mine in zip(sampled, own, strict=True):
            assert branch.weight == pytest.approx(mine - (sum(own) - mine) / 2)
            assert 1 <= len(branch.answer) <= 30
            assert not stops & set(branch.answer[:-1])
        assert branch.own == old.packed_answers[0].own
    assert reward == pytest.approx(sum(rewards) / len(rewards))
    assert assembly.model.training
    torch.manual_seed(3)
    assert critic.rewrite(before) == (after, reward)  # by torch's chances, which a state keeps


def test_the_reward_is_cider_with_the_end_as_a_word(assembly: Assembly, mixed: DataSet) -> None:
    critic = SelfCriticalSampler(assembly, mixed, 2)
    group_captions = [example for example in mixed.examples if example.task == "caption"]
    references = [[(*caption_tokens(text, "en"), "<end>") for text in example.answers] for example in group_captions]
    example = group_captions[4]
    for text, ended in ((example.answers[0], True), (example.answers[0], False), ("a square", True)):
        ids = assembly.prompts.answer_ids(text)
        assert ids[-1] in assembly.model.language.stop_ids
        said = (*caption_tokens(text, "en"), *(["<end>"] if ended else []))
        expected = cider([said if row == 4 else () for row in range(len(references))], references)[4]
        assert critic.reward(ids if ended else ids[:-1], example.images, "en") == pytest.approx(expected)
    whole = assembly.prompts.answer_ids(example.answers[0])
    assert critic.reward(whole, example.images, "en") > critic.reward(whole[:-1], example.images, "en") > 0


def test_weights_of_siblings_cancel_out_and_equal_ones_teach_nothing(
    assembly: Assembly, mixed: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = SelfCriticalSampler(assembly, mixed, 4)
    found = iter([0.4, 0.1, 0.0, 0.9] * 4)
    monkeypatch.setattr(critic, "reward", lambda *_: next(found))
    after, reward = critic.rewrite(step_of(assembly, mixed))
    assert reward == pytest.approx(0.35)
    for row in after.rows:
        weights = [branch.weight for branch in row.packed_answers if branch.caption is not None]
        assert weights == pytest.approx([0.4 - 1 / 3, 0.1 - 1.3 / 3, -1.4 / 3, 0.9 - 0.5 / 3])
    monkeypatch.setattr(critic, "reward", lambda *_: 0.7)
    after, _ = critic.rewrite(step_of(assembly, mixed))
    assert all(b.weight == pytest.approx(0) for row in after.rows for b in row.packed_answers if b.caption is not None)


def test_a_run_tells_its_reward_chooses_by_cider_and_goes_on_where_it_stopped(
    values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(values, "test")
    whole = finetune(recipe, tmp_path / "whole", dtype="float32", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [("reward" in line, "val_CIDEr" in line) for line in lines] == [
        (True, False), (True, False), (True, False), (False, True),
    ] * 2  # fmt: skip
    assert whole.metrics["val_CIDEr"] == max(line["val_CIDEr"] for line in lines if "val_CIDEr" in line)

    short = parse_recipe(values | {"train": values["train"] | {"validate_every": 2}}, "test")
    first = finetune(short, tmp_path / "unbroken", dtype="float32", quiet=True)
    stopped = finetune_until(short, tmp_path / "broken", monkeypatch)
    assert not stopped.finished
    again = finetune(short, tmp_path / "broken", dtype="float32", quiet=True, resume=True)
    assert again.steps == first.steps and again.metrics["val_CIDEr"] == first.metrics["val_CIDEr"]
    states = [(tmp_path / name / "last" / "bridge.safetensors").read_bytes() for name in ("unbroken", "broken")]
    assert states[0] == states[1]


def finetune_until(recipe: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that Ctrl-C stops at its first validation after the check before training."""
    validate, calls = module.validate, []

    def press_ctrl_c(*args: Any, **options: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args, **options)

    monkeypatch.setattr(module, "validate", press_ctrl_c)
    stopped = finetune(recipe, out, dtype="float32", quiet=True)
    monkeypatch.setattr(module, "validate", validate)
    return stopped


def test_greedy_cider_is_the_mean_over_languages(
    assembly: Assembly, mixed: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [example for example in mixed.examples if example.task == "caption"]
    foreign = [replace(example, language="zh", answers=("红色", "红色的")) for example in captions]
    monkeypatch.setattr(
        "adapters.training.self_critical.answer_examples",
        lambda _, asked, *__, **___: [one.answers[0] if one.language == "en" else "" for one in asked],
    )
    english = greedy_cider(assembly, captions, "mixed")
    assert english > 0
    assert greedy_cider(assembly, [*captions, *foreign], "mixed") == pytest.approx(english / 2)
    assert greedy_cider(assembly, [], "mixed") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"self_critical": 1}, "take at least 2"),
        ({"task": "vqa"}, "have no captions"),
        ({"language": "t5"}, "for causal LLMs"),
    ],
)
def test_what_cannot_be_weighed_is_told(
    values: Any, change: dict[str, Any], said: str, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    if "self_critical" in change:
        values["train"] |= change
    if "task" in change:
        values["task"], values["data"]["train"] = "vqa", str(draw_data(tmp_path / "data"))
    if "language" in change:
        values["language"]["source"] = str(language_folders["t5"])
    with pytest.raises(UserError, match=said) as raised:
        finetune(parse_recipe(yaml.safe_load(yaml.safe_dump(values)), "test"), tmp_path / "out", quiet=True)
    assert "train.self_critical=" in str(raised.value)
