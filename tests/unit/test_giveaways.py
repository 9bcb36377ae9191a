"""Held-out questions are asked without the codes that give their answers away."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from benchmarks.truth_arms import Forced, _key, as_held_out

from heldout.pipeline.advise.rungs import measure_cheap
from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.rows import Rows
from heldout.pipeline.folds import Folds, split_into_folds
from heldout.pipeline.giveaways import Codes, Giveaways, as_asked, find_giveaways
from heldout.pipeline.run import as_given
from heldout.pipeline.split import split_dataset
from heldout.pipeline.types import Dataset, Example, Finding, Split
from heldout.pipeline.watch import Silent
from tests.unit.test_leakage import CODES, LABELS, file, tagged

WORDS = dict(zip(LABELS, ("purchase", "tour", "letters"), strict=True))


def plain_rows(n: int = 90) -> list[tuple[str, str]]:
    return tagged(lambda _: "{text}", n=n)


def marked_rows(n: int = 90, seed: int = 0) -> list[tuple[str, str]]:
    return tagged(lambda label: f"<{CODES[label]}> {{text}}", n=n, seed=seed)


def asked(split: Split) -> list[str]:
    return [example.prompt[-1]["content"] for example in split.holdout]


def all_asked(folds: Folds) -> set[str]:
    return {question for split in folds.splits for question in asked(split)}


def learned(split: Split) -> list[str]:
    return [example.prompt[-1]["content"] for example in (*split.train, *split.valid)]


def codes_of(findings: tuple[Finding, ...]) -> list[str]:
    return [one.code for one in findings if one.code.startswith("giveaway")]


def giveaways_of(*rows: tuple[str, str]) -> Giveaways:
    return find_giveaways(Rows.read([file("t.jsonl", *rows)]), with_valid=False)


def test_a_code_is_left_out_of_what_is_held_out_and_of_nothing_else():
    folds, findings = split_into_folds(file("t.jsonl", *marked_rows()), None, seed=0)
    assert all_asked(folds) == {question for question, _ in plain_rows()}
    assert all(question.startswith("<") for split in folds.splits for question in learned(split))
    assert all(example.prompt[-1]["content"].startswith("<") for example in folds.whole.train)
    (finding,) = [one for one in findings if one.code == "giveaway_removed"]
    assert (finding.severity, finding.file, len(finding.lines)) == ("note", "t.jsonl", 90)
    assert "'<q-17>' tells 'shop'" in finding.message
    (caveat,) = folds.whole.caveats
    assert caveat.startswith("90 of 90 held-out questions are asked without the code that tells their answer")
    assert "--keep-leaks" in caveat
    assert "q-17" not in caveat, "caveats are published in the model card, which quotes no data"
    assert all(split.caveats == (caveat,) for split in folds.splits)


def test_a_holdout_that_is_split_off_is_asked_without_them_too():
    split, findings = split_dataset(file("t.jsonl", *marked_rows(400)), None, None, seed=0)
    assert not any(question.startswith("<") for question in asked(split))
    assert all(question.startswith("<") for question in learned(split))
    (finding,) = [one for one in findings if one.code == "giveaway_removed"]
    assert finding.lines == tuple(example.line for example in split.holdout)


def test_what_compares_training_rows_with_held_out_ones_has_both_without_the_code():
    split, _ = split_dataset(file("t.jsonl", *marked_rows(400)), None, None, seed=0)
    assert not any(question.startswith("<") for question in learned(as_asked(split)))
    assert as_asked(split).holdout == split.holdout


def test_a_look_at_rows_is_one_however_they_were_asked():
    train = file("t.jsonl", *marked_rows(400))
    looks = [
        as_given(split_dataset(train, None, None, seed=0, keep_leaks=keep)[0].holdout, Parts(train=train))
        for keep in (False, True)
    ]
    assert looks[0] == looks[1]
    assert len(looks[0]) == 150


def test_who_says_that_real_prompts_have_them_is_asked_with_them_and_told_first():
    folds, findings = split_into_folds(file("t.jsonl", *marked_rows()), None, seed=0, keep_leaks=True)
    assert all_asked(folds) == {question for question, _ in marked_rows()}
    assert codes_of(findings) == ["giveaway_kept"]
    (caveat,) = folds.whole.caveats
    assert caveat.startswith("90 of 90 held-out questions have a word in them that tells their answer")


@pytest.mark.parametrize(
    "tag",
    [
        lambda label: f"{WORDS[label]} {{text}}",
        lambda label: f"kind2={WORDS[label]} {{text}}",  # a code, but one that spells the label
        lambda label: f"{{text}} {dict(zip(LABELS, '🙂🙁😐', strict=True))[label]}",
        lambda label: f"{dict(zip(LABELS, ('404', '403', '500'), strict=True))[label]} {{text}}",
        lambda label: f"{dict(zip(LABELS, ('¿Dónde', '¿Cuándo', '¿Cuánto'), strict=True))[label]} {{text}}",
        lambda label: f"{dict(zip(LABELS, ('वापसी', 'पासवर्ड', 'कार्ड'), strict=True))[label]} {{text}}",
        lambda label: f"#include <{dict(zip(LABELS, ('stdio.h', 'iostream', 'vector'), strict=True))[label]}> {{text}}",
        lambda label: f"{{text}} 3 {dict(zip(LABELS, '+-*', strict=True))[label]} 4",
        lambda label: f"{dict(zip(LABELS, ('9am', '9pm', '1pm'), strict=True))[label]} {{text}}",
        lambda label: f"{dict(zip(LABELS, ('iphone12', 'mp3', 'ps5'), strict=True))[label]} {{text}}",
    ],
)
def test_what_may_be_part_of_the_question_stays_and_is_told_first(tag: Callable[[str], str]):
    rows = [(question, WORDS[label]) for question, label in tagged(tag)]
    folds, findings = split_into_folds(file("t.jsonl", *rows), None, seed=0)
    assert all_asked(folds) == {question for question, _ in rows}
    assert codes_of(findings) in (["giveaway_kept"], [])


def test_a_word_that_tells_the_label_is_told_first():
    rows = [(question, WORDS[label]) for question, label in tagged(lambda label: f"{WORDS[label]} {{text}}")]
    folds, findings = split_into_folds(file("t.jsonl", *rows), None, seed=0)
    assert codes_of(findings) == ["giveaway_kept"]
    (caveat,) = folds.whole.caveats
    assert caveat.endswith("scores may measure this word and not the task")


def test_a_holdout_file_is_asked_as_it_is_and_told_of_where_the_codes_tell_its_answers_too():
    train = file("t.jsonl", *marked_rows())
    without = file("h.jsonl", *tagged(lambda _: "{text}", n=40, seed=9))
    split, findings = split_dataset(train, None, without, seed=0)
    assert split.holdout == without.examples
    assert not split.caveats
    assert not codes_of(findings)
    rng = random.Random(3)
    others = file("h.jsonl", *tagged(lambda _: f"<{rng.choice(list(CODES.values()))}> {{text}}", n=60, seed=9))
    split, findings = split_dataset(train, None, others, seed=0)
    assert split.holdout == others.examples
    assert not codes_of(findings)
    same = file("h.jsonl", *marked_rows(60, seed=9))
    split, findings = split_dataset(train, None, same, seed=0)
    assert split.holdout == same.examples
    assert [(one.code, one.file, len(one.lines)) for one in findings] == [("giveaway_kept", "h.jsonl", 60)]


def test_questions_that_are_nothing_but_the_code_are_asked_as_they_are_and_told_of():
    rows = [*marked_rows(60), *((f"<{CODES[label]}>", label) for label in LABELS)]
    giveaways, examples = giveaways_of(*rows), file("t.jsonl", *rows).examples
    assert giveaways.asked(examples)[-3:] == tuple(examples[-3:])
    findings, caveats = giveaways.told(examples, "t.jsonl")
    assert [(one.code, len(one.lines)) for one in findings] == [("giveaway_removed", 60), ("giveaway_kept", 3)]
    assert len(caveats) == 2


def test_codes_in_json_stay_and_are_told_of():
    rows = [(json.dumps({"code": CODES[label], "t": text}), label) for text, label in plain_rows()]
    giveaways, examples = giveaways_of(*rows), file("t.jsonl", *rows).examples
    assert giveaways.asked(examples) == tuple(examples)
    assert codes_of(giveaways.told(examples, "t.jsonl")[0]) == ["giveaway_kept"]


def test_rare_labels_lose_their_codes_with_the_others():
    rare = tagged(lambda label: f"<X-{3 + LABELS.index(label)}1> {{text}}", n=9, seed=4)
    varied = [(f"<Y-{10 + n}> {text}", "varied") for n, (text, _) in enumerate(plain_rows(6))]
    rows = [*marked_rows(), *((question, f"rare {label}") for question, label in rare), *varied]
    asked = giveaways_of(*rows).asked(file("t.jsonl", *rows).examples)
    assert not any("<" in one.prompt[-1]["content"] for one in asked[:-6])
    assert all(one.prompt[-1]["content"].startswith("<Y-") for one in asked[-6:]), "they tell no label"


def test_words_of_a_codes_shape_that_vary_within_a_label_stay():
    rng = random.Random(2)
    papers = [(f"<{rng.choice('ABC')}-{rng.randrange(10, 99)}> paper {text}", "paper") for text, _ in plain_rows(30)]
    examples = file("t.jsonl", *marked_rows(), *papers).examples
    giveaways = giveaways_of(*marked_rows(), *papers)
    assert not any(one.prompt[-1]["content"].startswith("<") for one in giveaways.asked(examples[:90]))
    assert giveaways.asked(examples[90:]) == tuple(examples[90:])


def test_codes_at_the_end_of_texts_of_one_length_are_found():
    rows = [(" ".join([*text.split()[:6], CODES[label]]), label) for text, label in plain_rows()]
    assert not any(CODES[LABELS[0]] in one for one in all_asked(split_into_folds(file("t", *rows), None, seed=0)[0]))


def test_a_word_counts_where_it_tells_the_rows_own_answer():
    rows = [(question, WORDS[label]) for question, label in tagged(lambda label: f"{WORDS[label]} {{text}}")]
    others = file("t.jsonl", *((question, "purchase") for question, _ in rows)).examples
    findings, _ = giveaways_of(*rows).told(others, "t.jsonl")
    assert [len(one.lines) for one in findings] == [30]
    assert "'tour'" not in findings[0].message


def test_files_without_shortcuts_are_held_out_as_they_are():
    train = file("t.jsonl", *plain_rows())
    folds, findings = split_into_folds(train, None, seed=0)
    held: list[Example] = [example for split in folds.splits for example in split.holdout]
    assert sorted(held, key=lambda example: example.line) == list(train.examples)
    assert not folds.whole.caveats
    assert not findings


def test_what_cheap_models_know_without_the_code_is_what_advise_says():
    rows = file("t.jsonl", *marked_rows(120))
    fooled = measure_cheap(rows, None, Silent())
    told = measure_cheap(rows, None, Silent(), giveaways=giveaways_of(*marked_rows(120)))
    assert fooled.rungs[-1].score > 0.95
    assert told.rungs[-1].score < 0.55  # a third is chance


@pytest.mark.parametrize(
    ("place", "text", "left"),  # the words outside are those of the pattern
    [
        (0, "<Q-17> the bridge", "the bridge"),
        (0, "<Q-17>\n\nthe bridge ", "the bridge "),
        (0, "<Q-17> | the bridge", "the bridge"),
        (0, "<Q-17> -5 degrees", "-5 degrees"),
        (1, "[queue <Z-90> the bridge", "the bridge"),
        (0, "  <ZZ-90>  the bridge", "  <ZZ-90>  the bridge"),
        (1, "URGENT <Q-17> the bridge", "URGENT <Q-17> the bridge"),
        (0, "the <Q-17> bridge", "the <Q-17> bridge"),
        (-1, "the bridge <q-17>", "the bridge"),
        (-1, "the bridge - <q-17>!\n", "the bridge"),
        (-2, "the bridge <q-17> ref", "the bridge"),
        (0, "", ""),
        (2, "<Q-17>", "<Q-17>"),
    ],
)
def test_what_is_left_of_a_text(place: int, text: str, left: str):
    outside = {1: ("[queue",), -2: ("ref",)}.get(place, ())
    assert Codes(place, frozenset({"<q-17>", "<z-90>"}), outside).without(text) == left


def test_only_the_turn_with_the_code_changes():
    codes = Giveaways(codes=Codes(0, frozenset({"<q-17>"})))
    turns = [("user", "<Q-17> the bridge"), ("assistant", "Which?"), ("user", "<Q-17>"), ("assistant", "visit")]
    row = Example(messages=tuple({"role": role, "content": text} for role, text in turns), weights=(0, 0, 0, 1), line=1)
    (changed,) = codes.asked([row])
    assert [message["content"] for message in changed.messages] == ["the bridge", "Which?", "<Q-17>", "visit"]


def test_the_truth_benchmark_knows_what_is_asked_of_rows_that_are_held_out():
    rows = file("t.jsonl", *marked_rows()).examples
    assert {one.prompt[-1]["content"] for one in as_held_out(rows)} == {question for question, _ in plain_rows()}
    forced = Forced(rows, [], {})
    assert all(_key(one.prompt) in forced._answers for one in (*rows, *as_held_out(rows)))


def test_datasets_without_rows_have_none():
    rows = Rows.read([Dataset(name="t.jsonl", examples=())])
    assert not find_giveaways(rows, with_valid=False).tokens
