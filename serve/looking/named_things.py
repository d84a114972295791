"""The things that an answer names, found by simple rules of English, so that each can be looked for in the picture."""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CUTS = _words("""
    is are was were be been has have had does do with in on at of to from into onto over under through by near behind
    beside between above below along across around against inside outside toward towards off out up down for while as
    and or but that which who where there it next
""")
_THINGS_IN_ING = _words("""
    building ceiling ring string king wing clothing swing painting railing awning thing wedding
""")
_NO_THINGS = _words("""
    yes no none nothing unknown a an the this his her its their some red green blue yellow white black brown grey gray
    orange purple pink tan one two three four five six seven eight nine ten many not i don't know left right true false
""")


def things_named(text: str) -> list[str]:
    """The phrases of an answer or a caption that name things, each once, in their order.

    A sentence is cut at verbs that end in -ing, at forms of "be" and "have", at prepositions and at conjunctions. What
    is left names a thing if it is not only an article, a number, a colour, yes or no. Other verbs stay where they are.
    """
    chunks: list[list[str]] = [[]]
    for word in re.findall(r"[\w'-]+|[^\w\s]", text.lower()):
        cut = not word[0].isalnum() or word in _CUTS or (word.endswith("ing") and word not in _THINGS_IN_ING)
        if cut:
            chunks.append([])
        else:
            chunks[-1].append(word)
    naming = (chunk for chunk in chunks if any(word not in _NO_THINGS and not word.isdigit() for word in chunk))
    return list(dict.fromkeys(" ".join(chunk) for chunk in naming))
