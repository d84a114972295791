"""Whole pictures held out: none is on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import VQA
from tiny import draw_captions, draw_data

from adapters.data.examples import DataSet, Example, merge, mix, split_by_image
from adapters.data.reading import read_data
from adapters.recipe import load_recipe, parse_recipe
from adapters.training.setup import read_split
from qformer.errors import UserError


def rows_of(data: DataSet) -> set[str]:
    return {example.id for example in data.examples}


def images_of(data: DataSet) -> set[str]:
    return {image.digest() for example in data.examples for image in example.images}


def test_split_holds_out_whole_pictures(jsonl: Callable[..., Path], folder: Path) -> None:
    (folder / "twin.png").write_bytes((folder / "b.png").read_bytes())  # the same picture under another name
    names = ["a.png", "b.png", "c.png", "d.png", "twin.png"]
    rows = [{"image": name, "question": f"{turn}?", "answer": "x"} for turn in range(3) for name in names]
    data = read_data(jsonl(*rows))
    seen = set()
    for seed in range(20):
        train, val = split_by_image(data, 0.25, seed)
        assert rows_of(train) | rows_of(val) == rows_of(data) and not rows_of(train) & rows_of(val)
        assert len(images_of(val)) == 1 and len(images_of(train)) == 3
        assert not images_of(train) & images_of(val)
        assert train.fingerprint != val.fingerprint != data.fingerprint
        assert split_by_image(data, 0.25, seed)[1] == val
        seen |= images_of(val)
    assert len(seen) == 4  # the seed matters
    shuffled = read_data(jsonl(*rows[::-1]))
    assert images_of(split_by_image(shuffled, 0.25, 3)[1]) == images_of(split_by_image(data, 0.25, 3)[1])


def test_bad_rows_stay_with_the_first_part(jsonl: Callable[..., Path]) -> None:
    data = read_data(jsonl(VQA, "broken", VQA | {"image": "b.png"}), skip_bad_rows=True)
    train, val = split_by_image(data, 0.5, 0)
    assert (train.skipped, val.skipped) == (data.skipped, ())
    assert len(data.skipped) == 1


def test_split_keeps_joined_pictures_together(jsonl: Callable[..., Path]) -> None:
    data = read_data(jsonl(*(VQA | {"image": name} for name in ("a.png", "b.png", "c.png", "d.png"))))
    a, b, c, d = (example.images[0] for example in data.examples)
    pairs = [Example((x, y), "?", ("x",), "", "1") for x, y in ((a, b), (b, c), (d, d))]
    joined = DataSet("pairs", "vqa", tuple(pairs), "sha256:x")
    for seed in range(6):
        train, val = split_by_image(joined, 0.5, seed)
        assert not images_of(train) & images_of(val)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 5])
def test_split_refuses_a_bad_fraction(fraction: float, jsonl: Callable[..., Path]) -> None:
    data = read_data(jsonl(VQA, VQA | {"image": "b.png"}))
    with pytest.raises(UserError, match="between 0 and 1"):
        split_by_image(data, fraction, 0)


def test_split_needs_two_pictures(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="at least 2"):
        split_by_image(read_data(jsonl(VQA, VQA)), 0.1, 0)
    train, val = split_by_image(read_data(jsonl(VQA, VQA | {"image": "b.png"})), 0.001, 0)
    assert len(train.examples) == len(val.examples) == 1


def test_several_files_are_learned_from_together(tmp_path: Path, cache_here: Path) -> None:
    asked = read_data(draw_data(tmp_path))
    captions = read_data(draw_captions(tmp_path))
    both = merge([asked, captions])
    assert both.task == "mixed" and len(both.examples) == 24 + 12
    assert [e.task for e in both.examples] == ["vqa"] * 24 + ["caption"] * 12
    assert both.fingerprint not in (asked.fingerprint, captions.fingerprint)
    alone = merge([asked])
    assert alone.fingerprint == asked.fingerprint and {e.task for e in alone.examples} == {"vqa"}
    assert merge([asked, asked]).task == "vqa"
    train, held_out = split_by_image(both, 0.25, 0)
    seen, unseen = ({e.images[0].digest() for e in part.examples} for part in (train, held_out))
    assert not seen & unseen  # a picture is held out of every file
    assert {e.task for e in held_out.examples} == {"vqa", "caption"}


# -- mixtures ----------------------------------------------------------------------------------------------------------


def test_shares_are_kept_and_no_row_is_left_out(jsonl: Callable[..., Path]) -> None:
    small = read_data(jsonl(*(VQA | {"question": f"{n}?"} for n in range(3))))
    large = read_data(jsonl(*(VQA | {"question": f"{n}!"} for n in range(10))))
    first, second = mix([small, large], [1, 2])
    assert (len(first.examples), len(second.examples)) == (5, 10)
    assert {row.question for row in first.examples} == {"0?", "1?", "2?"}
    assert len({(row.question, row.turn) for row in first.examples}) == 5
    assert [row.question for row in second.examples] == [row.question for row in large.examples]
    assert mix([small, large], [1, 2])[0].examples == first.examples
    assert [len(part.examples) for part in mix([small, large], [0.75, 0.25])] == [30, 10]
    assert [len(part.examples) for part in mix([small, large], [0.01, 0.99])] == [3, 297]


def test_a_recipe_gives_shares(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    draw_data(tmp_path)
    draw_captions(tmp_path)
    values = load_recipe("domain_cpu").model_dump()
    files = [{"file": str(tmp_path / "data.jsonl"), "share": 3}, {"file": str(tmp_path / "captions.jsonl"), "share": 1}]
    values |= {"task": "mixed"}
    values["data"] |= {"train": files, "val": str(tmp_path / "data.jsonl")}
    train, _ = read_split(parse_recipe(values, "test"))
    counted = Counter(row.task for row in train.examples)
    assert counted["vqa"] == 3 * counted["caption"] and counted["caption"] == 12
    for wrong, words in (
        ([files[0], {"file": "x.jsonl"}], "give each file a share, or none"),
        ([files[0] | {"repeat": 2}], "a share and a repeat contradict each other"),
    ):
        values["data"]["train"] = wrong
        with pytest.raises(UserError, match=words):
            parse_recipe(values, "test")
    values["data"] |= {"train": files, "val": files}
    with pytest.raises(UserError, match="validation takes each row once"):
        parse_recipe(values, "test")
