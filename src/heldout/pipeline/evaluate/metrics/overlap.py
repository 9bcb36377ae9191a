"""How much two texts have in common. Each formula is its source's; docs/metrics.md names the differences that
remain: how texts are cut into words, and how zero counts are smoothed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

#: Orders of n-grams: of characters in chrF, of words in BLEU and GLEU.
CHRF_ORDERS, WORD_ORDERS = 6, 4
#: How much more recall weighs than precision in chrF (Popović 2016: chrF2).
CHRF_BETA = 2


def token_f1(answer: str, target: str) -> float:
    """F1 of the words two texts have in common, without case and punctuation, in any order."""
    got, wanted = (Counter(re.findall(r"\w+", text.casefold())) for text in (answer, target))
    return _f1((got & wanted).total(), got.total(), wanted.total())


def rouge_l(answer: str, target: str) -> float:
    """F1 of the longest common subsequence of lower-cased words (Lin 2004, beta 1)."""
    got, wanted = answer.lower().split(), target.lower().split()
    return _f1(_common_subsequence(got, wanted), len(got), len(wanted))


def rouge_n(answer: str, target: str, *, n: int) -> float:
    """F1 of the runs of n lower-cased words that two texts share (Lin 2004, beta 1)."""
    got, wanted = (_ngrams(text.lower().split(), n) for text in (answer, target))
    return _f1((got & wanted).total(), got.total(), wanted.total())


def chrf(answer: str, target: str) -> float:
    """chrF2 (Popović 2015, 2016): F-score of precision and recall of runs of 1 to 6 characters, each averaged over
    the lengths that both texts have; white space does not count."""
    got, wanted = ("".join(text.split()) for text in (answer, target))
    if not got or not wanted:
        return float(got == wanted)
    precision = recall = 0.0
    orders = min(CHRF_ORDERS, len(got), len(wanted))
    for n in range(1, orders + 1):
        ours, theirs = _ngrams(got, n), _ngrams(wanted, n)
        common = (ours & theirs).total()
        precision += common / ours.total() / orders
        recall += common / theirs.total() / orders
    if not precision + recall:
        return 0.0
    weight = CHRF_BETA**2
    return min(1.0, (1 + weight) * precision * recall / (weight * precision + recall))


def bleu(answer: str, target: str) -> float:
    """Sentence BLEU (Papineni 2002): geometric mean of the precision of 1 to 4 words, times the brevity penalty.

    A length without a match counts as half a match, the next as a quarter, and so on (Lin and Och 2004, NIST's
    smoothing); lengths that the answer is too short for are left out.
    """
    got, wanted = _words(answer), _words(target)
    if not got or not wanted:
        return float(got == wanted)
    logs, smallest = [], 1.0
    for n in range(1, min(WORD_ORDERS, len(got)) + 1):
        ours = _ngrams(got, n)
        common: float = (ours & _ngrams(wanted, n)).total()
        if not common:
            if n == 1:
                return 0.0
            smallest /= 2
            common = smallest
        logs.append(math.log(common / ours.total()))
    return min(1.0, math.exp(min(0.0, 1 - len(wanted) / len(got)) + sum(logs) / len(logs)))


def gleu(answer: str, target: str) -> float:
    """Google's BLEU for sentences (Wu 2016): the smaller of precision and recall of all runs of 1 to 4 words."""
    got, wanted = _words(answer), _words(target)
    if not got or not wanted:
        return float(got == wanted)
    common = ours = theirs = 0
    for n in range(1, WORD_ORDERS + 1):
        one, other = _ngrams(got, n), _ngrams(wanted, n)
        common, ours, theirs = common + (one & other).total(), ours + one.total(), theirs + other.total()
    return common / max(ours, theirs)


def fuzzy_match(answer: str, target: str) -> float:
    """Share of the characters of both texts that stay when one is edited into the other by deleting and inserting:
    twice the longest common subsequence over both lengths. What RapidFuzz calls ratio, as a share."""
    return _f1(_common_subsequence(answer, target), len(answer), len(target))


def _f1(common: float, got: int, wanted: int) -> float:
    return float(got == wanted) if not got or not wanted else 2 * common / (got + wanted)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _ngrams(units: Sequence[Hashable], n: int) -> Counter[Hashable]:
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


def _common_subsequence(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a whole row of the table at a time in the bits of one number
    (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for i, unit in enumerate(one):
        places[unit] = places.get(unit, 0) | 1 << i
    everything = (1 << len(one)) - 1
    row = everything
    for unit in other:
        matched = row & places.get(unit, 0)
        row = (row + matched) | (row - matched)
    return len(one) - (row & everything).bit_count()
