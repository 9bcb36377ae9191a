"""Prompts that begin alike: each beginning is read once."""

from __future__ import annotations

from typing import Any

from heldout.engine import sharing
from heldout.engine.base import Message, ModelRef
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from tests.torch.generating import MIXED, TASK, check, expected


def test_prompts_with_several_long_beginnings_read_each_beginning_once(
    engine: LocalEngine, tuned: ModelRef, plain: dict[str | None, Any], template: ChatTemplate
) -> None:
    systems = ["Name the colour. " * 20, "Name the colour, please. " * 20]
    conversations: list[list[Message]] = [
        [{"role": "system", "content": systems[i % 2]}, TASK[i % len(TASK)][-1]] for i in range(12)
    ]
    conversations.insert(3, MIXED[0])
    prompts = [template.prompt(one) for one in conversations]
    found = sharing.families(prompts)
    assert sorted(len(one.members) for one in found) == [1, 6, 6]
    assert sorted(i for one in found for i in one.members) == list(range(13))
    assert min(one.shared for one in found if len(one.members) == 6) > 100
    wanted = [expected(plain[tuned.adapter], template, one) for one in conversations]
    check(engine, tuned, conversations, wanted)


def test_families_keep_a_token_of_every_prompt_and_leave_small_ones_together() -> None:
    assert sharing.families([]) == []
    assert sharing.families([[1, 2, 3]]) == [(0, [0])]
    assert sharing.families([[1, 2, 3]] * 3) == [(2, [0, 1, 2])]
    assert sharing.families([[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]]) == [(1, [0, 1, 2])]
    long = [[7] * 600 + [i] for i in range(2)]
    assert sharing.families([[7, 1], *long, [9]]) == [(600, [1, 2]), (0, [0, 3])]
    nested = [[7] * 600 + [8] * 2000 + [i] for i in range(3)]
    assert sharing.families([*long, *nested]) == [(2600, [2, 3, 4]), (600, [0, 1])]


def test_no_more_tokens_are_read_than_behind_one_beginning() -> None:
    def read(prompts: list[list[int]]) -> int:
        return sum(
            one.shared + sum(len(prompts[i]) - one.shared for i in one.members) for one in sharing.families(prompts)
        )

    for common, heads, own, questions in ((3000, 50, 300, 4), (1500, 40, 60, 10), (0, 20, 400, 5), (100, 3, 900, 30)):
        prompts = [
            [1] * common + [2 + head] * own + [99, question] for head in range(heads) for question in range(questions)
        ]
        assert read(prompts) <= common + sum(len(prompt) - common for prompt in prompts)
    assert read(prompts) < 5000, "three long beginnings are worth a family each"
    chain = [[1] * n for n in range(1, 1500)]  # rows that are each the beginning of the next
    assert sorted(i for one in sharing.families(chain) for i in one.members) == list(range(len(chain)))
