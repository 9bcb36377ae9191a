"""Any model behind a chat service as an engine: what evaluates local models evaluates those of others too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

from heldout.engine.base import ChatRequest, ChatService, Message, ModelRef, Piece, Progress, Reply, Sampling
from heldout.errors import InvalidValue, UserError

#: Conversations that are asked at the same time.
AT_ONCE = 8
#: Answers of a server that is busy or restarting, and the seconds to wait before asking again.
BUSY = (429, 500, 502, 503, 504)
WAITS = (1.0, 4.0, 15.0)


@dataclass(frozen=True, kw_only=True)
class ChatEngine:
    """An Engine whose models answer by name (`ModelRef.base_model`) and do nothing else."""

    service: ChatService
    waits: Sequence[float] = WAITS

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        """See Engine.chat. A busy server is asked again a few times; its last error is raised."""
        requests = [
            ChatRequest(model=model.base_model, messages=list(messages), sampling=sampling)
            for messages in conversations
        ]
        replies = []
        with ThreadPoolExecutor(AT_ONCE) as threads:
            waiting = [threads.submit(self._ask, request) for request in requests]
            try:
                for future in waiting:
                    replies.append(future.result())
                    if progress:
                        progress(len(replies), len(requests))
            except BaseException:
                for future in waiting:
                    future.cancel()
                raise
        return replies

    def _ask(self, request: ChatRequest) -> Reply:
        for wait in self.waits:
            try:
                return self._answer(request)
            except UserError as error:
                if error.status not in BUSY:
                    raise
            time.sleep(wait)
        return self._answer(request)

    def _answer(self, request: ChatRequest) -> Reply:
        try:
            return self.service.chat(request)[0]
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # another kind of server
            raise InvalidValue(
                f"What answers for {request.model} does not speak the chat completions API: {error!r}. Is the base URL "
                "right, with its /v1?",
                param="model",
            ) from error

    def stream(
        self, model: ModelRef, conversation: Sequence[Message], sampling: Sampling = Sampling()
    ) -> Iterator[Piece]:
        """See Engine.stream."""
        return self.service.stream(ChatRequest(model=model.base_model, messages=list(conversation), sampling=sampling))

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        """At most how many tokens each text is: a token is at least one byte of it."""
        return [len(text.encode(errors="surrogatepass")) for text in texts]

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        """Raises InvalidValue: the API has no such question."""
        return self._cannot(model.base_model, "says how likely a given answer is")

    def embed(self, encoder: str, texts: Sequence[str]) -> list[list[float]]:
        """Raises InvalidValue: that is another API."""
        return self._cannot(encoder, "gives vectors")

    def close(self) -> None:
        """Nothing of it is in this process's memory."""

    def _cannot(self, model: str, what: str) -> NoReturn:
        raise InvalidValue(f"{model} is behind a chat API, which never {what}", param="model")
