"""Who answers prompts with a base or fine-tuned model: the contract, without torch.

The same engine scores the baselines, evaluates the adapter and serves it, so a number in a report is a
number about what will be served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: One chat message as on the wire: {"role": …, "content": …}.
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. The defaults are greedy: evaluation must not depend on luck."""

    max_tokens: int | None = None  # None: up to the end of the model's context
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    #: Likely answers, as often as they are likely. They may save time and change no greedy answer, but for rounding.
    expected: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """What was answered at one place, and what else could have been. A classifier's whole answer is one."""

    text: str
    log_prob: float  # natural logarithm
    top: tuple[tuple[str, float], ...]  # (text, log-probability), likeliest first, `text` among them


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. `finish_reason` is "stop", or "length" when `max_tokens` cut it."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[TokenChoice, ...] = ()  # empty where log-probabilities are not known


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of a streamed answer; the last one has the finish reason and the token counts."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: tuple[TokenChoice, ...] = ()  # of `text`; empty where log-probabilities are not known


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model an engine can load: a base model's name, and the folder of what was trained on top of it (a
    PEFT adapter, or a classifier on an encoder)."""

    base_model: str
    adapter: str | None = None


#: Called with (done, total) while many conversations are answered, first with 0 when the model is loaded. It may
#: raise to stop the work.
Progress = Callable[[int, int], None]


class Engine(Protocol):
    """Answers conversations with any model it can load, many at a time."""

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = ...,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """One reply for each conversation, in order.

        Raises ModelNotFound, ContextLengthExceeded, or InvalidValue when the model's chat template
        cannot render a conversation, or the model is an encoder that was not trained to answer.
        """
        ...

    def stream(self, model: ModelRef, conversation: Sequence[Message], sampling: Sampling = ...) -> Iterator[Piece]:
        """The reply in pieces. Errors that can be known before the first token are raised by the call
        itself, not by the iteration."""
        ...

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        """Sum of the natural-log probabilities of each conversation's last (assistant) message, end-of-turn token
        included, given what comes before it. What conversations share is read once: several answers to one prompt
        cost little more than one. Raises as `chat` does."""
        ...

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is to this model; an encoder's special tokens around it are counted."""
        ...

    def embed(self, encoder: str, texts: Sequence[str]) -> list[list[float]]:
        """A vector of length 1 for each text, as an encoder sees it untrained. Raises ContextLengthExceeded, or
        InvalidValue when the model is no encoder."""
        ...

    def close(self) -> None:
        """Free the memory; the next call loads again."""
        ...


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What `/v1/chat/completions` asks of an engine, once the wire's words are left behind."""

    model: str
    messages: list[Message]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    log_probs: bool = False  # an answer without them is an error then


class ChatService(Protocol):
    """Answers a chat request by model name: in this process, or at another one over HTTP."""

    def chat(self, request: ChatRequest) -> list[Reply]:
        """`request.n` replies. Raises ModelNotFound for an unknown name."""
        ...

    def stream(self, request: ChatRequest) -> Iterator[Piece]:
        """One reply in pieces (`n` is 1). Raises before the first piece where it can."""
        ...
