"""How much memory a training will need, before it starts; and how to make it fit, or why it cannot.

Counted from shapes: what the layers keep for the backward pass (train/block.py lists it), the weights, the
adapter with its optimizer, the largest block of logits. How close it comes is in docs/experiments.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from heldout.engine.portions import GPU, POSITIONS, PROCESSOR
from heldout.errors import InvalidValue

if TYPE_CHECKING:
    from heldout.pipeline.plan import TrainPlan

GIB = 1 << 30
#: The interpreter with torch and transformers, measured.
RUNTIME = 450 << 20
#: What a job holds besides when it comes to training: what its checks and rungs import and leave behind, measured.
JOB = 256 << 20
#: What oneDNN compiles for bfloat16 products, measured (train/rounding.py): for adapters that answer, where kernels
#: compute all else, and for all of a training.
COMPILED = (100 << 20, 150 << 20)
#: Adapters that the engine keeps beside the trained one: the candidates (pipeline/candidate_answers.py).
CANDIDATES = 4
#: Logits of so many predictions exist at once, with kernels and without (train/head.py), so many times over in fp32;
#: kernels turn them into their gradient where they are.
HEAD_ROWS, HEAD_COPIES = (96, 256), (1, 2)
#: What freed and allocated blocks leave unused between them.
SLACK = 1.05
#: A layer's attention weights are kept up to this many (train/attention.py), else computed again.
KEPT_SCORES = 1 << 22
#: On a GPU: cuBLAS's workspaces; the interpreter lives elsewhere.
GPU_RUNTIME = 100 << 20
#: And packs are filled up to one of a few sizes (train/graphs.py), by an eighth on average.
FILLED = 1.125
#: Packed tokens of a validation (fewer with small micro-batches): nothing is kept for a backward pass, so more fit.
VALID_TOKENS = 4096
#: A micro-batch is not cut below this many packed tokens: each costs a pass over all weights.
SMALLEST = 64


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A base model's sizes."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_width: int
    number: int  # bytes of an activation: 4 or 2
    held: int  # of a weight in memory
    gpu: bool = False  # the memory is a GPU's
    frozen: bool = False  # kernels multiply with base weights (engine/frozen.py)
    kernel_threads: int = 0  # that attend with kernels (heldout/kernels); none: attention's weights are in memory


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a plan makes of the examples."""

    packed: int  # tokens of the largest step, packed
    longest: int  # tokens of the longest example
    predictions: int  # supervised tokens of the largest step
    trained: int  # parameters that are trained
    ranks: int  # ranks of all adapters of a layer together


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes at the highest point of a job, by what they are for."""

    weights: int
    adapter: int  # with gradients and optimizer
    training: int  # activations of a step
    evaluation: int  # of a validation, or of answering prompts
    recorded: int = 0  # what recorded steps hold (train/graphs.py) beside others that run as they are
    runtime: int = RUNTIME
    job: int = JOB

    @property
    def peak(self) -> int:
        """The most at any time. What a step has freed is used again by a validation."""
        training = self.adapter + self.recorded + self.training
        return round(self.runtime + self.job + SLACK * (self.weights + max(training, self.evaluation)))

    @property
    def of_training(self) -> int:
        """The most in a process that takes steps and does nothing else."""
        return round(self.runtime + SLACK * (self.weights + self.adapter + self.recorded + self.training))


def predict(shapes: Shapes, sizes: Sizes, plan: TrainPlan) -> Need:
    """The memory of a chat model's training with this plan."""
    number, packed = shapes.number, max(min(sizes.packed, plan.micro_tokens), sizes.longest)
    if shapes.gpu:
        packed = round(packed * FILLED)
    trained_layers = shapes.layers - plan.freeze_layers
    step = _step(shapes, sizes, packed, trained_layers, checkpointing=plan.checkpointing)
    predictions = min(sizes.predictions, packed)
    at_once = HEAD_ROWS[not shapes.frozen]
    logits = min(at_once, predictions) * shapes.vocabulary * 4 * HEAD_COPIES[not shapes.frozen]
    portions = GPU if shapes.gpu else PROCESSOR
    cached = portions.cached * shapes.layers * 2 * shapes.kv_heads * shapes.head_width * number
    answering = cached + _passing(shapes, sizes, portions.read) + POSITIONS * shapes.vocabulary * 4 * 2
    answering += (1 + CANDIDATES) * sizes.trained * 4
    whole = shapes.frozen and shapes.kernel_threads > 0  # layers are computed in one call (kernels/block.py)
    compiled = 0 if shapes.gpu or number == 4 else COMPILED[not shapes.frozen]
    validated = max(valid_tokens(plan), sizes.longest)
    validating = _passing(shapes, sizes, validated) + at_once * shapes.vocabulary * 8
    return Need(
        # The places for all A, and for s B beside every W, are part of the weights.
        weights=shapes.parameters * shapes.held + sizes.trained * number,
        adapter=sizes.trained * 4 * 4,
        training=step + logits + _dropout_pool(plan, shapes, sizes, packed),
        evaluation=max(validating + (step if shapes.gpu else 0), answering + (compiled if whole else 0)),
        recorded=step if shapes.gpu else 0,
        runtime=GPU_RUNTIME if shapes.gpu else RUNTIME + (0 if whole else compiled),
        job=0 if shapes.gpu else JOB,
    )


