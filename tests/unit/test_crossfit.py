"""Cross-fitting in numbers: what folds leave on disk, how they are put together, how long the last model trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heldout.errors import InvalidValue
from heldout.pipeline import crossfit
from heldout.pipeline.crossfit import CrossFit, Fold, FoldWatch
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import Scores, score_answers
from heldout.pipeline.folds import split_into_folds
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.selection import Candidate, Selection
from heldout.pipeline.training import Adapter, CurvePoint, ModelFacts
from heldout.pipeline.types import Dataset, Split
from heldout.pipeline.watch import Silent
from tests.unit.conftest import labelled, right, rung, split_of

FACTS = ModelFacts(hidden_size=64, layers=2, context=512, parameters=1)
SPLIT = split_of(labelled("train", 40), labelled("valid", 10), labelled("holdout", 12))
METRIC = choose_metric([row.target for row in SPLIT.train])


def scored(*answers: str) -> Scores:
    """These answers, then right ones, to SPLIT's holdout; half of the tokens of the prompts are 3, one is cut."""
    given = [*answers, *(row.target for row in SPLIT.holdout[len(answers) :])]
    return replace(score_answers(METRIC, SPLIT.holdout, given), prompt_tokens=3.5, cut=1)


def fold(number: int = 1, *, best_epoch: float = 1.5, learning_rate: float = 1e-3) -> Fold:
    return Fold(
        number=number,
        train=40,
        valid=10,
        best_step=6,
        best_epoch=best_epoch,
        last_step=9,
        learning_rate=learning_rate,
        valid_loss=0.25,
        stopped="all 9 steps taken",
        seconds=2.5,
        scores=scored("red", "nonsense"),
    )


def test_what_a_fold_found_is_read_back_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "fold-1"
    assert crossfit.read_fold(directory, SPLIT, METRIC) is None
    crossfit.write_fold(directory, SPLIT, fold())
    assert crossfit.read_fold(directory, SPLIT, METRIC) == fold()
    assert [path.name for path in directory.iterdir()] == ["fold.json"]


def test_a_ladder_is_read_back_as_it_was(tmp_path: Path) -> None:
    rungs = (
        Rung(name="constant", kind="constant", description="always 'red'", scores=scored(*["red"] * 12)),
        Rung(name="few-shot-4", kind="prompt", description="4 shots", scores=scored()),
    )
    assert crossfit.read_ladder(tmp_path, SPLIT, METRIC) is None
    crossfit.write_ladder(tmp_path, SPLIT, rungs)
    assert crossfit.read_ladder(tmp_path, SPLIT, METRIC) == rungs


def test_a_record_about_other_rows_is_refused_with_what_to_delete(tmp_path: Path) -> None:
    crossfit.write_fold(tmp_path, SPLIT, fold())
    crossfit.write_ladder(tmp_path, SPLIT, ())
    other = replace(SPLIT, holdout=SPLIT.holdout[1:])
    for read in (crossfit.read_fold, crossfit.read_ladder):
        with pytest.raises(InvalidValue, match=f"other data.*delete the folder {tmp_path}"):
            read(tmp_path, other, METRIC)
    record = json.loads((tmp_path / "fold.json").read_text())
    (tmp_path / "fold.json").write_text(json.dumps({**record, "version": 0}))
    with pytest.raises(InvalidValue, match="another version"):
        crossfit.read_fold(tmp_path, SPLIT, METRIC)


def test_a_record_that_was_being_written_is_no_record(tmp_path: Path) -> None:
    crossfit.write_fold(tmp_path, SPLIT, fold())
    whole = (tmp_path / "fold.json").read_bytes()
    (tmp_path / "fold.json").unlink()
    (tmp_path / "fold.writing").write_bytes(whole[:100])
    assert crossfit.read_fold(tmp_path, SPLIT, METRIC) is None
    crossfit.write_fold(tmp_path, SPLIT, fold())
    assert crossfit.read_fold(tmp_path, SPLIT, METRIC) == fold()


