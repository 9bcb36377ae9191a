"""Near duplicates: what says the same in other letters is found, what only looks alike is not."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest

from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.duplicates import (
    find_conflicting_answers,
    find_exact_duplicates,
    find_near_conflicts,
    find_near_duplicates,
)
from heldout.pipeline.checks.near import DIFFERENT_BITS, SIMILAR, find_near
from heldout.pipeline.checks.rows import Rows, canonical, grams, jaccard, plain, sign
from heldout.pipeline.checks.templates import find_templates
from heldout.pipeline.types import Dataset, Example

SYSTEM = "You sort letters to a museum of trains. Answer with one word and nothing else. " * 8
WORDS = (
    "engine whistle platform ticket sleeper carriage tunnel viaduct signal guard steam coal boiler track gauge "
    "museum visit group school weekend member shop poster model photograph archive donation volunteer heritage "
    "restore wheel brake lamp uniform timetable station bridge freight passenger driver fireman compartment dining"
).split()


def row(text: str, answer: str, line: int, *, system: str = SYSTEM) -> Example:
    contents = (("system", system), ("user", text), ("assistant", answer))
    messages = tuple({"role": role, "content": content} for role, content in contents)
    return Example(messages=messages, weights=(0, 0, 1), line=line)


def parts(*rows: tuple[str, str]) -> Parts:
    return Parts(train=Dataset(name="t", examples=tuple(row(*one, n) for n, one in enumerate(rows, start=1))))


def sentences(n: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Rows that share a long system prompt and little else."""
    rng = random.Random(seed)
    return [(" ".join(rng.choices(WORDS, k=9)), rng.choice(("shop", "visit", "archive"))) for _ in range(n)]


def lines_of(found: object) -> list[tuple[int, ...]]:
    return [finding.lines for finding in found]  # type: ignore[attr-defined]


BASE = ("May I bring a dog on the steam train?", "visit")


@pytest.mark.parametrize(
    "variant",
    [
        "MAY I BRING A DOG ON THE STEAM TRAIN?",
        "May I bring a dog on the steam train",
        "May I bring a dog, on the steam train?!",
        "  May I bring\ta dog\u00a0on the  steam train? ",
        "May I bring a dog on the steam trian?",
        "May I bring my dog on the steam train?",
        "Hello, may I bring a dog on the steam train?",
        "Ｍay I bring a dog on the steam train?",
    ],
)
def test_a_question_in_other_letters_is_a_near_duplicate(variant: str):
    rows = sentences(60)
    found = parts(*rows[:20], BASE, *rows[20:], (variant, "visit"))
    assert lines_of(find_near_duplicates(found)) == [(21, 62)]
    assert not list(find_exact_duplicates(found))


@pytest.mark.parametrize(
    "other",
    [
        "May I take pictures on the steam train?",
        "How old is the steam train?",
        "When does the steam train leave?",
    ],
)
def test_another_question_about_the_same_thing_is_none(other: str):
    assert not list(find_near_duplicates(parts(BASE, (other, "visit"), *sentences(60))))


def test_a_shared_system_prompt_makes_no_rows_alike():
    assert not list(find_near_duplicates(parts(*sentences(300))))


def test_copies_are_exact_and_are_not_told_twice():
    found = parts(*sentences(60), BASE, BASE, BASE)
    assert lines_of(find_exact_duplicates(found)) == [(61, 62, 63)]
    assert not list(find_near_duplicates(found))


def test_of_copies_and_a_variant_the_first_copy_stands_for_all():
    found = parts(*sentences(60), BASE, BASE, (BASE[0].upper(), "visit"))
    assert lines_of(find_near_duplicates(found)) == [(61, 63)]


def test_another_number_is_another_question():
    rows = [("Send 50 tickets to the school", "shop"), ("Send 500 tickets to the school", "shop")]
    assert not list(find_near_duplicates(parts(*rows, *sentences(60))))
    assert not list(find_near_conflicts(parts(rows[0], ("Send 500 tickets to the school", "visit"), *sentences(60))))


def test_a_letter_with_another_date_is_the_same_letter():
    letter = (
        "Dear museum, our school class of young visitors would like to see the engine shed and ride the train on "
        "May {}, please let us know what this would cost and where we can have lunch. Kind regards, the teacher"
    )
    found = parts(*sentences(60), (letter.format(12), "visit"), (letter.format(27), "visit"))
    assert lines_of(find_near_duplicates(found)) == [(61, 62)]


def test_lookalikes_with_other_answers_are_told_apart_from_duplicates():
    # A negation changes what is asked; such pairs are no duplicates to remove.
    rows = [("I can come to the museum on Sunday", "visit"), ("I cannot come to the museum on Sunday", "archive")]
    found = parts(*sentences(60), *rows)
    assert not list(find_near_duplicates(found))
    (finding,) = find_near_conflicts(found)
    assert (finding.severity, finding.lines) == ("note", (61, 62))
    assert "keep both" in finding.message


def test_free_answers_to_one_question_may_be_worded_freely():
    rng = random.Random(1)
    filler = [(" ".join(rng.choices(WORDS, k=9)), " ".join(rng.choices(WORDS, k=12))) for _ in range(60)]
    said = "Yes, dogs are welcome on a lead in all carriages but the dining car."
    found = parts(*filler, (BASE[0], said), (BASE[0].lower() + "!", said.replace("Yes, dogs", "Dogs")))
    assert lines_of(find_near_duplicates(found)) == [(61, 62)]
    other = parts(*filler, (BASE[0], said), ("May I bring two dogs on the steam train?", "No: the guards are afraid."))
    assert not list(find_near_duplicates(other))


