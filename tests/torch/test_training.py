"""Training keeps the best checkpoint, survives interruption bit for bit, and hands over what was trained."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import heldout
from heldout.engine.base import ModelRef
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.engine.weights import load_tokenizer
from heldout.errors import InvalidTrainingFile, InvalidValue
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.request import Tools
from heldout.pipeline.stages import prove_serving
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Silent
from heldout.processes.foreground import Result
from heldout.settings import Settings
from heldout.train.checkpoint import ADAPTER
from heldout.train.trainer import TorchTrainer
from tests.conftest import COLOURS, colour_files, colour_row, write_rows
from tests.torch.conftest import (
    LEARNING,
    NOISY,
    SMALL,
    TOOLS,
    Recording,
    examples,
    parts,
    same_training,
    train,
)

Plan = Callable[..., TrainPlan]


@dataclass(frozen=True)
class Tuned:
    """A finished `heldout.tune` with what its watch was told."""

    result: Result
    watch: Recording


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tune")
    files = colour_files(folder)
    watch = Recording()
    result = heldout.tune(
        files["train"],
        files["valid"],
        files["holdout"],
        model=str(tiny_model),
        seed=3,
        out=folder / "out",
        watch=watch,
        settings=Settings(data_dir=folder, precision="float32"),
        n_epochs=4,
        learning_rate=LEARNING.learning_rate,
    )
    return Tuned(result, watch)


def guesses() -> Split:
    """Answers that nothing in the prompt tells: they can be memorised, not learned."""
    rng = random.Random(0)

    def shuffled(numbers: range) -> Any:
        rows = examples(numbers)
        answers = [f'{{"colour":"{rng.choice(COLOURS)}"}}' for _ in rows]
        return tuple(
            replace(row, messages=(*row.messages[:-1], {"role": "assistant", "content": answer}))
            for row, answer in zip(rows, answers, strict=True)
        )

    train_, valid = shuffled(range(16)), shuffled(range(1000, 1016))
    return Split(train=train_, valid=valid, holdout=valid, seed=0, groups=48)


def test_early_stopping_keeps_the_best_checkpoint(
    tiny_model: Path, tmp_path: Path, plan: Plan, engine: LocalEngine
) -> None:
    split = guesses()
    many = plan(n_epochs=60, total_steps=120, eval_every=2, patience=3, learning_rate=1e-2)
    adapter = train(tiny_model, tmp_path, many, split)
    measured = {point.step: point.valid_loss for point in adapter.curve if point.valid_loss is not None}
    assert adapter.best_step < adapter.last_step < 120
    assert measured[adapter.best_step] == min(measured.values()) < measured[adapter.last_step]
    assert f"keeping step {adapter.best_step}" in adapter.stopped
    served = valid_loss(engine, tiny_model, adapter, split)
    assert served == pytest.approx(measured[adapter.best_step], rel=1e-4)
    assert served != pytest.approx(measured[adapter.last_step], rel=1e-2)


def valid_loss(engine: LocalEngine, model: Path, adapter: Adapter, split: Split) -> float:
    """Mean loss per supervised token of each example, then over examples, by the serving path."""
    ref = ModelRef(base_model=str(model), adapter=str(adapter.directory))
    template = ChatTemplate(load_tokenizer(model))
    log_probs = engine.log_probs(ref, [row.messages for row in split.valid])
    sizes = [sum(template.encode(row.messages, row.weights).supervised) for row in split.valid]
    losses = [-log_prob / size for log_prob, size in zip(log_probs, sizes, strict=True)]
    return sum(losses) / len(losses)


def test_without_early_stopping_all_steps_are_taken_and_the_best_is_still_kept(
    tiny_model: Path, tmp_path: Path, plan: Plan
) -> None:
    all_steps = plan(total_steps=36, eval_every=2, patience=1, learning_rate=1e-2, early_stopping=False)
    adapter = train(tiny_model, tmp_path, all_steps, guesses())
    measured = {point.step: point.valid_loss for point in adapter.curve if point.valid_loss is not None}
    assert adapter.last_step == 36
    assert adapter.best_step == min(measured, key=lambda step: measured[step]) < 36
    assert adapter.stopped.startswith("all 36 steps taken")


def interrupted(model: Path, folder: Path, step: int) -> None:
    """Begin to train, and be killed at `step`."""
    with pytest.raises(KeyboardInterrupt):
        train(model, folder, NOISY, SMALL, Recording(interrupt_at=step))


def resumed(model: Path, folder: Path) -> tuple[Adapter, Recording]:
    """Train in the same folder again, and what was told."""
    watch = Recording()
    return train(model, folder, NOISY, SMALL, watch), watch


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return train(tiny_model, tmp_path_factory.mktemp("uninterrupted"), NOISY, SMALL)


@pytest.mark.parametrize("step", [8, 12], ids="killed at step {}".format)
def test_an_interrupted_training_goes_on_bit_for_bit(
    tiny_model: Path, tmp_path: Path, uninterrupted: Adapter, step: int
) -> None:
    interrupted(tiny_model, tmp_path, step)
    adapter, watch = resumed(tiny_model, tmp_path)
    assert same_training(adapter, uninterrupted)
    # A checkpoint is written after the step's metrics: what was told last is done again.
    last = 3 * ((step - 1) // 3)
    steps = [what for kind, what in watch.story if kind == "metrics"]
    assert steps == list(range(last + 1, 13))
    assert any(f"continues from the checkpoint of step {last}" in text for text in watch.messages) == (last > 0)


def test_dropout_and_seed_make_a_difference(tiny_model: Path, tmp_path: Path, uninterrupted: Adapter) -> None:
    # Otherwise the bits above would agree for nothing.
    for i, changed in enumerate((replace(NOISY, lora_dropout=0.0), replace(NOISY, seed=1))):
        assert not same_training(train(tiny_model, tmp_path / str(i), changed, SMALL), uninterrupted)


@pytest.mark.parametrize("file", [ADAPTER, "state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    tiny_model: Path, tmp_path: Path, uninterrupted: Adapter, file: str
) -> None:
    interrupted(tiny_model, tmp_path, 8)
    newest = tmp_path / "checkpoints" / "step-000006" / file
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    adapter, watch = resumed(tiny_model, tmp_path)
    assert any("continues from the checkpoint of step 3" in text for text in watch.messages)
    assert same_training(adapter, uninterrupted)


def test_a_checkpoint_that_was_being_written_is_no_checkpoint(
    tiny_model: Path, tmp_path: Path, uninterrupted: Adapter
) -> None:
    interrupted(tiny_model, tmp_path, 8)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-000006").rename(checkpoints / ".writing-000006")
    adapter, watch = resumed(tiny_model, tmp_path)
    assert any("continues from the checkpoint of step 3" in text for text in watch.messages)
    assert same_training(adapter, uninterrupted)


def test_a_finished_training_is_handed_over_again_without_a_step(
    tiny_model: Path, tmp_path: Path, uninterrupted: Adapter
) -> None:
    resumed(tiny_model, tmp_path)
    adapter, watch = resumed(tiny_model, tmp_path)
    assert same_training(adapter, uninterrupted)
    assert not any(kind == "metrics" for kind, _ in watch.story)


def test_a_training_that_diverges_names_the_step_and_what_to_change(
    tiny_model: Path, tmp_path: Path, plan: Plan
) -> None:
    absurd = plan(learning_rate=1e20, warmup_steps=0)
    with pytest.raises(InvalidTrainingFile, match=r"not a number at step 2, .* Set learning_rate below") as failed:
        train(tiny_model, tmp_path, absurd, SMALL)
    assert failed.value.param == "hyperparameters.learning_rate"
    assert not (tmp_path / "adapter").exists()


def test_weights_that_are_no_numbers_are_never_kept(tiny_model: Path, tmp_path: Path, plan: Plan) -> None:
    # Just below what diverges: validation sees the damage and keeps an earlier step, or a finite one.
    adapter = train(tiny_model, tmp_path, plan(learning_rate=1e4, warmup_steps=0, total_steps=9), SMALL)
    assert all(tensor.isfinite().all() for tensor in load_file(adapter.directory / ADAPTER).values())


def test_a_training_that_diverges_in_its_only_step_says_so(tiny_model: Path, tmp_path: Path, plan: Plan) -> None:
    once = plan(learning_rate=1e20, warmup_steps=0, n_epochs=1, batch_size=16, total_steps=1, eval_every=1)
    with pytest.raises(InvalidTrainingFile, match="diverged"):
        train(tiny_model, tmp_path, once, parts(16, 4))


def test_tune_returns_the_verdict_and_the_files(tuned: Tuned) -> None:
    result = tuned.result
    assert result.verdict.outcome in ("ship", "dont_ship", "inconclusive")
    # The frozen encoder is a rung where its wheel is installed.
    names = [rung.name for rung in result.rungs if rung.name != "frozen-encoder"]
    assert names[:3] == ["constant", "tfidf-logistic", "zero-shot"]
    assert result.tuned.kind == "tuned"
    assert len(result.tuned.scores.per_example) == 48
    losses = [point.train_loss for point in result.outcome.adapter.curve]
    assert losses[-1] < losses[0] / 5, "it has learned something"
    assert {path.name for path in result.adapter.iterdir()} == {ADAPTER, "adapter_config.json", "README.md"}
    folder = result.report.parent
    assert result.report.name == "report.html"
    assert {"report.html", "report.md", "report.json", "metrics.csv"} <= {path.name for path in folder.iterdir()}


def tells_of_no_kernels(told: tuple[str, Any]) -> bool:
    """What a job says first on a machine without a C++ compiler."""
    return told[0] == "message" and told[1].startswith("Kernels for this processor are not used")


def test_tune_measures_what_training_cost(tuned: Tuned) -> None:
    adapter = tuned.result.outcome.adapter
    assert adapter.examples_per_second > 0
    assert adapter.peak_memory_bytes > 50 * 2**20, "torch alone takes more"
    assert 0 < adapter.seconds < tuned.result.outcome.seconds
    # Every example counts with all its tokens, in every epoch.
    assert adapter.trained_tokens > 30 * 80 * adapter.last_step / 10
    assert adapter.precision == "float32"
    assert adapter.kernels != any(map(tells_of_no_kernels, tuned.watch.story))


def test_the_story_of_training_begins_before_its_numbers(tuned: Tuned) -> None:
    story = tuned.watch.story
    begins = next(i for i, (kind, what) in enumerate(story) if kind == "message" and what.startswith("Training "))
    ends = next(i for i, (kind, what) in enumerate(story) if kind == "message" and "Training ended" in what)
    metrics = [i for i, (kind, _) in enumerate(story) if kind == "metrics"]
    chosen = next(i for i, (kind, what) in enumerate(story) if kind == "message" and " is chosen" in what)
    assert begins < metrics[0] <= metrics[-1] < ends < chosen
    assert re.search(r"Training [\d,]+ of [\d,]+ parameters \(\d+\.\d\d%\): LoRA r=16", story[begins][1])
    assert "Verdict:" in tuned.watch.messages[-1]
    assert [what for kind, what in story if kind == "metrics"] == list(range(1, len(metrics) + 1))
    assert [what for kind, what in story if kind == "checkpoint"] == list(range(10, len(metrics) + 1, 10)), (
        "one an epoch"
    )


def test_tune_does_not_overwrite_a_finished_job(tuned: Tuned, tiny_model: Path) -> None:
    folder = tuned.result.report.parent
    with pytest.raises(InvalidValue, match="already holds a finished job"):
        heldout.tune(folder.parent / "train.jsonl", model=str(tiny_model), out=folder)


def begun_and_taken_up(model: Path, folder: Path, **second: Any) -> list[dict[str, Any]]:
    """Tune, be killed at step 9, and tune again in the same folder; each time's numbers, as planned."""
    files = colour_files(folder)
    plans: list[dict[str, Any]] = []

    class Planned(Recording):
        def planned(self, plan: TrainPlan) -> None:
            plans.append({name: choice["value"] for name, choice in plan.as_dict().items()})

    def tune(watch: Recording, **options: Any) -> None:
        settings = Settings(data_dir=folder, precision="float32")
        options = {"model": str(model), "out": folder / "out", "watch": watch, "settings": settings, **options}
        heldout.tune(files["train"], holdout=files["holdout"], **options)

    with pytest.raises(KeyboardInterrupt):
        tune(Planned(interrupt_at=9), n_epochs=2)
    tune(Planned(), **{"n_epochs": 2, **second})
    return plans


