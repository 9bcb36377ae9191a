"""Fragility: what the perturbations touch, and what the light says of answers that flip."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heldout.engine.base import Message
from heldout.pipeline.augment.perturb import pieces
from heldout.pipeline.consequences import fragility
from heldout.pipeline.consequences.base import Budget, Consequence
from heldout.pipeline.consequences.perturbations import allowed, aside, perturbed, separate, space
from heldout.pipeline.consequences.perturbed_answers import Asked
from tests.unit.conftest import example
from tests.unit.consequences import MODEL, Says, Speaking, last, subject
from tests.unit.test_consequences import HOLDOUT, TRAIN, brittle, right_label, ticket

TEXTS = st.lists(
    st.sampled_from(
        [
            "please",
            "send",
            "Order: new",
            "a - b",
            "12.50",
            "x_1",
            '"as is"',
            "`code here`",
            '{"a": 1}',
            "größe",
            "don't",
        ]
    ),
    max_size=12,
).map(" ".join)


@given(TEXTS | st.text(max_size=80), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_no_perturbation_touches_what_must_stay_and_the_seed_decides(text: str, seed: int) -> None:
    protected = [one.text for one in pieces(text) if not one.free]
    for change in (space, separate, aside):
        found = change(text, random.Random(seed))
        assert found == change(text, random.Random(seed))
        rest = found
        for stretch in protected:
            assert stretch in rest, change
            rest = rest[rest.index(stretch) + len(stretch) :]
    assert space(text, random.Random(seed)).split() == text.split()
    assert aside(text, random.Random(seed)).startswith(text)


def test_separators_are_changed_between_a_name_and_its_value_only() -> None:
    found = {separate("Name: Kim, at 12:30, see http://a.b: ok", random.Random(seed)) for seed in range(8)}
    assert found == {"Name - Kim, at 12:30, see http://a.b: ok", "Name:\nKim, at 12:30, see http://a.b: ok"}


def test_there_are_eight_and_an_encoder_has_no_system_prompt_to_lose() -> None:
    names = [one.name for one in allowed(TRAIN, is_encoder=False)[0]]
    assert len(set(names)) == len(names) == 8
    assert set(names) - {one.name for one in allowed(TRAIN, is_encoder=True)[0]} == {"system prompt"}


def test_only_the_users_words_and_the_system_prompt_change_never_the_answer() -> None:
    for one in allowed(TRAIN, is_encoder=False)[0]:
        for row in HOLDOUT[:10]:
            other = perturbed(row, one, 3)
            assert other == perturbed(row, one, 3)
            assert other.messages[-1] == row.messages[-1]
            if one.name != "system prompt":
                assert other.messages[0] == row.messages[0]


def test_where_letters_decide_the_users_words_are_left_alone() -> None:
    rows = [example(f"word {i}" if i % 2 else f"WORD {i}", "small" if i % 2 else "big", i + 1) for i in range(60)]
    found, why = allowed(rows, is_encoder=False)
    assert [one.name for one in found] == ["system prompt"]
    assert why
    measured = fragility.measure(subject(Speaking(right_label), rows, rows, is_encoder=True, constant="big"))
    assert measured.status == "not_measured"
    assert why in measured.sentence


def test_values_that_are_copied_out_of_the_prompt_must_still_stand_in_it() -> None:
    rows = [
        example(f"Book a table for Kim{chr(97 + i)}", json.dumps({"name": f"Kim{chr(97 + i)}"}), i) for i in range(26)
    ]
    found, _ = allowed(rows, is_encoder=False)
    assert {one.name for one in found} == {"irrelevant ending", "greeting", "system prompt"}


def test_a_model_that_reads_the_matter_is_not_fragile() -> None:
    found = fragility.measure(subject(Speaking(right_label, brittle), TRAIN, HOLDOUT))
    assert found.status == "ok", found.sentence
    assert found.numbers["flip_rate"] < 0.02
    assert found.numbers["n"] == 90


def test_a_model_that_knows_the_template_by_heart_fails_when_the_prompt_is_steadier() -> None:
    found = fragility.measure(subject(Speaking(brittle, right_label), TRAIN, HOLDOUT))
    assert found.status == "fail", found.sentence
    assert found.numbers["score"] == 1.0
    assert found.numbers["perturbations"]["irrelevant ending"]["drop"] == pytest.approx(2 / 3, abs=0.05)
    assert found.numbers["p_fail"] > 0.99
    assert "robust" in found.sentence
    (shown,) = found.examples
    assert "became 'card'" in shown


def test_a_model_that_flips_more_but_is_still_better_everywhere_is_warned_of_and_not_rejected() -> None:
    found = fragility.measure(subject(Speaking(brittle), TRAIN, HOLDOUT, constant="visa"))
    assert found.status == "warn", found.sentence


def test_the_baseline_is_not_asked_where_it_cannot_change_the_light() -> None:
    engine = Speaking(right_label, lambda messages: "no idea")
    fragility.measure(subject(engine, TRAIN, HOLDOUT))
    assert {model for model, _ in engine.asked} == {MODEL}


def test_the_baselines_shots_are_asked_with_it() -> None:
    engine = Speaking(brittle, right_label)
    known = subject(engine, TRAIN, HOLDOUT)
    fragility.measure(replace(known, baseline=replace(known.baseline, shots=(TRAIN[0],))))
    theirs = [messages for model, messages in engine.asked if model != MODEL]
    assert theirs
    assert all(TRAIN[0].target in [message["content"] for message in messages] for messages in theirs)


def test_at_most_a_hundred_examples_are_asked_and_always_the_same() -> None:
    first, again = Speaking(right_label), Speaking(right_label)
    many = [ticket(i, "other") for i in range(300)]
    assert fragility.measure(subject(first, TRAIN, many)).numbers["n"] == 100
    fragility.measure(subject(again, TRAIN, many))
    assert first.asked == again.asked


def test_a_perturbation_that_makes_prompts_too_long_is_left_out_and_named() -> None:
    longest = max(len(last(row.prompt)) for row in HOLDOUT)
    found = fragility.measure(subject(Speaking(right_label, longest=longest), TRAIN, HOLDOUT))
    assert "irrelevant ending" in found.numbers["left_out"]
    assert "left out: irrelevant ending" in found.sentence
    assert "small letters" in found.numbers["perturbations"]


class Slow(Speaking):
    """A second an answer."""

    def __init__(self, tuned: Says, base: Says | None = None) -> None:
        self.now = 0.0

        def slowly(answers: Says) -> Says:
            def answer(messages: Sequence[Message]) -> str:
                self.now += 1.0
                return answers(messages)

            return answer

        super().__init__(slowly(tuned), slowly(base or tuned))

    def measure(self, seconds: float, **known: Any) -> Consequence:
        """Fragility, in half of so many seconds from now on."""
        one = subject(self, TRAIN, HOLDOUT, **known)
        self.now = 0.0
        return fragility.measure(replace(one, budget=Budget(seconds, clock=lambda: self.now)))


def test_when_time_is_short_some_examples_are_asked_in_all_wordings_before_the_others() -> None:
    found = Slow(right_label).measure(400.0, constant="card")
    asked = {name: numbers["n"] for name, numbers in found.numbers["perturbations"].items()}
    assert asked == {
        "typing slips": 60,  # the second part was begun
        "irrelevant ending": 60,
        "system prompt": 18,
        "small letters": 30,
        "greeting": 30,
        "white space": 30,
    }
    assert "left out" not in found.sentence, "the others change nothing here"
    assert found.numbers["only_part"] == "30 of 90 examples were asked under all perturbations"
    assert found.sentence.endswith(
        "under all perturbations; the time for probes (200 s) was used up; HELDOUT_EVAL_BUDGET gives them more"
    )


def test_examples_that_only_the_most_damaging_perturbations_were_tried_on_count_in_no_mean() -> None:
    def slips(messages: Sequence[Message]) -> str:
        return right_label(messages) if last(messages) in WORDINGS else "no idea"

    WORDINGS = {last(row.prompt) for row in HOLDOUT} | {
        last(perturbed(row, one, 0).prompt)
        for one in allowed(TRAIN, is_encoder=False)[0]
        if one.name != "typing slips"
        for row in HOLDOUT
    }
    short, long = (Slow(slips).measure(seconds, constant="card") for seconds in (400.0, 5000.0))
    assert short.numbers["perturbations"]["typing slips"]["n"] == 60
    assert short.numbers["n"] == 30
    assert short.numbers["flip_rate"] == pytest.approx(long.numbers["flip_rate"], abs=0.05)


def test_few_examples_are_asked_in_one_part_and_what_time_took_is_no_lack_of_examples() -> None:
    engine = Slow(right_label)
    few = subject(engine, TRAIN, HOLDOUT[:24], constant="card")
    engine.now = 0.0
    found = fragility.measure(replace(few, budget=Budget(60.0, clock=lambda: engine.now)))
    assert found.numbers["perturbations"]["typing slips"]["n"] == 24
    engine.now = 0.0
    none = fragility.measure(replace(few, budget=Budget(0.0, clock=lambda: engine.now)))
    assert none.sentence.count("the time for probes") == 1


def test_when_the_time_is_used_up_the_last_perturbations_are_left_out_and_named() -> None:
    found = Slow(right_label).measure(130.0, constant="card")
    assert list(found.numbers["perturbations"]) == ["typing slips", "irrelevant ending", "system prompt"]
    assert "left out: small letters, greeting, white space" in found.sentence
    assert "HELDOUT_EVAL_BUDGET" in found.sentence


def test_a_baseline_that_there_was_no_time_for_is_told_in_one_clause() -> None:
    found = Slow(brittle, right_label).measure(330.0)
    assert "baseline" not in found.numbers
    assert found.sentence.count("zero-shot") == 1
    assert "zero-shot was asked none of these perturbations; 30 of 90" in found.sentence
    assert found.sentence.count("the time for probes") == 1


def test_a_baseline_that_was_asked_some_names_the_others() -> None:
    found = Slow(brittle, right_label).measure(400.0)
    assert found.numbers["baseline"]["perturbations"] == ["typing slips", "irrelevant ending"]
    assert "zero-shot was asked all but system prompt, small letters, " in found.sentence


def test_a_baseline_that_was_asked_some_examples_is_compared_on_those() -> None:
    found = Slow(brittle, right_label).measure(900.0)
    assert found.status == "fail", found.sentence
    assert found.numbers["n"] == found.numbers["baseline"]["n"] == 30
    assert set(found.numbers["baseline"]["perturbations"]) == set(found.numbers["perturbations"])
    found = Slow(brittle, right_label).measure(1100.0)
    assert found.numbers["n"] == 60
    assert found.numbers["baseline"]["n"] == 30
    assert "points ahead of zero-shot on 30 of them" in found.sentence


def test_a_baseline_is_compared_on_ten_examples_or_not_at_all() -> None:
    def asked(places: range, drop: float) -> Asked:
        n = len(places)
        same = (drop,) * n
        no = ("",) * n
        return Asked(tried=tuple(range(20)), places=tuple(places), flips=same, drops=same, answers=no, texts=no)

    def light(theirs: range) -> Consequence:
        ours, other = {"slips": asked(range(20), 1.0)}, {"slips": asked(theirs, 0.0)}
        words = {"slips": "with a slip"}
        score = [1.0] * 20
        return fragility.judge(
            ours,
            other,
            score,
            score,
            HOLDOUT[:20],
            [""] * 20,
            words=words,
            baseline_name="zero-shot",
            refused={},
            late="late",
        )

    assert light(range(9)).numbers["p_fail"] == 0.0
    assert light(range(9)).numbers["not_compared"] == "zero-shot was asked none of these perturbations"
    assert light(range(10)).status == "fail"
