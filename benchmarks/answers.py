"""How fast is evaluation? Answers per second against a plain loop of transformers' `generate`, with the same words.

    .venv/bin/python benchmarks/answers.py [--task banking12] [--shots 8] [--rows 48]
    .venv/bin/python benchmarks/answers.py --adapter DIRECTORY/adapter [--task banking12]    a tuned model

The prompts are a few-shot rung's: the task's system prompt, the shots, the question. Both sides answer greedily with
the bundled model in the same precision and threads, taking turns; the plain loop has transformers' own cache, one
prompt at a time. With `--adapter` (of `heldout tune` on the task's training file) the prompts are those of the tuned
model, and the engine is also asked as an evaluation asks it: with the training answers to read ahead. Then every label
of the task is read behind some of the prompts: all in one call, and each in a call of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, split_of

from heldout.engine import weights
from heldout.engine.base import Message, ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.settings import Settings

MAX_TOKENS = 32


class Plain:
    """transformers, with PEFT where there is an adapter: one prompt after the other, as the model's card shows it."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self.model: Any = weights.load_model(folder, torch.float32, "sdpa")
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()
        self.template = ChatTemplate(weights.load_tokenizer(folder))

    def answers(self, prompts: list[list[Message]]) -> list[str]:
        """What it says, greedily."""
        found = []
        for messages in prompts:
            ids = torch.tensor([self.template.prompt(messages)])
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS
                )
            found.append(self.template.decode(out[0, ids.shape[1] :].tolist()))
        return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def compare_answers(
    engine: LocalEngine, ref: ModelRef, plain: Plain, prompts: list[list[Message]], rounds: int, expected: list[str]
) -> str:
    """The same prompts, in turns: rows of a table. With `expected` the engine also reads these ahead."""
    ways = {"engine": Sampling(max_tokens=MAX_TOKENS)}
    if expected:
        ways["engine, with the training answers read ahead"] = replace(ways["engine"], expected=tuple(expected))
    engine.chat(ref, prompts[:1], ways["engine"])  # loaded
    seconds: dict[str, list[float]] = {way: [] for way in ("plain", *ways)}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds):
        for way, sampling in ways.items():
            took, replies = timed(lambda sampling=sampling: engine.chat(ref, prompts, sampling))
            seconds[way].append(took)
            texts[way] = [reply.text for reply in replies]
        took, texts["plain"] = timed(lambda: plain.answers(prompts))
        seconds["plain"].append(took)
    lines = ["| answers | answers/s | faster than plain by | equal to plain |", "|---|--:|--:|--:|"]
    for way, taken in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(taken, seconds["plain"], strict=True))
        same = sum(one == other for one, other in zip(texts[way], texts["plain"], strict=True))
        rate = len(prompts) / statistics.median(taken)
        lines.append(f"| {way} | {rate:.2f} | {ratio:.1f}x | {same} of {len(prompts)} |")
    return "\n".join(lines)


def compare_readings(engine: LocalEngine, ref: ModelRef, prompts: list[list[Message]], labels: list[str]) -> str:
    """Every label behind some prompts, all in one call and each in a call of its own: rows of a table."""
    behind = [[[*messages, {"role": "assistant", "content": label}] for label in labels] for messages in prompts[:8]]
    engine.log_probs(ref, behind[0][:1])
    together, found = timed(lambda: engine.log_probs(ref, [one for some in behind for one in some]))
    one_by_one, singly = timed(lambda: [engine.log_probs(ref, [one])[0] for some in behind[:2] for one in some])
    rates = len(labels) * 2 / one_by_one, len(labels) * len(behind) / together
    far = max(abs(a - b) for a, b in zip(found, singly, strict=False))
    return (
        f"| {len(labels)} labels, read | labels/s | faster by | largest difference, nats |\n|---|--:|--:|--:|\n"
        f"| each in a call of its own | {rates[0]:.2f} | 1.0x | |\n"
        f"| together | {rates[1]:.2f} | {rates[1] / rates[0]:.1f}x | {far:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="banking12")
    parser.add_argument("--shots", type=int, help="solved examples in a prompt; default: 8, with an adapter none")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapter", type=Path, help="of the bundled model, trained on the task")
    asked = parser.parse_args()
    split = split_of(asked.task, seed=0)
    count = asked.shots if asked.shots is not None else 0 if asked.adapter else 8
    shots = [turn for row in split.train[:count] for turn in row.messages if turn["role"] != "system"]
    rows = split.holdout[: asked.rows]
    prompts = [[*row.prompt[:-1], *shots, row.prompt[-1]] for row in rows]
    assert all(len(row.prompt) == 2 for row in rows), "a task with a system prompt and one question"

    engine = LocalEngine(cache=Settings().cache, aliases={}, precision="float32")
    ref = ModelRef(base_model=MODEL, adapter=str(asked.adapter) if asked.adapter else None)
    plain = Plain(engine.folder(MODEL), asked.adapter)
    labels = sorted({row.target for row in split.train})
    lengths = [len(plain.template.prompt(one)) for one in prompts]
    print(
        f"{asked.task}, {count} shots, {statistics.mean(lengths):.0f} tokens a prompt, {len(prompts)} prompts, "
        f"{torch.get_num_threads()} threads, medians of {asked.rounds} rounds\n"
    )
    print(compare_answers(engine, ref, plain, prompts, asked.rounds, labels if asked.adapter else []), flush=True)
    print(f"\n{compare_readings(engine, ref, prompts, labels)}")


if __name__ == "__main__":
    main()