def test_contradictions_are_found_whatever_the_case_and_punctuation():
    found = parts(
        *sentences(60), ("Is the shop open?", "shop"), ("is the shop open", "visit"), ("IS THE SHOP OPEN", "shop")
    )
    assert lines_of(find_conflicting_answers(found)) == [(61, 62, 63)]


def test_another_system_prompt_may_ask_for_another_answer():
    rows = [row(text, answer, n) for n, (text, answer) in enumerate(sentences(60), start=1)]
    rows += [row("Good evening", "visit", 61), row("Good evening", "archive", 62, system="Name the drawer.")]
    assert not list(find_conflicting_answers(Parts(train=Dataset(name="t", examples=tuple(rows)))))


def test_the_same_json_in_another_spelling_is_no_contradiction():
    rows = [("Is the shop open?", '{"a": 1, "b": 2}'), ("is the shop open", '{"b":2,"a":1}')]
    assert canonical(rows[0][1]) == canonical(rows[1][1])
    assert not list(find_conflicting_answers(parts(*rows)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Can't stop!", "cant stop", True),
        ("e-mail", "EMAIL", True),
        ("3.5 tons", "35 tons", False),
        ("-5 degrees", "5 degrees", False),
        ("?", "!", False),
        ("Straße", "STRASSE", True),
        ("C++", "C", False),
        ("room 7, floor 3.", "room 7 floor 3", True),
        ("from -5 to 5", "from 5 to 5", False),
        ("version 1.2-3", "version 12-3", False),
        ("n° ٣٫٥", "n° ٣٥", False),
    ],
)
def test_plain_text_has_no_case_and_punctuation_but_keeps_numbers(one: str, other: str, same: bool):
    assert (plain(one) == plain(other)) is same


def test_similar_texts_meet_in_a_band_and_others_hardly_ever():
    rng = random.Random(3)
    pairs = []
    for _ in range(4000):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(5, 12)))
        words = text.split()
        for _ in range(rng.randrange(5)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        pairs.append((text, " ".join(words)))
    signed = [sign(texts) for texts in zip(*pairs, strict=True)]
    apart = [(one ^ other).bit_count() for one, other in zip(*(each.sketch.tolist() for each in signed), strict=True)]
    meet = (signed[0].bands == signed[1].bands).any(axis=0)
    similarity = np.array([jaccard(grams(one), grams(other)) for one, other in pairs])
    assert meet[similarity >= SIMILAR].mean() > 0.99
    assert meet[similarity < 0.15].mean() < 0.05
    for (_, bits), kept in zip(DIFFERENT_BITS, (0.999, 0.985, 0.84), strict=True):
        assert (np.array(apart)[similarity >= SIMILAR] <= bits).mean() > kept
        assert (np.array(apart)[similarity < 0.15] <= bits).mean() < 0.1


def test_short_and_empty_texts_have_a_signature_of_their_own():
    texts = ["", "a", "ab", "abc", "abcd", "abcde", "abcd"]
    signed = sign(texts).bands.T.tolist()
    assert signed[4] == signed[6]
    assert all(one != other for one, other in itertools.combinations(signed[:6], 2))


def test_what_belongs_together_does_not_depend_on_the_order_of_files():
    rows = [*sentences(40), BASE, (BASE[0] + " please", "visit")]
    for order in (rows, rows[::-1]):
        near = find_near(Rows.read([parts(*order).train]))
        counts = np.unique(near.same, return_counts=True)[1]
        assert sorted(counts.tolist())[-2:] == [1, 2]


@pytest.mark.parametrize(
    "slot",
    [lambda n: f"number {n}", lambda n: WORDS[n % 40] + WORDS[n % 37] + WORDS[n % 31]],
    ids=["numbers", "words"],
)
def test_ten_thousand_rows_of_one_pattern_cost_no_more_than_others(slot):
    rows = [
        (f"Please tell me all about the engine called {slot(n)} today", ("shop", "visit")[n % 2]) for n in range(4000)
    ]
    started = time.process_time()
    found = parts(*rows)
    near = found.near
    assert time.process_time() - started < 20
    assert near.same.shape == (4000,)
    (finding,) = find_templates(found)
    assert finding.severity == "note"
    assert "please tell me all about the engine called" in finding.message
    assert len(finding.lines) == 4000


def test_natural_rows_have_no_template():
    assert not list(find_templates(parts(*sentences(400))))


def test_a_row_costs_little_memory():
    made = sentences(3000)
    found = Rows.read([parts(*made).train])
    kept = ("exact", "prompt", "asked", "system", "answer", "numbers", "line", "length", "sketch")
    assert sum(getattr(found, name).nbytes for name in kept) / len(found) < 100
    assert sum(band.nbytes for band in found.bands) / len(found) == 80


def test_bands_of_many_rows_lie_in_a_file_and_say_the_same(monkeypatch):
    made = parts(*sentences(300))
    in_memory, near = Rows.read([made.train]), find_near(made.rows)
    monkeypatch.setattr("heldout.pipeline.checks.rows.IN_MEMORY", 299)
    monkeypatch.setattr("heldout.pipeline.checks.rows._BATCH_ROWS", 7)
    in_a_file = Rows.read([made.train])
    assert [band.tolist() for band in in_a_file.bands] == [band.tolist() for band in in_memory.bands]
    assert find_near(in_a_file).same.tolist() == near.same.tolist()
