"""Where losses do not tell the score, the checkpoints that may be handed over answer validation rows: for real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from heldout.engine.base import ModelRef
from heldout.engine.local import LocalEngine
from heldout.pipeline.candidate_answers import LEAST, MOST, choose_by_answers, count_to_ask, rows_to_ask
from heldout.pipeline.evaluate.answers import SCORERS, Metric, choose_metric
from heldout.pipeline.evaluate.scores import answer_room, score_model
from heldout.pipeline.giveaways import Giveaways
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.run import run_job
from heldout.pipeline.selection import Candidate, Kind, select
from heldout.pipeline.stages import prove_serving
from heldout.pipeline.training import RIGHT, Adapter
from heldout.pipeline.types import Example
from heldout.train import checkpoint
from heldout.train.candidates import prove
from heldout.train.checkpoint import ADAPTER
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_files, colour_row, sources_of, write_rows
from tests.torch.conftest import LEARNING, TOOLS, Noting, Recording, parts, train

SPLIT = parts()
ROUGE = choose_metric([row.target for row in SPLIT.train], "rouge_l")
LABELS = choose_metric([row.target for row in SPLIT.train])


def asked_of(engine: Noting) -> list[tuple[str, int]]:
    """Who was asked, by folder, and for how many answers."""
    return [(Path(model.adapter).name, len(some)) for model, some in engine.calls if model.adapter]


@dataclass(frozen=True)
class Asked:
    """A choice by answers, and what was seen of it."""

    before: Adapter
    after: Adapter
    engine: Noting
    watch: Recording
    tools: Tools


EARLY, LATE = 5, 60


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Adapter:
    """A finished training whose checkpoint of step 5 answers badly, and whose last one well."""
    kept = replace(LEARNING, kept_shares=(EARLY / LATE, 1.0), early_stopping=False)  # nothing prunes step 5
    return train(tiny_model, tmp_path, kept, SPLIT)


def with_candidates(adapter: Adapter, model: Path, *candidates: Candidate) -> Adapter:
    """The adapter, as if these had been the candidates."""
    trainer = TorchTrainer(**TOOLS)
    root = adapter.directory.parent / "checkpoints"
    folders: dict[Kind, Path] = {one.kind: checkpoint.read(root, one.step)[0] for one in candidates}
    selection = select(candidates, metric=RIGHT)
    trainee = trainer.build(adapter.plan, SPLIT, str(model), None)
    return trainer.hand_over(
        replace(adapter, contenders=prove(trainee, selection, folders, SPLIT.valid[:4])), selection
    )


def candidate(kind: Kind, step: int, loss: float) -> Candidate:
    """As training saw it: no answer right, whichever it is."""
    return Candidate(kind=kind, step=step, valid_loss=loss, scores=(0.0,) * len(SPLIT.valid))


def choose(adapter: Adapter, model: Path, metric: Metric) -> Asked:
    watch, engine = Recording(), Noting()
    tools = Tools(engine=engine, trainer=TorchTrainer(**TOOLS), watch=watch)
    return Asked(adapter, choose_by_answers(adapter, SPLIT, metric, str(model), tools), engine, watch, tools)


def test_the_checkpoint_whose_answers_score_better_is_handed_over(tiny_model: Path, adapter: Adapter) -> None:
    early, last = candidate("best_loss", EARLY, 0.4), candidate("last", LATE, 0.5)
    misled = with_candidates(adapter, tiny_model, early, last)
    assert misled.best_step == EARLY, "the losses speak for it"
    found = choose(misled, tiny_model, ROUGE)
    folders = [f"step-{step:06d}" for step in (EARLY, LATE)]
    assert asked_of(found.engine) == [(folder, len(SPLIT.valid)) for folder in folders]
    after = found.after
    assert (after.best_step, after.selection.chosen.kind, after.selection.metric) == (LATE, "last", "ROUGE-L")
    assert "ROUGE-L" in after.selection.reason
    assert after.directory == misled.directory
    assert (after.directory / ADAPTER).read_bytes() == (after.checkpoint / ADAPTER).read_bytes()
    assert after.checkpoint.name == folders[1]
    assert after.seconds > misled.seconds, "choosing is part of training"
    prove_serving(after, str(tiny_model), found.tools)  # its proofs are those of what was handed over
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        prove_serving(replace(after, proofs=misled.proofs), str(tiny_model), found.tools)
    # The scores are those of the answers that the job would score.
    room = answer_room(found.engine, str(tiny_model), SPLIT)
    served = ModelRef(base_model=str(tiny_model), adapter=str(after.directory))
    again = score_model(found.engine, served, SPLIT.valid, ROUGE, max_tokens=room, learned=SPLIT.train)
    assert after.selection.chosen.scores == again.per_example
    assert any("2 checkpoints answer 24 of 24 validation rows" in text for text in found.watch.messages)
    # Taken up again, nothing is asked and the same is chosen.
    once_more = choose(misled, tiny_model, ROUGE)
    assert asked_of(once_more.engine) == []
    assert once_more.after.selection == after.selection
    # By another metric it is.
    assert len(asked_of(choose(misled, tiny_model, choose_metric(["a", "b"], "chrf")).engine)) == 2


def test_nothing_is_asked_where_training_knows_the_score(tiny_model: Path, adapter: Adapter) -> None:
    misled = with_candidates(adapter, tiny_model, candidate("best_loss", EARLY, 0.4), candidate("last", LATE, 0.5))
    found = choose(misled, tiny_model, LABELS)
    assert found.after is misled
    assert asked_of(found.engine) == []


def test_nothing_is_asked_where_no_score_could_change_the_choice(tiny_model: Path, adapter: Adapter) -> None:
    one = with_candidates(adapter, tiny_model, candidate("best_loss", LATE, 0.4), candidate("last", LATE, 0.4))
    assert choose(one, tiny_model, ROUGE).after is one


def test_a_candidate_that_no_score_could_put_first_is_not_asked(tiny_model: Path, adapter: Adapter) -> None:
    three = with_candidates(
        adapter,
        tiny_model,
        candidate("best_loss", EARLY, 0.4),
        candidate("best_metric", LATE, 0.5),
        candidate("last", LATE, 0.5),
    )
    barred = candidate("average", EARLY, 0.41)
    selection = replace(three.selection, candidates=(*three.selection.candidates, barred))
    found = choose(replace(three, selection=selection), tiny_model, ROUGE)
    assert [folder for folder, _ in asked_of(found.engine)] == [f"step-{step:06d}" for step in (EARLY, LATE)]
    scores = {one.kind: one.score for one in found.after.selection.candidates}
    assert scores["average"] is None
    assert scores["best_metric"] == scores["last"], "one checkpoint under two names answers once"
    assert found.after.best_step == LATE


def test_a_checkpoint_has_one_score_under_every_name(tiny_model: Path, adapter: Adapter) -> None:
    twins = with_candidates(
        adapter,
        tiny_model,
        candidate("best_loss", EARLY, 0.4),
        candidate("best_metric", EARLY, 0.4),
        candidate("last", LATE, 0.5),
    )
    scores = {one.kind: one.score for one in choose(twins, tiny_model, ROUGE).after.selection.candidates}
    assert scores["best_metric"] == scores["best_loss"] != scores["last"]


def test_that_a_checkpoint_cannot_be_read_is_still_said(tiny_model: Path, adapter: Adapter) -> None:
    two = with_candidates(adapter, tiny_model, candidate("best_loss", EARLY, 0.4), candidate("last", LATE, 0.5))
    found = choose(replace(two, selection=replace(two.selection, complete=False)), tiny_model, ROUGE)
    assert found.after.selection.reason.startswith("of the checkpoints that can be read, step 60 (the last) is chosen")


def test_candidates_are_asked_without_the_codes_that_the_holdout_is_asked_without(
    tiny_model: Path, adapter: Adapter
) -> None:
    class NoDigits(Giveaways):
        def asked(self, examples: Sequence[Example]) -> tuple[Example, ...]:
            return tuple(replace(row, messages=row.messages[1:], weights=row.weights[1:]) for row in examples)

    two = with_candidates(adapter, tiny_model, candidate("best_loss", EARLY, 0.4), candidate("last", LATE, 0.5))
    watch, engine = Recording(), Noting()
    split = replace(SPLIT, giveaways=NoDigits(tokens=(), codes=None))
    tools = Tools(engine=engine, trainer=TorchTrainer(**TOOLS), watch=watch)
    choose_by_answers(two, split, ROUGE, str(tiny_model), tools)
    assert {messages[0]["role"] for _, some in engine.calls for messages in some} == {"user"}, (
        "as they are asked, not as they are"
    )


@pytest.mark.parametrize("name", SCORERS)
def test_only_labels_that_are_compared_exactly_are_told_by_their_tokens(name: str) -> None:
    assert choose_metric(["yes", "no"] * 3, name).is_told_by_tokens == (name == "exact_match")
    assert not choose_metric(["a text", "another"], name).is_told_by_tokens
    assert not replace(LABELS, grade=lambda examples, answers: [0.0] * len(answers)).is_told_by_tokens


def test_so_many_rows_answer_as_cost_little_beside_training() -> None:
    assert count_to_ask(1000, candidates=2, trained=10_000) == MOST
    assert count_to_ask(1000, candidates=4, trained=1000) == 125, "half as many answers as rows were trained on"
    assert count_to_ask(1000, candidates=4, trained=10) == LEAST
    assert count_to_ask(30, candidates=4, trained=10) == 30
    rows = rows_to_ask(SPLIT, 10)
    assert rows == rows_to_ask(SPLIT, 10) != rows_to_ask(replace(SPLIT, seed=SPLIT.seed + 1), 10)
    assert [row.line for row in rows] == sorted({row.line for row in rows})
    assert rows_to_ask(SPLIT, len(SPLIT.valid)) == SPLIT.valid


# In a job


def run(model: Path, folder: Path, watch: Recording, **asked: object) -> Outcome:
    paths = colour_files(folder)
    wrong = [colour_row(i if i % 3 == 0 else i + 1)["messages"] for i in range(1000, 1024)]
    rows = [colour_row(i)["messages"] for i in range(1000, 1024)]  # of two in three the answer is another row's
    answers = zip(rows, wrong, strict=True)
    write_rows(paths["valid"], [{"messages": [*row[:2], other[2]]} for row, other in answers])  # type: ignore[index]
    files = sources_of(paths)
    request = Request(
        base_model=str(model),
        training=files["train"],
        validation=files["valid"],
        holdout=files["holdout"],
        seed=0,
        hyperparameters=Hyperparameters.parse({"n_epochs": 6, "learning_rate": 0.02, **asked}),
        directory=folder / "out",
        eval_budget=0.0,
    )
    return run_job(request, Tools(engine=LocalEngine(**TOOLS), trainer=TorchTrainer(**TOOLS), watch=watch))


class Killing(Recording):
    """Kills the job when half of the answers to choose by are there."""

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage == "choosing a checkpoint" and 2 * done >= total:
            raise KeyboardInterrupt


def test_a_job_that_is_killed_while_candidates_answer_comes_to_the_same_choice(
    tiny_model: Path, tmp_path: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    watch = Recording()
    whole = run(tiny_model, tmp_path / "whole", watch, metric="chrf")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "killed", Killing(), metric="chrf")
    taken_up = run(tiny_model, tmp_path / "killed", Recording(), metric="chrf")
    assert whole.adapter.selection == taken_up.adapter.selection
    assert whole.tuned.scores.answers == taken_up.tuned.scores.answers
    # It is told once, and written down with the metric that chose.
    selection = whole.adapter.selection
    assert watch.messages.count(selection.reason) == 1
    assert (selection.metric, whole.tuned.scores.metric) == ("chrF", "chrF")
    report = json.loads((tmp_path / "whole" / "out" / "report.json").read_text())
    assert report["training"]["selection"]["metric"] == "chrF"
    on_valid = selection.chosen.score
    assert on_valid is not None
    assert report["training"]["optimism"] == pytest.approx(on_valid - whole.tuned.scores.mean)
