"""Replies that are produced piece by piece by a plain generator, and what happens when the client leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send


class ClosingStream(StreamingResponse):
    """A streamed reply that closes its source at the end, also when the client hangs up half-way.

    Without it the source is left to the garbage collector: a model would go on generating for nobody.
    """

    def __init__(self, content: Iterator[str] | Iterator[bytes], *, source: Any, **options: Any) -> None:
        super().__init__(content, **options)
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(close, self.source)


def close(source: Any) -> None:
    """Close a generator or a file; an iterator without `close` has nothing to give back."""
    if hasattr(source, "close"):
        source.close()
