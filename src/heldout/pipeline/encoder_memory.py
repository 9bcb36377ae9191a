"""How much memory the training of a classifier on an encoder will need: what memory.py is for chat models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from heldout.errors import InvalidValue
from heldout.pipeline.memory import GIB, RUNTIME, SLACK

if TYPE_CHECKING:
    from heldout.pipeline.plan import TrainPlan

#: All of it is float32.
NUMBER = 4
#: The encoder fits its head with scikit-learn, which chat models do not load; measured.
HEAD_FITTING = 60 << 20
#: Of a trained weight: AdamW's two moments, its average, and in a step its gradient, in a validation a copy of it
#: while the average is in its place.
COPIES = 4
#: Numbers a trained layer keeps for each token, in widths of the hidden and of the inner layer: its input, q, k, v,
#: attention's result, both sums and their normed forms with dropout's masks; the inner values before and after.
KEPT_HIDDEN, KEPT_INNER = 11, 2
#: While one layer works nothing of the others is added to it but this, in the same widths.
WORKING_HIDDEN, WORKING_INNER = 6, 2


@dataclass(frozen=True, kw_only=True)
class EncoderShapes:
    """An encoder's sizes."""

    parameters: int
    trained: int  # parameters that are trained, the head among them
    layers: int  # that are trained
    hidden: int
    intermediate: int
    heads: int


def predict(shapes: EncoderShapes, plan: TrainPlan, *, longest: int, valid_tokens: int) -> int:
    """Bytes of the process at its highest point.

    Args:
        longest: tokens of the longest text; a pass is never smaller.
        valid_tokens: padded tokens of a pass without gradients.
    """
    training = max(plan.micro_tokens, longest)
    kept = training * (KEPT_HIDDEN * shapes.hidden + KEPT_INNER * shapes.intermediate)
    # Attention's weights of a pass: the same tokens, each against its own text.
    kept += 2 * shapes.heads * training * longest
    passing = max(training, valid_tokens, longest)
    working = passing * (WORKING_HIDDEN * shapes.hidden + WORKING_INNER * shapes.intermediate)
    working += 2 * shapes.heads * passing * longest
    weights = shapes.parameters + COPIES * shapes.trained
    return round(RUNTIME + HEAD_FITTING + SLACK * NUMBER * (weights + kept * shapes.layers + working))


def fit(plan: TrainPlan, shapes: EncoderShapes, limit: int, *, longest: int, valid_tokens: int) -> TrainPlan:
    """The plan with its prediction. Raises InvalidValue when it does not fit into `limit` bytes.

    There is nothing to cut: a pass is small already, and what fills the memory is weights.
    """
    need = predict(shapes, plan, longest=longest, valid_tokens=valid_tokens)
    if need > limit:
        raise InvalidValue(
            f"This job does not fit into memory: it needs {need / GIB:.2f} GiB, and {limit / GIB:.2f} GiB may be used "
            f"(HELDOUT_MEMORY_LIMIT). The encoder has {shapes.parameters:,} parameters, of which {shapes.trained:,} "
            f"are trained, and the longest text has {longest} tokens. Use a smaller encoder or raise freeze_layers.",
            param="model",
        )
    reason = (
        f"weights {NUMBER * shapes.parameters / GIB:.2f} GiB, what is trained "
        f"{NUMBER * COPIES * shapes.trained / GIB:.2f} besides, {need / GIB:.2f} in all"
    )
    return replace(plan, predicted_memory_bytes=need, reasons={**plan.reasons, "predicted_memory_bytes": reason})
