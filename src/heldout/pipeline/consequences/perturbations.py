"""The eight changes that must not change an answer: seven of what the user wrote, one of the system prompt.

What may be touched at all is decided by `augment.perturb.pieces`: no numbers, quotations, code, addresses or JSON.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from heldout.pipeline.augment import perturb
from heldout.pipeline.augment.copies import system_forms, with_system_form, with_user_text
from heldout.pipeline.augment.forms import why_blocked
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.types import Example

#: An example with another wording; the same example where there was nothing to change.
Perturb = Callable[[Example, random.Random], Example]

_SPACE = re.compile(r"(?<=\S) (?=\S)")
_COLON = re.compile(r"(?<=[^\W\d_]): (?=\S)")
_DASH = re.compile(r"(?<=\S) - (?=\S)")
#: They name nothing that any task could be about. English is added to English only, as by `perturb.greet`.
_ASIDES = (" (sent from https://mail.example.org/app)", " The weather is mild today.", " See https://www.example.com/")
#: What white space becomes.
_SPACES = ("  ", "\n", "   ")


class Perturbation(NamedTuple):
    """One change. `keeps_text` says that what the user wrote stands in the prompt letter for letter."""

    name: str
    words: str  # what was done, in words
    apply: Perturb
    keeps_text: bool = False


def space(text: str, rng: random.Random) -> str:
    """One blank in six, at least one, becomes two or three, or a new line."""
    return _some(text, _SPACE, rng, lambda rng: rng.choice(_SPACES), share=6)


def aside(text: str, rng: random.Random) -> str:
    """A sentence or an address at the end that has nothing to do with it."""
    if perturb.greet(text, random.Random(0)) == text:  # no English
        return f"{text} https://www.example.com/"
    return text + rng.choice(_ASIDES)


def separate(text: str, rng: random.Random) -> str:
    """Other marks between a field's name and its value: ": " becomes " - " or a new line, " - " becomes ": "."""
    new = rng.choice((" - ", ":\n"))
    # Not one after the other: what the first wrote, the second would take back.
    return "".join(
        _DASH.sub(": ", one.text)
        if one.free and _DASH.search(one.text)
        else _COLON.sub(new, one.text)
        if one.free
        else one.text
        for one in perturb.pieces(text)
    )


def _some(
    text: str, pattern: re.Pattern[str], rng: random.Random, new: Callable[[random.Random], str], *, share: int
) -> str:
    """One found place in `share`, at least one, becomes something new."""
    parts = [one.text for one in perturb.pieces(text)]
    found = [
        (number, match.span())
        for number, one in enumerate(perturb.pieces(text))
        if one.free
        for match in pattern.finditer(one.text)
    ]
    chosen = rng.sample(found, min(len(found), max(1, len(found) // share)))
    for number, (start, end) in sorted(chosen, reverse=True):
        parts[number] = parts[number][:start] + new(rng) + parts[number][end:]
    return "".join(parts)


def _of_user(change: perturb.Change) -> Perturb:
    return lambda example, rng: with_user_text(example, lambda text: change(text, rng), example.copy)


def of_text() -> tuple[Perturbation, ...]:
    """Those of what the user wrote, the most telling first: where time is short, the last ones are not asked."""
    return (
        Perturbation("typing slips", "with a typing slip", _of_user(perturb.slip)),
        Perturbation("irrelevant ending", "with an irrelevant ending", _of_user(aside), keeps_text=True),
        Perturbation("small letters", "in small letters", _of_user(perturb.lower)),
        Perturbation("greeting", "with a greeting", _of_user(perturb.greet), keeps_text=True),
        Perturbation("white space", "with other white space", _of_user(space)),
        Perturbation("no closing marks", "without closing marks", _of_user(perturb.unmark)),
        Perturbation("other separators", "with other marks between name and value", _of_user(separate)),
    )


def of_system(train: Sequence[Example]) -> tuple[Perturbation, ...]:
    """The system prompt left out or in another form; nothing when rows have none, or different ones."""
    forms = system_forms(train)
    if not forms:
        return ()
    return (
        Perturbation(
            "system prompt",
            "with the system prompt left out or in another form",
            lambda example, rng: with_system_form(example, rng.choice(forms)),
        ),
    )


def allowed(train: Sequence[Example], *, is_encoder: bool) -> tuple[tuple[Perturbation, ...], str | None]:
    """The perturbations that leave the answers of such data right, and why others do not.

    An encoder does not read a system prompt that all rows share.
    """
    system = () if is_encoder else of_system(train)
    why = why_blocked(train)
    if why is None:
        text = of_text()
        return (*text[:2], *system, *text[2:]), None
    # Values that are copied out of the prompt still stand in it beside a greeting. Where letters or marks decide, or
    # the answer is the prompt in other words, it does matter what stands there.
    form = choose_metric([example.target for example in train]).form
    kept = tuple(one for one in of_text() if one.keeps_text) if form == "json" else ()
    return (*kept, *system), why


def perturbed(example: Example, one: Perturbation, seed: int) -> Example:
    """The example changed; always in the same way."""
    return one.apply(example, random.Random(f"{seed}/{one.name}/{example.line}"))
