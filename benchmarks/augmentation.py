"""What augmented copies are worth over the rows themselves, at equal steps, on clean and on badly typed tests.

    .venv/bin/python benchmarks/augmentation.py [--tasks banking12 clinc10-oos sentiment3] [--seeds 0 1 2]
        [--model all-minilm-l6-v2] [--per-label 8] [--set freeze_layers=turbo] [--rows 0 0] [--out runs.jsonl]
    .venv/bin/python benchmarks/augmentation.py --summary runs.jsonl
    .venv/bin/python benchmarks/augmentation.py --packed

Arms: `none` is the plan as it is. `duplicated` has every row twice and half as many epochs: what another order of
the same rows is worth. `robust` and `paraphrase` are the product's own. All take the same number of steps without early
stopping, and the checkpoint to score is selected on validation as in a job. Train has `--per-label` rows of each
label, drawn by the seed and the same for every arm; validation and test are the task's own.

The test is scored clean and badly typed by this file's own code, not by the product's: `typos` (a letter left out,
doubled, swapped or replaced in every third word of four letters or more), `bare` (small letters, no punctuation) and
`both`. A run that stands in `--out` is not done again. `--packed` trains nothing: how many more tokens a chat model
computes with `robust` copies, whose system prompts are not all the same.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, base_folder, mean, part_of, plan_of, split_of, trainer

from heldout.engine import weights
from heldout.pipeline.augment.copies import Augmented, robust_copies
from heldout.pipeline.augment.paraphrase import paraphrased_copies
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent
from heldout.train import loop
from heldout.train.candidates import choose
from heldout.train.memory import keep_freed_memory
from heldout.train.trainer import that_fit

ENCODER = "all-minilm-l6-v2"
ARMS = ("none", "duplicated", "robust", "paraphrase")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def typos(text: str, rng: random.Random) -> str:
    """A letter is wrong in every third word of four letters or more."""
    words = list(re.finditer(r"[^\W\d_]{4,}", text))
    for word in sorted(rng.sample(words, math.ceil(len(words) / 3)), key=lambda one: -one.start()):
        at = rng.randrange(word.start() + 1, word.end() - 1)
        middle = text[at : at + 2]
        wrong = rng.choice((middle[1], middle[0] + middle, middle[::-1], rng.choice(LETTERS) + middle[1]))
        text = text[:at] + wrong + text[at + 2 :]
    return text


def bare(text: str, rng: random.Random) -> str:
    """Small letters, no punctuation."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split()) or text


TESTS: dict[str, Callable[[str, random.Random], str]] = {
    "clean": lambda text, rng: text,
    "typos": typos,
    "bare": bare,
    "both": lambda text, rng: typos(bare(text, rng), rng),
}


def badly_typed(examples: Sequence[Example], how: str) -> list[Example]:
    """The test with its last user message typed like that; the same for every arm and seed."""
    rng = random.Random(how)
    return [
        replace(
            one,
            messages=(
                *one.messages[:-2],
                {**one.messages[-2], "content": TESTS[how](one.messages[-2]["content"], rng)},
                one.messages[-1],
            ),
        )
        for one in examples
    ]


def few_of_each(split: Split, per_label: int) -> Split:
    """So many rows of each label in train; 0: all."""
    if not per_label:
        return split
    rows = random.Random(f"{split.seed}/few").sample(split.train, len(split.train))
    counts: dict[str, int] = defaultdict(int)
    chosen = []
    for row in rows:
        counts[row.target] += 1
        if counts[row.target] <= per_label:
            chosen.append(row)
    return replace(split, train=tuple(chosen), groups=len(chosen))


def copies_of(arm: str, split: Split, seed: int, paraphrases: Path) -> Augmented:
    """As a job has them. The paraphrases of a task and seed are kept for the next run."""
    if arm == "robust":
        return robust_copies(split, seed=seed)
    if arm != "paraphrase":
        return Augmented()
    from heldout.engine.local import LocalEngine
    from heldout.settings import Settings

    engine = LocalEngine(cache=Settings().cache, aliases={}, allow_paths=True)
    found = paraphrased_copies(split, engine, MODEL, ENCODER, seed=seed, directory=paraphrases, watch=Silent())
    engine.close()
    print(found.sentence, file=sys.stderr)
    return found


