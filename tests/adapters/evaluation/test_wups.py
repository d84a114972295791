"""WUPS over a small WordNet that is written by hand, in the format of Princeton's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.evaluation.wordnet import WordNet
from adapters.evaluation.wups import wups
from qformer.errors import UserError

# entity ← thing ← furniture ← (chair, table); entity ← thing ← animal ← dog; chair also has a person's meaning;
# "puppy" is below dog and, by a second way up, below thing
SYNSETS = {
    100: ("entity", []),
    200: ("thing", [100]),
    300: ("furniture", [200]),
    400: ("chair", [300]),
    500: ("table", [300]),
    600: ("animal", [200]),
    700: ("dog", [600]),
    800: ("chair", [900]),
    900: ("person", [100]),
    950: ("puppy", [700, 200]),
    970: ("man", [900]),
    980: ("goose", [600]),
    990: ("left", []),  # a top of its own
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordnet")
    licence = "  1 This is a made-up WordNet.\n"
    data = [
        f"{offset:08d} 03 n 01 {lemma} 0 {len(above):03d} "
        + "".join(f"{'@i' if lemma == 'dog' else '@'} {one:08d} n 0000 " for one in above)
        + "| a gloss; with words\n"
        for offset, (lemma, above) in SYNSETS.items()
    ]
    lemmas: dict[str, list[int]] = {}
    for offset, (lemma, _) in SYNSETS.items():
        lemmas.setdefault(lemma, []).append(offset)
    index = [
        f"{lemma} n {len(offsets)} 1 @ {len(offsets)} 0 {' '.join(f'{one:08d}' for one in offsets)}  \n"
        for lemma, offsets in sorted(lemmas.items())
    ]
    (folder / "data.noun").write_text(licence + "".join(data))
    (folder / "index.noun").write_text(licence + "".join(index))
    (folder / "noun.exc").write_text("geese goose\n")
    return folder


@pytest.fixture(scope="module")
def wordnet(folder: Path) -> WordNet:
    return WordNet(folder)


def test_meanings_of_words_and_plurals(wordnet: WordNet) -> None:
    assert wordnet.meanings("Chair") == [400, 800]
    assert wordnet.meanings("chairs") == [400, 800]
    assert wordnet.meanings("men") == [970]
    assert wordnet.meanings("geese") == [980]
    assert wordnet.meanings("puppies") == [950]
    assert wordnet.meanings("unheard of") == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (400, 500, 2 * 3 / (4 + 4)),  # both furniture, which is the third from the top
        (400, 400, 1.0),
        (400, 300, 2 * 3 / (4 + 3)),
        (400, 700, 2 * 2 / (4 + 4)),  # both things
        (400, 800, 2 * 1 / (4 + 3)),  # both entities
        (950, 980, 2 * 3 / (3 + 3 + 3)),  # both animals; from puppy over thing, and down again, it is two steps also
        (400, 990, 0.0),  # nothing in common
    ],
)
def test_similarities_by_hand(first: int, second: int, expected: float, wordnet: WordNet) -> None:
    assert wordnet.similarity(first, second) == pytest.approx(expected)
    assert wordnet.similarity(second, first) == pytest.approx(expected)


def test_wups_by_hand(wordnet: WordNet) -> None:
    assert wups("chair", ["chair"], wordnet) == 1.0
    assert wups("chairs", ["table"], wordnet, threshold=0.0) == pytest.approx(0.75)
    assert wups("chair", ["table"], wordnet, threshold=0.9) == pytest.approx(0.075)  # a tenth under the threshold
    assert wups("table, chair", ["chair, table"], wordnet) == 1.0
    # one of two: min(1, 1 · 0.75) at 0, min(1, 1 · 0.075) at 0.9
    assert wups("chair", ["chair, table"], wordnet, threshold=0.0) == pytest.approx(0.75)
    assert wups("chair", ["chair, table"], wordnet) == pytest.approx(0.075)
    assert wups("chair, dog", ["chair, table"], wordnet, threshold=0.0) == pytest.approx(min(0.5, 0.75))
    assert wups("unheard", ["unheard"], wordnet) == 1.0
    assert wups("unheard", ["chair"], wordnet, threshold=0.0) == 0.0
    assert wups("dog", ["chair", "dog"], wordnet) == 1.0  # the best answer counts


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("data.noun", None, "data.noun cannot be read"),
        ("index.noun", "chair n 2 1 @ 2 0 00000400\n", "line 1 of index.noun is not of WordNet's format"),
        ("index.noun", "chair v 1 1 @ 1 0 00000400\n", "line 1 of index.noun is not of WordNet's format"),
        ("data.noun", "00000400 03 n 01 chair 0 002 @ 00000300 n 0000 | x\n", "line 1 of data.noun is not of"),
        ("data.noun", "00000400 03 n 01 chair 0 001 @ 00000300 n 0000 | x\n", "has no entry 300, which 400"),
        ("data.noun", "00000400 03 n 01 sofa 0 000 | x\n", "does not list 400 of data.noun under 'sofa'"),
    ],
)
def test_a_folder_that_is_no_wordnet(name: str, text: str | None, told: str, folder: Path, tmp_path: Path) -> None:
    for file in ("data.noun", "index.noun"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="--wordnet") as error:
        WordNet(tmp_path)
    assert told in str(error.value)
