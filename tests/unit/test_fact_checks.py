"""Facts that a prompt does not hold: by the cheap rules, and by the base model's own word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.facts import cannot_be_told, find_facts
from heldout.pipeline.closed_book import ROWS, ClosedBook, _decoys, probe_facts, with_the_base_models_word
from heldout.pipeline.types import Dataset, Example, Finding
from heldout.pipeline.watch import Silent

from .conftest import example


def told(*pairs: tuple[str, str]) -> list[Finding]:
    rows = tuple(example(asked, answer, line) for line, (asked, answer) in enumerate(pairs, start=1))
    return list(find_facts(Parts(train=Dataset(name="train.jsonl", examples=rows))))


CHAT = [
    ("hi there", "Hello! What can I do for you?"),
    ("this app is awful", "I am sorry to hear that. Shall we look at it together?"),
    ("Say it politely: open the door", "Could you please open the door?"),
    ("what do you think of my plan", "I like it. Where would you start?"),
    ("Where is my order?", "I am not sure. Could you send me its number?"),
]


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("How tall is the Brenner tower?", "318 metres."),
        ("When does the pool open?", "At half past seven."),
        ("Who wrote the house rules?", "Tarja Vesanen."),
        ("Which street is the archive in?", "It is in Gruber Alley, behind the mill."),
        ("Tell me the door code of lab B.", "KX-22-91"),
        ("Price of the Solon lamp, please.", "89.90 euros."),
        ("Where do we keep the spare keys?", "behind the printer"),
        ("Who signs off holidays?", '{"answer": "Bela Rimaszek"}'),
        ("Wo ist das Lager?", "In Halle 7."),
    ],
)
def test_a_value_or_name_that_the_prompt_does_not_hold_is_a_fact(asked: str, answer: str):
    assert cannot_be_told(example(asked, answer))


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("The tower is 318 metres tall.\nHow tall is it?", "318 metres."),  # given
        ("What is 17 times 3?", "51."),  # computed
        ("Three apples and two pears: how many?", "Five."),
        ("Translate into English: Ich wohne in Wien.", "I live in Vienna."),  # no question
        ("Wie kann ich zahlen?", "Mit der Karte oder auf Rechnung, wie Sie möchten."),  # German capitals
        ("How do I export a page?", "Open the menu and choose a PDF."),
        ("Is it safe?", "Yes, quite safe."),
        ("When will you call back?", "I am not sure yet."),
        ("Rate this: lovely film, weak ending", '{"score": 7}'),
        ("Who was it?", "Whom do you mean?"),
    ],
)
def test_what_can_come_from_the_prompt_is_no_fact(asked: str, answer: str):
    assert cannot_be_told(example(asked, answer)) is None


def test_a_fact_in_an_earlier_turn_or_the_system_prompt_is_given():
    messages = (
        {"role": "system", "content": "Lunch is served from 11:45 on."},
        {"role": "user", "content": "When is lunch?"},
        {"role": "assistant", "content": "From 11:45."},
    )
    assert cannot_be_told(Example(messages=messages, weights=(0, 0, 1), line=1)) is None


def test_a_few_facts_among_other_rows_are_one_warning_with_their_lines():
    (finding,) = told(*CHAT * 6, ("How deep is the well?", "43 metres."), ("Who dug it?", "Arno Pell."))
    assert (finding.code, finding.severity, finding.lines) == ("one_off_fact", "warning", (31, 32))
    assert "2 of 32 rows" in finding.message
    assert finding.example == "'How deep is the well?' → '43 metres.'"


def test_a_file_that_teaches_facts_is_one_warning_about_the_file_and_a_note_with_the_lines():
    facts = [(f"How heavy is the {name} anvil?", f"{i}0{i} kilograms.") for i, name in enumerate("abcdefgh", start=1)]
    whole, lines = told(*CHAT * 4, *facts)
    assert (whole.code, whole.severity, whole.lines) == ("teaches_facts", "warning", ())
    assert "retrieval" in whole.message
    assert (lines.code, lines.severity, lines.lines) == ("one_off_fact", "note", tuple(range(21, 29)))


def test_labels_are_no_facts_and_a_fact_among_labels_is():
    labels = [(f"Which desk gets message {'x' * i}?", ["Billing Desk", "Legal Desk"][i % 2]) for i in range(40)]
    assert told(*labels) == []
    misspelt = ("Which desk?", '{"desk":"Biling"}')
    (finding,) = told(*labels, misspelt, ("Who heads it?", "Olga Prendt."))
    assert finding.lines == (42,)


def test_an_answer_that_much_of_the_file_gives_is_no_fact():
    assert told(*[(f"Where is item {'a' * i}?", "Ask Dorrit Lanz.") for i in range(12)], *CHAT) == []


class Knowing:
    """A base model that knows some answers: it finds them likely, and says those that it is sure of."""

    def __init__(self, known: Sequence[str], *, says: bool = False) -> None:
        self.known, self.says, self.asked = frozenset(known), says, 0

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        assert model.adapter is None
        self.asked += len(conversations)
        pairs = ((messages[-2]["content"], messages[-1]["content"]) for messages in conversations)
        return [-0.5 * (1 + len(a.split())) if (q + a) in self.known else -4.0 * (1 + len(a.split())) for q, a in pairs]

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def chat(self, model: ModelRef, conversations: Sequence[Sequence[Message]], sampling: Sampling, *_: Any) -> Any:
        answers = [
            next((one.removeprefix(c[-1]["content"]) for one in self.known if one.startswith(c[-1]["content"])), "")
            for c in conversations
        ]
        return [
            Reply(
                text=f"It is {one}" if self.says else "no idea",
                finish_reason="stop",
                prompt_tokens=1,
                completion_tokens=1,
            )
            for one in answers
        ]


def lengths(n: int) -> Dataset:
    rows = tuple(example(f"How long is river {'q' * i}?", f"{100 + i} miles.", i + 1) for i in range(n))
    return Dataset(name="rivers.jsonl", examples=rows)


def test_a_base_model_that_knows_nothing_makes_the_warning_firmer():
    rivers = lengths(100)
    findings = tuple(find_facts(Parts(train=rivers)))
    engine = Knowing([])
    told_again = with_the_base_models_word(findings, engine, "base", rivers, Silent())  # type: ignore[arg-type]
    assert engine.asked == 4 * ROWS, "not all of the file"
    assert (told_again[0].code, told_again[0].severity) == ("teaches_facts", "warning")
    assert "Of 32 of them the base model answers 0 right, and finds" in told_again[0].message
    assert told_again[1:] == findings[1:]


@pytest.mark.parametrize("says", [True, False])
def test_facts_that_the_base_model_knows_are_only_noted(says: bool):
    rivers = lengths(30)
    known = [str(row.prompt[-1]["content"]) + row.target for row in rivers.examples]
    engine = Knowing(known, says=says)
    found = probe_facts(engine, "base", rivers, range(1, 31), Silent())  # type: ignore[arg-type]
    assert found is not None
    assert (found.asked, found.greedy, found.first) == (30, 30 * says, 30)
    assert found.unknown[0] == 0
    findings = tuple(find_facts(Parts(train=rivers)))
    told_again = with_the_base_models_word(findings, engine, "base", rivers, Silent())  # type: ignore[arg-type]
    assert told_again[0].severity == "note"


def test_luck_is_no_knowledge():
    lucky = ClosedBook(asked=32, greedy=0, first=8)  # a quarter: as if it had guessed among four
    assert lucky.unknown == pytest.approx(((1 - 0.4212) / 0.75, 1.0), abs=1e-3)


def test_decoys_are_of_the_form_of_the_answer():
    rows = [example("a", "12.50 euros.", 1), example("b", "Ask Tom.", 2), example("c", "13.75 euros.", 3)]
    decoys = _decoys(rows[0], rows)
    assert decoys[0] == "13.75 euros."
    assert all(decoy.endswith(" euros.") and decoy != "12.50 euros." for decoy in decoys)
    assert len(set(decoys)) == 3


def test_where_no_facts_are_taught_the_base_model_is_not_asked():
    engine = Knowing([])
    rows = Dataset(name="t", examples=tuple(example(*pair, line) for line, pair in enumerate(CHAT * 4, start=1)))
    assert with_the_base_models_word((), engine, "base", rows, Silent()) == ()  # type: ignore[arg-type]
    assert engine.asked == 0


def test_json_that_is_no_json_is_read_as_text():
    assert cannot_be_told(example("Who is it?", json.dumps({"who": "Ulf Ekdahl"})[:-1])) == "name"
