"""The base model's own greedy answers to general prompts: asked once in a job, and kept in its directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from heldout.engine.base import Engine, ModelRef, Reply, Sampling
from heldout.errors import InvalidValue
from heldout.kept import read_record, write_record
from heldout.pipeline.watch import Watch

FILE, FACTS_FILE = "general_answers.json", "general_facts.json"
#: Changes when the record on disk does.
VERSION = 1
#: An answer of more tokens is cut. Most of the prompts ask for a few words.
MAX_TOKENS = 64
#: And of short questions, which a word answers; a longer answer has it in its first sentence, or is slow to come to it.
FACT_TOKENS = 16


def base_answers(
    prompts: Sequence[str],
    engine: Engine,
    base_model: str,
    *,
    directory: Path,
    watch: Watch,
    file: str = FILE,
    max_tokens: int = MAX_TOKENS,
) -> list[Reply]:
    """What the base model answers to each prompt, in order.

    What was asked before is read from `file` in `directory`, so a job that is taken up again has the same answers.
    Raises InvalidValue when the answers there are another model's.
    """
    path = directory / file
    known = _read(path, base_model, max_tokens)
    new = [prompt for prompt in prompts if prompt not in known]
    if new:
        replies = engine.chat(
            ModelRef(base_model=base_model),
            [[{"role": "user", "content": prompt}] for prompt in new],
            Sampling(max_tokens=max_tokens),
            lambda done, total: watch.progress("general prompts", done, total),
        )
        known |= dict(zip(new, replies, strict=True))
        _write(path, base_model, max_tokens, known)
        watch.kept()
    return [known[prompt] for prompt in prompts]


def is_whole(reply: Reply) -> bool:
    """True for an answer that the model ended itself; a cut one must not be taken for ended."""
    return reply.finish_reason == "stop" and bool(reply.text.strip())


def _read(path: Path, base_model: str, max_tokens: int) -> dict[str, Reply]:
    record = read_record(path)
    if record is None:
        return {}
    if (record["version"], record["base_model"], record["max_tokens"]) != (VERSION, base_model, max_tokens):
        raise InvalidValue(
            f"{path} was written by a job with another base model or another version of Heldout; delete it to have "
            "the general prompts answered again"
        )
    return {one["prompt"]: Reply(**one["reply"]) for one in record["answers"]}


def _write(path: Path, base_model: str, max_tokens: int, known: dict[str, Reply]) -> None:
    answers = [{"prompt": prompt, "reply": asdict(reply)} for prompt, reply in known.items()]
    record = {"version": VERSION, "base_model": base_model, "max_tokens": max_tokens, "answers": answers}
    write_record(path, record)
