"""Caption scores against the official COCO scorer's, recorded in a fixture, and against values worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters.evaluation import java_scores as java
from adapters.evaluation.caption_tokens import caption_tokens
from adapters.evaluation.captions import bleu, cider, rouge_l, score_captions
from qformer.errors import UserError

FLICKR8K = Path(__file__).resolve().parents[4] / "shared" / "data" / "flickr8k"
KEYS = ["n", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    """Made-up captions with the official tokens and scores; scripts/make_caption_fixture.py writes them."""
    return json.loads((Path(__file__).parent / "fixtures" / "captions.json").read_text(encoding="utf-8"))


def words(*captions: str) -> list[list[str]]:
    return [caption.split() for caption in captions]


# ---- tokens


def test_tokens_are_the_official_ones(official: dict[str, Any]) -> None:
    pairs = [(sentence["text"], sentence["tokens"]) for sentence in official["sentences"]]
    for picture in official["pictures"]:
        pairs.append((picture["prediction"], picture["prediction_tokens"]))
        pairs += zip(picture["references"], picture["reference_tokens"], strict=True)
    assert len(pairs) == 286
    assert [(text, caption_tokens(text)) for text, _ in pairs] == [(text, tokens.split()) for text, tokens in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
def test_tokens_are_the_official_ones_over_flickr8k(split: str) -> None:
    path = FLICKR8K / f"captions_{split}.jsonl"
    if not path.is_file() or not shutil.which("java") or not importlib.util.find_spec("pycocoevalcap"):
        pytest.skip("needs Flickr8k's captions, Java and pycocoevalcap")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = path.read_text(encoding="utf-8").splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    found = PTBTokenizer().tokenize({row: [{"caption": caption}] for row, caption in enumerate(captions)})
    differ = [caption for row, caption in enumerate(captions) if caption_tokens(caption) != found[row][0].split()]
    assert differ == []


def test_chinese_is_counted_in_characters() -> None:
    assert caption_tokens("一个穿T恤的男孩,3只狗。", "zh") == list("一个穿t恤的男孩3只狗")
    assert caption_tokens("“iPhone 15”和 wi-fi……", "zh") == ["iphone", "15", "和", "wi-fi"]
    assert caption_tokens("。!", "zh") == []


def test_an_unknown_language_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match='language "fr": captions are scored in en and zh only'):
        score_captions(["un chien"], [["un chien"]], language="fr")


# ---- scores


def test_scores_are_the_official_ones(official: dict[str, Any]) -> None:
    pictures = official["pictures"]
    scores = score_captions([p["prediction"] for p in pictures], [p["references"] for p in pictures])
    assert list(scores) == KEYS
    assert scores["n"] == 40
    assert {key: scores[key] for key in KEYS[1:]} == pytest.approx(
        {key: official["scores"][key] for key in KEYS[1:]}, abs=1e-9
    )


def test_scores_of_each_picture_are_the_official_ones(official: dict[str, Any]) -> None:
    pictures = official["pictures"]
    said = words(*(p["prediction_tokens"] for p in pictures))
    given = [words(*p["reference_tokens"]) for p in pictures]
    assert cider(said, given) == pytest.approx([p["CIDEr"] for p in pictures], abs=1e-9)
    assert rouge_l(said, given) == pytest.approx([p["ROUGE-L"] for p in pictures], abs=1e-9)


def test_bleu_by_hand() -> None:
    # the example of Papineni et al. 2002, section 2.1: two of seven words count, and no pair of words
    said, given = words("the the the the the the the"), [words("the cat is on the mat", "there is a cat on the mat")]
    assert bleu(said, given) == pytest.approx([2 / 7, 0, 0, 0], abs=1e-6)
    # all of it is right, but half as long: exp(1 - 4/2)
    assert bleu(words("a b"), [words("a b c d")])[:2] == pytest.approx([math.exp(-1)] * 2, abs=1e-8)
    # references of two and of four words are equally close to three: the shorter counts, so nothing is taken off
    assert bleu(words("a b c"), [words("a b c d", "a b")])[0] == pytest.approx(1, abs=1e-8)
    # precision is the corpus's, not the mean of the sentences': 1 + 0 of 1 + 3 words
    assert bleu(words("a", "x y z"), [words("a"), words("b c d")])[0] == pytest.approx(1 / 4, abs=1e-8)


def test_rouge_l_by_hand() -> None:
    # the example of Lin 2004, section 3: three and two words in order, of four
    given = words("police killed the gunman")
    assert rouge_l(words("police kill the gunman", "the gunman kill police"), [given, given]) == [
        pytest.approx(0.75),
        pytest.approx(0.5),
    ]
    # precision 1, recall 1/2, beta 1.2
    assert rouge_l(words("a b"), [words("a c d b")]) == [pytest.approx(2.44 * 0.5 / (0.5 + 1.44))]
    # the best precision and the best recall come from different references
    assert rouge_l(words("a b"), [words("a", "x a b y")]) == [pytest.approx(1.0)]
    assert rouge_l([[], []], [words("a"), [["a"], []]]) == [0.0, 1.0]


def test_cider_by_hand() -> None:
    given = [words("red dog"), words("blue cat")]
    # words and pairs agree, longer n-grams there are none: two of four cosines are one
    assert cider(words("red dog", "red dog"), given) == pytest.approx([5.0, 0.0])
    # words: (1·1 + 1·1) / (√8 · √2); pairs: "red dog" clipped to one of its two, "dog red" not there: 1 / √5;
    # three pairs of words instead of one: exp(-2² / (2 · 6²))
    repeated = 10 / 4 * (1 / 2 + 1 / math.sqrt(5)) * math.exp(-4 / 72)
    assert cider(words("red dog red dog", "blue cat"), given) == pytest.approx([repeated, 5.0])
    # a word of every picture weighs nothing, and over a single picture every word is one
    assert cider(words("the", "the"), [words("the dog"), words("the cat")]) == [0.0, 0.0]
    assert cider(words("red dog"), [words("red dog")]) == [0.0]


def test_empty_predictions_score_nothing() -> None:
    empty = score_captions(["", " . "], [["A dog."], ["A cat."]])
    assert empty == {"n": 2, **dict.fromkeys(KEYS[1:], 0.0)}
    assert score_captions([], []) == {"n": 0, **dict.fromkeys(KEYS[1:], 0.0)}


def test_a_perfect_caption_scores_full_marks() -> None:
    captions = ["A red dog runs over the green hill.", "Two cats sleep in a big basket."]
    scores = score_captions(captions, [[caption, "Something else."] for caption in captions])
    assert [scores[key] for key in KEYS[1:6]] == pytest.approx([1.0] * 5, abs=1e-8)
    chinese = score_captions(["两只狗在草地上跑。", "一只猫"], [["两只狗在草地上跑"], ["一只黑猫"]], language="zh")
    assert 0.5 < chinese["BLEU-1"] < 1 < chinese["CIDEr"]


def test_a_picture_without_a_reference_is_named() -> None:
    with pytest.raises(UserError, match="picture 2 of 2 has no reference caption"):
        score_captions(["a", "b"], [["a"], []])
    with pytest.raises(ValueError):
        score_captions(["a"], [["a"], ["b"]])


# ---- METEOR and SPICE


def test_meteor_is_the_official_one(official: dict[str, Any]) -> None:
    reason = java.why_not("METEOR")
    if reason:
        pytest.skip(reason)
    pictures = official["pictures"]
    scores, _ = java.java_scores([p["prediction"] for p in pictures], [p["references"] for p in pictures])
    assert scores["METEOR"] == pytest.approx(official["scores"]["METEOR"], abs=1e-9)


# Stands in for java: the programs' protocols without the programs.
STAND_IN = """#!{python}
import json, sys
if "spice-1.0.jar" in sys.argv:
    rows = json.load(open(sys.argv[4]))
    assert rows[1] == dict(image_id=1, test="a cat", refs=["the cat 's here"]), rows
    json.dump([dict(image_id=row["image_id"], scores=dict(All=dict(f=0.25))) for row in rows], open(sys.argv[6], "w"))
