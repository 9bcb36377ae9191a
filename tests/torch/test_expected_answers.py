"""Expected answers are read ahead, and change no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heldout.engine import cache, generate
from heldout.engine.base import ModelRef, Sampling
from heldout.engine.expected import Expected
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.engine.weights import load_model
from tests.torch.conftest import TOOLS
from tests.torch.generating import GREEDY, MIXED, TASK


@pytest.mark.parametrize("steps", ["small", "large"])
def test_what_answers_are_expected_to_be_changes_no_answer(
    engine: LocalEngine, base: ModelRef, tuned: ModelRef, steps: str, request: pytest.FixtureRequest
) -> None:
    if steps == "small":
        request.getfixturevalue("small_steps")
    for model in (tuned, base):
        for conversations in (TASK, MIXED):
            plain = engine.chat(model, conversations, GREEDY)
            said = tuple(reply.text for reply in plain)
            beginnings = tuple(text[: len(text) // 2] + " and then something else" for text in said)
            for expected in (
                said,
                said[:1],
                beginnings,
                ("nobody says this",),
                ("",),
                (said[0] * 9,),
                (*said, *beginnings),
            ):
                assert engine.chat(model, conversations, replace(GREEDY, expected=expected)) == plain
                short = replace(GREEDY, max_tokens=3, expected=expected)
                assert engine.chat(model, conversations, short) == engine.chat(
                    model, conversations, Sampling(max_tokens=3)
                )


def test_expected_answers_are_read_in_fewer_passes(
    engine: LocalEngine, tuned: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [0]
    read = cache.read

    def counted(*given: Any) -> Any:
        passes[0] += 1
        return read(*given)

    monkeypatch.setattr(cache, "read", counted)

    def count(expected: tuple[str, ...]) -> int:
        passes[0] = 0
        engine.chat(tuned, TASK, replace(GREEDY, expected=expected))
        return passes[0]

    said = [reply.text for reply in engine.chat(tuned, TASK, GREEDY)]
    one_by_one = count(())
    assert one_by_one > 5
    assert count((said[0],)) < one_by_one
    assert count(tuple(said)) < one_by_one, "what all begin with, and each as soon as it can only be that one"
    assert count(("nobody says this",)) == one_by_one


def test_where_guesses_part_and_fail_the_slots_that_are_left_are_used_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = [0]
    keep = cache.Rows.keep

    def counted(rows: cache.Rows, which: Any) -> None:
        closed[0] += len(which) == len(rows.lengths)  # nobody is dropped: only the gaps are closed
        keep(rows, which)

    monkeypatch.setattr(cache.Rows, "keep", counted)
    model = load_model(tiny_model, torch.float32, cache.IMPLEMENTATION)
    prompts = [[first, first + 1] for first in range(100, 200)]
    with torch.no_grad():
        said = [one.tokens for one in generate.generate(model, prompts, [40] * 100, GREEDY, frozenset())]
        # Answers that begin differently: what is expected of one is expected of no other.
        rows = list({answer[0]: row for row, answer in enumerate(said)}.values())[:10]
        assert len(rows) == 10
        turns = {said[row][0]: (turn, said[row]) for turn, row in enumerate(rows)}

        class Guesses(Expected):
            """One row after the other has nine tokens guessed right, while all others have a wrong one."""

            def __bool__(self) -> bool:
                return True

            def after(self, begun: Sequence[int], most: int) -> list[int]:
                if not begun:
                    return []
                turn, answer = turns[begun[0]]
                at = len(begun)
                right = 4 * turn + 1 <= at < 4 * turn + 10
                return (answer[at : at + 9] if right else [(answer[at] + 1) % 500])[:most] if at < 40 else []

        found = generate.generate(
            model, [prompts[row] for row in rows], [40] * 10, GREEDY, frozenset(), expected=Guesses()
        )
    assert [one.tokens for one in found] == [said[row] for row in rows]
    assert closed[0] > 0


def test_the_end_of_a_turn_within_a_guess_ends_the_answer(
    tiny_model: Path, tuned: ModelRef, template: ChatTemplate, engine: LocalEngine
) -> None:
    (whole,) = engine.chat(tuned, [TASK[0]], GREEDY)
    goes_on = whole.text + "<|im_end|>\n<|im_start|>user\nand more"
    assert engine.chat(tuned, [TASK[0]], replace(GREEDY, expected=(goes_on,))) == [whole]


def test_in_bfloat16_expected_answers_differ_in_no_more_than_near_ties(tuned: ModelRef) -> None:
    engine = LocalEngine(**{**TOOLS, "precision": "bfloat16"})
    plain = engine.chat(tuned, TASK * 4, GREEDY)
    said = tuple(reply.text for reply in plain)
    ahead = engine.chat(tuned, TASK * 4, replace(GREEDY, expected=said))
    for messages, one, other in zip(TASK * 4, plain, ahead, strict=True):
        if one.text != other.text:
            both = [[*messages, {"role": "assistant", "content": reply.text}] for reply in (one, other)]
            a, b = engine.log_probs(tuned, both)
            assert abs(a - b) < 0.5, "rounding decided between two answers that are as likely"


def test_a_warm_answer_is_drawn_as_if_nothing_was_expected(engine: LocalEngine, base: ModelRef) -> None:
    warm = Sampling(max_tokens=24, temperature=1.0, seed=3)
    plain = engine.chat(base, TASK, warm)
    assert engine.chat(base, TASK, replace(warm, expected=tuple(reply.text for reply in plain))) == plain
