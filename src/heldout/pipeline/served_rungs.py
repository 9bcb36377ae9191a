"""Rungs that can be asked like a fine-tuned model: you may not need a language model for this."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heldout.engine.base import Engine
from heldout.engine.labels import Labels, classifier_config, text_of, user_text, varies_in_system
from heldout.engine.rungs import CONFIG, TENSORS, rows_of_labels, write_shots, write_word_counts
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.evaluate.scores import turns_of
from heldout.pipeline.ladder import CLASSICAL, FROZEN, Rung, classical_model, frozen_model, one_thread
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Example


@dataclass(frozen=True, kw_only=True)
class ServedRung:
    """A rung as a model: what is loaded on top of its base model. `directory` has its files."""

    rung: str
    base_model: str
    directory: Path


def serve_word_counts(train: Sequence[Example], base_model: str, *, directory: Path) -> ServedRung:
    """The classical rung, fitted on `train`. The base model is named and never asked."""
    with one_thread():
        model = classical_model().fit([user_text(one.prompt) for one in train], [one.target for one in train])
    write_word_counts(directory, *(step for _, step in model.steps))
    return ServedRung(rung=CLASSICAL, base_model=base_model, directory=directory)


def serve_shots(rung: Rung, base_model: str, *, directory: Path) -> ServedRung:
    """The base model behind the solved examples of a few-shot rung: nobody has to send them any more."""
    write_shots(directory, turns_of(rung.shots))
    return ServedRung(rung=rung.name, base_model=base_model, directory=directory)


def serve_frozen_encoder(
    train: Sequence[Example], engine: Engine, encoder: str, facts: ModelFacts, *, directory: Path
) -> ServedRung | None:
    """The frozen rung, fitted on `train` and saved as a classifier of which no layer was trained. None where the
    answers are no labels of one form: a classifier could not say them.

    Args:
        facts: of the encoder.
        directory: a folder for this rung alone.
    """
    import numpy as np
    from safetensors.numpy import save_file

    try:
        labels = Labels.of(example.target for example in train)
    except InvalidTrainingFile:
        return None
    with_system = varies_in_system([example.prompt for example in train])
    vectors = engine.embed(encoder, [text_of(example.prompt, with_system=with_system) for example in train])
    with one_thread():
        fitted = frozen_model().fit(vectors, [labels.index(example.target) for example in train])
    weight, bias = rows_of_labels(fitted)
    # It was fitted to vectors of length 1; classifiers read them in length sqrt(h).
    head = {"head.weight": weight / math.sqrt(facts.hidden_size), "head.bias": bias}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(one, dtype=np.float32) for name, one in head.items()}
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
    config = classifier_config(
        labels,
        width=facts.hidden_size,
        frozen_layers=facts.layers,
        max_length=facts.context,
        with_system=with_system,
    )
    (directory / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return ServedRung(rung=FROZEN, base_model=encoder, directory=directory)
