"""Tokens of captions, as caption scores count them.

English follows the Penn Treebank conventions of the Stanford tokenizer (CoreNLP 3.4.1) that the official COCO caption
scorer runs, without what that scorer then drops as punctuation. The rules were found by comparing outputs and need no
Java. What may surprise is kept because scores must agree: brackets stay, as `-lrb-` and `-rrb-` (the scorer drops the
upper-case names only, after lower-casing), and so do `!!`, `&`, `$` and `#`.

Known differences. The official tokenizer reads all captions as one text, so the full stop after a single letter or
after "no" at a caption's end depends on the next caption, and a contraction at the end of the last one stays whole;
here each is tokenised alone. A curly apostrophe within a word ("o'clock") stays curly there, so that two spellings
differ; here it becomes straight. "4 1/2" is one token there and two here. Rarities (HTML with attributes, some
emoticons, three full stops in a web address, several slashes in a word) may differ too.
"""

from __future__ import annotations

import re

from qformer.errors import UserError

LANGUAGES = ("en", "zh")

_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs ens esq est etc ext feb fla fri ft ga gen gov
    govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo
    mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres prof profs pte pty ptys pvt rd rep
    reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas tue tues univ va
    vs vt wed wis wisc wm wyo
"""
_STATES = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # abbreviations when capitalised only
_NUMBERED = "art ca fig figs no nos op pp prop"  # abbreviations before a number only: "no. 5"
# Capitalised, these begin a sentence: a full stop between a single letter and one of them is no part of the letter.
_STARTERS = """
    a about according additionally after an as at but earlier he her here however if in it last many more now once one
    other our she since so some such that the their then there these they this we what when while yet you
