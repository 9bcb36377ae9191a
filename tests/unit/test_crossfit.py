"""Cross-fitting in numbers: what folds leave on disk, how they are put together, how long the last model trains."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heldout.errors import InvalidTrainingFile, InvalidValue
from heldout.pipeline import crossfit, fold_records
from heldout.pipeline.crossfit import CrossFit, Fold, FoldWatch
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import Scores, score_answers
from heldout.pipeline.fold_length import TrainedFold, choose_length, final_plan, fold_plan, trained_fold
from heldout.pipeline.folds import split_into_folds
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.selection import Candidate, Selection
from heldout.pipeline.training import Adapter, CurvePoint, KeptModel, ModelFacts
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


def fold(number: int = 1) -> Fold:
    return Fold(
        number=number,
        train=40,
        valid=10,
        best_step=6,
        best_epoch=1.5,
        last_step=9,
        learning_rate=1e-3,
        valid_loss=0.25,
        stopped="all 9 steps taken",
        seconds=2.5,
        scores=scored("red", "nonsense"),
    )


def test_what_a_fold_found_is_read_back_as_it_was(tmp_path: Path) -> None:
    directory = tmp_path / "fold-1"
    assert fold_records.read_fold(directory, SPLIT, METRIC) is None
    fold_records.write_fold(directory, SPLIT, fold())
    assert fold_records.read_fold(directory, SPLIT, METRIC) == fold()
    assert [path.name for path in directory.iterdir()] == ["fold.json"]


def test_a_ladder_is_read_back_as_it_was(tmp_path: Path) -> None:
    rungs = (
        Rung(name="constant", kind="constant", description="always 'red'", scores=scored(*["red"] * 12)),
        Rung(name="few-shot-4", kind="prompt", description="4 shots", scores=scored(), shots=SPLIT.train[3:7]),
    )
    assert fold_records.read_ladder(tmp_path, SPLIT, METRIC) is None
    fold_records.write_ladder(tmp_path, SPLIT, rungs)
    assert fold_records.read_ladder(tmp_path, SPLIT, METRIC) == rungs


def test_a_record_about_other_rows_is_refused_with_what_to_delete(tmp_path: Path) -> None:
    fold_records.write_fold(tmp_path, SPLIT, fold())
    fold_records.write_ladder(tmp_path, SPLIT, ())
    other = replace(SPLIT, holdout=SPLIT.holdout[1:])
    for read in (fold_records.read_fold, fold_records.read_ladder):
        with pytest.raises(InvalidValue, match=f"other data.*delete the folder {tmp_path}"):
            read(tmp_path, other, METRIC)
    record = json.loads((tmp_path / "fold.json").read_text())
    (tmp_path / "fold.json").write_text(json.dumps({**record, "version": 0}))
    with pytest.raises(InvalidValue, match="another version"):
        fold_records.read_fold(tmp_path, SPLIT, METRIC)


def test_a_record_that_was_being_written_is_no_record(tmp_path: Path) -> None:
    fold_records.write_fold(tmp_path, SPLIT, fold())
    whole = (tmp_path / "fold.json").read_bytes()
    (tmp_path / "fold.json").unlink()
    (tmp_path / "fold.writing").write_bytes(whole[:100])
    assert fold_records.read_fold(tmp_path, SPLIT, METRIC) is None
    fold_records.write_fold(tmp_path, SPLIT, fold())
    assert fold_records.read_fold(tmp_path, SPLIT, METRIC) == fold()


def test_the_models_of_a_finished_fold_are_deleted_and_its_record_stays(tmp_path: Path) -> None:
    fold_records.write_fold(tmp_path, SPLIT, fold())
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
            replace(
                rung(f"few-shot-{shots}", right(4, score), description=f"{shots} shots"), shots=SPLIT.train[:shots]
            ),
        ]
        for answer, shots, score in (("red", 4, 4), ("blue", 8, 2))
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
    assert pooled[2].shots == SPLIT.train[:4], "served is the prompt that was best in its fold"
    assert "those of lines 1, 2, 3, 4, the best in their fold" in pooled[2].description


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

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None:
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
    in_fold.checkpoint(3, Path("x"), {}, again=True)
    assert watch.told[3:] == [], "taken up from there it has not"


def whole(n: int, valid: int = 0) -> Split:
    files = [
        Dataset(name=name, examples=labelled(name, count)) if count else None
        for name, count in (("train", n), ("valid", valid))
    ]
    assert files[0] is not None
    return split_into_folds(files[0], files[1], seed=0)[0].whole


def model(step: int, *losses: float, directory: Path = Path("kept")) -> KeptModel:
    return KeptModel(step=step, directory=directory / f"step-{step:06d}", losses=losses)


def trained(
    number: int = 1, *, losses: Sequence[Sequence[float]] = (), lines: Sequence[int] = (), rate: float = 1e-3
) -> TrainedFold:
    """A fold that kept a model for each list of `losses`, one loss for each of `lines`; by default just one model."""
    models = tuple(model(5 * (at + 1), *some) for at, some in enumerate(losses or [()]))
    return TrainedFold(
        number=number,
        train=40,
        valid=len(lines),
        steps_per_epoch=5,
        last_step=20,
        learning_rate=rate,
        stopped="all 20 steps taken",
        seconds=2.5,
        models=models,
        valid_losses=(0.5,) * len(models),
        valid_lines=tuple(lines),
    )


def test_what_a_training_found_is_read_back_as_it_was(tmp_path: Path) -> None:
    assert fold_records.read_trained(tmp_path, SPLIT) is None
    one = trained(losses=[[0.5, 0.25]] * 4, lines=[3, 4])
    one = replace(one, models=tuple(model(each.step, *each.losses, directory=tmp_path / "kept") for each in one.models))
    fold_records.write_trained(tmp_path, SPLIT, one)
    assert fold_records.read_trained(tmp_path, SPLIT) == one
    assert one.folders(tmp_path) == {"kept"}


def test_the_validation_rows_of_all_folds_together_choose_how_long_to_train() -> None:
    # Each fold by itself would choose another of its models; their mean is lowest for the third.
    curves = ([0.2, 0.9, 0.6, 0.9], [0.9, 0.4, 0.5, 0.9], [0.9, 0.9, 0.5, 0.4])
    folds = [
        trained(number, losses=[[loss] for loss in curve], lines=[number])
        for number, curve in enumerate(curves, start=1)
    ]
    length = choose_length(folds)
    assert (length.chosen, length.share, length.rows) == (2, 0.75, 3)
    assert length.losses == pytest.approx((2.0 / 3, 2.2 / 3, 1.6 / 3, 2.2 / 3))
    assert length.sentence.startswith("75% of the planned steps: there the calibrated loss of the 3 validation rows")


def test_rows_that_a_fold_answers_do_not_choose_its_model() -> None:
    folds = [trained(1, losses=[[0.5, 0.5], [0.4, 0.4], [0.6, 0.6], [0.6, 0.6]], lines=[1, 2])]
    folds.append(trained(2, losses=[[0.9], [0.9], [0.9], [0.1]], lines=[3]))
    assert choose_length(folds).chosen == 3
    assert choose_length(folds, but={3}).chosen == 1


def test_a_loss_that_is_no_number_chooses_nothing() -> None:
    broken = [[0.9], [0.8], [math.nan], [math.inf]]
    assert choose_length([trained(losses=broken, lines=[1])]).chosen == 1
    with pytest.raises(InvalidTrainingFile, match="no validation loss is a number"):
        choose_length([trained(losses=[[math.nan]] * 4, lines=[1])])


def test_a_fold_trains_to_the_end_and_keeps_models_on_the_way() -> None:
    asked = Hyperparameters(n_epochs=4)
    plan = fold_plan(make_plan(asked, SPLIT, FACTS, seed=0), whole(80))
    assert (plan.total_steps, plan.end_step, plan.kept_steps) == (20, 20, (5, 10, 15, 20))
    assert not plan.early_stopping
    assert "those of one are too few" in plan.reasons["early_stopping"]
    off = fold_plan(make_plan(replace(asked, early_stopping=False), SPLIT, FACTS, seed=0), whole(80))
    assert (off.kept_steps, off.reasons["early_stopping"]) == ((20,), "set in the request")


def test_the_model_to_serve_ends_after_the_share_of_the_schedule_that_the_folds_chose() -> None:
    asked = Hyperparameters()
    folds = [trained(losses=[[0.5], [0.1], [0.6], [0.6]], lines=[1])] * 5
    planned = fold_plan(make_plan(asked, SPLIT, FACTS, seed=4), whole(80))
    plan = final_plan(asked, whole(80), FACTS, planned, folds, choose_length(folds), seed=4)
    assert planned.n_epochs == 12
    assert (plan.n_epochs, plan.total_steps, plan.end_step) == (12, 120, 60), "80 rows, batch 8: 10 steps an epoch"
    assert (plan.early_stopping, plan.kept_steps, plan.seed) == (False, (), 4)
    assert plan.reasons["end_share"].startswith("50% of the planned steps")
    assert "nothing is left to choose by" in plan.reasons["early_stopping"]


def test_without_early_stopping_the_model_to_serve_takes_all_steps() -> None:
    asked = Hyperparameters(n_epochs=3, early_stopping=False)
    folds = [trained(losses=[[0.5]], lines=[1])] * 5
    planned = fold_plan(make_plan(asked, SPLIT, FACTS, seed=0), whole(80))
    plan = final_plan(asked, whole(80), FACTS, planned, folds, choose_length(folds), seed=0)
    assert (plan.end_step, plan.reasons["end_share"]) == (30, "all planned steps, as early stopping is off")


def test_the_model_to_serve_trains_at_the_rate_that_the_folds_ended_with() -> None:
    asked = Hyperparameters(learning_rate=3e-3, lr_search="light")
    planned = make_plan(asked, SPLIT, FACTS, seed=0)

    def served(*rates: float) -> TrainPlan:
        folds = [trained(losses=[[0.5]] * 4, lines=[1], rate=rate) for rate in rates]
        return final_plan(asked, whole(80), FACTS, planned, folds, choose_length(folds), seed=0)

    plan = served(1e-3, 1e-2, 1e-3, 3e-3, 1e-3)
    assert (plan.learning_rate, plan.lr_search) == (1e-3, "off")
    assert "0.003 was planned" in plan.reasons["learning_rate"]
    assert served(3e-3).reasons["learning_rate"] == "set in the request"


def test_with_a_validation_file_the_model_to_serve_is_stopped_by_it_as_the_folds_were() -> None:
    asked = Hyperparameters(n_epochs=9)
    split = whole(80, valid=20)
    planned = make_plan(asked, SPLIT, FACTS, seed=0)
    assert fold_plan(planned, split) == planned
    folds = [trained()] * 5
    plan = final_plan(asked, split, FACTS, planned, folds, choose_length(folds), seed=0)
    assert plan == make_plan(asked, split, FACTS, seed=0)
    assert (plan.n_epochs, plan.early_stopping) == (9, True)


def point(step: int, valid_loss: float) -> CurvePoint:
    return CurvePoint(
        step=step,
        train_loss=0.5,
        train_accuracy=0.5,
        valid_loss=valid_loss,
        valid_calibrated_loss=valid_loss / 2,
        valid_accuracy=0.5,
    )


def test_the_best_step_of_a_fold_is_told_in_epochs_of_its_own_rows() -> None:
    best = Candidate(kind="best_loss", step=5, valid_loss=0.75, scores=())
    plan = fold_plan(make_plan(Hyperparameters(batch_size=8, n_epochs=4), SPLIT, FACTS, seed=0), whole(80))
    adapter = Adapter(
        plan=plan,
        directory=Path("adapter"),
        checkpoint=Path("step-000005"),
        best_step=5,
        last_step=20,
        curve=tuple(point(step, 0.5 + step / 100) for step in (5, 10, 15, 20)),
        trained_tokens=1,
        trained_parameters=1,
        examples_per_second=1.0,
        seconds=3.0,
        peak_memory_bytes=1,
        precision="float32",
        kernels=True,
        learning_rate=5e-4,
        stopped="stopped",
        selection=Selection(chosen=best, reason="the lowest", candidates=(best,)),
        proofs=(),
        contenders=(),
        kept=tuple(model(step, 0.25) for step in (5, 10, 15, 20)),
    )
    found = trained_fold(2, SPLIT, plan, whole(80), adapter)
    assert found.valid_lines == tuple(row.line for row in SPLIT.valid)
    assert [one.step for one in found.models] == [5, 10, 15, 20]
    made = crossfit.make_fold(found, 2, scored())
    assert made.best_epoch == 3.0, "five steps an epoch of 40 rows"
    assert (made.number, made.train, made.valid, made.valid_loss) == (2, 40, 10, 0.65)
    assert made.learning_rate == 5e-4
    assert made.as_dict()["holdout"] == 12
    by_file = trained_fold(2, SPLIT, replace(plan, kept_shares=()), whole(80, valid=10), replace(adapter, kept=()))
    assert [(one.step, one.directory) for one in by_file.models] == [(5, Path("adapter"))]
    assert by_file.valid_lines == ()


def test_the_report_says_what_was_measured() -> None:
    found = CrossFit(folds=tuple(fold(number) for number in range(1, 6)), groups=57)
    assert "out-of-fold answers of 5 models" in found.sentence
    assert "the served model was trained on all rows and was itself not measured" in found.sentence
    assert found.as_dict()["groups"] == 57
    assert [one["fold"] for one in found.as_dict()["folds"]] == [1, 2, 3, 4, 5]
