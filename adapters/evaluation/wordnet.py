"""The nouns of a WordNet folder, and how alike two of them are.

WordNet is not part of this project: its files (`index.noun`, `data.noun`, `noun.exc`) are read from a folder of
Princeton's format (wndb(5WN)), such as the `dict` folder of any release since 2.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from qformer.errors import UserError

_ENDINGS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
    ("ies", "y"),
)  # fmt: skip
_HYPERNYMS = ("@", "@i")  # a kind of; an instance of


class WordNet:
    """Nouns, their meanings (synsets, by their offset in `data.noun`) and what each is a kind of.

    Args:
        folder: it holds `index.noun` and `data.noun`; `noun.exc` (irregular plurals) is read if it is there.

    Raises:
        UserError: a file is missing or not of WordNet's format.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        self._meanings = {lemma: offsets for lemma, offsets in map(self._index, self._lines("index.noun"))}
        read = list(map(self._data, self._lines("data.noun")))
        self._above = {offset: above for offset, _, above in read}
        self._lemmas = {offset: lemma for offset, lemma, _ in read}
        irregular = self._folder / "noun.exc"
        listed = irregular.read_text(encoding="utf-8").splitlines() if irregular.is_file() else []
        self._irregular = {words[0]: words[1:] for words in map(str.split, listed) if words}
        for offset, above in self._above.items():
            if missing := next((one for one in above if one not in self._above), None):
                raise UserError(f"--wordnet {folder}: data.noun has no entry {missing}, which {offset} is a kind of")
            lemma = self._lemmas[offset].lower()
            if offset not in self._meanings.get(lemma, ()):
                raise UserError(f"--wordnet {folder}: index.noun does not list {offset} of data.noun under '{lemma}'")
        self._depths: dict[int, tuple[int, int]] = {}
        self.similarity = lru_cache(maxsize=2**16)(self._similarity)

    def meanings(self, noun: str) -> list[int]:
        """The synsets of a noun, also in the plural, the most frequent first; empty if WordNet has none."""
        word = noun.lower().replace(" ", "_")
        forms = [word, *self._irregular.get(word, ())]
        if word not in self._irregular:
            singular = _singulars([word])
            forms += singular
            while singular and not any(form in self._meanings for form in forms):
                singular = _singulars(singular)
                forms += singular
        return [
            offset
            for form in dict.fromkeys(forms)
            if form in self._meanings
            for offset in self._meanings[form]
        ]  # fmt: skip

    def _similarity(self, first: int, second: int) -> float:
        """Wu and Palmer's similarity of two synsets: twice the depth of what both are, over the sum of their depths.

        Wu and Palmer 1994 (ACL, P94-1019), section 4.2, as NLTK's `wup_similarity` computes it, with which DAQUAR is
        scored: of what both are a kind of, the deepest by its shortest way up counts (of several the first by name),
        its depth is its longest way up, and a synset's is that plus the shortest path between them, on which one may
        also come down. 0 if they share nothing.
        """
        ways, others = self._ways_up(first), self._ways_up(second)
        shared = ways.keys() & others.keys()
        if not shared:
            return 0.0
        deepest = max(self._depth(one)[0] for one in shared)
        candidates = [one for one in shared if self._depth(one)[0] == deepest]
        common = first if first in candidates else min(candidates, key=self._name)
        depth = self._depth(common)[1] + 1
        above = self._ways_up(common)
        return 2 * depth / (_path(ways, above) + _path(others, above) + 2 * depth)

    def _ways_up(self, synset: int) -> dict[int, int]:
        """Everything that a synset is a kind of, itself included, with the shortest number of steps to it."""
        found, here, steps = {synset: 0}, [synset], 0
        while here:
            steps += 1
            here = [above for one in here for above in self._above[one] if above not in found]
            found |= dict.fromkeys(here, steps)
        return found

    def _depth(self, synset: int) -> tuple[int, int]:
        """The shortest and the longest way to the top, in steps."""
        if synset not in self._depths:
            above = [self._depth(one) for one in self._above[synset]]
            self._depths[synset] = (
                (1 + min(low for low, _ in above), 1 + max(high for _, high in above)) if above else (0, 0)
            )
        return self._depths[synset]

    def _name(self, synset: int) -> str:
        """Its first lemma and which of the lemma's meanings it is, as NLTK names it."""
        lemma = self._lemmas[synset].lower()
        return f"{lemma}.n.{self._meanings[lemma].index(synset) + 1:02d}"

    def _lines(self, name: str) -> Iterable[tuple[str, int, list[str]]]:
        """The entries of a file as words, with file and line; the licence at its top begins with blanks."""
        path = self._folder / name
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--wordnet {self._folder}: {name} cannot be read ({getattr(error, 'strerror', None) or error}); name"
                " the folder of WordNet that holds index.noun and data.noun"
            ) from error
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip() and not line.startswith(" "):
                yield name, number, line.split(" | ")[0].split()

    def _index(self, entry: tuple[str, int, list[str]]) -> tuple[str, list[int]]:
        """`lemma n synsets p_cnt [ptr…] senses tagsenses offset…`"""
        name, number, words = entry
        try:
            count = int(words[2])
            offsets = [int(word) for word in words[len(words) - count :]]
            if words[1] != "n" or count < 1 or len(words) != 6 + int(words[3]) + count:
                raise ValueError
        except (ValueError, IndexError) as error:
            raise self._not_wordnet(name, number) from error
        return words[0], offsets

    def _data(self, entry: tuple[str, int, list[str]]) -> tuple[int, str, list[int]]:
        """`offset lexfile n words(hex) word lexid … p_cnt (symbol offset pos source/target)…`"""
        name, number, words = entry
        try:
            after = 4 + 2 * int(words[3], 16)
            pointers = words[after + 1 : after + 1 + 4 * int(words[after])]
            if words[2] != "n" or len(pointers) != 4 * int(words[after]):
                raise ValueError
            above = [int(pointers[at + 1]) for at in range(0, len(pointers), 4) if pointers[at] in _HYPERNYMS]
            return int(words[0]), words[4], above
        except (ValueError, IndexError) as error:
            raise self._not_wordnet(name, number) from error

    def _not_wordnet(self, name: str, number: int) -> UserError:
        return UserError(
            f"--wordnet {self._folder}: line {number} of {name} is not of WordNet's format; take the files as they come"
        )


def _path(ways: dict[int, int], others: dict[int, int]) -> int:
    """The fewest steps between two synsets, up from one and down to the other, given both ways up."""
    return min(ways[one] + others[one] for one in ways.keys() & others.keys())


def _singulars(words: Iterable[str]) -> list[str]:
    """What each word may be the plural of."""
    return [word[: len(word) - len(old)] + new for word in words for old, new in _ENDINGS if word.endswith(old)]
