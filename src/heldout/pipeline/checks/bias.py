"""Answers that follow a word for a group of people: a model would learn the group instead of the matter.

The words are our own short list, for English; names stand for groups only roughly (docs/checks/bias.md).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from heldout.pipeline.checks.groups import are_labels, fold
from heldout.pipeline.checks.parts import Parts, shorten
from heldout.pipeline.evaluate.answers import LABEL_CHARACTERS
from heldout.pipeline.types import Example, Finding

#: Rows of a group, at least: with fewer nothing can be said about it.
MIN_GROUP = 20
#: The largest difference of an answer's share between two groups, and Cramér's V of their table, to warn from.
#: Chance alone makes both differ from 0 in any file; these are too large where answers follow the matter.
MIN_GAP, MIN_V = 0.2, 0.2
#: Rows that name a group against rows that name none differ in more than the group, so more is asked there.
MIN_GAP_TO_REST = 0.3
#: Chance of such a table if group and answer had nothing to do with each other, over all tables that were looked at.
MAX_P = 0.01
DRAWS = 9_999
#: The commonest answers are compared one by one, all others as one.
COMPARED = 30
#: So many different answers are kept; a file with more of them, and few rows for each, has no labels.
MAX_ANSWERS = 5_000
#: The user's text is looked at so far: a pasted document may name every group.
CHARACTERS = 2_000
REST = "no such word"
OTHER = "any other answer"

_GENDERS = {
    "female": "woman women female girl girls lady ladies mother mothers mom moms mum mums wife wives daughter "
    "daughters sister sisters aunt aunts grandmother grandma niece girlfriend widow actress waitress businesswoman "
    "housewife mrs ms she her hers herself",
    "male": "man men male boy boys gentleman gentlemen father fathers dad dads husband husbands son sons brother "
    "brothers uncle uncles grandfather grandpa nephew boyfriend widower businessman mr he him his himself",
}
_NAMES = {
    "female": "mary patricia jennifer linda elizabeth barbara susan jessica sarah karen lisa nancy betty sandra ashley "
    "kimberly emily donna michelle carol amanda melissa deborah stephanie rebecca laura sharon cynthia kathleen "
    "amy angela shirley anna brenda pamela emma nicole helen samantha katherine catherine christine debra rachel "
    "carolyn janet maria olivia heather diane julie joyce victoria kelly christina joan evelyn lauren judith "
    "megan andrea cheryl hannah jacqueline martha gloria teresa ann sara madison frances kathryn janice jean "
    "abigail alice julia judy sophia grace denise amber doris marilyn danielle beverly isabella theresa diana "
    "natalie brittany charlotte marie kayla alexis lori claire lucy fiona ruth eva clara nina sofia elena irene "
    "ingrid fatima aisha priya mei yuki ana lucia carmen rosa isabel greta heidi petra sabine monika chloe zoe "
    "ella lily mia ava eleanor jane kate anne lena leila amelia harriet paula nora ellen molly wendy",
    "male": "james robert john michael david william richard joseph thomas christopher charles daniel matthew anthony "
    "mark donald steven andrew paul joshua kenneth kevin brian george timothy ronald jason edward jeffrey ryan "
    "jacob gary nicholas eric jonathan stephen larry justin scott brandon benjamin samuel gregory alexander "
    "patrick frank raymond jack dennis jerry tyler aaron jose adam nathan henry zachary douglas peter kyle noah "
    "ethan jeremy walter keith roger terry austin sean gerald carl harold dylan arthur lawrence jesse bryan billy "
    "bruce gabriel joe logan alan juan albert willie elijah wayne randy vincent mason roy ralph bobby russell "
    "bradley philip eugene oliver simon martin hans stefan klaus jürgen wolfgang pierre luis carlos miguel pedro "
    "ahmed mohammed muhammad omar ali rajesh hiroshi wei ivan dmitri sven lars tom harry liam lucas leo max felix "
    "hugo oscar fred stuart graham neil ian colin nigel",
}
_RELIGIONS = {
    "christian": "christian christians christianity catholic catholics protestant protestants church bible",
    "muslim": "muslim muslims islam islamic mosque quran koran ramadan hijab",
    "jewish": "jew jews jewish judaism synagogue torah kosher",
    "hindu": "hindu hindus hinduism",
    "buddhist": "buddhist buddhists buddhism",
    "sikh": "sikh sikhs sikhism",
    "atheist": "atheist atheists atheism",
}
_ORIGINS = {
    "african": "african africans nigerian nigerians kenyan kenyans ghanaian ethiopian somali somalis",
    "american": "american americans",
    "arab": "arab arabs egyptian egyptians syrian syrians iraqi iraqis lebanese moroccan moroccans saudi",
    "asian": "asian asians",
    "black": "black blacks",
    "british": "british english scottish welsh irish",
    "chinese": "chinese",
    "french": "french",
    "german": "german germans",
    "indian": "indian indians pakistani pakistanis bangladeshi",
    "italian": "italian italians",
    "japanese": "japanese",
    "latino": "latino latina latinos latinas hispanic hispanics mexican mexicans brazilian brazilians colombian",
    "eastern european": "polish romanian romanians bulgarian bulgarians ukrainian ukrainians",
    "russian": "russian russians",
    "turkish": "turkish turks",
    "white": "white whites caucasian",
}
_AGES = {
    "old": "old elderly pensioner pensioners retired retiree retirees senior seniors octogenarian",
    "young": "young teenager teenagers teen teens student students adolescent",
}
_ORIENTATIONS = {"gay": "gay gays lesbian lesbians bisexual homosexual queer", "transgender": "transgender trans"}
_DISABILITIES = {"disabled": "disabled wheelchair deaf blind autistic dyslexic"}
#: attribute -> group -> its words.
ATTRIBUTES: Mapping[str, Mapping[str, str]] = {
    "gender": _GENDERS,
    "gender, by first names": _NAMES,
    "religion": _RELIGIONS,
    "origin": _ORIGINS,
    "age": _AGES,
    "sexual orientation": _ORIENTATIONS,
    "disability": _DISABILITIES,
}
#: "A Mexican restaurant", "the black card", "an old account": these words count beside a person only.
_PERSON = (
    r"(?:man|men|woman|women|person|people|guys?|lady|ladies|boys?|girls?|customers?|clients?|users?|citizens?|couple|"
    r"mother|father|gentleman|immigrants?|family)"
)
_NEEDS_A_PERSON = frozenset(
    word
    for text in (*_ORIGINS.values(), "old young senior retired blind deaf disabled")
    for word in text.split()
    if not (word.endswith("s") and word[:-1] in text.split())
)


def _forms(attribute: str, word: str) -> tuple[str, ...]:
    # "mark" and "will" are words, "Mark" is a name.
    return (word.capitalize(),) if attribute == "gender, by first names" else (word, word.capitalize(), word.upper())


_GROUPS: dict[str, list[tuple[str, str]]] = {}
for _attribute, _groups in ATTRIBUTES.items():
    for _group, _words in _groups.items():
        for _one in _words.split():
            for _form in _forms(_attribute, _one):
                _GROUPS.setdefault(_form, []).append((_attribute, _group))
_FORMS = frozenset(_GROUPS)
_WORD = re.compile(r"[^\W\d_]+")
_Tables = dict[str, dict[str, Counter[str]]]  # attribute -> group -> answer -> rows


def find_group_label_correlation(parts: Parts) -> Iterator[Finding]:
    """Labels of the training file that are given to one group of people more than to another."""
    tables, answers = _count(parts)
    if not are_labels(answers):
        return
    common = [answer for answer, _ in answers.most_common(COMPARED)]
    for attribute, groups in tables.items():
        links = [
            _link(common, (one, other), [_row(groups, one, common, answers), _row(groups, other, common, answers)])
            for one, other in itertools.combinations([*sorted(groups), REST], 2)
        ]
        links = [link for link in links if min(link.sizes) >= MIN_GROUP]
        strong = [link for link in links if link.is_strong and link.p() * len(links) <= MAX_P]
        if strong:
            yield _finding(parts, attribute, max(strong, key=lambda link: (REST not in link.groups, link.gap)))


def _finding(parts: Parts, attribute: str, link: _Link) -> Finding:
    one, other = link.groups
    shares = [f"{share:.0%} of {size}" for share, size in zip(link.shares, link.sizes, strict=True)]
    return Finding(
        code="group_label_correlation",
        # Rows that name somebody and rows that name nobody may differ in what they are about.
        severity="note" if other == REST else "warning",
        message=(
            f"The answer {shorten(link.answer)} goes with a word for a group of people ({attribute}): {shares[0]} rows "
            f'for "{one}" have it, {shares[1]} rows for "{other}" (Cramér\'s V {link.v:.2f}). A model would learn the '
            "group and not the matter. If that is not meant, correct the answers, or even out the groups among them."
        ),
        file=parts.train.name,
    )


def groups_named(example: Example) -> dict[str, str]:
    """attribute -> the group that the user's text names; an attribute of which it names two is left out."""
    text = "\n".join(str(message["content"])[:CHARACTERS] for message in example.prompt if message["role"] == "user")
    named: dict[str, set[str]] = {}
    for word in _FORMS.intersection(_WORD.findall(text)):
        if word.lower() not in _NEEDS_A_PERSON or is_of_a_person(word, text):
            for attribute, group in _GROUPS[word]:
                named.setdefault(attribute, set()).add(group)
    return {attribute: next(iter(groups)) for attribute, groups in named.items() if len(groups) == 1}


