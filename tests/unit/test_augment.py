"""Augmentation: changed copies say the same, stay inside train, and cost no step more."""

from __future__ import annotations

import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.errors import InvalidValue
from heldout.pipeline.augment import paraphrase
from heldout.pipeline.augment.copies import COPIES, SYSTEM_FORMS, robust_copies
from heldout.pipeline.augment.forms import asked, why_blocked
from heldout.pipeline.augment.paraphrase import AT_ONCE, FILE, paraphrased_copies
from heldout.pipeline.augment.perturb import CHANGES, drop, greet, lower, mark, pieces, slip, unmark
from heldout.pipeline.checks.groups import prompt_fingerprint
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent
from tests.conftest import SHARED
from tests.unit.conftest import example, split_of

CHAT = ModelFacts(hidden_size=64, layers=2, context=512, parameters=1)
ENCODER = replace(CHAT, kind="encoder")

LITERAL = [
    "4,096.50",
    "2026-10-01",
    '"Exactly This, Please."',
    "“Leave the Quote alone”",
    "`just the code`",
    "```\nIf The: code\n```",
    "https://Example.com/The/just.html?a=B",
    "Some.Name@Example.com",
    '{"The": ["Just", {"Really": null}]}',
    "{ The: just, Really: { very: the } }",
    '[ "The", "just" ]',
    "[NAME]",
    "getUserName()",
    "snake_case_Name",
    "/usr/Local/the.txt",
    "<just>",
    "ISO-9001",
    "50%",
]

WORDS = st.text(alphabet=string.ascii_letters + "äéßñж .,?!'-", max_size=40)
SENTENCES = st.lists(st.one_of(WORDS, st.sampled_from(LITERAL), st.text(max_size=12)), max_size=8).map(" ".join)


# One text


@pytest.mark.parametrize("literal", LITERAL)
@pytest.mark.parametrize("change", CHANGES)
def test_what_must_stay_letter_for_letter_stays(change: Callable[[str, random.Random], str], literal: str) -> None:
    text = f"Could you Please look at the Order {literal} and just Tell me Really quickly what is wrong?"
    for seed in range(40):
        assert literal in change(text, random.Random(seed))


@given(SENTENCES)
@settings(max_examples=100, deadline=None)
def test_a_text_taken_apart_is_the_text(text: str) -> None:
    parts = pieces(text)
    assert "".join(one.text for one in parts) == text
    assert all(one.text for one in parts)


