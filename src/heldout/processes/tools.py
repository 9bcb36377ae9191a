"""Who does the heavy work in this process: the local engine and the torch trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heldout.engine import catalogue
from heldout.engine.local import LocalEngine, use_threads
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.checks import ModelTools
from heldout.pipeline.plan import MAX_LENGTH
from heldout.pipeline.run import Tools
from heldout.pipeline.watch import Watch
from heldout.settings import Settings
from heldout.train.trainer import TorchTrainer


def local_engine(settings: Settings) -> LocalEngine:
    """An engine for names that are already trusted: a job's base model, or the command line's."""
    use_threads(settings.chat_threads)
    return LocalEngine(**_options(settings))


def local_tools(settings: Settings, base_model: str, watch: Watch) -> Tools:
    """Engine and trainer for one job, its base model ready to be loaded. Raises ModelNotFound."""
    use_threads(settings.job_threads)
    engine = LocalEngine(**_options(settings))
    if not engine.is_prepared(base_model):
        watch.message(f"Unpacking the bundled model {base_model} (about half a minute, once)")
        engine.folder(base_model)
    trainer = TorchTrainer(**_options(settings), memory_limit=settings.memory_bytes)
    return Tools(engine=engine, trainer=trainer, watch=watch)


def model_tools(settings: Settings, base_model: str) -> ModelTools:
    """What checks may ask of a base model: its tokens, by its own tokenizer and template, and vectors by the
    bundled encoder where that is installed. Each is loaded at its first question. Raises ModelNotFound."""
    use_threads(settings.job_threads)
    trainer = TorchTrainer(**_options(settings), memory_limit=settings.memory_bytes)
    facts = trainer.facts(base_model)
    return ModelTools(
        kind=facts.kind,
        limit=facts.context if facts.kind == catalogue.ENCODER else min(facts.context, MAX_LENGTH),
        count_tokens=lambda examples: trainer.count_tokens(examples, base_model=base_model),
        embed=_Asked(LocalEngine(**_options(settings))).vectors if catalogue.bundled_encoder() else None,
    )


class _Asked:
    """Answers for ModelTools."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine

    def vectors(self, texts: Sequence[str]) -> list[list[float]]:
        """Of as much of a text as the encoder reads: its beginning says what it is about."""
        encoder = catalogue.bundled_encoder()
        assert encoder is not None
        longest = max(map(len, texts), default=0)
        while True:
            try:
                return self.engine.embed(encoder, [text[:longest] for text in texts])
            except ContextLengthExceeded:
                longest //= 2


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "cache": settings.cache,
        "aliases": settings.model_aliases,
        "precision": settings.precision,
        "allow_paths": True,
    }