def test_the_models_of_a_finished_fold_are_deleted_and_its_record_stays(tmp_path: Path) -> None:
    crossfit.write_fold(tmp_path, SPLIT, fold())
    for name in ("checkpoints/step-000003", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_model.safetensors").write_text("weights")
    for _ in range(2):  # again after a kill in between
        crossfit.discard_models(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["fold.json"]


def test_answers_of_all_folds_are_put_together_in_order() -> None:
    parts = [
        replace(rung("a", right(6, 3)).scores, prompt_tokens=10.0, cut=1),
        replace(rung("a", right(2, 2)).scores, prompt_tokens=50.0, cut=2),
    ]
    pooled = crossfit.pool(parts)
    assert pooled.per_example == (1, 1, 1, 0, 0, 0, 1, 1)
    assert (pooled.mean, pooled.prompt_tokens, pooled.cut) == (0.625, 20.0, 3)
    assert pooled.interval == rung("a", right(8, 5)).scores.interval, "of eight examples, not a mean of two intervals"


def test_the_ladders_of_folds_become_one_ladder() -> None:
    ladders = [
        [
            rung("constant", right(4, 1), kind="constant", description=f"always {answer}"),
            rung("zero-shot", right(4, 2), description="the prompt as it is"),
            rung(f"few-shot-{shots}", right(4, 3), description=f"{shots} shots"),
        ]
        for answer, shots in (("red", 4), ("blue", 8))
    ]
    pooled = crossfit.pool_rungs(ladders, Silent())
    assert [(one.name, one.kind, one.scores.mean) for one in pooled] == [
        ("constant", "constant", 0.25),
        ("zero-shot", "prompt", 0.5),
        ("few-shot", "prompt", 0.75),
    ]
    assert {len(one.scores.per_example) for one in pooled} == {8}
    assert pooled[0].description == "always the commonest training answer of the fold"
    assert pooled[1].description == "the prompt as it is"
    assert "(4, 8 examples)" in pooled[2].description


class Telling(Silent):
    """A watch that notes everything it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        self.told.append(("message", text, level))

    def progress(self, stage: str, done: int, total: int) -> None:
        self.told.append(("progress", stage, done, total))

    def planned(self, plan: TrainPlan) -> None:
        self.told.append(("planned",))

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        self.told.append(("metrics", point.step))

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any]) -> None:
        self.told.append(("checkpoint", step))

    def kept(self) -> None:
        self.told.append(("kept",))


def test_a_rung_that_one_fold_does_not_have_is_left_out_aloud() -> None:
    watch = Telling()
    ladders = [[rung("zero-shot", right(4, 2)), rung("few-shot-4", right(4, 3))], [rung("zero-shot", right(4, 2))]]
    assert [one.name for one in crossfit.pool_rungs(ladders, watch)] == ["zero-shot"]
    ((_, text, level),) = watch.told
    assert level == "warn"
    assert text.startswith("few-shot is left out of the ladder: 1 of 2 folds")


def test_a_folds_steps_and_checkpoints_do_not_look_like_the_jobs() -> None:
    watch = Telling()
    in_fold = FoldWatch(watch, 2, 5)
    in_fold.message("Training ended", level="warn")
    in_fold.progress("train", 3, 9)
    in_fold.metrics(CurvePoint(step=3, train_loss=1.0, train_accuracy=0.5), 9)
    in_fold.planned(make_plan(Hyperparameters(), SPLIT, FACTS, seed=0))
    assert watch.told == [("message", "fold 2 of 5: Training ended", "warn"), ("progress", "fold 2 of 5: train", 3, 9)]
    in_fold.checkpoint(3, Path("x"), {})
    assert watch.told[2:] == [("kept",)], "a job that is killed now has got somewhere"


def whole(n: int, valid: int = 0) -> Split:
    files = [
        Dataset(name=name, examples=labelled(name, count)) if count else None
        for name, count in (("train", n), ("valid", valid))
    ]
    assert files[0] is not None
    return split_into_folds(files[0], files[1], seed=0)[0].whole


@pytest.mark.parametrize(
    ("best", "steps", "n_epochs"),
    [
        ([1.0, 3.0, 2.5, 2.0, 9.0], 25, 3),  # 80 rows, batch 8: 10 steps an epoch
        ([1.0, 1.0, 1.0, 1.0, 1.0], 10, 1),
        ([0.1, 0.1, 0.02, 0.02, 0.02], 1, 1),
    ],
)
def test_the_model_to_serve_trains_as_long_as_the_median_fold_needed(
    best: list[float], steps: int, n_epochs: int
) -> None:
    folds = [fold(number, best_epoch=epoch) for number, epoch in enumerate(best, start=1)]
    plan = crossfit.final_plan(Hyperparameters(n_epochs=9), whole(80), FACTS, folds, seed=4)
    assert (plan.total_steps, plan.n_epochs, plan.early_stopping, plan.seed) == (steps, n_epochs, False, 4)
    assert plan.warmup_steps <= steps
    assert "the median of the folds' best" in plan.reasons["total_steps"]
    assert "nothing is left to choose by" in plan.reasons["early_stopping"]


def test_the_model_to_serve_trains_at_the_rate_that_the_folds_ended_with() -> None:
    asked = Hyperparameters(learning_rate=3e-3, lr_search="light")
    folds = [fold(learning_rate=rate) for rate in (1e-3, 1e-2, 1e-3, 3e-3, 1e-3)]
    plan = crossfit.final_plan(asked, whole(80), FACTS, folds, seed=0)
    assert (plan.learning_rate, plan.lr_search) == (1e-3, "off")
    assert "0.003 was planned" in plan.reasons["learning_rate"]
    same = crossfit.final_plan(asked, whole(80), FACTS, [fold(learning_rate=3e-3)] * 5, seed=0)
    assert same.reasons["learning_rate"] == "set in the request"


def test_with_a_validation_file_the_model_to_serve_is_stopped_by_it_as_the_folds_were() -> None:
    asked = Hyperparameters(n_epochs=9)
    split = whole(80, valid=20)
    plan = crossfit.final_plan(asked, split, FACTS, [fold(best_epoch=1.0)] * 5, seed=0)
    assert plan == make_plan(asked, split, FACTS, seed=0)
    assert (plan.n_epochs, plan.early_stopping) == (9, True)


def test_the_best_step_of_a_fold_is_told_in_epochs_of_its_own_rows() -> None:
    kept = Candidate(kind="best_loss", step=15, valid_loss=0.75, scores=())
    plan = make_plan(Hyperparameters(batch_size=8), SPLIT, FACTS, seed=0)
    adapter = Adapter(
        plan=plan,
        directory=Path("adapter"),
        checkpoint=Path("step-000015"),
        best_step=15,
        last_step=20,
        curve=(
            CurvePoint(
                step=15,
                train_loss=0.5,
                train_accuracy=0.5,
                valid_loss=0.75,
                valid_calibrated_loss=0.5,
                valid_accuracy=0.5,
            ),
        ),
        trained_tokens=1,
        trained_parameters=1,
        examples_per_second=1.0,
        seconds=3.0,
        peak_memory_bytes=1,
        precision="float32",
        learning_rate=5e-4,
        stopped="stopped",
        selection=Selection(chosen=kept, reason="the lowest", candidates=(kept,)),
        proofs=(),
    )
    made = crossfit.make_fold(2, SPLIT, plan, adapter, scored())
    assert made.best_epoch == 3.0, "five steps an epoch of 40 rows"
    assert (made.number, made.train, made.valid, made.valid_loss) == (2, 40, 10, 0.75)
    assert made.learning_rate == 5e-4
    assert made.as_dict()["holdout"] == 12


def test_the_report_says_what_was_measured() -> None:
    found = CrossFit(folds=tuple(fold(number) for number in range(1, 6)), groups=57)
    assert "out-of-fold answers of 5 models" in found.sentence
    assert "the served model was trained on all rows and was itself not measured" in found.sentence
    assert found.as_dict()["groups"] == 57
    assert [one["fold"] for one in found.as_dict()["folds"]] == [1, 2, 3, 4, 5]
