"""The consequences of a real training, measured in whole jobs with tiny models: a chat model and a classifier."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from heldout.pipeline.consequences import CONSEQUENCES
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.run import run_job
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_files, sources_of
from tests.torch.conftest import TOOLS, Noting, Recording
from tests.torch.encoders import make_tiny_encoder


class NotingEngine(Noting):
    """The engine, with a note of what the tuned model was asked."""

    @property
    def asked(self) -> list[str]:
        return self.questions(adapter=True)


@dataclass(frozen=True)
class Done:
    """A finished job with what was seen of it."""

    folder: Path
    outcome: Outcome
    engine: NotingEngine
    watch: Recording

    @property
    def consequences(self) -> dict[str, Consequence]:
        return {one.name: one for one in self.outcome.consequences}


def run(
    model: Path,
    folder: Path,
    *,
    rate: float,
    epochs: int,
    budget: float | None = None,
    change: Callable[[Path], None] = lambda holdout: None,
) -> Done:
    files = colour_files(folder)
    change(files["holdout"])
    engine, watch = NotingEngine(), Recording()
    source = sources_of(files)
    (folder / "out").mkdir()
    outcome = run_job(
        Request(
            base_model=str(model),
            training=source["train"],
            validation=source["valid"],
            holdout=source["holdout"],
            seed=1,
            hyperparameters=Hyperparameters(n_epochs=epochs, learning_rate=rate, early_stopping=False),
            directory=folder / "out",
            eval_budget=budget,
        ),
        Tools(engine=engine, trainer=TorchTrainer(**TOOLS), watch=watch),
    )
    return Done(folder / "out", outcome, engine, watch)


@pytest.fixture(scope="module")
def chat(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(tiny_model, tmp_path_factory.mktemp("chat"), rate=2e-2, epochs=6, budget=600.0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("classifier")
    return run(make_tiny_encoder(folder / "tiny-bert"), folder, rate=2e-3, epochs=12, budget=600.0)


def test_every_consequence_has_a_light_a_sentence_and_numbers_in_every_form_of_the_report(chat: Done) -> None:
    assert len(chat.outcome.consequences) == len(CONSEQUENCES)
    stored = json.loads((chat.folder / "report.json").read_text())["consequences"]
    assert stored == [json.loads(json.dumps(one.as_dict())) for one in chat.outcome.consequences]
    text, page = (chat.folder / "report.md").read_text(), (chat.folder / "report.html").read_text()
    for name, one in chat.consequences.items():
        assert f"| {name} |" in text
        assert f"<td class=name>{name}</td>" in page
        assert any(message.startswith(f"Consequences, {name}: ") for message in chat.watch.messages), one
    assert any(re.fullmatch(r"Evaluation took \d+ s in all, training \d+ s", told) for told in chat.watch.messages)


def test_a_chat_model_is_asked_perturbed_and_its_training_answers_are_read(chat: Done) -> None:
    found = chat.consequences
    assert found["fragility"].status != "not_measured", found["fragility"].sentence
    assert found["fragility"].numbers["n"] == 48
    assert 0 <= found["memorisation"].numbers["auc"] <= 1
    assert found["memorisation"].numbers["n_holdout"] == 48
    assert found["generalisation"].numbers["n"]["train"] == 48
    assert found["calibration"].numbers["n"] == 48
    assert 0 < found["calibration"].numbers["brier"] < 2
    assert "never given a way to decline" in found["hallucination"].sentence


def test_a_fail_makes_the_outcome_dont_ship(chat: Done) -> None:
    failed = [one for one in chat.outcome.consequences if one.status == "fail" and one.name != "forgetting"]
    reasons = chat.outcome.verdict.reasons
    assert reasons[: len(failed)] == tuple(f"{one.name} fails: {one.sentence}" for one in failed)
    if failed:
        assert chat.outcome.verdict.outcome == "dont_ship"


def test_a_classifier_is_measured_with_its_own_probabilities(classifier: Done) -> None:
    found = classifier.consequences
    assert found["calibration"].numbers["n"] == 48
    assert 0 <= found["calibration"].numbers["brier"] <= 2
    assert "system prompt" not in found["fragility"].numbers["perturbations"]
    assert found["format"].numbers["fit"] == 1.0
    assert found["forgetting"].status == "not_measured"
    assert found["memorisation"].numbers["train_loss"] == pytest.approx(
        found["memorisation"].numbers["holdout_loss"], abs=1.0
    )


def test_a_holdout_answer_that_the_classifier_cannot_give_does_not_stop_the_job(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("unknown")
    model = make_tiny_encoder(folder / "tiny-bert")

    def with_another(path: Path) -> None:
        rows = path.read_text().splitlines()
        path.write_text(
            "\n".join([rows[0].replace('{\\"colour\\":\\"red\\"}', '{\\"colour\\":\\"pink\\"}'), *rows[1:]])
        )
        assert "pink" in path.read_text()

    done = run(model, folder, rate=2e-3, epochs=3, budget=600.0, change=with_another)
    assert done.consequences["memorisation"].numbers["n_holdout"] == 47
    assert done.consequences["calibration"].numbers["n"] == 48


def test_without_time_the_tuned_model_answers_the_holdout_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("hasty")
    done = run(make_tiny_encoder(folder / "tiny-bert"), folder, rate=2e-3, epochs=3, budget=0.0)
    assert len(done.engine.asked) == 48
    for name in ("fragility", "memorisation", "generalisation", "calibration"):
        assert "HELDOUT_EVAL_BUDGET" in done.consequences[name].sentence
    assert done.consequences["format"].status == "ok"
