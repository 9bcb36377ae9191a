"""System prompts that differ within a file where all rows are meant to have the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from heldout.pipeline.checks.groups import fold
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.types import Dataset, Example, Finding

#: From so many rows on there is a usual system prompt; it is the one of at least this share of the rows.
MIN_ROWS = 20
DOMINANT_SHARE = 0.9
#: Files with more system prompts than this vary them on purpose; no more are counted.
MAX_PROMPTS = 1_000
#: Variants told apart in the message.
_SHOWN = 4
_SHOWN_CHARACTERS = 40

_MISSING = ""


@dataclass
class _Prompts:
    """The system prompts of one file: how often, and in which rows those that are not the commonest."""

    n: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    uncounted: int = 0

    def add(self, prompt: str) -> None:
        self.n += 1
        if prompt in self.counts or len(self.counts) < MAX_PROMPTS:
            self.counts[prompt] += 1
        else:
            self.uncounted += 1

    @property
    def usual(self) -> str | None:
        """The system prompt that nearly all rows have, if there is one."""
        if self.n < MIN_ROWS:
            return None
        [(prompt, count)] = self.counts.most_common(1)
        return prompt if count >= DOMINANT_SHARE * self.n else None


def find_system_prompt_drift(parts: Parts) -> Iterator[Finding]:
    """Rows whose system prompt is not that of nearly all others; files whose prompt is not the training file's."""
    trained = None
    for dataset in parts.given():
        prompts = _Prompts()
        for example in dataset.examples:
            prompts.add(system_prompt(example))
        usual = prompts.usual
        if dataset is parts.train:
            trained = usual
        yield from _within(dataset, prompts)
        if dataset is not parts.train and trained is not None and usual is not None and usual != trained:
            yield _between(dataset, parts.train, _difference(trained, usual))


def system_prompt(example: Example) -> str:
    """The system messages of a row as one text; empty when it has none."""
    return "\n\n".join(str(message["content"]) for message in example.messages if message["role"] == "system")


def _within(dataset: Dataset, prompts: _Prompts) -> Iterator[Finding]:
    usual = prompts.usual
    slips = _slips(prompts.counts) if usual is None and not prompts.uncounted else {}
    if usual is None and not slips:
        return
    lines: list[int] = []
    variants: dict[str, list[int]] = {}
    for example in dataset.examples:
        prompt = system_prompt(example)
        if prompt in slips if usual is None else prompt != usual:
            lines.append(example.line)
            if prompt in variants or len(variants) < 1000:
                variants.setdefault(prompt, []).append(example.line)
    if not lines:
        return
    shown = [
        f"{name_lines(where, at_most=3)}: {_difference(usual if usual is not None else slips[prompt], prompt)}"
        for prompt, where in variants.items()
    ]
    if usual is not None:
        others = f"{prompts.counts[usual]} of {prompts.n} rows have one system prompt, {len(lines)} do not"
    else:
        others = (
            f"{len(lines)} of {prompts.n} rows have a system prompt that differs from others in case or blanks only"
        )
    yield Finding(
        code="system_prompt_differs",
        severity="warning",
        message=(
            f"{others} ({name_some(shown, at_most=_SHOWN)}). Use the prompt that the model will be asked with, letter "
            "for letter, unless the difference is meant."
        ),
        file=dataset.name,
        lines=tuple(lines),
        example=shorten(next(iter(variants))),
    )


def _slips(counts: Counter[str]) -> dict[str, str]:
    """Prompts that equal a commoner one but for case and blanks -> that one."""
    best: dict[str, str] = {}
    slips = {}
    for prompt, _ in counts.most_common():
        commoner = best.setdefault(fold(prompt), prompt)
        if commoner != prompt:
            slips[prompt] = commoner
    return slips


def _between(dataset: Dataset, train: Dataset, difference: str) -> Finding:
    return Finding(
        code="system_prompt_differs",
        severity="warning",
        message=(
            f"{dataset.name} has another system prompt than {train.name} ({difference}). Its scores would measure a "
            "prompt that training never shows; use one prompt in both."
        ),
        file=dataset.name,
    )


def _difference(usual: str, prompt: str) -> str:
    """What is in a prompt in the place of what is in the usual one, in words."""
    if not prompt:
        return "no system message"
    if not usual:
        return f"a system message, {_cut(prompt)}"
    before, after = usual.split(" "), prompt.split(" ")
    if len(before) + len(after) > 2000:  # comparing is quadratic
        return _cut(prompt)
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    if matcher.ratio() < 0.5:
        return f"another text, {_cut(prompt)}"
    changes = [
        (" ".join(before[i1:i2]), " ".join(after[j1:j2]), op)
        for op, i1, i2, j1, j2 in matcher.get_opcodes()
        if op != "equal"
    ]
    shown = [
        f"{_cut(new) if new.strip() else 'a blank'} added"
        if op == "insert"
        else f"{_cut(old) if old.strip() else 'a blank'} missing"
        if op == "delete"
        else f"{_cut(new)} for {_cut(old)}"
        for old, new, op in changes
    ]
    return name_some(shown, at_most=2)


def _cut(text: str) -> str:
    return shorten(text, at_most=_SHOWN_CHARACTERS)