"""
_APOSTROPHE_WORDS = "c'mon e'er ev'ry li'l nat'l nor'easter s'mores 'em 'till 'til 'cause"
_JOINED = {"cannot", "gonna", "wanna", "gotta", "gimme", "lemme"}  # read as two words


def _any(words: str) -> str:
    """Alternatives of a pattern, longest first."""
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


_L, _W = r"[^\W\d_½¼¾¹²³]", r"[^\W_½¼¾¹²³]"  # a letter; a letter or a digit
_END = rf"(?!{_W})"  # no word goes on here
_WHOLE = rf"(?![-_/]?{_W}|\.[,;:])"  # nor does a compound
_STOP = r"(?:\.(?=[,;:]))?"  # "dogs., cats" keeps its full stop
_SHORT = rf"'(?:s|d|m|ll|re|ve){_END}"
_COMPOUND = rf"{_W}+(?:[-_\u2010\u2011]{_W}+)*"

# The first alternative that matches is the token, so special cases come before plain words.
_TOKEN = re.compile(
    "|".join(
        [
            "''|``",
            # contractions: "do|n't", "dog|'s", "can|not"
            rf"{_L}*(?!n){_L}(?=n't{_END})|n't{_END}|{_L}+(?={_SHORT})|{_SHORT}|'t(?=(?:is|was){_END})",
            rf"can(?=not{_WHOLE})|(?:gon|wan)(?=na{_WHOLE})|got(?=ta{_WHOLE})|(?:gim|lem)(?=me{_WHOLE})",
            # tags, addresses and names of the web
            r"</?[a-z][\w.:-]*/?>",
            rf"(?:https?://|www\.){_W}+(?:[.-]{_W}+)*(?:/[\w./?=&%#~-]*[\w/])?",
            rf"{_W}[\w.-]*@{_W}+(?:[.-]{_W}+)*|@[a-z_]\w*|#{_L}+",
            # full stops within words and after abbreviations: "p.m.", "dog.com", "etc.", "no. 5", "J."
            rf"(?:{_W}+-)*(?:{_L}(?:\.{_L})+|ph\.d)\.(?:-{_W}+)*{_END}",
            rf"{_L}+(?:[.!?]{_L}+)+(?:-{_W}+)*{_STOP}",
            rf"(?:{_any(_ABBREVIATIONS)}|(?-i:{_any(_STATES + ' ' + _STATES.upper())}))\.(?:-{_W}+)*",
            rf"{_any(_NUMBERED)}\.(?=\s?\d)",
            rf"{_L}\.(?!\s+(?=(?-i:[A-Z])){_any(_STARTERS)}(?!\S))",
            # numbers: "3.5-inch", "1,000", "5:30", "-5", "'50s", "'09"
            rf"\d+(?:[.,]\d+)+(?:-{_W}+)+|[-+]?\d*(?:[.:,]\d+)+|[-+]\d+|'[2-9]0s|'\d\d(?!\S)",
            # apostrophes within words: "'n'", "o'clock", "O'Neil", "Hawai'i"
            rf"{_any(_APOSTROPHE_WORDS)}|'n(?:'|{_WHOLE})|(?:dunkin|somethin|ol)'",
            rf"(?:[dlno]|(?-i:[A-HJ-XZ]))'{_L}{{2,}}(?:-{_W}+)*{_STOP}|[dlj]'|y'(?={_L})",
            rf"{_L}+[aeiouy]'(?:[aeiou]|(?-i:[A-Z])){_L}*",
            # "AT&T", "US$"; words, with hyphens, underscores and slashes
            rf"(?-i:[A-Z]+(?:[&+][A-Z]+)+|[A-Z]+\$){_STOP}",
            rf"{_COMPOUND}(?:(?:/[a-z0-9]+(?:-[a-z0-9]+)*){{1,2}}|{_STOP})",
            # signs; the last alternative takes whatever is left
            rf"[<>]?[:;=][-o*']?(?:[()@|\\{{\[\]]|[dp]{_END})",
            r"&(?:amp|lt|gt|quot|apos|nbsp);",
            r"\.+|-+|[?!]+|_+|\*+|#+|@+|<<|>>|\S",
        ]
    ),
    re.IGNORECASE,
)
_CHUNK = re.compile(r"\S+")

# Before reading: curly and angle quotes as straight ones, no soft hyphens, zero-width spaces as spaces.
_PLAIN = str.maketrans("\u2019\u2018\u201c\u201d\u2039\u203a«»\u200b", '\'`""\'\'"" ', "\u00ad")
_DROPPED = set("?!,:;\u2013\u2014…\"'`") | {"''", "``", "&quot;", "&apos;", "&nbsp;"}
_DROPPED_RUN = re.compile(r"\.+|-{1,4}")  # five hyphens or more are a token
_RENAMED = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "£": "#", "€": "$", "¢": "cents"}
_RENAMED |= {"½": "1/2", "¼": "1/4", "¾": "3/4"}
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})

_LATIN = r"[a-z0-9\u00c0-\u024f]+"
_CHINESE_TOKEN = re.compile(rf"{_LATIN}(?:[.'-]{_LATIN})*|[^\W_]")


def caption_tokens(caption: str, language: str = "en") -> list[str]:
    """The lower-cased tokens of a caption that scores count, without punctuation.

    English: the words of the Penn Treebank, as the official COCO scorer has them. Chinese: characters, with runs of
    Latin letters and digits kept whole, so that scores don't depend on a word segmenter.

    Raises:
        UserError: the language is neither "en" nor "zh".
    """
    text = caption.translate(_PLAIN)
    if language == "en":
        return _english(text)
    if language == "zh":
        return _CHINESE_TOKEN.findall(text.lower())
    raise UserError(f'language "{language}": captions are scored in {" and ".join(LANGUAGES)} only')


def _english(text: str) -> list[str]:
    tokens = []
    for chunk in _CHUNK.finditer(text):
        word = chunk[0].lower()
        if word.isalpha() and word not in _JOINED:  # nearly always
            tokens.append(word)
            continue
        for match in _TOKEN.finditer(text, chunk.start()):
            if match.start() >= chunk.end():
                break
            token = match[0]
            if token not in _DROPPED and not _DROPPED_RUN.fullmatch(token) and token <= "\uffff":  # no emoji
                tokens.append(_written(token))
    return tokens


def _written(token: str) -> str:
    """A token as the official tokenizer writes it."""
    token = _RENAMED.get(token, token).lower()
    if token[0] in ":;=<>" and token[-1] not in "()":  # tags and some emoticons keep their signs
        return token
    return token.translate(_BRACKETS)
