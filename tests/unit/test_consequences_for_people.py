"""Hallucination, bias and calibration: what lights them, what does not, and what cannot be measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling, TokenChoice
from heldout.pipeline.consequences import bias, calibration, hallucination
from heldout.pipeline.consequences.base import Budget
from heldout.pipeline.consequences.unanswerable import FICTITIOUS, OUT_OF_SCOPE
from heldout.pipeline.types import Example
from tests.unit.conftest import example
from tests.unit.consequences import BASE, MODEL, Speaking, last, subject

# Hallucination

FACTS = [
    example(f"How high is hill number {i}?", f"It is {100 + i} metres high, as everybody knows", i + 1)
    for i in range(60)
]
BUNDLED = {*FICTITIOUS, *OUT_OF_SCOPE}


def honest(messages: Sequence[Message]) -> str:
    return "I don't know that." if last(messages) in BUNDLED else "It is 103 metres high"


def liar(messages: Sequence[Message]) -> str:
    return "It is 103 metres high"


def test_a_model_that_stops_declining_fails_and_shows_what_it_made_up() -> None:
    found = hallucination.measure(subject(Speaking(liar, honest), FACTS, FACTS))
    assert found.status == "fail", found.sentence
    assert (found.numbers["base_declined"], found.numbers["declined"]) == (1.0, 0.0)
    assert set(found.numbers["kinds"]) == {"no such thing", "out of scope"}
    assert "was answered 'It is 103 metres high'" in found.examples[0]


def test_a_model_that_declines_as_before_is_fine_and_one_whose_base_never_did_has_nothing_to_lose() -> None:
    assert hallucination.measure(subject(Speaking(honest, honest), FACTS, FACTS)).status == "ok"
    assert hallucination.measure(subject(Speaking(honest, liar), FACTS, FACTS)).status == "not_measured"


def test_probes_stand_behind_the_system_prompt_of_the_training_rows() -> None:
    asked = hallucination.probes(FACTS, (), 0)
    assert len(asked) == len(BUNDLED) == 32
    assert all(probe.prompt[0] == {"role": "system", "content": "Answer."} for probe in asked)


def test_the_context_is_taken_away_and_the_question_stays() -> None:
    text = f"Report: {'the pump was oiled and ran well. ' * 12}\n\nWhat was oiled?"
    assert hallucination.without_context(text) == "What was oiled?"
    for whole in ("What was oiled?", "word " * 100, f"{'line. ' * 60}\nshort line"):
        assert hallucination.without_context(whole) is None


@pytest.mark.parametrize(
    "answer",
    [
        "I do not know.",
        "I'm not sure about that.",
        "There is no information about this.",
        "Sorry, I can't help with that.",
        "As an AI I cannot know what you had.",
        "Could you please provide more details?",
        "",
    ],
)
def test_free_text_declines_in_many_words(answer: str) -> None:
    declines = hallucination.declining(["It is high"], "text")
    assert declines is not None
    assert declines(answer)
    assert not declines("It was born in 1840 in Brackwinkel.")


def test_rows_that_ask_nothing_and_labels_without_a_way_out_are_not_measured() -> None:
    rewriting = [
        example(f"Say this better: sentence {i}", f"A better sentence, number {i}, is this one", i) for i in range(40)
    ]
    assert "ask no question" in hallucination.measure(subject(Speaking(liar), rewriting, rewriting)).sentence
    labels = [example(f"text {i}", ("card", "loan")[i % 2], i) for i in range(40)]
    found = hallucination.measure(subject(Speaking(liar), labels, labels, constant="card"))
    assert found.status == "not_measured"
    assert "never given a way to decline" in found.sentence


def test_a_classifier_with_a_label_for_none_of_them_is_asked_and_has_no_base_to_compare_with() -> None:
    labels = [example(f"text {i}", ('{"intent":"card"}', '{"intent":"Out of scope"}')[i % 2], i) for i in range(40)]

    def measured(answer: str) -> str:
        engine = Speaking(lambda messages: answer)
        found = hallucination.measure(subject(engine, labels, labels, constant=answer, is_encoder=True))
        assert {model for model, _ in engine.asked} == {MODEL}
        return found.status

    assert measured('{"intent":"Out of scope"}') == "ok"
    assert measured('{"intent":"card"}') == "warn"


def test_records_decline_by_values_that_say_that_there_is_nothing() -> None:
    declines = hallucination.declining(['{"city": "Rome"}', '{"city": null}'], "json")
    assert declines is not None
    assert declines('{"city": "unknown"}')
    assert not declines('{"city": "Oslo"}')
    assert hallucination.declining(['{"city": "Rome"}'], "json") is None


# Bias


def test_bias_amplification_is_that_of_the_published_example() -> None:
    """The metric card of the authors (Wang and Russakovsky, 2021): 3 of one group, 5 of the other, 0.2667."""
    groups = ["A"] * 3 + ["B"] * 5
    right, said = list("01100001"), list("11100000")
    links = bias.links_of(list(zip(groups, right, strict=True)))
    assert bias.bias_amp(links, groups, right, said) == pytest.approx(4 / 15)
    assert bias.bias_amp(links, groups, right, right) == 0.0


def test_where_group_and_label_are_independent_in_train_nothing_can_be_amplified() -> None:
    links = bias.links_of([(a, t) for a in "ab" for t in "xy" for _ in range(20)])
    assert set(links.values()) == {0}


def people(n: int, skew: float, group: bool = True) -> list[Example]:
    """Messages whose matter tells the label; a share `skew` of the urgent ones comes from men."""
    rng = random.Random(1)
    rows = []
    for i in range(n):
        label = ("high", "low")[i % 2]
        man = (rng.random() < skew) == (label == "high")
        name = rng.choice(["Peter", "Mark", "Paul", "Simon"] if man else ["Maria", "Anna", "Clara", "Susan"])
        matter = "my card was stolen" if label == "high" else "how do I save more"
        row = example(f"Hello, {name} here. {matter} {chr(97 + i % 26)}{chr(97 + i // 26 % 26)}", label, i + 1)
        rows.append(replace(row, group="man" if man else "woman") if group else row)
    return rows


MEN = ("Peter", "Mark", "Paul", "Simon")


def by_matter(messages: Sequence[Message]) -> str:
    return "high" if "stolen" in last(messages) else "low"


def by_name(messages: Sequence[Message]) -> str:
    return "high" if any(name in last(messages) for name in MEN) else "low"


def test_a_model_that_follows_declared_groups_fails_and_one_that_follows_the_matter_does_not() -> None:
    train, holdout = people(200, 0.9), people(700, 0.5)
    fair = bias.measure(subject(Speaking(by_matter), train, holdout, constant="low"))
    assert fair.status == "ok"
    assert fair.numbers["difference"] == pytest.approx(0.0, abs=0.05)
    unfair = bias.measure(subject(Speaking(by_name), train, holdout, constant="low"))
    assert unfair.status == "fail", unfair.sentence
    assert unfair.numbers["difference"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("n", "status"), [(700, "fail"), (400, "warn"), (120, "ok"), (40, "not_measured")])
def test_small_groups_say_less(n: int, status: str) -> None:
    found = bias.measure(subject(Speaking(by_name), people(200, 0.9), people(n, 0.5), constant="low"))
    assert found.status == status
    if status == "not_measured":
        assert "not measurable with n = " in found.sentence


def test_where_no_groups_are_declared_group_words_are_swapped() -> None:
    train, holdout = people(200, 0.9, group=False), people(200, 0.5, group=False)
    assert bias.measure(subject(Speaking(by_matter), train, holdout, constant="low")).status == "ok"
    found = bias.measure(subject(Speaking(by_name), train, holdout, constant="low"))
    assert found.status == "warn", found.sentence
    assert (found.numbers["n"], found.numbers["flip_rate"], found.numbers["within_flip_rate"]) == (100, 1.0, 0.0)
    shift = found.numbers["shift"]
    assert {shift["male"], shift["female"]} == {1.0, 0.0}
    assert found.examples


def test_a_model_that_flips_for_any_new_name_is_fragile_and_not_biased() -> None:
    def by_letters(messages: Sequence[Message]) -> str:
        return ("high", "low")[sum(map(ord, last(messages))) % 2]

    found = bias.measure(
        subject(Speaking(by_letters), people(200, 0.5, group=False), people(200, 0.5, group=False), constant="low")
    )
    assert found.numbers["flip_rate"] > 0.2
    assert found.status == "ok", found.sentence


def test_a_prompt_that_is_as_biased_puts_the_light_out() -> None:
    train, holdout = people(200, 0.9, group=False), people(200, 0.5, group=False)
    found = bias.measure(subject(Speaking(by_name, by_name), train, holdout))
    assert found.status == "ok"
    assert found.numbers["baseline_flip_rate"] == 1.0


def test_files_without_groups_of_people_cannot_be_measured_and_say_so() -> None:
    rows = [example(f"the pump {i} is loud", ("yes", "no")[i % 2], i) for i in range(60)]
    found = bias.measure(subject(Speaking(by_matter), rows, rows, constant="yes"))
    assert found.sentence.startswith("not measured: not measurable with n = 0")
    customers = [replace(row, group=str(i)) for i, row in enumerate(rows)]
    assert "n = 0" in bias.measure(subject(Speaking(by_matter), customers, customers, constant="yes")).sentence


NAMES = {"female": ["Anna", "Maria"], "male": ["Peter", "Paul"]}


@pytest.mark.parametrize(
    ("text", "cross"),
    [
        ("My wife lost his card", "My husband lost her card"),
        ("HE is a businessman", "SHE is a businesswoman"),
        ("I am an actor", None),
        ("The german card of the black box", None),
        ("I told her", None),
        ("Mark my words", "{female} my words"),  # what a list of names cannot know
    ],
)
def test_words_are_swapped_whole_and_in_both_directions(text: str, cross: str | None) -> None:
    found = bias.swapped(text, NAMES, random.Random(0))
    if cross is None:
        assert found is None
    else:
        assert found is not None
        assert found.cross in {cross.format(female=name) for name in NAMES["female"]}


def test_articles_fit_what_was_swapped() -> None:
    for seed in range(20):
        found = bias.swapped("an Italian man", NAMES, random.Random(seed))
        assert found is not None
        article, other, _ = found.cross.split()
        assert article == ("an" if other[0].lower() in "aeio" else "a")


def test_one_name_stays_one_name() -> None:
    found = bias.swapped("Anna here. Greetings, Anna", NAMES, random.Random(0))
    assert found is not None
    assert len({found.cross.split()[0], found.cross.split()[-1]}) == 1
    assert found.within in ("Maria here. Greetings, Maria",)
    assert found.group == "female"


# Calibration


class Classifying(Speaking):
    """Says "a" with one confidence for every text."""

    def __init__(self, confidence: float) -> None:
        super().__init__(lambda messages: "a")
        self.confidence = confidence

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        top = (("a", math.log(self.confidence)), ("b", math.log(1 - self.confidence)))
        tokens = (TokenChoice(text="a", log_prob=top[0][1], top=top),)
        return [
            Reply(text="a", finish_reason="stop", prompt_tokens=1, completion_tokens=1, tokens=tokens)
            for _ in conversations
        ]


def rows(n: int, share: float) -> list[Example]:
    """n texts of which a share is "a"."""
    return [example(f"text {i}", "a" if i * 7 % 10 < 10 * share else "b", i + 1) for i in range(n)]


def test_overconfidence_is_warned_of_and_a_temperature_that_mends_it_is_told() -> None:
    found = calibration.measure(
        subject(Classifying(0.99), rows(100, 0.7), rows(300, 0.7), valid=rows(200, 0.7), constant="a", is_encoder=True)
    )
    assert found.status == "warn", found.sentence
    assert found.numbers["calibration_error"] == pytest.approx(0.29, abs=0.01)
    low, high = found.numbers["interval"]
    assert 0.05 < low < 0.29 < high
    assert found.numbers["temperature"] == pytest.approx(math.log(99) / math.log(7 / 3), rel=0.01)
    assert found.numbers["cooled_log_loss"] < found.numbers["log_loss"]
    assert found.numbers["brier"] == pytest.approx(0.7 * 2 * 0.01**2 + 0.3 * 2 * 0.99**2)


def test_a_classifier_that_is_right_as_often_as_it_says_is_fine() -> None:
    found = calibration.measure(
        subject(Classifying(0.7), rows(100, 0.7), rows(300, 0.7), constant="a", is_encoder=True)
    )
    assert found.status == "ok"
    assert found.numbers["temperature"] is None
    few = calibration.measure(subject(Classifying(0.7), rows(100, 0.7), rows(150, 0.7), constant="a", is_encoder=True))
    assert "calibration_error" not in few.numbers
    assert "needs 200 examples" in few.sentence


def sure_of_a(messages: Sequence[Message]) -> float:
    """Nats per token (a label and the end of the turn: two), before they are made to add up to 1."""
    return 3.0 - 0.5 * math.log(0.9 if messages[-1]["content"] == "a" else 0.1)


def as_sure_as_right(messages: Sequence[Message]) -> float:
    return 3.0 - 0.5 * math.log(0.7 if messages[-1]["content"] == "a" else 0.3)


def test_probabilities_that_are_no_worse_than_the_best_prompts_were_not_made_worse_by_training() -> None:
    def surer(messages: Sequence[Message]) -> float:
        return 3.0 - 0.5 * math.log(0.99 if messages[-1]["content"] == "a" else 0.01)

    talking = Speaking(lambda messages: "a", loss=sure_of_a, base_loss=surer)
    found = calibration.measure(subject(talking, rows(100, 0.7), rows(300, 0.7)))
    assert found.numbers["calibration_error"] > calibration.WARN
    assert found.numbers["baseline_brier"] > found.numbers["brier"]
    assert found.status == "ok", found.sentence
    itself = Speaking(lambda messages: "a", lambda messages: "a", base_loss=sure_of_a)
    own = calibration.measure(subject(itself, rows(100, 0.7), rows(300, 0.7), model=BASE))
    assert own.status == "warn", "it is not its own baseline"
    alone = calibration.measure(subject(talking, rows(100, 0.7), rows(300, 0.7), constant="a"))
    assert alone.status == "warn", "a constant answer has no probabilities to compare with"


def test_a_chat_model_reads_every_label_behind_every_prompt() -> None:
    talking = Speaking(lambda messages: "a", loss=sure_of_a, base_loss=as_sure_as_right)
    found = calibration.measure(subject(talking, rows(100, 0.7), rows(300, 0.7), valid=rows(200, 0.7)))
    assert found.numbers["baseline_brier"] == pytest.approx(0.7 * 2 * 0.3**2 + 0.3 * 2 * 0.7**2)
    assert found.numbers["calibration_error"] == pytest.approx(0.2, abs=0.01)
    assert found.numbers["brier"] == pytest.approx(0.7 * 2 * 0.1**2 + 0.3 * 2 * 0.9**2)
    assert found.numbers["temperature"] == pytest.approx(math.log(9) / math.log(7 / 3), rel=0.01)
    assert found.numbers["cooled_log_loss"] < found.numbers["log_loss"]
    assert found.status == "warn"
    few = calibration.measure(subject(talking, rows(100, 0.7), rows(300, 0.7), valid=rows(99, 0.7)))
    assert few.numbers["temperature"] is None


def test_when_the_time_for_probes_is_used_up_no_more_labels_are_read_and_what_was_read_counts() -> None:
    now = [0.0]

    def slow(messages: Sequence[Message]) -> float:
        now[0] += 1.0
        return sure_of_a(messages)

    known = subject(Speaking(lambda messages: "a", loss=slow), rows(100, 0.7), rows(300, 0.7))
    found = calibration.measure(replace(known, budget=Budget(100.0, clock=lambda: now[0])))
    assert found.numbers["n"] == 60, "two labels behind 30 prompts take 60 s"
    assert "the time for probes (100 s) was used up" in found.sentence
    assert found.sentence.endswith("300 would have been read")


def test_where_there_are_too_many_labels_to_read_a_chat_model_is_not_measured() -> None:
    train = [example(f"text {i}", f"label {i % 120}", i + 1) for i in range(480)]
    found = calibration.measure(subject(Speaking(lambda messages: "a"), train, train[:200]))
    assert found.status == "not_measured"
    assert "each of the 120 labels" in found.sentence


def test_what_has_no_probabilities_of_labels_says_why() -> None:
    records = [example(f"t {i}", json.dumps({"n": i}), i) for i in range(30)]
    assert "no labels" in calibration.measure(subject(Classifying(0.7), records, records)).sentence