def valid_tokens(plan: TrainPlan) -> int:
    """Packed tokens that are computed at once where no backward pass follows."""
    return max(plan.micro_tokens, min(VALID_TOKENS, 2 * plan.micro_tokens))


def fit(plan: TrainPlan, shapes: Shapes, sizes: Sizes, limit: int) -> TrainPlan:
    """The plan with the largest micro-batch that fits into `limit` bytes, checkpointed if it must be.

    Raises InvalidValue when nothing fits.
    """
    whole = max(sizes.packed, sizes.longest)
    for checkpointing in (False, True):
        tokens = plan.micro_tokens
        while True:
            tried = replace(plan, micro_tokens=tokens, checkpointing=checkpointing)
            need = predict(shapes, sizes, tried)
            if need.peak <= limit:
                return _with_reasons(tried, plan, need, limit, whole)
            if tokens <= max(SMALLEST, sizes.longest):
                break
            tokens = min(tokens, whole) // 2
    raise InvalidValue(
        f"This job does not fit into memory: it needs {need.peak / GIB:.2f} GiB ({need.weights / GIB:.2f} of them for "
        f"the weights of the base model, {max(need.training + need.adapter, need.evaluation) / GIB:.2f} for training "
        f"and evaluation), and {limit / GIB:.2f} GiB may be used (HELDOUT_MEMORY_LIMIT). The longest example has "
        f"{sizes.longest} tokens. Use a smaller base model, shorter examples, or freeze_layers.",
        param="model",
    )


def _with_reasons(chosen: TrainPlan, before: TrainPlan, need: Need, limit: int, whole: int) -> TrainPlan:
    reasons = dict(chosen.reasons)
    fits = f"{need.peak / GIB:.2f} GiB of {limit / GIB:.1f}"
    if chosen.micro_tokens < min(before.micro_tokens, whole):
        reasons["micro_tokens"] = f"a step of {whole} packed tokens is cut into several to need {fits}"
    if chosen.checkpointing:
        reasons["checkpointing"] = f"layers are computed twice to need {fits}"
    reasons["predicted_memory_bytes"] = (
        f"weights {need.weights / GIB:.2f} GiB, adapter and optimizer {need.adapter / GIB:.2f}, a step "
        f"{need.training / GIB:.2f}, evaluation {need.evaluation / GIB:.2f}, "
        f"the rest {(need.runtime + need.job) / GIB:.2f}"
    )
    return replace(chosen, predicted_memory_bytes=need.peak, reasons=reasons)


def _step(shapes: Shapes, sizes: Sizes, packed: int, layers: int, *, checkpointing: bool) -> int:
    """Activations of one step: what every layer keeps, and what the one at work needs besides."""
    hidden, wide = shapes.hidden, shapes.intermediate
    q, kv = shapes.heads * shapes.head_width, shapes.kv_heads * shapes.head_width
    kept = packed * (
        hidden  # its input
        + 2 * sizes.ranks  # inner values of what takes the two normed inputs
        + hidden  # the residual stream after attention
        + q  # attention's result
        + 2 * wide  # gate and up
    )
    if shapes.gpu:
        attention = packed * (q + 2 * kv) * shapes.number
        # Computed again in the backward pass, with keys repeated; one bias for all layers, and what it is made of.
        attending = 8 * packed * q * shapes.number + packed * packed * (shapes.number + 2)
    elif shapes.kernel_threads:
        # The joint q, k and v, and a logarithm for each row. Each thread works with the keys of a path, blocks of
        # scores, and gradients of all keys of its heads (Work and Parts of attention.cpp).
        of_thread = sizes.longest * (6 * shapes.head_width + 2 * 48)
        of_heads = (shapes.kernel_threads + shapes.kv_heads) * packed * 2 * shapes.head_width
        attention = packed * (q + 2 * kv) * shapes.number + packed * shapes.heads * 4
        attending = 3 * packed * (q + kv) * shapes.number + (shapes.kernel_threads * of_thread + of_heads) * 4
    else:
        # q, k and v in the groups' order, and the weights; in float32 whatever the rest is in (train/attention.py).
        scores = shapes.heads * packed * sizes.longest
        attention = (packed * (q + 2 * kv) + (scores if scores <= KEPT_SCORES else 0)) * 4
        attending = 3 * (packed * q + min(scores, KEPT_SCORES)) * 4
    a_layer = kept * shapes.number + attention
    working = packed * (6 * wide + 6 * hidden) * shapes.number + attending
    held = packed * hidden * layers * shapes.number + a_layer if checkpointing else a_layer * layers
    return held + working


def _passing(shapes: Shapes, sizes: Sizes, tokens: int) -> int:
    """Activations of one layer when nothing is kept."""
    q = shapes.heads * shapes.head_width
    scores = 3 * shapes.heads * tokens * sizes.longest
    if not shapes.gpu:
        scores = 0 if shapes.kernel_threads else min(scores, 3 * KEPT_SCORES * 4)
    return (tokens * (5 * shapes.hidden + 4 * q + 4 * shapes.intermediate) + scores) * shapes.number


def _dropout_pool(plan: TrainPlan, shapes: Shapes, sizes: Sizes, packed: int) -> int:
    if not plan.lora_dropout:
        return 0
    if shapes.gpu:  # the same for all steps, a power of two (train/dropout.py)
        most = 2 * max(plan.micro_tokens, sizes.longest) * shapes.intermediate
        return max(1 << 21, 1 << most.bit_length()) * shapes.number
    return max(1 << 21, 2 * packed * shapes.intermediate) * 8
