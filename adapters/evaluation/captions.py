"""Scores of captions: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L, as the official COCO caption scorer computes them.

`score_captions` takes text; `bleu`, `rouge_l` and `cider` take tokens, so that another tokenizer can come before them.
METEOR and SPICE need Java and are in `adapters.evaluation.java_scores`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from adapters.evaluation.caption_tokens import caption_tokens
from qformer.errors import UserError

ORDERS = (1, 2, 3, 4)  # lengths of n-grams
ROUGE_BETA = 1.2  # recall weighs more than precision; the value of the COCO scorer
CIDER_SIGMA = 6.0  # width of CIDEr-D's length penalty, in words

Tokens = Sequence[str]
Ngram = tuple[str, ...]


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str = "en"
) -> dict[str, float]:
    """`n`, `BLEU-1` to `BLEU-4`, `ROUGE-L` and `CIDEr` of one predicted caption a picture.

    BLEU and ROUGE-L are fractions. CIDEr is CIDEr-D with its factor of ten, so that 1.0 is what papers print as 100.
    Its weights come from the references given: it means little over few pictures and is 0 over a single one.

    Args:
        predictions: one caption a picture; an empty one scores 0.
        references: the reference captions of each picture, at least one.
        language: "en" counts words, "zh" characters.

    Raises:
        UserError: the language is unknown, or a picture has no reference.
        ValueError: there are not as many predictions as pictures.
    """
    said = [caption_tokens(caption, language) for caption in predictions]
    given = [[caption_tokens(caption, language) for caption in captions] for captions in references]
    for row, captions in enumerate(given, start=1):
        if not captions:
            raise UserError(f"picture {row} of {len(given)} has no reference caption: give at least one, or drop it")
    return {
        "n": len(said),
        **{f"BLEU-{order}": value for order, value in zip(ORDERS, bleu(said, given), strict=True)},
        "ROUGE-L": _mean(rouge_l(said, given)),
        "CIDEr": _mean(cider(said, given)),
    }


def cider_of_each(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, language: str = "en"
) -> list[float]:
    """CIDEr-D of each picture, times ten, from texts; their mean is `score_captions`' CIDEr."""
    said = [caption_tokens(caption, language) for caption in predictions]
    return cider(said, [[caption_tokens(caption, language) for caption in captions] for captions in references])


def bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 over the whole corpus.

    Papineni et al. 2002 (ACL, P02-1040), section 2: clipped n-gram precisions, their geometric mean, and the brevity
    penalty. The reference length is that of the closest reference, of two as close the shorter. There is no smoothing:
    the COCO scorer's two small constants only keep empty predictions from dividing by zero.
    """
    matched, counted = [0] * len(ORDERS), [0] * len(ORDERS)
    length, reference_length = 0, 0
    for said, captions in zip(predictions, references, strict=True):
        length += len(said)
        reference_length += min((abs(len(caption) - len(said)), len(caption)) for caption in captions)[1]
        for index, order in enumerate(ORDERS):
            most: Counter[Ngram] = Counter()
            for caption in captions:
                most |= _ngrams(caption, order)
            matched[index] += (_ngrams(said, order) & most).total()
            counted[index] += max(len(said) - order + 1, 0)

    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, hits, tries in zip(ORDERS, matched, counted, strict=True):
        product *= (hits + 1e-15) / (tries + 1e-9)
        scores.append(product ** (1 / order) * brevity)
    return scores


def rouge_l(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """ROUGE-L of each picture.

    Lin 2004 (ACL workshop, W04-1013), section 3: the F-measure of the longest common subsequence. Over several
    references, COCO's convention: the best precision and the best recall, each from whichever caption gives it.
    """
    return [_rouge_l(said, captions) for said, captions in zip(predictions, references, strict=True)]


def _rouge_l(said: Tokens, captions: Sequence[Tokens]) -> float:
    if not said:  # the COCO scorer's convention: nothing said is right if a reference, too, is empty
        return float(any(not caption for caption in captions))
    common = [_common_subsequence(said, caption) for caption in captions]
    precision = max(common) / len(said)
    recall = max(count / max(len(caption), 1) for count, caption in zip(common, captions, strict=True))
    if not precision:
        return 0.0
    square = ROUGE_BETA**2
    return (1 + square) * precision * recall / (recall + square * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence of two token lists."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0  # the row before, one to the left
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = diagonal + 1 if token == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def cider(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each picture, times ten; the weights come from these very references."""
    scorer = Cider(references)
    return [scorer.score(said, captions) for said, captions in zip(predictions, references, strict=True)]


class Cider:
    """CIDEr-D with weights from a corpus of references.

    Vedantam et al. 2015 (arXiv 1411.5726), the variant CIDEr-D: the cosine of tf-idf vectors with clipped counts, a
    Gaussian penalty on the difference of lengths, averaged over the references and over n-grams of one to four words.
    A document is a picture: all of its references together.

    Args:
        corpus: the references of each picture, as tokens.
    """

    def __init__(self, corpus: Sequence[Sequence[Tokens]]) -> None:
        self._pictures_with: Counter[Ngram] = Counter()
        for captions in corpus:
            self._pictures_with.update(
                {ngram for caption in captions for order in ORDERS for ngram in _ngrams(caption, order)}
            )
        self._log_pictures = math.log(max(len(corpus), 1))

    def score(self, said: Tokens, captions: Sequence[Tokens]) -> float:
        """CIDEr-D of one caption against a picture's references, times ten."""
        return 10 * _mean(list(self._similarities(said, captions)))

    def _vector(self, tokens: Tokens, order: int) -> tuple[dict[Ngram, float], float]:
        """The tf-idf weights of a caption's n-grams, and their norm."""
        weights = {
            ngram: count * (self._log_pictures - math.log(max(self._pictures_with[ngram], 1)))
            for ngram, count in _ngrams(tokens, order).items()
        }
        return weights, math.sqrt(sum(weight * weight for weight in weights.values()))

    def _similarities(self, said: Tokens, captions: Sequence[Tokens]) -> Iterator[float]:
        """The clipped cosine, with its penalty, for each length of n-gram and each reference."""
        for order in ORDERS:
            ours, our_norm = self._vector(said, order)
            for caption in captions:
                theirs, their_norm = self._vector(caption, order)
                product = sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in ours.keys() & theirs.keys())
                norms = our_norm * their_norm
                apart = len(said) - len(caption)
                yield product / norms * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2)) if norms else 0.0


def _ngrams(tokens: Tokens, order: int) -> Counter[Ngram]:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