def is_of_a_person(word: str, text: str) -> bool:
    """Whether such a word is said of somebody: "a German customer", and not "a German card"."""
    return (
        re.search(rf"\b{word}(?:[- ]\w+)? {_PERSON}\b|\b(?:am|I'm|as an?)(?: an?)? {word}\b", text, re.IGNORECASE)
        is not None
    )


def _count(parts: Parts) -> tuple[_Tables, Counter[str]]:
    """Rows by attribute, group and answer; rows by answer. Nothing when the answers are no labels."""
    tables: _Tables = {}
    answers: Counter[str] = Counter()
    for example in parts.train.examples:
        answer = fold(example.target)
        if len(answer) > LABEL_CHARACTERS:
            continue
        answers[answer] += 1
        if len(answers) > MAX_ANSWERS:
            return {}, Counter()
        for attribute, group in groups_named(example).items():
            tables.setdefault(attribute, {}).setdefault(group, Counter())[answer] += 1
    return tables, answers


def _row(
    groups: Mapping[str, Counter[str]], group: str, common: Sequence[str], answers: Counter[str]
) -> tuple[int, ...]:
    """Rows of a group by answer, in the order of `common`; all other answers last."""
    rows = answers - sum(groups.values(), Counter[str]()) if group == REST else groups[group]
    counts = [rows[answer] for answer in common]
    return (*counts, sum(rows.values()) - sum(counts))