def test_a_job_that_is_taken_up_without_a_seed_keeps_its_split(tiny_model: Path, tmp_path: Path) -> None:
    # Another seed would split anew, and judge on rows that were trained on.
    first, again = begun_and_taken_up(tiny_model, tmp_path)
    assert first == again


def test_a_job_that_is_taken_up_with_other_numbers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"unfinished job with other .*hyperparameters"):
        begun_and_taken_up(tiny_model, tmp_path, lora_r=4)


def test_shots_that_do_not_fit_the_context_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    rows = [colour_row(i) for i in range(80)]
    for row in rows:
        row["messages"][1]["content"] += " size" * 110  # type: ignore[index]
    result = heldout.tune(
        write_rows(tmp_path / "long.jsonl", rows[:60]),
        holdout=write_rows(tmp_path / "holdout.jsonl", rows[60:]),
        keep_leaks=True,  # so long, they are nearly the same
        model=str(tiny_model),
        out=tmp_path / "out",
        settings=Settings(data_dir=tmp_path, precision="float32"),
        seed=0,
        n_epochs=1,
    )
    assert [rung.name for rung in result.rungs if rung.kind == "prompt"] == ["zero-shot"]


def test_plain_peft_loads_the_adapter_and_gives_the_same_answers(
    tuned: Tuned, tiny_model: Path, engine: LocalEngine
) -> None:
    adapter = tuned.result.adapter
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(adapter)).eval()
    template = ChatTemplate(load_tokenizer(tiny_model))
    conversations = [row.messages for row in examples(range(3000, 3004))]
    ref = ModelRef(base_model=str(tiny_model), adapter=str(adapter))
    wanted = []
    for messages in conversations:
        tokens = template.encode(messages, [0, 0, 1])
        with torch.no_grad():
            chances = torch.log_softmax(plain(input_ids=torch.tensor([tokens.ids])).logits[0, :-1], dim=-1)
        wanted.append(sum(float(chances[i - 1, tokens.ids[i]]) for i, s in enumerate(tokens.supervised) if s))
    assert engine.log_probs(ref, conversations) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_an_adapter_that_is_not_the_trained_one_is_not_served(
    trained: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    copy = replace(trained, directory=Path(shutil.copytree(trained.directory, tmp_path / "adapter")))
    watch = Recording()

    def prove() -> None:
        engine = LocalEngine(**TOOLS)
        prove_serving(copy, str(tiny_model), Tools(engine=engine, trainer=TorchTrainer(**TOOLS), watch=watch))

    prove()
    assert re.search(r"gives the trainer's log-probabilities on 8 answers", watch.messages[-1])
    weights = load_file(copy.directory / ADAPTER)
    name = next(name for name in weights if "lora_B" in name and "layers.1" in name)
    save_file({**weights, name: weights[name] * 1.5}, copy.directory / ADAPTER)
    with pytest.raises(RuntimeError, match="the served model differs from the trained one"):
        prove()


def test_an_example_that_cannot_be_trained_on_fails_before_the_first_step(
    tiny_model: Path, tmp_path: Path, plan: Plan
) -> None:
    watch = Recording()
    split = parts()
    long = replace(split.valid[3], messages=(*split.valid[3].messages[:2], {"role": "assistant", "content": "x" * 900}))
    with pytest.raises(InvalidTrainingFile, match=rf"validation data are longer .* line {long.line} \(\d+ tokens\)"):
        train(tiny_model, tmp_path, plan(), replace(split, valid=(*split.valid[:3], long)), watch)
    assert [one for one in watch.story if not tells_of_no_kernels(one)] == []
    assert not (tmp_path / "adapter").exists()


def test_a_silent_watch_is_a_watch(tiny_model: Path, tmp_path: Path, plan: Plan) -> None:
    few = plan(n_epochs=1, total_steps=2, eval_every=1)
    adapter = train(tiny_model, tmp_path, few, parts(16, 4), Silent())
    assert [point.step for point in adapter.curve] == [1, 2]
