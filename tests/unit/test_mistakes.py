"""Which wrong answers a reader is shown."""

from __future__ import annotations

from dataclasses import replace

from heldout.pipeline.ladder import Rung
from heldout.pipeline.mistakes import instructive_mistakes
from tests.unit.conftest import example, rung

TARGETS = ["red", "red", "red", "blue", "green", "red"]
ROWS = [example(f"question {i}", target, i + 1) for i, target in enumerate(TARGETS)]


def answering(name: str, *answers: str) -> Rung:
    made = rung(name, [float(answer == target) for answer, target in zip(answers, TARGETS, strict=True)])
    return replace(made, scores=replace(made.scores, answers=answers))


def test_what_training_made_worse_comes_first_then_the_commonest_and_one_of_a_kind_is_shown() -> None:
    tuned = answering("tuned", "blue", "blue", "blue", "red", "black", "red")
    prompt = answering("zero-shot", "?", "?", "?", "?", "green", "?")
    found = instructive_mistakes(ROWS, tuned, prompt)
    assert [(one.line, one.expected, one.tuned, one.alike) for one in found] == [
        (5, "green", "black", 1),
        (1, "red", "blue", 3),
        (4, "blue", "red", 1),
    ]
    assert (found[0].baseline, found[0].baseline_score, found[0].asked) == ("green", 1.0, "question 4")
    assert len(instructive_mistakes(ROWS, tuned, prompt, most=2)) == 2


def test_of_a_kind_the_one_is_shown_that_the_baseline_had_right() -> None:
    tuned = answering("tuned", "blue", "blue", "blue", "blue", "green", "red")
    prompt = answering("zero-shot", "?", "red", "?", "?", "?", "?")
    (first,) = instructive_mistakes(ROWS, tuned, prompt)
    assert (first.line, first.alike) == (2, 3)


def test_a_model_without_mistakes_has_none_to_show() -> None:
    assert instructive_mistakes(ROWS, answering("tuned", *TARGETS), answering("zero-shot", *["?"] * 6)) == ()
