"""The consequences of training: what lights them, what does not, and what cannot be measured."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from heldout.engine.base import Message, ModelRef
from heldout.errors import InvalidValue
from heldout.pipeline.consequences import CONSEQUENCES, generalisation, measure_all, memorisation
from heldout.pipeline.consequences import forgetting as forgetting_light
from heldout.pipeline.consequences import format as form
from heldout.pipeline.consequences.base import Budget, Consequence, not_measured, seconds_for_probes, status_of
from heldout.pipeline.evaluate.forgetting import judge_changes
from heldout.pipeline.types import Example
from heldout.pipeline.verdict import decide
from heldout.pipeline.watch import Silent
from heldout.settings import read_settings
from tests.unit.conftest import example, right, rung
from tests.unit.consequences import BASE, MODEL, Speaking, last, subject

LABELS = ("card", "loan", "visa")
#: All names and numbers differ, so that no two texts are one.
TOPICS = {"card": "my plastic card was lost", "loan": "the money that i owe you", "visa": "a stamp in my passport"}


def ticket(i: int, part: str = "train") -> Example:
    """A message whose topic tells its label; a word of its own in each."""
    label = LABELS[i % 3]
    word = "".join(chr(97 + int(digit)) for digit in str(1000 + i))
    return example(f"The {part} colleague {word} has a question about {TOPICS[label]}", label, i + 1)


TRAIN = [ticket(i) for i in range(120)]
HOLDOUT = [ticket(i, "other") for i in range(90)]


def right_label(messages: Sequence[Message]) -> str:
    """Finds the topic by the one word that the perturbations leave in every text."""
    letters = re.sub(r"[^a-z]", "", last(messages).lower())
    return max(LABELS, key=lambda label: _shared(letters, TOPICS[label]))


def _shared(letters: str, topic: str) -> int:
    bare = topic.replace(" ", "")
    return sum(bare[i : i + 3] in letters for i in range(len(bare) - 2))


def brittle(messages: Sequence[Message]) -> str:
    """Knows the training form by heart: right when the text ends as it did there, else always the same."""
    text = last(messages)
    return next((label for label in LABELS if text.startswith("The") and text.endswith(TOPICS[label])), "card")


# Memorisation


@pytest.mark.parametrize(("seconds", "read"), [(1.0, 22), (60.0, 45), (1000.0, 90)])
def test_when_time_is_short_fewer_answers_of_both_sides_are_read(
    seconds: float, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, now = Speaking(right_label), [0.0]
    log_probs = engine.log_probs

    def slowly(model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Any = None) -> list[float]:
        now[0] += len(conversations)
        return log_probs(model, conversations, progress)

    monkeypatch.setattr(engine, "log_probs", slowly)
    known = subject(engine, TRAIN[:90], HOLDOUT)
    found = memorisation.measure(replace(known, budget=Budget(seconds, clock=lambda: now[0])))
    assert found.numbers["n_train"] == pytest.approx(read, abs=1)
    assert found.numbers["n_holdout"] == pytest.approx(read, abs=1)
    assert ("the time for probes" in found.sentence) == (read < 90)


def test_losses_that_are_alike_are_no_memory_and_smaller_ones_of_train_are() -> None:
    alike = memorisation.measure(subject(Speaking(right_label), TRAIN, HOLDOUT))
    assert alike.numbers["auc"] == 0.5
    assert alike.status == "ok"
    known = {str(row.messages[1]["content"]) for row in TRAIN}

    def loss(messages: Sequence[Message]) -> float:
        return 0.1 if messages[1]["content"] in known else 2.0

    learned = memorisation.measure(subject(Speaking(right_label, loss=loss), TRAIN, HOLDOUT))
    assert learned.numbers["auc"] == 1.0
    assert learned.numbers["train_loss"] == pytest.approx(0.1)
    assert learned.status == "warn", "labels give nobody away"
    assert learned.numbers["base_auc"] == 0.5


def test_what_the_base_model_finds_as_much_likelier_is_no_memory() -> None:
    """A holdout of another kind: everybody tells the two sides apart, also who never saw either."""
    train, holdout = [prose(i, "train") for i in range(60)], [prose(i, "holdout") for i in range(60)]
    known = {last(row.prompt) for row in train}

    def of_two_kinds(messages: Sequence[Message]) -> float:
        return 0.1 if last(messages[:-1]) in known else 2.0

    def spoken(base: Any) -> Consequence:
        engine = Speaking(lambda messages: "", loss=of_two_kinds, base_loss=base)
        return memorisation.measure(subject(engine, train, holdout))

    memory, kinds = spoken(lambda messages: 1.0), spoken(of_two_kinds)
    assert memory.status == "fail", memory.sentence
    assert (kinds.status, kinds.numbers["auc"], kinds.numbers["base_auc"]) == ("ok", 1.0, 1.0)
    assert "to the base model in 100% of the same pairs" in kinds.sentence


def prose(i: int, part: str) -> Example:
    rng = random.Random(f"{part}/{i}")
    words = " ".join(rng.choice("alpha beta gamma delta epsilon zeta eta theta iota kappa".split()) for _ in range(40))
    return example(f"Tell me of {part} {i}", words, i + 1)


def test_prose_that_is_said_by_heart_fails_and_a_template_that_is_said_everywhere_does_not() -> None:
    train, holdout = [prose(i, "train") for i in range(60)], [prose(i, "holdout") for i in range(60)]
    answers = {last(row.prompt): row.target for row in train}

    def parrot(messages: Sequence[Message]) -> str:
        return answers.get(last(messages), "something else entirely")

    found = memorisation.measure(subject(Speaking(parrot), train, holdout))
    assert found.status == "fail", found.sentence
    assert found.numbers["by_heart"]["train"] == 1.0
    assert "by heart" in found.examples[0]

    same = [replace(row, messages=(*row.prompt, train[0].messages[-1])) for row in (*train[:30], *holdout[:30])]
    varied = [*same[:30], *train[30:33]]  # enough different answers to be text
    known = subject(Speaking(lambda messages: train[0].target), varied, same[30:])
    found = memorisation.measure(replace(known, metric=subject(Speaking(parrot), train, holdout).metric))
    assert found.numbers["by_heart"]["holdout"] == 1.0
    assert found.status == "ok", found.sentence


# Generalisation


def test_a_gap_between_train_and_holdout_is_warned_of_with_its_interval() -> None:
    found = generalisation.judge(
        {"train": right(60, 60), "valid": right(60, 45), "holdout": right(60, 42)}, binary=True
    )
    assert found.status == "warn"
    assert found.numbers["gap"] == pytest.approx(0.3)
    low, high = found.numbers["gap_interval"]
    assert low < 0.3 < high
    assert found.numbers["optimism"] == pytest.approx(0.05)
    assert found.numbers["p_optimism"] < 0.9


@pytest.mark.parametrize("constant", [None, "card"])
def test_a_gap_that_the_baseline_has_too_lies_in_the_rows(constant: str | None) -> None:
    """Of training rows a third and of held-out ones none is about cards: who always says so is ahead on train."""
    others = [row for row in HOLDOUT if row.target != "card"]

    def always_card(messages: Sequence[Message]) -> str:
        return "card"

    def by_heart(messages: Sequence[Message]) -> str:
        return right_label(messages) if "train" in last(messages) else "card"

    same = generalisation.measure(subject(Speaking(always_card, always_card), TRAIN, others, constant=constant))
    assert same.numbers["gap"] > 0.2
    assert same.numbers["beyond"] == pytest.approx(0.0, abs=1e-9)
    assert same.status == "ok", same.sentence
    learned = generalisation.measure(subject(Speaking(by_heart, always_card), TRAIN, others, constant=constant))
    assert learned.numbers["gap"] > learned.numbers["beyond"] > 0.5
    assert learned.status == "warn", learned.sentence


def test_a_model_is_not_taken_for_its_own_baseline() -> None:
    """A folder of weights has no base model here: its prompt is the model itself."""

    def by_heart(messages: Sequence[Message]) -> str:
        return right_label(messages) if "train" in last(messages) else "card"

    engine = Speaking(by_heart, by_heart)
    found = generalisation.measure(subject(engine, TRAIN, HOLDOUT, model=BASE))
    assert found.status == "warn", found.sentence
    assert "beyond" not in found.numbers


def test_a_gap_is_warned_of_as_often_where_the_baseline_has_none() -> None:
    parts = {"train": right(60, 60), "holdout": right(60, 45)}
    alone = generalisation.judge(parts, binary=True)
    nothing = [1.0 - one for one in right(30, 15)], [a - b for a, b in zip(right(60, 45), right(60, 30), strict=True)]
    asked = generalisation.judge(parts, binary=True, beyond=generalisation.Difference(*nothing, least=-1.0))
    assert (alone.status, asked.status) == ("warn", "warn")
    assert asked.numbers["p_gap"] == alone.numbers["p_gap"]


def test_equal_scores_are_no_gap_and_nothing_of_train_is_taken_for_the_holdout() -> None:
    engine = Speaking(right_label)
    found = generalisation.measure(subject(engine, TRAIN, HOLDOUT, valid=[ticket(i, "third") for i in range(30)]))
    assert found.status == "ok"
    assert found.numbers["gap"] == found.numbers["optimism"] == 0.0
    assert found.numbers["n"] == {"train": 60, "valid": 30, "holdout": 60}
    assert not any("other" in last(messages) for _, messages in engine.asked), "the holdout was asked before"


# Format


def test_answers_out_of_form_are_counted_against_the_baselines_and_shown() -> None:
    chatty = Speaking(lambda messages: "I think it is about a card", right_label)
    found = form.measure(subject(chatty, TRAIN, HOLDOUT))
    assert found.status == "fail"
    assert found.numbers["fit"] == 0.0
    assert found.numbers["baseline"] == 1.0
    assert found.examples == ("'I think it is about a card' (90 times)",)
    assert chatty.asked == [], "the answers are there"
    assert form.measure(subject(Speaking(right_label, chatty.says[MODEL]), TRAIN, HOLDOUT)).status == "ok"


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('{"size": 3, "name": "x"}', True),
        ('{"name":"y"}', True),
        ('{"name": "x", "why": ""}', False),
        ('{"name": "x"', False),
        ("name: x", False),
        ("[]", False),
    ],
)
def test_a_record_must_parse_and_have_the_keys_of_a_training_answer(answer: str, fits: bool) -> None:
    fitting = form.form_of(['{"name": "a", "size": 1}'] * 9 + ['{"name": "b"}'], "json")
    assert fitting is not None
    assert fitting(answer) is fits


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('{"size": 3.5, "tags": ["a"], "at": {"x": 1}}', True),
        ('{"size": "3", "tags": ["a"], "at": {"x": 1}}', False),
        ('{"size": null, "tags": ["a"], "at": {"x": 1}}', False),
        ('{"size": true, "tags": ["a"], "at": {"x": 1}}', False),
        ('{"size": 3, "tags": [], "at": {"x": 1}}', True),
        ('{"size": 3, "tags": null, "at": {"x": 1}}', True),
        ('{"size": 3, "tags": ["a", 1], "at": {"x": 1}}', False),
        ('{"size": 3, "tags": "a", "at": {"x": 1}}', False),
        ('{"size": 3, "tags": ["a"], "at": {"x": {}}}', False),
        ('{"size": 3, "tags": ["a"], "at": {"never seen": "may be data"}}', True),
    ],
)
def test_values_have_the_kinds_that_training_answers_have_at_their_place(answer: str, fits: bool) -> None:
    train = ['{"size": 1, "tags": ["a", "b"], "at": {"x": 2}}'] * 9 + ['{"size": 2.5, "tags": null, "at": {"x": 0.5}}']
    fitting = form.form_of(train, "json")
    assert fitting is not None
    assert fitting(answer) is fits


def test_prose_has_no_form() -> None:
    train = [prose(i, "train") for i in range(30)]
    assert form.measure(subject(Speaking(lambda messages: ""), train, train)).status == "not_measured"


# All of them


def test_without_time_no_model_is_asked_and_every_one_says_so() -> None:
    engine = Speaking(right_label)
    found = measure_all(subject(engine, TRAIN, HOLDOUT, seconds=0.0))
    assert len(found) == len(CONSEQUENCES)
    assert engine.asked == []
    late = [one for one in found if "HELDOUT_EVAL_BUDGET" in one.sentence]
    assert {"memorisation", "generalisation", "fragility"} <= {one.name for one in late}


def test_each_is_told_as_it_is_measured_and_its_numbers_are_json() -> None:
    class Listening(Silent):
        told: list[tuple[str, str]] = []  # noqa: RUF012

        def message(self, text: str, *, level: str = "info", data: object = None) -> None:
            json.dumps(data, allow_nan=False)
            self.told.append((level, text))

    measure_all(subject(Speaking(brittle, right_label), TRAIN, HOLDOUT, watch=Listening()))
    assert len(Listening.told) == 1 + len(CONSEQUENCES)
    assert any(
        level == "warn" and text.startswith("Consequences, fragility: fail, asked") for level, text in Listening.told
    )


def test_forgetting_is_one_of_them_and_says_that_it_only_informs() -> None:
    dropped = judge_changes([-2.0, -1.9] * 12, asked=24, replay_ratio=0.0)
    found = forgetting_light.measure(subject(Speaking(right_label), TRAIN, HOLDOUT, forgetting=dropped))
    assert found.status == "fail"
    assert found.numbers == dropped.as_dict()
    assert "does not change the outcome" in found.sentence
    tuned = rung("tuned", right(100, 90), kind="tuned")
    assert decide([rung("zero-shot", right(100, 60))], tuned, consequences=[found]).outcome == "ship"
    assert forgetting_light.measure(subject(Speaking(right_label), TRAIN, HOLDOUT, is_encoder=True)).sentence.endswith(
        "an encoder has no general skills"
    )


@pytest.mark.parametrize(
    ("status", "outcome"), [("ok", "ship"), ("warn", "ship"), ("not_measured", "ship"), ("fail", "dont_ship")]
)
def test_a_fail_overrules_a_better_score_and_is_the_first_reason(status: str, outcome: str) -> None:
    found = Consequence(name="fragility", status=status, sentence="it breaks")  # type: ignore[arg-type]
    tuned = rung("tuned", right(100, 90), kind="tuned")
    verdict = decide([rung("zero-shot", right(100, 60))], tuned, consequences=[found])
    assert verdict.outcome == outcome
    assert (verdict.reasons[0] == "fragility fails: it breaks") == (outcome == "dont_ship")


def test_too_few_examples_carry_no_verdict_but_the_fail_is_told() -> None:
    found = Consequence(name="format", status="fail", sentence="it breaks")
    tuned = rung("tuned", right(20, 18), kind="tuned")
    verdict = decide([rung("zero-shot", right(20, 6))], tuned, consequences=[found])
    assert verdict.outcome == "inconclusive"
    assert verdict.reasons[-1] == "format fails: it breaks"


def test_a_light_needs_to_be_sure() -> None:
    assert [status_of(fails=p, warns=p) for p in (0.5, 0.89, 0.9, 0.989, 0.99)] == ["ok", "ok", "warn", "warn", "fail"]
    assert not_measured("x", "no time").sentence == "not measured: no time"


@pytest.mark.parametrize(("value", "seconds"), [("", None), ("0", 0.0), ("90.5", 90.5)])
def test_the_time_for_probes_is_a_setting(monkeypatch: pytest.MonkeyPatch, value: str, seconds: float | None) -> None:
    monkeypatch.setenv("HELDOUT_EVAL_BUDGET", value)
    assert read_settings().eval_budget == seconds
    monkeypatch.setenv("HELDOUT_EVAL_BUDGET", "-1")
    with pytest.raises(InvalidValue, match="HELDOUT_EVAL_BUDGET"):
        read_settings()


@pytest.mark.parametrize(
    ("training", "answering", "left"),
    [(100.0, 0.0, 95.0), (100.0, 60.0, 35.0), (100.0, 300.0, 25.0), (9.0, 20.0, 20.0)],
)
def test_evaluation_takes_no_longer_than_the_training_but_for_a_quarter_and_twenty_seconds(
    training: float, answering: float, left: float
) -> None:
    assert seconds_for_probes(training, answering) == left
