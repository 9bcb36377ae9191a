"""Training speed and memory against a stock trainer, side by side on this machine.

    .venv/bin/python benchmarks/training.py [--task banking12] [--steps 10] [--rounds 3]

Same rows, same bundled model, LoRA r=16 on all linear layers, batch 8. Every contender runs in a process
of its own, in turns; the table shows medians over the rounds. Steps are timed after two warm-up steps.

    heldout      our loop with its defaults (dropout 0.05, gradient clipping)
    trl-default  TRL SFTTrainer as it comes for chat rows: whole-sequence loss, gradient checkpointing, fp32
    trl-best     TRL with prompt/completion rows, no checkpointing, and the faster precision of this machine
    trl-bf16     the same in bfloat16, whatever this machine makes of it
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "tasks"
EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = "smollm2-135m-instruct"
BATCH, WARM = 8, 2
CONTENDERS = ("heldout", "trl-default", "trl-best", "trl-bf16")


def rows_of(task: str) -> list[dict[str, Any]]:
    path = EXAMPLES / "tickets.train.jsonl" if task == "tickets" else SHARED / task / "train.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is not there; use --task tickets for the set that comes with the project")
    return [json.loads(line) for line in path.read_text().splitlines()]


def base_folder() -> Path:
    from heldout.engine import catalogue, weights
    from heldout.settings import Settings

    return weights.prepare(catalogue.resolve(MODEL, {}), Settings().cache)


def run_heldout(task: str, steps: int) -> tuple[float, float]:
    """Examples per second and the last step's loss."""
    import torch

    from heldout.engine import weights
    from heldout.pipeline.hyperparameters import Hyperparameters
    from heldout.pipeline.plan import make_plan
    from heldout.pipeline.training import ModelFacts
    from heldout.pipeline.types import Example, Split
    from heldout.train import loop, sft
    from heldout.train.memory import keep_freed_memory

    examples = tuple(
        Example(
            messages=tuple(row["messages"]),
            weights=tuple(int(message["role"] == "assistant") for message in row["messages"]),
            line=line,
        )
        for line, row in enumerate(rows_of(task), start=1)
    )
    split = Split(train=examples, valid=examples[:8], holdout=(), seed=0, groups=len(examples))
    facts = ModelFacts(hidden_size=576, layers=30, context=8192, parameters=134_515_008)
    keep_freed_memory()
    plan = make_plan(Hyperparameters(batch_size=BATCH), split, facts, seed=0)
    trainee = sft.build_model(plan, base_folder(), weights.choose_precision())
    tokens = sft.tokenize(trainee.template, examples, plan.max_length, task)
    optimizer = torch.optim.AdamW(trainee.parameters.values(), lr=plan.learning_rate, fused=True)
    loss = 0.0
    for step in range(1, WARM + steps + 1):
        if step == WARM + 1:
            started = time.perf_counter()
        loss, _ = loop.train_step(plan, trainee, optimizer, tokens, loop.batch_rows(plan, len(tokens), step), step)
    return steps * BATCH / (time.perf_counter() - started), loss


def run_trl(task: str, steps: int, contender: str) -> tuple[float, float]:
    """Examples per second and the mean loss."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from heldout.engine import weights

    folder = base_folder()
    best = contender != "trl-default"
    low = contender == "trl-bf16" or (best and weights.choose_precision() == torch.bfloat16)
    rows = rows_of(task)
    if best:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            max_steps=WARM + steps,
            learning_rate=2e-4,
            use_cpu=True,
            bf16=low,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **({"gradient_checkpointing": False} if best else {}),
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if low else torch.float32)
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        result = trainer.train()
    return steps * BATCH / (marks[-1] - marks[WARM - 1]), result.training_loss


def child(task: str, steps: int, contender: str) -> None:
    from heldout.train.memory import PeakMemory

    with PeakMemory() as peak:
        run = run_heldout(task, steps) if contender == "heldout" else run_trl(task, steps, contender)
    print(json.dumps({"examples_per_second": run[0], "loss": run[1], "peak_memory_bytes": peak.bytes}))


def measure(task: str, steps: int, contender: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", contender, "--task", task, "--steps", str(steps)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{contender} failed:\n{finished.stderr[-3000:]}")
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def machine() -> str:
    import torch

    from heldout.engine.weights import _gemm_rate, choose_precision

    rates = {dtype: _gemm_rate(dtype) * 2 * 384 * 1024 * 1024 / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    return (
        f"{torch.get_num_threads()} threads, matrix products {rates[torch.float32]:.0f} GFLOP/s fp32, "
        f"{rates[torch.bfloat16]:.0f} bf16; heldout trains in {str(choose_precision()).removeprefix('torch.')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "banking12" if (SHARED / "banking12").is_dir() else "tickets"
    parser.add_argument("--task", default=default, help="a task of the shared data, or tickets (examples/)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS[:3]), choices=CONTENDERS)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.task, asked.steps, asked.child)
        return
    rows_of(asked.task)
    print(f"{asked.task}, batch {BATCH}, {asked.steps} steps, {asked.rounds} rounds; {machine()}\n", flush=True)
    found: dict[str, list[dict[str, float]]] = {one: [] for one in asked.contenders}
    for round_ in range(1, asked.rounds + 1):
        for contender in asked.contenders:
            found[contender].append(measure(asked.task, asked.steps, contender))
            last = found[contender][-1]
            print(
                f"round {round_}/{asked.rounds} {contender}: {last['examples_per_second']:.2f} examples/s, "
                f"{last['peak_memory_bytes'] / 2**30:.2f} GiB",
                file=sys.stderr,
                flush=True,
            )
    medians = {
        one: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for one, runs in found.items()
    }
    ours = medians[asked.contenders[0]]
    print("| trainer | examples/s | peak memory | heldout is faster by | heldout's memory share |")
    print("|---|--:|--:|--:|--:|")
    for name, run in medians.items():
        print(
            f"| {name} | {run['examples_per_second']:.2f} | {run['peak_memory_bytes'] / 2**30:.2f} GiB | "
            f"{ours['examples_per_second'] / run['examples_per_second']:.1f}x | "
            f"{ours['peak_memory_bytes'] / run['peak_memory_bytes']:.2f} |"
        )


if __name__ == "__main__":
    main()
