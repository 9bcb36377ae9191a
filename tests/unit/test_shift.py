"""Files of another kind are told apart from files that differ by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from heldout.pipeline.checks import ModelTools, Parts
from heldout.pipeline.checks.shift import MOST, find_label_shift, find_shift, two_sample_test
from heldout.pipeline.types import Dataset
from tests.unit.test_leakage import LABELS, file
from tests.unit.test_near_duplicates import WORDS

GARDEN = (
    "rose tulip hedge lawn spade compost seed bulb greenhouse tomato pepper weed slug rake hose soil pot prune bloom"
).split()


def rows(n: int, words: Sequence[str], *, seed: int, labels: Sequence[str] = LABELS) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(" ".join(rng.choices(words, k=8)), rng.choice(labels)) for _ in range(n)]


@pytest.mark.parametrize("seed", range(5))
def test_files_of_one_source_are_quiet(seed: int):
    train, valid = (file(name, *rows(n, WORDS, seed=seed + at)) for name, n, at in (("t", 200, 0), ("v", 60, 100)))
    assert not list(find_shift(Parts(train=train, valid=valid)))
    assert not list(find_label_shift(Parts(train=train, valid=valid)))


def test_another_subject_is_of_another_kind():
    train, valid = file("t", *rows(200, WORDS, seed=0)), file("v", *rows(40, GARDEN, seed=1))
    (finding,) = find_shift(Parts(train=train, valid=valid))
    assert (finding.code, finding.severity, finding.file) == ("shift", "warning", "v")
    assert "is of another kind than t" in finding.message
    assert "200 and 40 rows compared" in finding.message


def test_a_part_of_another_subject_differs():
    mixed = rows(90, WORDS, seed=1) + rows(60, GARDEN, seed=2)
    (finding,) = find_shift(Parts(train=file("t", *rows(300, WORDS, seed=0)), holdout=file("h", *mixed)))
    assert finding.message.startswith("h differs from t")


def test_the_same_answers_in_other_words_are_a_note():
    free = [f"answer number {n}" for n in range(60)]
    train = [(text, free[n % 60]) for n, (text, _) in enumerate(rows(60, WORDS, seed=0))]
    valid = [(text, free[n]) for n, (text, _) in enumerate(rows(60, GARDEN, seed=1))]
    (finding,) = find_shift(Parts(train=file("t", *train), valid=file("v", *valid)))
    assert finding.severity == "note"
    assert "in other words" in finding.message


def test_a_few_rows_are_not_compared():
    train, valid = file("t", *rows(200, WORDS, seed=0)), file("v", *rows(19, GARDEN, seed=1))
    assert not list(find_shift(Parts(train=train, valid=valid)))


def test_big_files_are_compared_by_a_sample_that_is_told():
    train, valid = file("t", *rows(MOST + 500, WORDS, seed=0)), file("v", *rows(50, GARDEN, seed=1))
    (finding,) = find_shift(Parts(train=train, valid=valid))
    assert f"{MOST} and 50 rows compared" in finding.message


def test_an_encoder_sees_what_words_do_not_show():
    # The files share no structure in words, but the "encoder" knows which topic each random word belongs to.
    rng = random.Random(3)
    train, other = ([f"w{rng.randrange(10**6) * 2 + odd}" for _ in range(100)] for odd in (0, 1))

    def embed(texts: Sequence[str]) -> list[list[float]]:
        return [[1.0, 0.0] if int(text[1:]) % 2 else [0.0, 1.0] for text in texts]

    assert two_sample_test(train, other, ModelTools()).auc < 0.6
    found = two_sample_test(train, other, ModelTools(embed=embed))
    assert found.auc == 1.0
    assert "encoder" in found.means
    assert found.p < 0.01


def test_other_shares_of_labels_are_named():
    skewed = rows(100, WORDS, seed=1, labels=("shop",) * 8 + ("visit", "archive"))
    (finding,) = find_label_shift(Parts(train=file("t", *rows(300, WORDS, seed=0)), valid=file("v", *skewed)))
    assert finding.code == "label_shift"
    assert "'shop' 3" in finding.message


def test_free_answers_have_no_shares():
    def free(name: str, seed: int) -> Dataset:
        return file(name, *((text, f"{seed} {n}") for n, (text, _) in enumerate(rows(100, WORDS, seed=seed))))

    assert not list(find_label_shift(Parts(train=free("t", 0), valid=free("v", 1))))
