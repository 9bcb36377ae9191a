"""The frozen rung as a model answers what the rung answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from heldout.engine.base import ModelRef
from heldout.engine.local import LocalEngine
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.ladder import frozen_rung
from heldout.pipeline.served_rungs import serve_frozen_encoder
from heldout.pipeline.watch import Silent
from heldout.train.trainer import TorchTrainer
from tests.torch.conftest import TOOLS
from tests.torch.encoders import make_tiny_encoder
from tests.unit.conftest import example, split_of

COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-bert"))


@pytest.mark.parametrize("labels", [COLOURS, COLOURS[:2]], ids=["four labels", "two labels"])
def test_a_served_frozen_encoder_answers_as_the_rung_did(encoder: str, labels: Sequence[str], tmp_path: Path) -> None:
    rows = [
        example(f"item {i} of the list is {labels[i % len(labels)]} and has size {i}", f'{{"colour":"{one}"}}', i)
        for i, one in enumerate([labels[i % len(labels)] for i in range(120)], start=0)
    ]
    split = split_of(rows[:80], (), rows[80:])
    engine, facts = LocalEngine(**TOOLS), TorchTrainer(**TOOLS).facts(encoder)
    (rung,) = frozen_rung(split, choose_metric([row.target for row in rows]), engine, encoder, Silent())
    served = serve_frozen_encoder(split.train, engine, encoder, facts, directory=tmp_path / "rung")
    assert served is not None
    assert (served.rung, served.base_model) == (rung.name, encoder)
    model = ModelRef(base_model=encoder, adapter=str(served.directory))
    replies = engine.chat(model, [list(row.prompt) for row in split.holdout])
    assert tuple(reply.text for reply in replies) == rung.scores.answers
    assert len(set(rung.scores.answers)) == len(labels)
    chances = [math.exp(chance) for _, chance in replies[0].tokens[0].top]
    assert len(chances) == len(labels)
    assert sum(chances) == pytest.approx(1)
    with pytest.raises(ContextLengthExceeded):
        engine.chat(model, [[{"role": "user", "content": "red " * 600}]])


def test_answers_of_several_forms_cannot_be_served(encoder: str, tmp_path: Path) -> None:
    rows = [example(f"item {i}", "red" if i % 2 else '{"colour":"blue"}', i) for i in range(20)]
    engine, facts = LocalEngine(**TOOLS), TorchTrainer(**TOOLS).facts(encoder)
    assert serve_frozen_encoder(rows, engine, encoder, facts, directory=tmp_path / "rung") is None
    assert not (tmp_path / "rung").exists()