else:
    for line in sys.stdin:
        name, *parts = [part.strip() for part in line.split("|||")]
        if name == "SCORE":
            assert parts in (["a dog", "a hound", "a dog"], ["the cat 's here", "a cat"]), parts
            print(len(parts), flush=True)
        else:
            assert parts == ["3", "2"], parts
            print("0.1\\n0.2\\n0.375", flush=True)
"""
BROKEN = "#!{python}\nimport sys; sys.exit('Error: out of steam\\nat Somewhere')"
CAPTIONS = (["A dog.", "A cat"], [["A dog", "a hound!"], ["The cat's here."]])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the jars' names in it, as pycocoevalcap's, and an empty PATH."""
    folder = tmp_path / "package"
    for name in ("meteor/meteor-1.5.jar", "spice/spice-1.0.jar"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    monkeypatch.setattr(java, "_package", lambda: folder)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return folder


def install(package: Path, program: str) -> None:
    path = package.parent / "bin" / "java"
    path.write_text(program.format(python=sys.executable))
    path.chmod(0o755)


def add_parser(package: Path) -> None:
    (package / "spice" / "lib").mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package / "spice" / "lib" / name).touch()


def test_java_programs_get_tokens_and_give_scores(package: Path) -> None:
    install(package, STAND_IN)
    scores, left_out = java.java_scores(*CAPTIONS)
    assert scores == {"METEOR": 0.375}
    assert list(left_out) == ["SPICE"]
    assert "stanford-corenlp-3.6.0.jar is not in" in left_out["SPICE"]
    add_parser(package)
    assert java.java_scores(*CAPTIONS) == ({"METEOR": 0.375, "SPICE": 0.25}, {})


def test_a_java_program_that_fails_is_left_out_with_its_complaint(package: Path) -> None:
    install(package, BROKEN)
    add_parser(package)
    scores, left_out = java.java_scores(*CAPTIONS)
    assert scores == {}
    assert left_out == {
        name: f"{name} is left out: its Java program failed (Error: out of steam)" for name in ("METEOR", "SPICE")
    }


def test_what_is_missing_is_said_in_one_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, left_out = java.java_scores(*CAPTIONS)
    assert scores == {}
    assert left_out["METEOR"] == "METEOR is left out: there is no java on the PATH"
    install(package, STAND_IN)
    assert 'these captions are "zh"' in (java.why_not("METEOR", language="zh") or "")
    assert java.why_not("METEOR") is None
    assert java.java_scores([], [])[1]["METEOR"] == "METEOR is left out: there are no captions"
    monkeypatch.setattr(java, "_package", lambda: None)
    assert "pycocoevalcap is not installed" in (java.why_not("SPICE") or "")
