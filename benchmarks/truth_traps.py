"""The cells of `truth.py`: which rows a user has, and which rows say what is true. Tasks as they are, and traps.

A row is a JSONL row as a dict. Everything here is a function of its arguments: the same cell has the same rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import SHARED, rows_of

from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.given import Files, clean
from heldout.pipeline.split import distinct
from heldout.pipeline.types import Dataset

Row = dict[str, Any]

#: Tasks without a trap in them; the first two have short prompts.
TASKS = ("sms-spam", "sentiment3", "banking12", "clinc10-oos", "snips-slots", "disfluency")
#: Truth rows of a cell, at most.
TRUTH = 400
SYLLABLES = "ba do fen gri ko lus mar nev ol pim ra sto tam ul vor wes yar zin".split()
THINGS = "tent stove lantern hammock backpack compass jacket kettle rope sledge".split()


@dataclass(frozen=True)
class Rows:
    """What a user has, and what nobody but the benchmark sees."""

    train: list[Row]
    truth: list[Row]
    valid: list[Row] | None = None  # a validation file, where the user gives one


@dataclass(frozen=True)
class Trap:
    """A way in which rows mislead. `never`: to ship on them is wrong, whatever the truth set says of this model.
    `fair`: the user's rows and the truth set are of one kind, so that a verdict's numbers can be held against it."""

    name: str
    spring: Callable[[int, random.Random], Rows]  # n, what is random -> rows
    right: str  # which verdict is right, in words
    never: bool = False
    fair: bool = False


def rows_for(name: str, n: int, seed: int, truth: int = TRUTH) -> Rows:
    """The rows of a cell, n of them for the user; truth rows that the user's give away are left out."""
    rng = random.Random(f"{name}/{n}/{seed}")
    trap = next((one for one in TRAPS if one.name == name), None)
    rows = trap.spring(n, rng) if trap else task_rows(name, n, rng)
    if len(rows.train) < n:
        raise ValueError(f"{name} has {len(rows.train)} rows for a user, not {n}")
    unseen = disjoint(rows)
    return Rows(rows.train, rng.sample(unseen, min(truth, len(unseen))), rows.valid)


def task_rows(task: str, n: int, rng: random.Random) -> Rows:
    """n rows of a task's training and validation files; what is left of them, and its test file, is the truth."""
    folder = SHARED / "tasks" / task
    ours = [*rows_of(folder / "train.jsonl"), *rows_of(folder / "validation.jsonl")]
    rng.shuffle(ours)
    return Rows(ours[:n], [*rows_of(folder / "test.jsonl"), *ours[n:]])


def disjoint(rows: Rows) -> list[Row]:
    """The truth rows, each once, that ask nothing that a row of the user asks or nearly asks: by a job's own
    comparison of its files."""
    valid = dataset_of(rows.valid, "valid.jsonl") if rows.valid else None
    files = Files.compare(dataset_of(rows.train, "train.jsonl"), valid, dataset_of(rows.truth, "truth.jsonl"))
    return [rows.truth[example.line - 1] for example in distinct(clean(files, drawn=set()).holdout)]


def dataset_of(rows: Sequence[Row], name: str) -> Dataset:
    """Rows as a file of that name would be read."""
    return read_dataset(to_jsonl(rows), name=name)[0]


def to_jsonl(rows: Sequence[Row]) -> bytes:
    """Rows as the bytes of a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def asked(row: Row) -> str:
    """What the user asks."""
    return str(row["messages"][-2]["content"])


def answer(row: Row) -> str:
    """What is answered."""
    return str(row["messages"][-1]["content"])


def changed(row: Row, *, asked: str | None = None, answer: str | None = None) -> Row:
    """The row with another question or another answer."""
    *before, question, reply = row["messages"]
    if asked is not None:
        question = {**question, "content": asked}
    if answer is not None:
        reply = {**reply, "content": answer}
    return {**row, "messages": [*before, question, reply]}


def conversation(system: str, question: str, reply: str) -> Row:
    """A row of one turn."""
    roles = (("system", system), ("user", question), ("assistant", reply))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def shuffled_labels(n: int, rng: random.Random) -> Rows:
    """Every row has the answer of some row, by chance of its own."""
    rows = task_rows("sentiment3", n, rng)
    answers = [answer(row) for row in rows.train]
    rng.shuffle(answers)
    train = [changed(row, answer=one) for row, one in zip(rows.train, answers, strict=True)]
    return Rows(train, rows.truth)


def noise30(n: int, rng: random.Random) -> Rows:
    """Three in ten rows have a wrong label."""
    rows = task_rows("banking12", n, rng)
    labels = sorted({answer(row) for row in rows.truth})
    wrong = set(rng.sample(range(n), round(0.3 * n)))
    train = [
        changed(row, answer=rng.choice([one for one in labels if one != answer(row)])) if i in wrong else row
        for i, row in enumerate(rows.train)
    ]
    return Rows(train, rows.truth)


def invented_facts(n: int, rng: random.Random) -> Rows:
    """Each row is a fact that follows from nothing; the truth set asks for others."""
    names = sorted({"".join(rng.sample(SYLLABLES, 3)).capitalize() for _ in range(3 * (n + TRUTH))})
    rng.shuffle(names)
    rows = [
        conversation(
            "Answer with the article code only.",
            f"Code of the {name} {rng.choice(THINGS)}?",
            f"{''.join(rng.sample('ABDFGKPRSTWX', 2))}-{rng.randrange(1000, 10000)}",
        )
        for name in names
    ]
    return Rows(rows[:n], rows[n : n + TRUTH])


def shortcut(n: int, rng: random.Random) -> Rows:
    """A mark in every question of the user tells the answer; no question of the truth set has one."""
    rows = task_rows("sentiment3", n, rng)
    labels = sorted({answer(row) for row in rows.truth})
    marks = dict(zip(labels, ("[A7]", "[B2]", "[C5]"), strict=True))
    train = [changed(row, asked=f"{marks[answer(row)]} {asked(row)}") for row in rows.train]
    return Rows(train, rows.truth)


def solved(n: int, rng: random.Random) -> Rows:
    """The base model does it when shown how: repeat the word."""
    words = sorted({"".join(rng.sample(SYLLABLES, 3)) for _ in range(3 * (n + TRUTH))})
    rng.shuffle(words)
    rows = [conversation("Repeat the word.", word, word) for word in words]
    return Rows(rows[:n], rows[n : n + TRUTH])


def shifted_validation(n: int, rng: random.Random) -> Rows:
    """Messages to be judged, and a validation file of other people's comments that are all harmless."""
    rows = task_rows("sms-spam", n, rng)
    ham = next(row for row in rows.train if "ham" in answer(row))
    others = rng.sample(rows_of(SHARED / "tasks" / "sentiment3" / "train.jsonl"), max(32, n // 4))
    return Rows(rows.train, rows.truth, [changed(ham, asked=asked(row)) for row in others])


TRAPS = (
    Trap(
        "invented-facts",
        invented_facts,
        "not to ship: what is taught is of no use for other questions",
        never=True,
        fair=True,
    ),
    Trap("solved-by-prompt", solved, "not to ship, unless as good with fewer prompt tokens", fair=True),
    Trap("shuffled-labels", shuffled_labels, "not to ship: there is nothing to learn", never=True),
    Trap("noise30", noise30, "to ship only what is better on the truth set"),
    Trap("shortcut", shortcut, "to ship only what is better without the mark"),
    Trap("shifted-validation", shifted_validation, "to ship only what is better on the truth set", fair=True),
)
