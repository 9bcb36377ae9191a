"""What a job is asked to do, and who does the work that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from heldout.engine.base import Engine
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.training import Trainer
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file of the job: how reports call it, and how to read it."""

    name: str
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    base_model: str
    training: Source
    validation: Source | None = None
    holdout: Source | None = None
    seed: int = 0
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    directory: Path  # checkpoints, adapter and report are written here; a job resumes from it
    eval_budget: float | None = None  # seconds for probes of the tuned model; None: as consequences/base.py has it
    grader: dict[str, Any] | None = None  # OpenAI's, as JSON; instead of `hyperparameters.metric`
    suffix: str | None = None  # the user's name for the model
    #: Variables by which the operator's settings change what is computed (Settings.of_jobs).
    environment: dict[str, str] = field(default_factory=dict)
    keep_leaks: bool = False  # score what gives itself away, and say so in the verdict


def first_look(examples: Sequence[Example]) -> int:
    """The answer of whoever keeps no book."""
    return 1


@dataclass(frozen=True, kw_only=True)
class Tools:
    """Who does the work that is not ours."""

    engine: Engine
    trainer: Trainer
    watch: Watch
    #: Notes that a verdict looks at these examples; how many verdicts have, this one included.
    look: Callable[[Sequence[Example]], int] = first_look
