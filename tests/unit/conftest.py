"""Examples, scores and rungs made by hand, and a real Postgres."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from heldout.pipeline.evaluate.scores import Scores
from heldout.pipeline.evaluate.statistics import mean_interval
from heldout.pipeline.ladder import Rung
from heldout.pipeline.types import Example, Split


def example(prompt: str, answer: str, line: int = 1) -> Example:
    """One question with a system message before it."""
    messages = (
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    )
    return Example(messages=messages, weights=(0, 0, 1), line=line)


def labelled(part: str, n: int, labels: Sequence[str] = ("red", "green", "blue")) -> tuple[Example, ...]:
    """n examples of one part; the part's name stands in every question, the labels take turns."""
    return tuple(example(f"{part} {i}", labels[i % len(labels)], i + 1) for i in range(n))


def split_of(
    train: Iterable[Example], valid: Iterable[Example] = (), holdout: Iterable[Example] = (), *, seed: int = 0
) -> Split:
    """Three given parts."""
    parts = {"train": tuple(train), "valid": tuple(valid), "holdout": tuple(holdout)}
    return Split(**parts, seed=seed, groups=sum(map(len, parts.values())))


def rung(
    name: str,
    per_example: Sequence[float],
    *,
    kind: str = "prompt",
    binary: bool = True,
    description: str = "",
    prompt_tokens: float = 0.0,
) -> Rung:
    """A rung with these scores."""
    scores = Scores(
        metric="exact match" if binary else "ROUGE-L",
        binary=binary,
        mean=sum(per_example) / len(per_example),
        interval=mean_interval(per_example, binary=binary),
        per_example=tuple(per_example),
        answers=("",) * len(per_example),
        prompt_tokens=prompt_tokens,
    )
    return Rung(name=name, kind=kind, description=description, scores=scores)


def right(n: int, k: int) -> list[float]:
    """n right-or-wrong scores of which the first k are right."""
    return [1.0] * k + [0.0] * (n - k)


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], str]]:
    """Makes empty databases in a Postgres of this session alone, behind a socket in a folder; their URLs."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (the extra heldout[postgres])")
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: float(one.parent.name))
    programs = shutil.which("initdb", path=os.pathsep.join(map(str, versions[-1:])) or None)
    if programs is None:
        pytest.skip("Postgres is not installed here")
    # Postgres refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        make = [programs, "--pgdata", data, "--username", "postgres", "--auth", "trust", "--no-sync"]
        subprocess.run(make, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        control = [Path(programs).with_name("pg_ctl"), "--pgdata", data, "--wait"]
        listen = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=500"
        start = [*control, "--log", folder / "log", "--options", listen, "start"]
        subprocess.run(start, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        stop = [*control, "--mode", "immediate", "stop"]
        stack.callback(subprocess.run, stop, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        numbers = itertools.count(1)

        def new() -> str:
            database = f"test_{next(numbers)}"
            server = create_engine(f"postgresql+psycopg://postgres@/postgres?host={folder}")
            with server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text(f"CREATE DATABASE {database}"))
            server.dispose()
            return f"postgresql+psycopg://postgres@/{database}?host={folder}"

        yield new
