"""How fast is evaluation? Answers per second against a plain loop of transformers' `generate`, with the same words.

    .venv/bin/python benchmarks/answers.py [--task banking12] [--shots 8] [--rows 48]

The prompts are a few-shot rung's: the task's system prompt, the shots, the question. Both sides answer greedily with
the bundled model in the same precision and threads, taking turns; the plain loop has transformers' own cache, one
prompt at a time. Then every label of the task is read behind some of the prompts: all in one call, and each in a call
of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, split_of

from heldout.engine import weights
from heldout.engine.base import Message, ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.settings import Settings

MAX_TOKENS = 32


def plain_loop(model: Any, template: ChatTemplate, prompts: list[list[Message]]) -> list[str]:
    """One prompt after the other, as the model's card shows it."""
    answers = []
    for messages in prompts:
        ids = torch.tensor([template.prompt(messages)])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS)
        answers.append(template.decode(out[0, ids.shape[1] :].tolist()))
    return answers


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="banking12")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    split = split_of(asked.task, seed=0)
    shots = [turn for row in split.train[: asked.shots] for turn in row.messages if turn["role"] != "system"]
    rows = split.holdout[: asked.rows]
    prompts = [[*row.prompt[:-1], *shots, row.prompt[-1]] for row in rows]
    assert all(len(row.prompt) == 2 for row in rows), "a task with a system prompt and one question"

    settings = Settings()
    engine = LocalEngine(cache=settings.cache, aliases={}, precision="float32")
    ref = ModelRef(base_model=MODEL)
    folder = engine.folder(MODEL)
    model = weights.load_model(folder, torch.float32, "sdpa")
    template = ChatTemplate(weights.load_tokenizer(folder))
    greedy = Sampling(max_tokens=MAX_TOKENS)
    engine.chat(ref, prompts[:1], greedy)  # loaded

    seconds: dict[str, list[float]] = {"engine": [], "plain": []}
    for _ in range(asked.rounds):
        took, replies = timed(lambda: engine.chat(ref, prompts, greedy))
        seconds["engine"].append(took)
        took, wanted = timed(lambda: plain_loop(model, template, prompts))
        seconds["plain"].append(took)
    same = sum(reply.text == text for reply, text in zip(replies, wanted, strict=True))
    ours, theirs = (len(prompts) / statistics.median(seconds[side]) for side in ("engine", "plain"))
    ratios = [b / a for a, b in zip(seconds["engine"], seconds["plain"], strict=True)]
    print(f"{asked.task}, {asked.shots} shots, {replies[0].prompt_tokens} tokens a prompt, {len(prompts)} prompts,")
    print(
        f"{torch.get_num_threads()} threads, medians of {asked.rounds} rounds; {same} of {len(prompts)} answers equal\n"
    )
    print("| | plain `generate` | engine | ratio |\n|---|--:|--:|--:|")
    print(f"| answers/s | {theirs:.2f} | {ours:.2f} | {statistics.median(ratios):.1f} |")

    labels = sorted({row.target for row in split.train})
    behind = [[[*messages, {"role": "assistant", "content": label}] for label in labels] for messages in prompts[:8]]
    together, found = timed(lambda: engine.log_probs(ref, [one for some in behind for one in some]))
    one_by_one, singly = timed(lambda: [engine.log_probs(ref, [one])[0] for some in behind[:2] for one in some])
    count, few = len(labels) * len(behind), len(labels) * 2
    far = max(abs(a - b) for a, b in zip(found, singly, strict=False))
    print(
        f"| labels read/s ({len(labels)} labels) | {few / one_by_one:.2f} | {count / together:.2f} | "
        f"{(count / together) / (few / one_by_one):.1f} |"
    )
    print(f"\nLargest difference of a label's log-probability: {far:.1e}")


if __name__ == "__main__":
    main()
