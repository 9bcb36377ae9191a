"""Rungs that can be asked like a fine-tuned model: you may not need a language model for this."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heldout.engine.base import Engine
from heldout.engine.labels import Labels, classifier_config, text_of, varies_in_system
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.ladder import FROZEN, frozen_model, one_thread
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Example


@dataclass(frozen=True, kw_only=True)
class ServedRung:
    """A rung as a model: what is loaded on top of its base model. `directory` has the two files of an adapter."""

    rung: str
    base_model: str
    directory: Path


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
    weight, bias = fitted.coef_, fitted.intercept_
    if len(labels) == 2:  # one row, for the second label against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    # It was fitted to vectors of length 1; classifiers read them in length sqrt(h).
    head = {"head.weight": weight / math.sqrt(facts.hidden_size), "head.bias": bias}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(one, dtype=np.float32) for name, one in head.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = classifier_config(
        labels,
        width=facts.hidden_size,
        frozen_layers=facts.layers,
        max_length=facts.context,
        with_system=with_system,
    )
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return ServedRung(rung=FROZEN, base_model=encoder, directory=directory)