@given(SENTENCES, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_stretch_that_is_protected_is_there_after_a_change_and_the_seed_decides(text: str, seed: int) -> None:
    kept = Counter(one.text for one in pieces(text) if not one.free)
    for change in CHANGES:
        changed = change(text, random.Random(seed))
        assert change(text, random.Random(seed)) == changed
        for stretch in kept:
            assert changed.count(stretch) >= text.count(stretch) or stretch in changed
        if text.strip():
            assert changed.strip(), "nothing is emptied"


@given(SENTENCES)
@settings(max_examples=100, deadline=None)
def test_no_change_but_a_slip_touches_a_letter_and_only_filler_words_go(text: str) -> None:
    def words(one: str) -> list[str]:
        return re.findall(r"[^\W\d_]+", one)

    rng = random.Random(0)
    assert words(mark(text, rng)) == words(text)
    assert words(unmark(text, rng)) == words(text)
    assert lower(text, rng).lower() == text.lower()
    gone = Counter(word.lower() for word in words(text)) - Counter(word.lower() for word in words(drop(text, rng)))
    assert gone.keys() <= {"a", "an", "the", "please", "just", "really", "very", "actually", "basically", "simply"}


def test_a_slip_hits_one_word_in_twelve_and_at_least_one_but_never_its_first_letter() -> None:
    text = " ".join(["wonderful"] * 60)
    for seed in range(50):
        found = slip(text, random.Random(seed)).split()
        wrong = [word for word in found if word != "wonderful"]
        assert 1 <= len(wrong) <= 3, "60 words would be five: three at most"
        assert all(word[0] == "w" and len(word) == 9 for word in wrong)
    assert slip("wonderful", random.Random(0)) != "wonderful"
    assert slip("I am so sad", random.Random(0)) == "I am so sad", "no word of four letters"
    assert slip("我想知道我的卡在哪里 كيف حالك", random.Random(0)) == "我想知道我的卡在哪里 كيف حالك"


def test_negation_and_content_are_never_left_out() -> None:
    text = "Please, I do not really like the card and never just wanted it without a fee."
    for seed in range(60):
        found = drop(text, random.Random(seed))
        assert all(word in found.split() for word in ("not", "never", "without", "like", "card"))


def test_marks_are_put_between_words_alone_and_closing_ones_taken_away() -> None:
    text = "I paid 1.50 at Dr. Foo's shop... and then? Nothing!"
    assert re.sub(r" [,;.:](?= )", "", mark(text, random.Random(1))) == text
    assert unmark(text, random.Random(0)) == "I paid 1.50 at Dr Foo's shop and then Nothing"
    assert unmark("?", random.Random(0)) == "?"


def test_a_greeting_has_no_thanks_and_is_not_put_before_another_language() -> None:
    said = {greet("Where is my card?", random.Random(seed)) for seed in range(200)}
    assert len(said) > 6
    assert all("Where is my card?" in one and not re.search("thank|great|sorry", one.lower()) for one in said)
    for other in ("Wo bleibt meine Karte?", "¿Dónde está mi tarjeta?", "我的卡在哪里"):
        assert greet(other, random.Random(0)) == other


@pytest.mark.parametrize(
    "text", ["a" * 200_000, "{" * 50_000, '"' * 50_001, "<" * 50_000, "“" * 50_000, "x1 " * 30_000, "[" * 50_000]
)
def test_long_and_odd_texts_take_no_time_that_grows_with_their_square(text: str) -> None:
    assert "".join(one.text for one in pieces(text)) == text


# Copies of rows

ROWS = tuple(
    Example(
        messages=(
            {"role": "system", "content": "Route the message. Answer with JSON."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps({"queue": label})},
        ),
        weights=(0, 0, 1),
        line=line,
        group=f"customer {line % 5}",
    )
    for line, (text, label) in enumerate(
        [
            (f"{start} {what} number {i}{end}", label)
            for i in range(8)
            for start, end in [("Where is the", "?"), ("I am still waiting for my", "")]
            for what, label in [("parcel with the shoes", "delivery"), ("invoice of last month", "billing")]
        ],
        start=2,
    )
)


def test_a_copy_knows_its_row_and_changes_nothing_of_the_answer() -> None:
    found = robust_copies(split_of(ROWS), seed=1)
    assert len(found.copies) == len(ROWS)
    for row, copies in zip(ROWS, found.copies, strict=True):
        assert 2 <= len(copies) <= COPIES
        assert len({json.dumps(copy.messages) for copy in (row, *copies)}) == len(copies) + 1, "all are different"
        for copy in copies:
            assert (copy.line, copy.group, copy.target) == (row.line, row.group, row.target)
            assert copy.copy in range(1, COPIES + 1)
            assert len(copy.weights) == len(copy.messages)
            assert copy.weights[-1] == 1
            assert asked(copy) != asked(row)
            assert re.findall(r"\d+", asked(copy)) == re.findall(r"\d+", asked(row))
    assert all(row.copy == 0 for row in ROWS)


def test_the_seed_and_the_line_decide_and_not_the_place() -> None:
    one = robust_copies(split_of(ROWS), seed=1).copies
    assert robust_copies(split_of(ROWS), seed=1).copies == one
    assert robust_copies(split_of(ROWS), seed=2).copies != one
    assert robust_copies(split_of(ROWS[10:]), seed=1).copies == one[10:], "folds share the copies of a row"


def test_some_copies_have_another_form_of_the_system_prompt_that_all_rows_share() -> None:
    copies = [copy for some in robust_copies(split_of(ROWS), seed=1).copies for copy in some]
    forms = Counter(copy.messages[0]["content"] if copy.messages[0]["role"] == "system" else "" for copy in copies)
    assert len(forms) == len(SYSTEM_FORMS) + 1
    assert 0.6 < forms["Route the message. Answer with JSON."] / len(copies) < 0.9
    assert forms["Route the message.\nAnswer with JSON."] > 0


def test_system_prompts_that_tell_rows_apart_stay() -> None:
    other = replace(ROWS[0], messages=({"role": "system", "content": "Be brief."}, *ROWS[0].messages[1:]))
    split = split_of((other, *ROWS[1:]))
    for row, some in zip(split.train, robust_copies(split, seed=1).copies, strict=True):
        assert all(copy.messages[0] == row.messages[0] for copy in some)


def test_every_user_message_of_a_conversation_is_changed_and_no_answer() -> None:
    turns = (
        {"role": "user", "content": "Where is the parcel that I ordered?"},
        {"role": "assistant", "content": "Which one?"},
        {"role": "user", "content": "The one that was sent on Monday, please."},
        {"role": "assistant", "content": "delivery"},
    )
    split = split_of([Example(messages=turns, weights=(0, 0, 0, 1), line=1)])
    (copies,) = robust_copies(split, seed=0).copies
    for copy in copies:
        assert [m["content"] for m in copy.messages[1::2]] == ["Which one?", "delivery"]
    assert any(copy.messages[0] != turns[0] and copy.messages[2] != turns[2] for copy in copies)


def test_no_copy_has_a_prompt_of_validation_or_holdout() -> None:
    free = robust_copies(split_of(ROWS), seed=1)
    taken = [copy for some in free.copies for copy in some][:2]
    split = split_of(ROWS, valid=taken[:1], holdout=taken[1:])
    made = [copy for some in robust_copies(split, seed=1).copies for copy in some]
    assert {prompt_fingerprint(copy.prompt) for copy in made}.isdisjoint(
        prompt_fingerprint(one.prompt) for one in taken
    )
    assert len(made) < sum(map(len, free.copies))


def test_a_row_with_nothing_to_change_has_no_copies() -> None:
    split = split_of([example("https://example.com/1", "up", 1), example("12 / 7", "down", 2)])
    alone = replace(split, train=tuple(replace(one, messages=one.messages[1:], weights=(0, 1)) for one in split.train))
    assert robust_copies(alone, seed=0).copies == ((), ())


# Where it is blocked


def rows_of(pairs: Sequence[tuple[str, str]]) -> list[Example]:
    return [example(prompt, answer, line) for line, (prompt, answer) in enumerate(pairs, start=1)]


WHAT = ("parcel", "invoice", "printer", "contract", "ticket", "garden", "meeting", "window", "recipe", "engine")

BLOCKED = {
    "differ in case or punctuation only": [
        (f"say {what} {i}", "Yes" if i % 2 else "yes") for i in range(6) for what in WHAT
    ],
    "depends on case or punctuation": [
        (f"{what} of the day {i}".upper() if loud else f"{what} of the day {i}", "loud" if loud else "calm")
        for i in range(4)
        for what in WHAT
        for loud in (True, False)
    ],
    "told by a closing question mark": [
        (f"{what} number {i} arrived {mark_}", "question" if mark_ == "?" else "statement")
        for i, what in enumerate(WHAT * 3)
        for mark_ in ("?" if (i + len(what)) % 2 else ".",)
    ],
    "told by a capital letter": [
        (f"The {what} {i} came" if i % 2 else f"a {what} {i} went", "formal" if i % 2 else "casual")
        for i, what in enumerate(WHAT * 3)
    ],
    "a single word": [
        (f"we do {word} like the {what} from shop {i}", label)
        for i in range(3)
        for what in WHAT
        for word, label in (("not", "negative"), ("all", "positive"))
    ],
    "look like code": [
        (f"write a function for the {what}", f"def {what}(x):\n    return x + {i}\n") for i, what in enumerate(WHAT)
    ],
    "copied from the prompt": [
        (f"order {i} of a {what} for Ms. Person{i}", json.dumps({"item": what, "name": f"Person{i}", "n": i}))
        for i, what in enumerate(WHAT)
    ],
    "prompts rewritten": [
        (f"the {what} um the {what} I mean was late by {i} days", f"The {what} was late by {i} days.")
        for i, what in enumerate(WHAT)
    ],
}  # fmt: skip


@pytest.mark.parametrize("facts", [CHAT, ENCODER], ids=["chat", "encoder"])
@pytest.mark.parametrize("reason", BLOCKED)
def test_answers_that_a_changed_prompt_would_make_wrong_are_refused_with_the_reason(
    reason: str, facts: ModelFacts
) -> None:
    split = split_of(rows_of(BLOCKED[reason]))
    with pytest.raises(InvalidValue, match=reason) as raised:
        make_plan(Hyperparameters(augmentation="robust"), split, facts, seed=0)
    assert raised.value.param == "hyperparameters.augmentation"
    assert "set it to none" in str(raised.value)
    assert make_plan(Hyperparameters(), split, facts, seed=0).augmentation == "none", "left alone it stays off"
    assert make_plan(Hyperparameters(augmentation="none"), split, facts, seed=0).augmentation == "none"


def test_labels_of_clear_prompts_and_free_answers_are_not_blocked() -> None:
    assert why_blocked(ROWS) is None
    chats = rows_of(
        [
            (f"What can I do about my {what}?", f"Call us on line {i}, we are glad to help.")
            for i, what in enumerate(WHAT)
        ]
    )
    assert why_blocked(chats) is None
    assert "no labels" in str(why_blocked(chats, labels_only=True))


def test_two_answers_to_the_very_same_prompt_are_a_contradiction_and_no_matter_of_case() -> None:
    pairs = [(f"my {what} is late", "delivery" if i % 2 else "billing") for i in range(4) for what in WHAT]
    assert "case" not in str(why_blocked(rows_of(pairs)))


@pytest.mark.parametrize(
    ("task", "blocked"),
    [
        ("banking12", None),
        ("banking77", None),
        ("clinc10-oos", None),
        ("sentiment3", None),
        ("sms-spam", None),
        ("snips-slots", "copied from the prompt"),
        ("disfluency", "prompts rewritten"),
    ],
)
def test_real_tasks_are_blocked_where_they_must_be(task: str, blocked: str | None) -> None:
    path = SHARED / "tasks" / task / "train.jsonl"
    if not path.exists():
        pytest.skip("the real data sets are not part of the repository")
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    found = why_blocked([Example(messages=tuple(row), weights=(0, 0, 1), line=i) for i, row in enumerate(rows)])
    assert (blocked in found) if blocked and found else found == blocked


# The plan


def test_augmentation_costs_no_step_more() -> None:
    split = split_of(ROWS)
    for facts in (CHAT, ENCODER):
        off = make_plan(Hyperparameters(), split, facts, seed=0)
        for how in ("robust", "paraphrase"):
            on = make_plan(Hyperparameters(augmentation=how), split, facts, seed=0)
            assert replace(on, augmentation="none", reasons=off.reasons) == off
            assert on.reasons["augmentation"] == "set in the request"
    assert "nothing" in off.reasons["augmentation"] or "off" in off.reasons["augmentation"]


# Paraphrases

TOPICS = {"delivery": "parcel", "billing": "invoice"}


@dataclass
class Writer:
    """As much of an Engine as paraphrases need. Vectors are of topics and wordings."""

    say: Callable[[str, int], str] = lambda text, k: (
        f"please tell me about the {_topic(text)}, wording {'abcd'[k]}, {_number(text)}"
    )
    finish: str = "stop"
    dies_at: int = 0
    asked: list[str] = field(default_factory=list)
    calls: int = 0
    vectors: Callable[[str], list[float]] | None = None

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        assert sampling.temperature > 0
        assert sampling.seed is not None
        texts = [str(messages[-1]["content"]).removeprefix(paraphrase.ASK) for messages in conversations]
        self.asked += texts
        return [
            Reply(text=self.say(text, i % COPIES), finish_reason=self.finish, prompt_tokens=9, completion_tokens=9)
            for i, text in enumerate(texts)
        ]

    def embed(self, encoder: str, texts: Sequence[str]) -> list[list[float]]:
        return [(self.vectors or _vector)(text) for text in texts]


def _topic(text: str) -> str:
    return "parcel" if "parcel" in text else "invoice"


def _other(text: str) -> str:
    return "invoice" if _topic(text) == "parcel" else "parcel"


def _number(text: str) -> str:
    return (re.findall(r"\d+", text) or [""])[0]


def _vector(text: str) -> list[float]:
    """Two texts of a topic have a cosine of 0.8, unless both are originals."""
    side = 0.6 if "wording" in text else 0.0
    about = [1.0, 0.0] if "parcel" in text else [0.0, 1.0]
    return [*(math.sqrt(1 - side**2) * one for one in about), side]


def written(engine: Writer, directory: Path, split: Split | None = None) -> list[tuple[Example, ...]]:
    return list(_augmented(engine, directory, split).copies)


def _augmented(engine: Writer, directory: Path, split: Split | None = None):  # type: ignore[no-untyped-def]
    return paraphrased_copies(
        split or split_of(ROWS),
        engine,
        "writer",
        "encoder",
        seed=1,
        directory=directory,
        watch=Silent(),  # type: ignore[arg-type]
    )


def test_paraphrases_with_the_rows_label_and_its_numbers_are_kept(tmp_path: Path) -> None:
    found = _augmented(Writer(), tmp_path)
    assert [len(some) for some in found.copies] == [COPIES] * len(ROWS)
    assert "wrote 128 paraphrases of 32 training rows, 128 of them were kept, for 32 rows" in found.sentence
    copy = found.copies[0][1]
    assert (copy.line, copy.group, copy.target, copy.copy) == (ROWS[0].line, ROWS[0].group, ROWS[0].target, 2)
    assert copy.messages[0] == ROWS[0].messages[0]


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (Writer(finish="length"), "cut or empty"),
        (Writer(say=lambda text, k: " "), "cut or empty"),
        (Writer(say=lambda text, k: text.upper()), "the same words"),
        (Writer(say=lambda text, k: f"the {_topic(text)}, wording {'abcd'[k]}"), "other numbers or quotations"),
        (Writer(say=lambda text, k: f"wording {'abcd'[k]}, 77 weeks: {text.lower()}"), "other numbers or quotations"),
        (Writer(say=lambda text, k: f"{_other(text)} wording {_number(text)} {'abcd'[k]}"), "another meaning"),
        (Writer(say=lambda text, k: f"{_topic(text)} {'abcd'[k]} {_number(text)}"), "hardly reworded"),
    ],
    ids=["cut", "empty", "same", "number lost", "number made up", "meaning", "copied"],
)  # fmt: skip
def test_bad_paraphrases_are_left_out_and_counted(tmp_path: Path, engine: Writer, why: str) -> None:
    found = _augmented(engine, tmp_path)
    assert found.copies == ((),) * len(ROWS)
    assert found.data is not None
    assert found.data["left_out"] == {why: 128}
    assert f"{why} 128" in found.sentence


