"""The inference process: answers chat completions with local models, over OpenAI's own wire.
`python -m heldout.processes.inference --port P`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import uvicorn

from heldout import gate
from heldout.api.app import create_chat_app
from heldout.api.wire_chat import no_log_probs
from heldout.engine import catalogue, rungs
from heldout.engine.base import ChatRequest, Engine, ModelRef, Piece, Reply
from heldout.errors import ModelNotFound, NotFound
from heldout.settings import DEFAULT_MODEL, Settings, read_settings
from heldout.store.blobs import Blobs, fetch_folder, open_blobs
from heldout.store.db import Db, open_db


class LocalChat:
    """A ChatService over the engine of this process: names become base models and adapter folders."""

    def __init__(self, settings: Settings, db: Db, blobs: Blobs, engine: Engine) -> None:
        self.settings, self.db, self.blobs, self.engine = settings, db, blobs, engine

    def chat(self, request: ChatRequest) -> list[Reply]:
        """See ChatService.chat."""
        sampling = request.sampling
        _refuse_log_probs(request, self._find(request.model))
        if request.n > 1 and sampling.seed is not None:
            # One seed for all would give n times the same answer.
            return [
                self.engine.chat(
                    self._find(request.model), [request.messages], replace(sampling, seed=sampling.seed + i)
                )[0]
                for i in range(request.n)
            ]
        return self.engine.chat(self._find(request.model), [request.messages] * request.n, sampling)

    def stream(self, request: ChatRequest) -> Iterator[Piece]:
        """See ChatService.stream."""
        _refuse_log_probs(request, self._find(request.model))
        return self.engine.stream(self._find(request.model), request.messages, request.sampling)

    def _find(self, name: str) -> ModelRef:
        if not name.startswith("ft:"):
            source = catalogue.resolve(name, self.settings.model_aliases)
            return ModelRef(base_model=source.name)
        # The server has asked already; this port is open to others on the machine.
        gate.admit(self.settings.gate, self.db, name)
        model = self.db.get_model(name)
        try:
            # The key is ours (adapters/<job>/<step>), so the folder below the cache is too.
            folder = fetch_folder(self.blobs, model.blobs, self.settings.adapters / model.blobs)
        except NotFound as missing:
            raise RuntimeError(f"the adapter of {name} is gone: {missing}") from missing
        return ModelRef(base_model=model.base_model, adapter=str(folder))


def _refuse_log_probs(request: ChatRequest, model: ModelRef) -> None:
    """Before an answer is generated that cannot be given."""
    if request.log_probs and not rungs.decides(model):
        raise no_log_probs()


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop, or until whoever started us is gone."""
    parser = argparse.ArgumentParser(prog="heldout.processes.inference")
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args(argv).port
    settings = read_settings()
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    from heldout.processes.tools import local_engine

    engine = local_engine(settings)  # names from clients are resolved by LocalChat, before they get there
    threading.Thread(target=_warm_up, args=(engine, settings), daemon=True).start()
    chat = LocalChat(settings, open_db(settings.database), open_blobs(settings.blobs), engine)
    app = create_chat_app(settings=settings, chat=chat)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    return 0


def _warm_up(engine: Engine, settings: Settings) -> None:
    """Dequantise and load what most clients will ask for before the first question comes."""
    likely = next(iter(settings.model_aliases.values()), DEFAULT_MODEL)
    with contextlib.suppress(ModelNotFound):  # whoever asks for it is told
        engine.count_tokens(likely, ["warm"])


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