class _Link(NamedTuple):
    """How far the answers of two groups differ, in the answer that differs most."""

    groups: tuple[str, str]
    sizes: tuple[int, int]
    answer: str
    shares: tuple[float, float]
    table: Sequence[Sequence[int]]
    v: float  # Cramér's V of the whole table

    @property
    def gap(self) -> float:
        return abs(self.shares[0] - self.shares[1])

    @property
    def is_strong(self) -> bool:
        return self.v >= MIN_V and self.gap >= (MIN_GAP_TO_REST if REST in self.groups else MIN_GAP)

    def p(self) -> float:
        """Share of random tables with the same margins whose chi square is as large (seeded)."""
        import numpy as np

        seen = np.asarray(self.table)
        totals = seen.sum(axis=0)
        expected = np.outer(seen.sum(axis=1), totals) / seen.sum()
        first = np.random.default_rng(0).multivariate_hypergeometric(totals, seen[0].sum(), DRAWS, method="marginals")
        # The second row is what the first leaves, so its squares follow.
        drawn = (((first - expected[0]) ** 2) / expected[0] + ((first - expected[0]) ** 2) / expected[1]).sum(axis=1)
        real = ((seen - expected) ** 2 / expected).sum()
        return float((1 + (drawn >= real - 1e-9).sum()) / (1 + DRAWS))


def _link(common: Sequence[str], groups: tuple[str, str], rows: Sequence[Sequence[int]]) -> _Link:
    given = [(answer, one, other) for answer, one, other in zip((*common, OTHER), *rows, strict=True) if one or other]
    sizes = sum(one for _, one, _ in given), sum(other for _, _, other in given)
    if not min(sizes):
        return _Link(groups, sizes, "", (0.0, 0.0), (), 0.0)
    expected = [(one + other) * size / sum(sizes) for size in sizes for _, one, other in given]
    seen = [one for _, one, _ in given] + [other for _, _, other in given]
    chi_square = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True))
    answer, one, other = max(given, key=lambda item: abs(item[1] / sizes[0] - item[2] / sizes[1]))
    table = seen[: len(given)], seen[len(given) :]
    return _Link(groups, sizes, answer, (one / sizes[0], other / sizes[1]), table, (chi_square / sum(sizes)) ** 0.5)