def test_a_paraphrase_that_a_classifier_gives_another_label_is_left_out(tmp_path: Path) -> None:
    def vectors(text: str) -> list[float]:
        # A rewording of "parcel" lies nearer to the invoices, yet not far from its original.
        if "parcel" in text and "wording" in text:
            return [0.65, math.sqrt(1 - 0.65**2), 0.0]
        return _vector(text)

    found = _augmented(Writer(vectors=vectors), tmp_path)
    assert found.data is not None
    assert found.data["left_out"] == {"another label": 64}
    assert {copy.target for some in found.copies for copy in some} == {'{"queue": "billing"}'}


def test_who_judges_a_paraphrase_has_not_seen_its_row(tmp_path: Path) -> None:
    def vectors(text: str) -> list[float]:
        # One row is like no other. Only who has learned its (wrong) label would give it to its paraphrase.
        if "parcel" in text and _number(text) == "3":
            return [0.5, 0.0, 0.33, 0.8] if "wording" in text else [0.6, 0.0, 0.0, 0.8]
        return [*_vector(text), 0.0]

    wrong = replace(
        ROWS[0], messages=(*ROWS[0].messages[:-1], {"role": "assistant", "content": '{"queue": "billing"}'})
    )
    odd = replace(wrong, messages=(wrong.messages[0], {"role": "user", "content": "My parcel 3"}, wrong.messages[2]))
    rows = [odd, *(row for row in ROWS if _number(asked(row)) != "3")]
    found = written(Writer(vectors=vectors), tmp_path, split_of(rows))
    assert found[0] == ()
    assert all(len(some) == COPIES for some in found[1:])


