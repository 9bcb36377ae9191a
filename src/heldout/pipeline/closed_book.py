"""Does the base model know the facts that a file teaches? Its own likelihoods say so, before training.

Asked only where the check `find_facts` says that a file teaches facts (checks/facts.py): a fact that the model
knows is a matter of form, one that it does not know is learned by heart, with a tendency to make up others
(SCIENCE §5).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from heldout.engine.base import Engine, Message, ModelRef, Sampling
from heldout.pipeline.checks.facts import TEACHES, closed_book
from heldout.pipeline.evaluate.statistics import wilson
from heldout.pipeline.types import Dataset, Example, Finding
from heldout.pipeline.watch import Watch

#: Rows that are asked about, at most.
ROWS = 32
#: Answers of other rows that each row's own answer is held against.
DECOYS = 3
#: The file is warned about when so many facts are unknown for sure (SCIENCE §5).
UNKNOWN = 0.4


@dataclass(frozen=True, kw_only=True)
class ClosedBook:
    """What the base model makes of questions whose answers are not in their prompts."""

    asked: int
    greedy: int  # that it answers right by itself
    first: int  # whose answer it finds likelier than all decoys, or says by itself

    @property
    def unknown(self) -> tuple[float, float]:
        """95 % interval of the share of facts that it does not know.

        Of unknown facts the right answer is still the likeliest of four in a quarter of the cases.
        """
        low, high = wilson(self.first, self.asked)
        luck = 1 / (1 + DECOYS)
        return (min(1.0, (1 - high) / (1 - luck)), min(1.0, (1 - low) / (1 - luck)))


def probe_facts(
    engine: Engine, base_model: str, dataset: Dataset, lines: Sequence[int], watch: Watch
) -> ClosedBook | None:
    """Ask the base model for the answers of the rows in these lines, 32 of them at most.

    None when there are too few different answers to tell a known one by.
    """
    chosen = set(lines) if len(lines) <= ROWS else set(random.Random("closed book").sample(list(lines), ROWS))
    rows = [example for example in dataset.examples if example.line in chosen]
    decoys = [_decoys(row, rows) for row in rows]
    if any(len(some) < DECOYS for some in decoys):
        return None
    model = ModelRef(base_model=base_model)
    asked = [_answered(row, answer) for row, some in zip(rows, decoys, strict=True) for answer in (row.target, *some)]
    tokens = engine.count_tokens(base_model, [str(messages[-1]["content"]) for messages in asked])
    log_probs = engine.log_probs(
        model, asked, lambda done, total: watch.progress("facts the base model knows", done, total)
    )
    per_answer = [one / (1 + n) for one, n in zip(log_probs, tokens, strict=True)]  # 1: the end of the turn
    per_token = [per_answer[start : start + 1 + DECOYS] for start in range(0, len(asked), 1 + DECOYS)]
    room = Sampling(max_tokens=max(tokens) + 8)
    replies = engine.chat(model, [row.prompt for row in rows], room)
    right = [_says(reply.text, row.target) for reply, row in zip(replies, rows, strict=True)]
    return ClosedBook(
        asked=len(rows),
        greedy=sum(right),
        first=sum(says or own > max(others) for says, (own, *others) in zip(right, per_token, strict=True)),
    )


def with_the_base_models_word(
    findings: Sequence[Finding], engine: Engine, base_model: str, dataset: Dataset, watch: Watch
) -> tuple[Finding, ...]:
    """The findings, with what the base model knows in that of a file that teaches facts; where there is none,
    nothing is asked."""
    if not any(finding.code == TEACHES for finding in findings):
        return tuple(findings)
    lines, _ = closed_book(dataset)
    found = probe_facts(engine, base_model, dataset, lines, watch)
    if found is None:
        return tuple(findings)
    return tuple(_told(finding, found) if finding.code == TEACHES else finding for finding in findings)


def _told(finding: Finding, found: ClosedBook) -> Finding:
    low, high = found.unknown
    numbers = (
        f"Of {found.asked} of them the base model answers {found.greedy} right, and finds the right answer likelier "
        f"than {DECOYS} wrong ones for {found.first} ({found.asked / (1 + DECOYS):.0f} would be luck): it does not "
        f"know {low:.0%} to {high:.0%} of them."
    )
    if low >= UNKNOWN:
        return replace(finding, message=f"{finding.message} {numbers}")
    numbers += " So the answers may be more a matter of form than of facts."
    return replace(finding, severity="note", message=f"{finding.message} {numbers}")


def _decoys(row: Example, rows: Sequence[Example]) -> list[str]:
    """Wrong answers for this row: of its form if it can be, a price against prices."""
    own = row.target.strip()
    others = [*dict.fromkeys(other.target for other in rows if other.target.strip() != own)]
    alike = [answer for answer in others if _shape(answer) == _shape(own)]
    if re.search("[0-9]", own):
        alike += [_other_digits(row.target, by) for by in (3, 5, 7)]
    others.sort(key=lambda answer: abs(len(answer) - len(own)))
    return [*dict.fromkeys([*alike, *others])][:DECOYS]


def _other_digits(answer: str, by: int) -> str:
    """The answer with every digit changed, none of them to a leading zero."""
    return re.sub("[0-9]", lambda digit: str((int(digit.group()) - 1 + by) % 9 + 1), answer)


def _shape(answer: str) -> str:
    """The form of an answer: digits are alike, and so are letters of words with a capital."""
    return re.sub(r"[A-Z]\w*", "A", re.sub(r"[0-9]+", "0", answer.strip()))


def _answered(row: Example, answer: str) -> list[Message]:
    return [*row.prompt, {"role": "assistant", "content": answer}]


def _says(text: str, target: str) -> bool:
    """True when the target stands in the text as whole words, whatever the case and the closing mark."""
    return f" {_words(target)} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
