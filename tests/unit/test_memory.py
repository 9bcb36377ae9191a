"""The memory of a training is counted before it starts, and made to fit or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heldout.errors import InvalidValue
from heldout.pipeline import encoder_memory, memory
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.memory import GIB, Shapes, Sizes, fit, predict
from heldout.pipeline.plan import TrainPlan, make_plan
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Example, Split

ROWS = tuple(Example(messages=(), weights=(), line=line) for line in range(1, 241))
PLAN = make_plan(
    Hyperparameters(),
    Split(train=ROWS, valid=ROWS[:120], holdout=ROWS, seed=0, groups=240),
    ModelFacts(hidden_size=576, layers=30, context=8192, parameters=134_515_008),
    seed=0,
)

#: The bundled model, in float32.
SHAPES = Shapes(
    parameters=134_515_008,
    layers=30,
    hidden=576,
    intermediate=1536,
    vocabulary=49152,
    heads=9,
    kv_heads=3,
    head_width=64,
    number=4,
    held=4,
)
SIZES = Sizes(packed=382, longest=179, predictions=93, trained=4_884_480, ranks=112)
BIG = replace(SIZES, packed=1800, longest=600, predictions=800)


def peak(plan: TrainPlan = PLAN, sizes: Sizes = SIZES) -> int:
    return predict(SHAPES, sizes, plan).peak


def test_more_tokens_more_layers_and_wider_numbers_need_more() -> None:
    assert peak(sizes=BIG) > peak()
    assert peak(replace(PLAN, freeze_layers=15), BIG) < peak(sizes=BIG)
    assert predict(replace(SHAPES, number=2, held=2), SIZES, PLAN).weights < predict(SHAPES, SIZES, PLAN).weights


def test_weights_that_stay_in_bfloat16_need_half_and_logits_of_fewer_rows_exist() -> None:
    held, plain = (predict(one, BIG, PLAN) for one in (replace(SHAPES, held=2, frozen=True), SHAPES))
    assert plain.weights - held.weights == 2 * SHAPES.parameters
    assert plain.training - held.training == (2 * 256 - 96) * 4 * SHAPES.vocabulary
    assert held.adapter == plain.adapter


def test_where_layers_are_one_call_only_answers_compile_products_in_bfloat16() -> None:
    low = replace(SHAPES, number=2, held=2)
    plain, held = predict(low, SIZES, PLAN), predict(replace(low, frozen=True), SIZES, PLAN)
    whole = predict(replace(low, frozen=True, kernel_threads=2), SIZES, PLAN)
    assert plain.runtime > held.runtime > whole.runtime
    assert whole.evaluation > held.evaluation
    assert whole.peak - whole.of_training >= memory.JOB


def test_a_gpu_holds_no_interpreter_and_keeps_no_scores_but_answers_more_at_once() -> None:
    """Measured on an H200: 0.72 GiB of training on banking12 with the 135M model in bfloat16 (docs/experiments.md)."""
    gpu = predict(replace(SHAPES, number=2, held=2, gpu=True), SIZES, replace(PLAN, micro_tokens=4096))
    here = predict(replace(SHAPES, number=2, held=2), SIZES, PLAN)
    assert gpu.runtime < here.runtime
    assert gpu.training < here.training
    assert gpu.evaluation > here.evaluation
    training = gpu.runtime + 1.05 * (gpu.weights + gpu.adapter + gpu.recorded + gpu.training)
    assert 0.72 * GIB < training < 1.3 * 0.72 * GIB


def test_a_plan_that_fits_is_left_alone_but_says_what_it_needs() -> None:
    fitted = fit(PLAN, SHAPES, SIZES, 8 * GIB)
    assert (fitted.micro_tokens, fitted.checkpointing) == (PLAN.micro_tokens, False)
    assert fitted.predicted_memory_bytes == peak()
    assert "weights 0.52 GiB" in fitted.reasons["predicted_memory_bytes"]


def test_a_tighter_limit_cuts_micro_batches_first_and_checkpoints_layers_next() -> None:
    whole = peak(sizes=BIG)
    cut = fit(PLAN, SHAPES, BIG, int(0.8 * whole))
    assert cut.micro_tokens < 1800
    assert not cut.checkpointing
    assert "cut into several" in cut.reasons["micro_tokens"]
    tight = peak(replace(PLAN, micro_tokens=1, checkpointing=True), BIG)
    twice = fit(PLAN, SHAPES, BIG, int(1.1 * tight))
    assert twice.checkpointing
    assert "computed twice" in twice.reasons["checkpointing"]
    assert twice.predicted_memory_bytes <= 1.1 * tight


def test_what_cannot_fit_is_refused_with_the_numbers_and_the_setting() -> None:
    with pytest.raises(InvalidValue, match=r"needs 1\.\d\d GiB .* 0\.50 GiB may be used \(HELDOUT_MEMORY_LIMIT\)"):
        fit(PLAN, SHAPES, SIZES, GIB // 2)


def test_a_micro_batch_is_never_smaller_than_the_longest_example() -> None:
    assert peak(replace(PLAN, micro_tokens=64), BIG) == peak(replace(PLAN, micro_tokens=600), BIG)


#: The bundled encoder with its upper half trained.
ENCODER = encoder_memory.EncoderShapes(
    parameters=22_713_216, trained=5_312_256, layers=3, hidden=384, intermediate=1536, heads=12
)
LARGE = encoder_memory.EncoderShapes(
    parameters=355_000_000, trained=302_000_000, layers=24, hidden=1024, intermediate=4096, heads=16
)


def test_a_classifier_needs_room_for_what_is_trained_and_for_its_longest_text() -> None:
    def need(shapes: encoder_memory.EncoderShapes, longest: int = 40) -> int:
        return encoder_memory.predict(shapes, PLAN, longest=longest, valid_tokens=512)

    assert need(ENCODER) < need(replace(ENCODER, trained=10 * ENCODER.trained)) < need(LARGE)
    assert need(ENCODER, longest=8000) > need(ENCODER)


def test_a_classifier_that_fits_says_what_it_needs_and_one_that_cannot_is_refused() -> None:
    fitted = encoder_memory.fit(PLAN, ENCODER, GIB, longest=40, valid_tokens=512)
    assert 0.5 * GIB < fitted.predicted_memory_bytes < GIB
    assert "what is trained 0.08" in fitted.reasons["predicted_memory_bytes"]
    with pytest.raises(InvalidValue, match=r"needs \d+\.\d\d GiB, and 1.00 GiB may be used .* or raise freeze_layers"):
        encoder_memory.fit(PLAN, LARGE, GIB, longest=40, valid_tokens=512)