def test_the_same_paraphrase_is_learned_once_and_one_of_the_holdout_never(tmp_path: Path) -> None:
    engine = Writer(say=lambda text, k: f"about the {_topic(text)}, one wording, {_number(text)}, {text[:3]}")
    found = written(engine, tmp_path)
    assert {len(some) for some in found} == {1}
    split = split_of(ROWS, holdout=[replace(found[0][0], line=9, copy=0)])
    assert written(engine, tmp_path, split)[0] == ()


def test_a_job_that_is_taken_up_again_asks_only_what_is_missing_and_ends_with_the_same_copies(tmp_path: Path) -> None:
    alone = written(Writer(), tmp_path / "alone")
    killed = Writer(dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        written(killed, tmp_path / "killed")
    again = Writer()
    assert written(again, tmp_path / "killed") == alone
    assert len(set(killed.asked)) == AT_ONCE
    assert set(killed.asked).isdisjoint(again.asked)
    third = Writer()
    assert written(third, tmp_path / "killed") == alone
    assert third.asked == []
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [FILE]


def test_paraphrases_of_another_job_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    written(Writer(), tmp_path)
    with pytest.raises(InvalidValue, match="delete it"):
        paraphrased_copies(
            split_of(ROWS),
            Writer(),
            "another",
            "encoder",
            seed=1,
            directory=tmp_path,
            watch=Silent(),  # type: ignore[arg-type]
        )


def test_without_an_encoder_nobody_can_judge_paraphrases(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="Install it"):
        paraphrased_copies(split_of(ROWS), Writer(), "writer", None, seed=1, directory=tmp_path, watch=Silent())  # type: ignore[arg-type]


def test_a_plan_that_asks_for_paraphrases_of_free_text_is_refused() -> None:
    split = split_of(rows_of([(f"What about my {what}?", f"It is fine, number {i}.") for i, what in enumerate(WHAT)]))
    with pytest.raises(InvalidValue, match="no labels"):
        make_plan(Hyperparameters(augmentation="paraphrase"), split, CHAT, seed=0)
    plan: TrainPlan = make_plan(Hyperparameters(augmentation="robust"), split, CHAT, seed=0)
    assert plan.augmentation == "robust"
