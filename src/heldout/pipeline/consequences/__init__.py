"""What training may have made worse, each measured on its own: docs/consequences.md.

A consequence is a function from what is known of the tuned model to a light with its sentence and numbers. Adding one
is adding a file here and its function to CONSEQUENCES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from heldout.pipeline.consequences import (
    bias,
    calibration,
    forgetting,
    format,
    fragility,
    generalisation,
    hallucination,
    memorisation,
)
from heldout.pipeline.consequences.base import Consequence, Measure, Subject, not_measured

#: In the order in which they are measured. Those that ask no model come first; of the others, those that tell most for
#: their time: the last ones are not run when the time for probes is used up.
CONSEQUENCES: tuple[Measure, ...] = (
    format.measure,
    forgetting.measure,
    fragility.measure,
    generalisation.measure,
    memorisation.measure,
    hallucination.measure,
    bias.measure,
    calibration.measure,
)

#: By cross-fitting, whom a consequence is about, where it is not the served model.
FOLDS = "measured on the models of the folds"
UNSEEN = f"{FOLDS}, each with rows that it never saw"
OF_FOLDS = MappingProxyType(
    {
        format.NAME: UNSEEN,
        fragility.NAME: UNSEEN,
        generalisation.NAME: FOLDS,
        memorisation.NAME: FOLDS,
        bias.NAME: UNSEEN,
        calibration.NAME: UNSEEN,
    }
)
#: A fail of these tells, and does not change the outcome.
INFORMING = frozenset({forgetting.NAME})


def without_models(why: str) -> dict[Measure, Consequence]:
    """Those that ask the tuned models of folds, not measured."""
    asking = (fragility, generalisation, memorisation, hallucination, bias, calibration)
    return {one.measure: not_measured(one.NAME, why) for one in asking}


def measure_all(
    subject: Subject, known: Mapping[Measure, Consequence] = MappingProxyType({})
) -> tuple[Consequence, ...]:
    """Every consequence, told as it is measured; those in `known` are not measured again."""
    subject.watch.message(
        f"Measuring the consequences of training, with at most {subject.budget.seconds:.0f} s of probes"
    )
    found = []
    for measure in CONSEQUENCES:
        one = known.get(measure) or measure(subject)
        if subject.folds and one.status != "not_measured" and one.name in OF_FOLDS:
            one = replace(one, sentence=f"{one.sentence}; {OF_FOLDS[one.name]}")
        found.append(one)
        subject.watch.message(
            f"Consequences, {one.name}: {'' if one.status == 'not_measured' else f'{one.status}, '}{one.sentence}",
            level="warn" if one.status in ("warn", "fail") else "info",
            data=one.as_dict(),
        )
    return tuple(found)