def run(
    task: str,
    seed: int,
    arm: str,
    model: str,
    per_label: int,
    rows: Sequence[int],
    asked: dict[str, Any],
    paraphrases: Path,
) -> dict[str, Any]:
    """Train once and score the selected checkpoint on every test."""
    split = part_of(few_of_each(split_of(task, seed), per_label), 0, *rows)
    plan = plan_of(split, seed, model, early_stopping=False, **asked)
    augmented = copies_of(arm, split, seed, paraphrases / f"{task}-{seed}-{per_label}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        trainee = trainer().build(plan, split, model, directory / "activations")
        keep_freed_memory()
        train, valid = trainee.rows(split.train, "train"), trainee.rows(split.valid, "valid")
        copies, _ = that_fit(augmented.copies, lambda some: trainee.rows(some, "copies"))
        learned = [*train, *train] if arm == "duplicated" else train
        trainee.prepare([*train, *(copy for some in copies for copy in some), *valid], Silent())
        checkpoints = directory / "checkpoints"
        course = loop.run(plan, trainee, learned, valid, copies=copies, checkpoints=checkpoints, watch=Silent())
        selection, folders = choose(trainee, valid, course, checkpoints=checkpoints)
        trainee.load(folders[selection.chosen.kind])
        scores = {
            how: mean(loop.validate(trainee, trainee.rows(badly_typed(split.holdout, how), how)).right) for how in TESTS
        }
    return {
        "task": task,
        "seed": seed,
        "arm": arm,
        "model": model,
        "per_label": per_label,
        "asked": asked,
        "rows": [len(split.train), len(split.valid), len(split.holdout)],
        "copies": sum(map(len, copies)),
        "steps": course.step,
        "kept": selection.chosen.step,
        "examples_per_second": course.examples / course.step_seconds,
        "valid": mean(course.answered[selection.chosen.step]),
        "scores": scores,
    }


def packed(task: str) -> float:
    """Packed tokens of eight epochs with copies, for one without."""
    from heldout.engine.template import ChatTemplate
    from heldout.train import sft
    from heldout.train.packing import pack

    split = split_of(task)
    plan, template = plan_of(split, 0), ChatTemplate(weights.load_tokenizer(base_folder()))

    def tokens(examples: Sequence[Example]) -> list[Any]:
        return sft.tokenize(template, examples, plan.max_length, task)

    rows, (copies, _) = tokens(split.train), that_fit(robust_copies(split, seed=0).copies, tokens)
    steps = range(1, 8 * math.ceil(len(rows) / plan.batch_size) + 1)
    with_, without = (sum(len(pack(loop.batch(plan, rows, some, step)).ids) for step in steps) for some in (copies, ()))
    return with_ / without


def summary(runs: Sequence[dict[str, Any]], than: str = "duplicated") -> str:
    """Means of every arm, and paired gains over `than` with 95 % intervals (Student's t over seeds, and over the
    pairs of task and seed for all tasks together)."""
    lines = []
    for model, per_label in sorted({(one["model"], one["per_label"]) for one in runs}):
        chosen = [one for one in runs if (one["model"], one["per_label"]) == (model, per_label)]
        by = {(one["task"], one["seed"], one["arm"]): one["scores"] for one in chosen}
        tasks = sorted({one["task"] for one in chosen})
        lines += [f"\n{model}, {per_label} rows a label\n", f"| task | arm | seeds | {' | '.join(TESTS)} |"]
        lines.append("|---|---|--:|" + "--:|" * len(TESTS))
        for name in (*tasks, "all"):
            for arm in ARMS:
                cells = [key for key in by if key[2] == arm and name in (key[0], "all")]
                if cells:
                    shown = [f"{100 * mean([by[key][how] for key in cells]):.1f}" for how in TESTS]
                    lines.append(f"| {name} | {arm} | {len(cells)} | {' | '.join(shown)} |")
                pairs = [(by[key], by[(*key[:2], than)]) for key in cells if (*key[:2], than) in by]
                if arm != than and len(pairs) > 1:
                    gains = [_gain([100 * (one[how] - other[how]) for one, other in pairs]) for how in TESTS]
                    lines.append(f"| {name} | {arm} − {than} | {len(pairs)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def _gain(differences: Sequence[float]) -> str:
    from scipy.stats import t

    n = len(differences)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean(differences):+.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["banking12", "clinc10-oos", "sentiment3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["none", "duplicated", "robust"], choices=ARMS)
    parser.add_argument("--model", default=ENCODER)
    parser.add_argument("--per-label", type=int, default=8, help="training rows of each label; 0: all")
    parser.add_argument("--rows", nargs=2, type=int, default=[0, 0], help="of validation and test; 0: all")
    parser.add_argument("--set", nargs="*", default=[], help="hyperparameters, name=value")
    parser.add_argument("--paraphrases", type=Path, default=Path(tempfile.gettempdir()) / "heldout-paraphrases")
    parser.add_argument(
        "--out", type=Path, help="append each run as a line of JSON; runs that stand there are passed over"
    )
    parser.add_argument("--summary", type=Path, help="only print what is in this file")
    parser.add_argument("--packed", action="store_true", help="only count tokens")
    asked = parser.parse_args()
    if asked.packed:
        for task in asked.tasks:
            print(f"{task}: {packed(task):.2f} times the packed tokens", flush=True)
        return
    if asked.summary:
        print(summary([json.loads(line) for line in asked.summary.read_text().splitlines()]))
        return
    chosen = dict(one.split("=", 1) for one in asked.set)
    done = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out and asked.out.exists() else []
    for seed in asked.seeds:
        for task in asked.tasks:
            for arm in asked.arms:
                key = {"task": task, "seed": seed, "arm": arm, "model": asked.model, "per_label": asked.per_label}
                if any(key.items() <= one.items() for one in done):
                    continue
                found = run(task, seed, arm, asked.model, asked.per_label, asked.rows, chosen, asked.paraphrases)
                print(json.dumps(found["scores"] | key | {"steps": found["steps"], "kept": found["kept"]}), flush=True)
                done.append(found)
                if asked.out:
                    with asked.out.open("a") as file:
                        file.write(json.dumps(found) + "\n")
    print(summary(done))


if __name__ == "__main__":
    main()
