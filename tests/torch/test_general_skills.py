"""Replay and forgetting in a whole job: trained, measured and reported for real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from heldout.engine import cache, weights
from heldout.engine.base import ModelRef
from heldout.engine.local import LocalEngine
from heldout.pipeline.general_prompts import HELD_BACK, REPLAYED
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.run import run_job
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Watch
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_row, sources_of, write_rows
from tests.torch.conftest import LEARNING, TOOLS, Noting, Recording

ROWS = {"train": range(40), "valid": range(1000, 1012), "holdout": range(2000, 2032)}


class NotingTrainer(TorchTrainer):
    """The trainer, with a note of what it was given."""

    def __init__(self) -> None:
        super().__init__(**TOOLS)
        self.fitted: list[Split] = []
        self.given: list[Split] = []

    def fit(self, plan: TrainPlan, split: Split, *, base_model: str, directory: Path | None = None) -> TrainPlan:
        self.fitted.append(split)
        return super().fit(plan, split, base_model=base_model, directory=directory)

    def train(
        self,
        plan: TrainPlan,
        split: Split,
        *,
        base_model: str,
        directory: Path,
        watch: Watch,
        cache: Path | None = None,
    ) -> Adapter:
        self.given.append(split)
        return super().train(plan, split, base_model=base_model, directory=directory, watch=watch, cache=cache)


class NotingEngine(Noting):
    """The engine, with a note of what the base model was asked."""

    @property
    def asked(self) -> list[str]:
        return self.questions(adapter=False)


@dataclass(frozen=True)
class Done:
    """A finished job with what was seen of it."""

    folder: Path
    outcome: Outcome
    trainer: NotingTrainer
    engine: NotingEngine
    watch: Recording


def shouted(i: int) -> dict[str, object]:
    """The colour task with another form of answer than the base model has learned."""
    row = colour_row(i)
    *prompt, answer = row["messages"]  # type: ignore[misc]
    return {"messages": [*prompt, {**answer, "content": str(json.loads(answer["content"])["colour"]).upper()}]}


@pytest.fixture(scope="module")
def talker(tiny_model: Path, trained: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model that ends its turns: what the adapter has learned is in its weights."""
    folder = tmp_path_factory.mktemp("models") / "talker"
    model = weights.load_model(tiny_model, torch.float32, cache.IMPLEMENTATION)
    merged = PeftModel.from_pretrained(model, str(trained.directory)).merge_and_unload()
    merged.save_pretrained(folder)
    weights.load_tokenizer(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    for part, numbers in ROWS.items():
        write_rows(folder / f"{part}.jsonl", [shouted(i) for i in numbers])
    return folder


def run(model: Path, folder: Path, *, ratio: float | None, watch: Recording | None = None) -> Done:
    """A job on the files beside `folder`; a killed one goes on."""
    folder.mkdir(exist_ok=True)
    trainer, engine, watch = NotingTrainer(), NotingEngine(), watch or Recording()
    parts = sources_of({part: folder.parent / f"{part}.jsonl" for part in ROWS})
    outcome = run_job(
        Request(
            base_model=str(model),
            training=parts["train"],
            validation=parts["valid"],
            holdout=parts["holdout"],
            seed=3,
            hyperparameters=Hyperparameters(
                n_epochs=4, learning_rate=LEARNING.learning_rate, early_stopping=False, replay_ratio=ratio
            ),
            directory=folder,
        ),
        Tools(engine=engine, trainer=trainer, watch=watch),
    )
    return Done(folder, outcome, trainer, engine, watch)


@pytest.fixture(scope="module")
def plain(talker: Path, root: Path) -> Done:
    return run(talker, root / "plain", ratio=None)


@pytest.fixture(scope="module")
def mixed(talker: Path, root: Path) -> Done:
    return run(talker, root / "mixed", ratio=0.5)


def general(split: Split) -> list[tuple[str, str]]:
    """The rows of train that come from no line: (prompt, answer)."""
    return [(str(row.prompt[0]["content"]), row.target) for row in split.train if row.line == 0]


def test_the_trainer_gets_the_base_models_answers_beside_the_users_rows(mixed: Done, talker: Path) -> None:
    assert [len(split.train) for split in mixed.trainer.given] == [60]
    rows = general(mixed.trainer.given[0])
    assert len({prompt for prompt, _ in rows}) == 20
    answers = LocalEngine(**TOOLS).chat(
        ModelRef(base_model=str(talker)), [[{"role": "user", "content": prompt}] for prompt, _ in rows]
    )
    assert [reply.text for reply in answers] == [answer for _, answer in rows]
    assert mixed.trainer.fitted[0].train == mixed.trainer.given[0].train, "memory is predicted for what is trained"
    assert mixed.outcome.plan.total_steps == mixed.outcome.adapter.last_step == 4 * 8
    assert any("Replay: 20 general examples" in message for message in mixed.watch.messages)


def test_validation_holdout_rungs_and_counts_are_about_the_users_rows_alone(mixed: Done, plain: Done) -> None:
    given = mixed.trainer.given[0]
    assert all(row.line for row in (*given.valid, *given.holdout))
    assert mixed.outcome.rungs == plain.outcome.rungs, "shots and classical models see no general example"
    assert mixed.outcome.as_dict()["data"]["train"] == 40


def test_without_replay_only_forgetting_asks_general_prompts(plain: Done) -> None:
    assert general(plain.trainer.given[0]) == []
    assert not set(plain.engine.asked) & set(REPLAYED)
    assert set(HELD_BACK) <= set(plain.engine.asked)


def test_replay_keeps_more_of_what_the_base_model_could_do(mixed: Done, plain: Done) -> None:
    without, with_ = plain.outcome.verdict.forgetting, mixed.outcome.verdict.forgetting
    assert without
    assert with_
    assert without.change < -0.5
    assert with_.change > 0.75 * without.change
    assert (without.replay_ratio, with_.replay_ratio) == (0.0, 0.5)


def test_a_drop_is_in_every_form_of_the_report(plain: Done) -> None:
    found = plain.outcome.verdict.forgetting
    assert found
    assert found.dropped
    stored = json.loads((plain.folder / "report.json").read_text())["verdict"]
    assert stored["guardrails"]["forgetting"]["change"] == found.change
    assert stored["reasons"][-1] == f"general skills dropped: {found.sentence}; {found.advice}"
    text, page = (plain.folder / "report.md").read_text(), (plain.folder / "report.html").read_text()
    assert "## General skills\n\nOn " in text
    assert "<h2>General skills</h2><p>On " in page
    for form in (text, page):
        assert f"changed by {found.change:+.2f} nats per token" in form


def test_a_job_that_was_killed_goes_on_with_the_same_general_examples(mixed: Done, talker: Path, root: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(talker, root / "killed", ratio=0.5, watch=Recording(interrupt_at=12))
    again = run(talker, root / "killed", ratio=0.5)
    assert again.trainer.given[0] == mixed.trainer.given[0]
    assert not set(again.engine.asked) & set(REPLAYED), "their answers are read from the job's directory"
    assert again.outcome.adapter.curve == mixed.outcome.adapter.curve
    assert again.outcome.verdict.forgetting == mixed.outcome.verdict.forgetting


def test_a_base_model_that_never_ends_its_turn_is_not_measured(tiny_model: Path, root: Path) -> None:
    done = run(tiny_model, root / "endless", ratio=None)
    assert done.outcome.verdict.forgetting is None
    assert any(message.startswith("Forgetting was not measured") for message in done.watch.messages)
    assert "General skills" not in (done.folder / "report.md").read_text()
    assert "General skills" not in (done.folder / "report.html").read_text()
