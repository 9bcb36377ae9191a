"""Copies of training rows with changed prompts: made from train alone, a fixed number of them, always the same."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from heldout.engine.base import Message
from heldout.pipeline.augment.perturb import CHANGES, pieces
from heldout.pipeline.checks.groups import prompt_fingerprint
from heldout.pipeline.types import Example, Split

#: Copies of a row. A fixed few, so that frozen layers are computed once for each (docs/design/frozen-layers.md).
COPIES = 4
#: Changes in one copy, where so many find something to change.
CHANGED = 2
#: Share of the copies that have another form of the system prompt, where all rows have the same one.
SYSTEM_CHANGED = 0.25

#: The system prompt in another form, or None: left out.
SystemChange = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Augmented:
    """copies[i] belong to train[i]. `sentence` says how they came about; empty without any."""

    copies: tuple[tuple[Example, ...], ...] = ()
    sentence: str = ""
    data: dict[str, Any] | None = None


def robust_copies(split: Split, *, seed: int) -> Augmented:
    """For every row of train up to COPIES others, each with CHANGED changes of its user messages, and some with
    another form of the system prompt that all rows share."""
    forms, others = system_forms(split.train), elsewhere(split)
    copies = tuple(_copies(example, forms, others, seed) for example in split.train)
    count = sum(map(len, copies))
    return Augmented(
        copies=copies,
        sentence=(
            f"Augmentation: {count} copies of {len(split.train)} training rows, with typing slips, other case and "
            "marks, greetings or fewer filler words, take turns with the rows; steps stay as planned"
        ),
        data={"augmentation": "robust", "copies": count, "rows": len(split.train)},
    )


def elsewhere(split: Split) -> set[str]:
    """Fingerprints of the prompts outside train. No copy may have one of them: the parts share no prompt."""
    return {prompt_fingerprint(example.prompt) for example in (*split.valid, *split.holdout)}


def with_user_text(example: Example, change: Callable[[str], str], number: int) -> Example:
    """A copy of the row whose user messages are changed."""

    def changed(message: Message) -> Message:
        return {**message, "content": change(message["content"])} if message["role"] == "user" else message

    return replace(example, messages=tuple(map(changed, example.messages)), copy=number)


def _copies(example: Example, forms: Sequence[SystemChange], others: set[str], seed: int) -> tuple[Example, ...]:
    found: list[Example] = []
    known = [example.messages]
    for number in range(1, COPIES + 1):
        # By line, not by place: the folds of cross-fitting share a row's copies, and their activations.
        rng = random.Random(f"{seed}/copy/{example.line}/{number}")
        copy = _changed(example, number, rng)
        if forms and rng.random() < SYSTEM_CHANGED:
            copy = with_system_form(copy, rng.choice(forms))
        if copy.messages not in known and prompt_fingerprint(copy.prompt) not in others:
            found.append(copy)
            known.append(copy.messages)
    return tuple(found)


def _changed(example: Example, number: int, rng: random.Random) -> Example:
    copy, effective = replace(example, copy=number), 0
    for change in rng.sample(CHANGES, len(CHANGES)):
        other = with_user_text(copy, lambda text, change=change: change(text, rng), number)  # type: ignore[misc]
        effective += other.messages != copy.messages
        copy = other
        if effective == CHANGED:
            break
    return copy


def with_system_form(example: Example, form: SystemChange) -> Example:
    first, *rest = example.messages
    text = form(first["content"])
    if text is None:
        return replace(example, messages=tuple(rest), weights=example.weights[1:])
    return replace(example, messages=({**first, "content": text}, *rest))


def system_forms(train: Sequence[Example]) -> tuple[SystemChange, ...]:
    """Nothing when system prompts differ: then they tell one row from another."""
    first = {str(one.messages[0]["content"]) if one.messages[0]["role"] == "system" else None for one in train}
    more = any(message["role"] == "system" for one in train for message in one.messages[1:])
    return SYSTEM_FORMS if len(first) == 1 and None not in first and not more else ()


def _broken(system: str) -> str:
    """A line for each sentence."""
    return "".join(re.sub(r"(?<=[.:?!]) (?=\S)", "\n", one.text) if one.free else one.text for one in pieces(system))


#: Few, and the same for all rows: what rows share is computed once for each form.
SYSTEM_FORMS: tuple[SystemChange, ...] = (
    lambda system: None,
    _broken,
    lambda system: f"Instructions:\n{system}",
)
