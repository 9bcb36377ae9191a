"""A small file without a holdout: five folds and the model to serve, trained and answered for real."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.pipeline.evaluate.scores import turns_of
from heldout.pipeline.fold_length import SHARES
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.request import Request, Source, Tools
from heldout.pipeline.run import run_job
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Split
from heldout.pipeline.verdict import Verdict
from heldout.pipeline.watch import Watch
from heldout.train.activations import Activations
from heldout.train.checkpoint import ADAPTER
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_row, write_rows
from tests.documents import faults
from tests.torch.conftest import LEARNING, TOOLS, Noting, Recording

ROWS = 40
FOLDERS = [f"fold-{number}" for number in range(1, 6)]


class NotingTrainer(TorchTrainer):
    """The trainer, with a note of what it was given."""

    def __init__(self) -> None:
        super().__init__(**TOOLS)
        self.given: list[tuple[str, Split, TrainPlan, Path | None]] = []  # folder, split, plan, cache

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
        self.given.append((directory.name, split, plan, cache))
        return super().train(plan, split, base_model=base_model, directory=directory, watch=watch, cache=cache)


class NotingEngine(Noting):
    """The engine, with a note of what each adapter was asked."""

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Folder of the adapter, question."""
        return [
            (next((part for part in Path(model.adapter).parts if part in FOLDERS), "served"), str(one[-1]["content"]))
            for model, conversations in self.calls
            if model.adapter
            for one in conversations
        ]


class Killing(Recording):
    """A watch that notes the stages, and kills the job when `stage` begins."""

    def __init__(self, stage: str = "") -> None:
        super().__init__()
        self.stage = stage
        self.stages: set[str] = set()

    def progress(self, stage: str, done: int, total: int) -> None:
        self.stages.add(stage)
        if stage == self.stage:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Done:
    """A finished job with what was seen of it."""

    outcome: Outcome
    trainer: NotingTrainer
    engine: NotingEngine
    watch: Recording


def run(
    model: Path, folder: Path, watch: Recording, valid: Path | None = None, budget: float = 0.0, **asked: Any
) -> Done:
    """A job on the 40 rows of `rows.jsonl` beside `folder`; a killed one goes on."""
    folder.mkdir(exist_ok=True)
    trainer, engine = NotingTrainer(), NotingEngine()
    outcome = run_job(
        Request(
            base_model=str(model),
            training=source(folder.parent / "rows.jsonl"),
            validation=source(valid) if valid else None,
            seed=2,
            hyperparameters=Hyperparameters(n_epochs=2, learning_rate=LEARNING.learning_rate, **asked),
            directory=folder,
            eval_budget=budget,
        ),
        Tools(engine=engine, trainer=trainer, watch=watch),
    )
    return Done(outcome, trainer, engine, watch)


