"""A rung that is asked for: an encoder that is fine-tuned on the same rows, judged on the same holdout."""

from __future__ import annotations

from pathlib import Path

from heldout.engine.base import ModelRef
from heldout.engine.catalogue import bundled_encoder
from heldout.engine.labels import Labels
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.evaluate.answers import Metric
from heldout.pipeline.evaluate.scores import score_model
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung
from heldout.pipeline.plan import make_plan
from heldout.pipeline.request import Tools
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Within

#: The name of the rung.
TUNED_ENCODER = "tuned-encoder"


def tuned_encoder_rung(split: Split, metric: Metric, tools: Tools, *, directory: Path) -> list[Rung]:
    """The bundled encoder fine-tuned with its own defaults, whatever was asked of the chat model. Nothing, and a
    sentence why, where an encoder cannot answer.

    Args:
        directory: of this rung alone; what lies there of an interrupted job is taken up.
    """
    encoder, watch = bundled_encoder(), Within(tools.watch, TUNED_ENCODER)
    if encoder is None:
        watch.message("left out: no encoder is installed (heldout[encoder])", level="warn")
        return []
    try:
        Labels.of(example.target for example in split.train)
        plan = make_plan(Hyperparameters(), split, tools.trainer.facts(encoder), seed=split.seed)
        plan = tools.trainer.fit(plan, split, base_model=encoder, directory=directory)
        tools.engine.close()  # training needs the memory
        adapter = tools.trainer.train(plan, split, base_model=encoder, directory=directory, watch=watch)
        watch.message(adapter.selection.reason, data=adapter.selection.as_dict())
    except InvalidTrainingFile as error:
        watch.message(f"left out: {error}", level="warn")
        return []
    model = ModelRef(base_model=encoder, adapter=str(adapter.directory))
    return [
        Rung(
            name=TUNED_ENCODER,
            kind="classical",
            description=f"{encoder} fine-tuned on the same rows, step {adapter.best_step} of {plan.total_steps}",
            scores=score_model(
                tools.engine,
                model,
                split.holdout,
                metric,
                max_tokens=1,  # a classifier's answer is one decision
                progress=lambda done, total: watch.progress("holdout", done, total),
            ),
        )
    ]
