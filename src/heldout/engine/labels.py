"""Answers that are labels, and the text of a conversation that a classifier reads. No torch.

Training, checks and serving share these functions: what was learned is what is asked and answered.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from heldout.engine.base import Message
from heldout.errors import InvalidTrainingFile


class Label(NamedTuple):
    """A class, and how the answer holds it: as its whole text (`key` is None), or as a JSON object's one value."""

    key: str | None
    name: str


def read_label(answer: str) -> Label | None:
    """The label an answer gives, or None when it is JSON of another shape than {"key": label}."""
    text = answer.strip()
    value = _json(text)
    if not isinstance(value, (dict, list)):
        return Label(None, text)
    if not isinstance(value, dict) or len(value) != 1:
        return None
    [(key, label)] = value.items()
    if isinstance(label, str):
        return Label(key, label)
    return None if isinstance(label, (dict, list)) else Label(key, json.dumps(label))


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The classes of a training file. `names[i]` and `answers[i]` belong to output i of the classifier."""

    key: str | None  # of the JSON objects; None when an answer is the bare label
    names: tuple[str, ...]
    answers: tuple[str, ...]  # what is answered: letter for letter what the file has most often for this label

    def __len__(self) -> int:
        return len(self.names)

    def index(self, answer: str) -> int | None:
        """Which class an answer names; None when it is none of them."""
        label = read_label(answer)
        known = label is not None and label.key == self.key and label.name in self.names
        return self.names.index(label.name) if known and label else None

    @classmethod
    def of(cls, answers: Iterable[str]) -> Labels:
        """The labels of these answers, in alphabetical order. Raises InvalidTrainingFile when the answers are
        no labels, not all of one form, or all the same (checks say so earlier, with lines)."""
        spellings: dict[str, Counter[str]] = {}
        keys = set()
        for answer in answers:
            label = read_label(answer)
            if label is None:
                raise InvalidTrainingFile(f"the answer {answer!r} is no label")
            keys.add(label.key)
            spellings.setdefault(label.name, Counter())[answer] += 1
        if len(keys) != 1 or len(spellings) < 2:
            raise InvalidTrainingFile(
                f"a classifier needs two labels or more in one form; there are {len(spellings)} in {len(keys)} forms"
            )
        names = sorted(spellings)
        return cls(
            key=keys.pop(),
            names=tuple(names),
            answers=tuple(spellings[name].most_common(1)[0][0] for name in names),
        )


#: In `adapter_config.json`, under "heldout": what tells a classifier from a PEFT adapter.
CLASSIFIER = "classifier"


def classifier_config(
    labels: Labels, *, width: int, frozen_layers: int, max_length: int, with_system: bool
) -> dict[str, Any]:
    """What stands beside a classifier's tensors: all that turns a text into an answer.

    Args:
        width: of the encoder's vectors.
        max_length: tokens of the longest text, special tokens included.
        with_system: see `text_of`.
    """
    return {
        "heldout": CLASSIFIER,
        "hidden_size": width,
        "frozen_layers": frozen_layers,
        "pooling": "mean over tokens, normalised to length sqrt(hidden_size)",
        "max_length": max_length,
        "with_system": with_system,
        "key": labels.key,
        "labels": list(labels.names),
        "answers": list(labels.answers),
    }


def user_text(prompt: Sequence[Message]) -> str:
    """What the user wrote, letter for letter: all that differs between rows in most classification files."""
    return "\n".join(str(message["content"]) for message in prompt if message["role"] == "user")


def varies_in_system(prompts: Iterable[Sequence[Message]]) -> bool:
    """True when the system messages tell one row from another."""
    return len({tuple(str(m["content"]) for m in prompt if m["role"] == "system") for prompt in prompts}) > 1


def text_of(prompt: Sequence[Message], *, with_system: bool) -> str:
    """What a classifier reads of a conversation before the answer: the messages in order.

    `with_system` is what `varies_in_system` said of the training rows. A system prompt that all of them
    share tells nothing about a row, so it is left out, in training as in serving.
    """
    shown = [message for message in prompt if with_system or message["role"] != "system"]
    if len(shown) == 1:
        return str(shown[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in shown)


def _json(text: str) -> Any:
    """The JSON object or array a text is, or None."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