def source(path: Path) -> Source:
    return Source(name=path.name, open=lambda: path.open("rb"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crossfit")
    write_rows(folder / "rows.jsonl", [colour_row(i) for i in range(ROWS)])
    return folder


@pytest.fixture(scope="module")
def done(tiny_model: Path, root: Path) -> Done:
    return run(tiny_model, root / "out", Recording())


def test_every_row_is_answered_once_by_a_model_that_never_saw_it(done: Done) -> None:
    questions = [str(colour_row(i)["messages"][1]["content"]) for i in range(ROWS)]  # type: ignore[index]
    assert sorted(question for _, question in done.engine.asked) == sorted(questions)
    assert [folder for folder, _, _, _ in done.trainer.given] == [*FOLDERS, "out"]
    for folder, split, _, _ in done.trainer.given[:5]:
        seen = {str(row.messages[1]["content"]) for row in (*split.train, *split.valid)}
        answered = {question for asked, question in done.engine.asked if asked == folder}
        assert len(answered) == 8
        assert seen == set(questions) - answered


def test_every_fold_trains_to_the_end_and_is_answered_by_a_model_of_the_chosen_length(done: Done) -> None:
    crossfit = done.outcome.crossfit
    assert crossfit is not None
    for fold, (_, _, plan, _) in zip(crossfit.folds, done.trainer.given, strict=False):
        assert fold.last_step == plan.total_steps
        assert fold.best_step in plan.kept_steps
        assert len(plan.kept_steps) == len(SHARES)


def test_the_rungs_are_judged_on_the_same_rows(done: Done) -> None:
    rungs = {one.name: one for one in done.outcome.rungs}
    assert [name for name in rungs if name != "frozen-encoder"] == [
        "constant",
        "tfidf-logistic",
        "zero-shot",
        "few-shot",
    ]
    assert {len(one.scores.per_example) for one in (*rungs.values(), done.outcome.tuned)} == {ROWS}
    # The word in the text is the label: a right score says that answers and rows are in the same order.
    assert rungs["tfidf-logistic"].scores.mean == 1.0
    assert done.outcome.verdict.numbers["n_holdout"] == ROWS


def test_the_cheaper_rungs_can_be_asked_too(done: Done) -> None:
    served = {one.rung: one for one in done.outcome.served_rungs}
    assert served.keys() >= {"tfidf-logistic", "few-shot"}
    model = ModelRef(base_model=served["few-shot"].base_model, adapter=str(served["few-shot"].directory))
    rung = next(one for one in done.outcome.rungs if one.name == "few-shot")
    asked = [{"role": "user", "content": "item 7 red"}]
    engine = LocalEngine(**TOOLS)
    served_reply, with_shots_sent = (
        engine.chat(ref, [prompt], Sampling(max_tokens=8))[0].text
        for ref, prompt in ((model, asked), (ModelRef(base_model=model.base_model), [*turns_of(rung.shots), *asked]))
    )
    assert served_reply == with_shots_sent


def test_the_served_model_learns_from_all_rows_for_as_long_as_the_folds_needed(done: Done) -> None:
    _, split, plan, _ = done.trainer.given[-1]
    assert (len(split.train), split.valid, split.holdout) == (ROWS, (), ())
    assert plan.total_steps == 10, "two epochs, as in the folds"
    assert plan.end_share in SHARES
    assert plan.reasons["end_share"].startswith(f"{plan.end_share:.0%} of the planned steps")
    adapter = done.outcome.adapter
    assert adapter.directory.name == "adapter"
    assert (adapter.best_step, adapter.last_step) == (plan.end_step, plan.end_step)
    assert done.outcome.plan == plan
    assert any("gives the trainer's log-probabilities on 8 answers" in text for text in done.watch.messages)


def test_steps_and_checkpoints_are_told_of_the_served_model_only(done: Done) -> None:
    steps = [what for kind, what in done.watch.story if kind == "metrics"]
    assert steps == list(range(1, done.outcome.plan.end_step + 1))
    assert [what for kind, what in done.watch.story if kind == "checkpoint"] == [5, 10][: len(steps) // 5]
    begins = next(i for i, (kind, _) in enumerate(done.watch.story) if kind == "metrics")
    last_fold = max(i for i, (_, what) in enumerate(done.watch.story) if str(what).startswith("fold 5 of 5"))
    assert last_fold < begins


def test_the_story_tells_the_cost_in_advance_and_what_was_measured_at_the_end(done: Done) -> None:
    messages = done.watch.messages
    told = next(text for text in messages if not text.startswith("rows.jsonl"))  # after what the checks saw
    assert told.startswith("Cross-fitting: 40 distinct prompts are too few for a holdout of their own")
    assert "6 trainings instead of 1" in told
    assert "Give a holdout file" in told
    shown = next(text for text in messages if text.startswith("The verdict can find, in 80 of 100 cases, with 40 rows"))
    assert messages.index(shown) < messages.index(next(text for text in messages if "rows to train on" in text))
    assert any(text.startswith("fold 2 of 5: the best step was ") for text in messages)
    trained = next(i for i, text in enumerate(messages) if text.startswith("The model to serve is trained on all"))
    assert any(text.startswith("How long to train: ") for text in messages[:trained])
    assert any("out-of-fold answers of 5 models" in text for text in messages[trained:])
    assert messages[-1].startswith("Verdict: ")


def test_folds_share_one_cache_folder_and_leave_only_their_records(done: Done, root: Path) -> None:
    assert {cache for _, _, _, cache in done.trainer.given} == {root / "out" / "activations"}
    for folder in FOLDERS:
        assert sorted(path.name for path in (root / "out" / folder).iterdir()) == [
            "fold.json",
            "ladder.json",
            "precision.json",
            "trained.json",
        ]
    report = json.loads((root / "out" / "report.json").read_text())
    assert faults(report) == []
    assert [one["fold"] for one in report["crossfit"]["folds"]] == [1, 2, 3, 4, 5]
    assert report["data"] | {"sources": {}} == {
        "train": ROWS,
        "valid": 0,
        "holdout": 0,
        "groups": ROWS,
        "seed": 2,
        "sources": {},
    }


def test_what_leaves_the_frozen_layers_is_computed_once_for_all_folds(
    tiny_model: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, computed = Activations.prepare, list[int]()

    def noting(self: Activations, *given: Any) -> int:
        computed.append(prepare(self, *given))
        return computed[-1]

    monkeypatch.setattr(Activations, "prepare", noting)
    found = run(tiny_model, root / "frozen", Recording(), freeze_layers=1)
    assert {plan.freeze_layers for _, _, plan, _ in found.trainer.given} == {1}
    assert sum(computed) == ROWS < sum(len(split.train) for _, split, _, _ in found.trainer.given)


@pytest.fixture(scope="module")
def probed(tiny_model: Path, root: Path) -> Done:
    """The same job with time for probes."""
    return run(tiny_model, root / "probed", Recording(), budget=600.0)


def test_consequences_are_measured_on_the_models_of_the_folds(probed: Done, done: Done) -> None:
    found = {one.name: one for one in probed.outcome.consequences}
    for name in ("fragility", "generalisation", "memorisation", "calibration"):
        assert found[name].status != "not_measured", found[name].sentence
        unseen = "" if name in ("generalisation", "memorisation") else ", each with rows that it never saw"
        assert found[name].sentence.endswith(f"measured on the models of the folds{unseen}")
    assert found["fragility"].numbers["n"] == found["calibration"].numbers["n"] == ROWS
    assert probed.outcome.tuned == done.outcome.tuned, "answers are the same, measured or not"
    assert "served" not in {folder for folder, question in probed.engine.asked if "item" in question}
    # What a question is about is told by the item's number, which no perturbation changes.
    held = {
        folder: {row.line for row in split.holdout} for folder, split, _, _ in probed.trainer.given if folder in FOLDERS
    }
    lines = {
        folder: {int(word) + 1 for asked, text in probed.engine.asked if asked == folder for word in items(text)}
        for folder in FOLDERS
    }
    parts = {folder: {row.line for row in (*split.train, *split.valid)} for folder, split, _, _ in probed.trainer.given}
    asked_again = {
        folder: Counter(int(word) + 1 for asked, text in probed.engine.asked if asked == folder for word in items(text))
        for folder in FOLDERS
    }
    for folder, own in held.items():
        assert own < lines[folder] <= own | parts[folder], "its own rows, and some that it learned or was chosen by"
        assert all(asked_again[folder][line] > 2 for line in own), "for the verdict once, then in other words"


def items(text: str) -> list[str]:
    """The number of the item that a question is about."""
    return re.findall(r"item (\d+)", text.lower())


def test_a_job_killed_while_or_after_it_measures_goes_on_and_leaves_no_model_of_a_fold(
    tiny_model: Path, root: Path, probed: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "killed-late"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, folder, Killing("consequences: reading answers"), budget=600.0)
    assert any((folder / name / "kept").is_dir() for name in FOLDERS), "they are still to be asked"
    # The folds' models are gone, and the job is killed before anybody knows that it ended.
    monkeypatch.setattr(Recording, "message", die_at_the_verdict(Recording.message))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, folder, Recording(), budget=600.0)
    monkeypatch.undo()
    assert not any((folder / name / "kept").is_dir() for name in FOLDERS)
    again = run(tiny_model, folder, Recording(), budget=600.0)
    assert again.engine.asked == []
    assert untimed(again.outcome.verdict) == untimed(probed.outcome.verdict)
    assert again.outcome.consequences == probed.outcome.consequences


def test_only_the_folders_of_its_own_folds_are_cleared(tiny_model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [colour_row(i) for i in range(30)])
    mine = tmp_path / "out" / "fold-9" / "images"
    mine.mkdir(parents=True)
    (tmp_path / "out" / "fold-10.csv").write_text("a,b")
    run(tiny_model, tmp_path / "out", Recording())
    assert mine.is_dir()
    assert (tmp_path / "out" / "fold-10.csv").read_text() == "a,b"


def die_at_the_verdict(message: Any) -> Any:
    def told(self: Recording, text: str, **more: Any) -> None:
        if text.startswith("Verdict: "):
            raise KeyboardInterrupt
        message(self, text, **more)

    return told


def untimed(verdict: Verdict) -> Verdict:
    """Without what the clock said of an answer."""
    clock = re.compile(r"(, and is [\d.,]+ times as fast)? \([^)]* ms an answer, not [^)]*\)")
    reasons = tuple(clock.sub("", reason) for reason in verdict.reasons)
    answers = {name: {**one, "milliseconds": 0.0} for name, one in verdict.numbers["answers"].items()}
    return replace(verdict, reasons=reasons, numbers={**verdict.numbers, "answers": answers})


def test_a_job_killed_again_and_again_repeats_no_finished_fold_and_ends_the_same(
    tiny_model: Path, root: Path, done: Done
) -> None:
    folder = root / "killed"
    for stage, trained, finished in (
        ("fold 4 of 5: zero-shot prompt", 0, 0),
        ("fold 2 of 5: train", 1, 0),
        ("fold 3 of 5: tuned model", 5, 2),
        ("train", 5, 5),
    ):
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, folder, Killing(stage))
        for record, count in (("trained.json", trained), ("fold.json", finished)):
            assert [name for name in FOLDERS if (folder / name / record).exists()] == FOLDERS[:count]
    again = run(tiny_model, folder, watch := Killing())
    assert [name for name, _, _, _ in again.trainer.given] == ["killed"], "the folds are read, not trained"
    assert again.engine.asked == []
    assert "train" in watch.stages
    assert not any("fold" in stage for stage in watch.stages), "nothing is scored again"
    assert untimed(again.outcome.verdict) == untimed(done.outcome.verdict)
    assert again.outcome.rungs == done.outcome.rungs
    assert again.outcome.tuned == done.outcome.tuned
    weights = [(one.outcome.adapter.directory / ADAPTER).read_bytes() for one in (again, done)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def with_valid(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """29 rows, and 13 to stop by of which one is in the training file as well."""
    folder = tmp_path_factory.mktemp("with-valid")
    write_rows(folder / "rows.jsonl", [colour_row(i) for i in range(29)])
    valid = write_rows(folder / "valid.jsonl", [colour_row(i) for i in (3, *range(1000, 1012))])
    return run(tiny_model, folder / "out", Recording(), valid)


def test_a_given_validation_file_stops_every_training(with_valid: Done) -> None:
    sizes = [(len(split.train), len(split.valid)) for _, split, _, _ in with_valid.trainer.given]
    assert sorted(sizes) == [(23, 12)] * 4 + [(24, 12), (29, 12)]
    assert with_valid.outcome.plan.n_epochs == 2
    assert with_valid.outcome.plan.early_stopping
    best = with_valid.outcome.adapter.best_step
    assert all(point.valid_loss for point in with_valid.outcome.adapter.curve if point.step == best)


def test_who_chose_a_checkpoint_is_told_once_for_each_training_that_chose_one(done: Done, with_valid: Done) -> None:
    chosen = [text for text in with_valid.watch.messages if re.search(r"\) is chosen( |:)", text)]
    assert sorted(text.partition(":")[0] for text in chosen if text.startswith("fold")) == [
        f"fold {number} of 5" for number in range(1, 6)
    ]
    assert len(chosen) == 6
    assert not any(" is chosen" in text for text in done.watch.messages), "there all folds choose together"
    assert sum(" is taken: there are no validation examples" in text for text in done.watch.messages) == 1


def test_by_a_metric_of_texts_only_a_validation_file_has_candidates_answer(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [colour_row(i) for i in range(ROWS)])
    without = run(tiny_model, tmp_path / "without", Recording(), metric="chrf")
    assert len(without.engine.asked) == len(rows.read_text().splitlines()), "each row once, for the verdict"
    # Of two answers in three another row's: the lowest loss is not that of the last step, and there is a choice.
    wrong = [{"messages": [*row(i)[:2], row(i if i % 3 == 0 else i + 1)[2]]} for i in range(1000, 1012)]
    valid = write_rows(tmp_path / "valid.jsonl", wrong)
    with_file = run(tiny_model, tmp_path / "with", Recording(), valid, metric="chrf")
    asked = Counter(folder for folder, _ in with_file.engine.asked)
    told = [text for text in with_file.watch.messages if "checkpoints answer 12 of 12 validation rows" in text]
    assert told
    for text in told:
        number = re.match(r"fold (\d) of 5", text)
        checkpoints = re.search(r"(\d) checkpoints answer", text)
        assert checkpoints
        if number:
            assert asked[f"fold-{number[1]}"] == 8 + 12 * int(checkpoints[1])


def row(i: int) -> list[Any]:
    return list(colour_row(i)["messages"])  # type: ignore[call-overload]


def test_below_thirty_prompts_the_verdict_is_inconclusive(with_valid: Done) -> None:
    verdict = with_valid.outcome.verdict
    assert verdict.outcome == "inconclusive"
    assert verdict.reasons[0] == "29 distinct prompts are too few for a verdict; 30 are the minimum, so give 1 more"
