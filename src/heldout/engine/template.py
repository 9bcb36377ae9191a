"""Conversations to tokens, the same way for training and serving.

What is trained on is cut where serving cuts it: the prompt is tokenised as a whole, the answer and its
end-of-turn token separately, so the model learns exactly the tokens it will be asked to produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heldout.engine.base import Message
from heldout.errors import InvalidValue


@dataclass(frozen=True)
class Tokens:
    """One conversation's tokens; `supervised[i]` says that token i is learned from."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


class ChatTemplate:
    """A tokenizer's chat template with the questions we ask of it."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int] = ()) -> None:
        """`stop_ids`: further end tokens from the model's generation settings."""
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        ends = {tokenizer.eos_token_id, *stop_ids, self._end_of_turn()}
        self.stop_ids = frozenset(i for i in ends if i is not None)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens the model continues when it is asked for the next assistant message."""
        return self._tokenize(self._render(messages, answer_next=True))

    def encode(self, messages: Sequence[Message], weights: Sequence[int]) -> Tokens:
        """The whole conversation, supervised at the assistant messages whose weight is 1 and at
        the end-of-turn token of each. Nothing after the last supervised token is kept: no loss
        looks at it.

        Raises InvalidValue when the template rewrites earlier turns as the conversation grows.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        done = ""  # how much of the rendered text is tokenised
        for index, weight in enumerate(weights):
            if not weight:
                continue
            before = self._render(messages[:index], answer_next=True)
            after = self._render(messages[: index + 1], answer_next=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise InvalidValue(
                    f"message {index}: the chat template of this model changes earlier messages when later "
                    "ones follow, so a conversation with several answers cannot be trained on in one piece. "
                    "Split it into one example per answer."
                )
            context = self._tokenize(before[len(done) :])
            answer = self._until_end_of_turn(self._tokenize(after[len(before) :]))
            ids += context + answer
            supervised += [False] * len(context) + [True] * len(answer)
            done = before + self.tokenizer.decode(answer)
            if not after.startswith(done):
                raise InvalidValue(f"message {index}: the tokenizer does not give back the answer it was given")
        return Tokens(tuple(ids), tuple(supervised))

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of answers, each without the end of its turn."""
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _render(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer_next
                )
            )
        except Exception as error:
            raise InvalidValue(
                f"the model's chat template refuses this conversation: {error}", param="messages"
            ) from error

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _until_end_of_turn(self, ids: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(ids) if token in self._special]
        return ids[: ends[-1] + 1] if ends else ids

    def _end_of_turn(self) -> int | None:
        """The special token that closes an assistant message in this template."""
        turn: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        ids = self._tokenize(self._render(turn, answer_next=False))
        return next((token for token in reversed(ids) if token in self._special), None)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences share."""
    # The first and the last in lexicographic order differ where any two of them differ first.
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))
