"""Is the checkpoint that answers choose better than the one that losses choose? On tasks whose answers are no labels.

    .venv/bin/python benchmarks/candidate_answers.py [--tasks disfluency snips-slots] [--seeds 0 1 2]
        [--set n_epochs=6] [--holdout 200]

Each run trains as a job does. Its candidates answer rows of validation (pipeline/candidate_answers.py), and then all of
them answer the holdout, which decides nothing. "Other" is the highest holdout score of a candidate: too high by luck
where candidates are about as good as each other. Time is what answering for the choice took, as a share of training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, hyperparameters_of, part_of, plan_of, split_of, trainer

from heldout.engine.base import ModelRef
from heldout.engine.local import LocalEngine
from heldout.pipeline.candidate_answers import choose_by_answers
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import answer_room, score_model
from heldout.pipeline.request import Tools
from heldout.pipeline.watch import Silent
from heldout.settings import Settings


def run(task: str, seed: int, holdout: int, asked: dict[str, Any], directory: Path) -> dict[str, Any]:
    """One training, the choice by losses and by answers, and what the holdout says of every candidate."""
    split = part_of(split_of(task, seed), 0, 0, holdout)
    metric = choose_metric([row.target for row in split.train])
    engine = LocalEngine(cache=Settings().cache, aliases={}, allow_paths=True)
    tools = Tools(engine=engine, trainer=trainer(), watch=Silent())
    plan = plan_of(split, seed, **asked)
    plan = tools.trainer.fit(plan, split, base_model=MODEL, directory=directory)
    adapter = tools.trainer.train(plan, split, base_model=MODEL, directory=directory, watch=Silent())
    chosen = choose_by_answers(adapter, split, metric, MODEL, tools)
    room = answer_room(engine, MODEL, split)
    scores: dict[Path, float] = {}  # one checkpoint may be several candidates
    for one in adapter.contenders:
        if one.directory not in scores:
            model = ModelRef(base_model=MODEL, adapter=str(one.directory))
            found = score_model(engine, model, split.holdout, metric, max_tokens=room, learned=split.train)
            scores[one.directory] = found.mean
    held = {one.kind: scores[one.directory] for one in adapter.contenders}
    return {
        "task": task,
        "seed": seed,
        "metric": metric.name,
        "step": chosen.last_step,
        "by_losses": adapter.selection.chosen.kind,
        "by_answers": chosen.selection.chosen.kind,
        "candidates": [one.as_dict() | {"holdout": held.get(one.kind)} for one in chosen.selection.candidates],
        "held": held,
        "rows": len(chosen.selection.chosen.scores),
        "asked": len(scores),
        "time": chosen.seconds / adapter.seconds - 1,
        "reason": chosen.selection.reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["disfluency", "snips-slots"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="hyperparameters, name=value")
    parser.add_argument("--holdout", type=int, default=0, help="rows of it; 0: all")
    parser.add_argument("--out", type=Path, help="append each run as a line of JSON")
    asked = parser.parse_args()
    chosen = hyperparameters_of(asked.set)
    print("| task | seed | metric | asked | by losses, holdout | by answers, holdout | other | time |")
    print("|---|--:|---|--:|--:|--:|--:|--:|")
    for task in asked.tasks:
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as directory:
                found = run(task, seed, asked.holdout, chosen, Path(directory))
            held = found["held"]
            print(
                f"| {task} | {seed} | {found['metric']} | {found['asked']} | "
                f"{held[found['by_losses']]:.1%} ({found['by_losses']}) | "
                f"{held[found['by_answers']]:.1%} ({found['by_answers']}) | {max(held.values()):.1%} | "
                f"{found['time']:.0%} |",
                flush=True,
            )
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
