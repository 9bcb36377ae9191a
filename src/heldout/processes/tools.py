"""Who does the heavy work in this process: the local engine and the torch trainer."""

from __future__ import annotations

from typing import Any

from heldout.engine import device
from heldout.engine.local import LocalEngine, use_threads
from heldout.kernels import compiling
from heldout.pipeline.checks import ModelTools
from heldout.pipeline.intake import model_tools
from heldout.pipeline.request import Tools
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
    trainer = _trainer(settings)
    return Tools(engine=engine, trainer=trainer, watch=watch)


def check_tools(settings: Settings, base_model: str) -> ModelTools:
    """What checks may ask of a base model where there is no job. Raises ModelNotFound."""
    use_threads(settings.job_threads)
    trainer = _trainer(settings)
    return model_tools(base_model, trainer.facts(base_model), trainer, LocalEngine(**_options(settings)))


def prepare_kernels(settings: Settings) -> str:
    """Compile what models compute with on this machine; the outcome, as a sentence."""
    if device.is_gpu():
        return "Models compute on the GPU: no kernels are compiled for the processor"
    _, why_not = compiling.choose(settings.cache, use=settings.uses_kernels)
    if why_not:
        return (
            f"No kernels for this processor, since {why_not}: a training step takes a quarter longer, or up to "
            "twice as long, and a model up to twice the memory"
        )
    return f"The kernels for this processor lie in {settings.cache}"


def _trainer(settings: Settings) -> TorchTrainer:
    return TorchTrainer(**_options(settings), memory_limit=int(settings.memory_limit))


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "cache": settings.cache,
        "aliases": settings.model_aliases,
        "precision": settings.precision,
        "allow_paths": True,
        "use_kernels": settings.uses_kernels,
    }
