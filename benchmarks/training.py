"""Training speed and memory against a stock trainer, side by side on this machine.

    .venv/bin/python benchmarks/training.py [--tasks banking12 snips-slots disfluency] [--steps 6] [--rounds 1]
                                            [--model DIRECTORY] [--batch 8]

Same rows, same model (the bundled one unless another is named), LoRA r=16 on all linear layers, batch 8. Every
contender runs in a process of its own, in turns; the table shows medians over the rounds. Steps are timed after
two warm-up steps. Memory is the process's; on a GPU, what torch holds of it.

    heldout      our loop with its defaults (dropout 0.05, gradient clipping)
    heldout-plain (processor) the same without kernels: where there is no C++ compiler
    trl-default  TRL SFTTrainer as it comes for chat rows: whole-sequence loss, gradient checkpointing, fp32 weights
                 and bf16 products, whatever this machine makes of them; on a processor with use_cpu, which it asks for
    trl-fp32     (processor) the same with fp32 products
    trl-best     TRL with prompt/completion rows, no checkpointing, and the faster precision of this machine
    trl-bf16     trl-best in bfloat16, whatever this machine makes of it
    trl-liger    (GPU) the same with Liger's kernels, where liger-kernel is installed

"Share of peak" is our matrix products with base weights and the output head, forward and backward, over the
time of the steps, as a share of what one large matrix product reaches in the same process. Attention,
adapters and everything that is not a product count as time, not as work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, OWN, SHARED, base_folder, examples_of, plan_of, rows_of, trainer

from heldout.pipeline.types import Split

WARM = 2
CONTENDERS = ("heldout", "heldout-plain", "trl-default", "trl-fp32", "trl-best", "trl-bf16", "trl-liger")
TASKS = ("banking12", "snips-slots", "disfluency")


def file_of(task: str) -> Path:
    return OWN / "tickets.train.jsonl" if task == "tickets" else SHARED / "tasks" / task / "train.jsonl"


def run_heldout(task: str, steps: int, contender: str, model: str, size: int) -> dict[str, float]:
    import torch

    from heldout.engine import device, weights
    from heldout.pipeline import memory
    from heldout.train import loop
    from heldout.train.memory import keep_freed_memory

    peaks = []
    if device.is_gpu():  # once, and gone before memory is measured; a processor's clock goes up and down with its load
        peaks.append(product_rate(weights.choose_precision(), device.chosen()))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    examples = examples_of(file_of(task))
    split = Split(train=examples, valid=examples[:8], holdout=(), seed=0, groups=len(examples))
    plan = plan_of(split, 0, model, batch_size=size)
    ours = trainer(use_kernels=contender == "heldout")
    plan = ours.fit(plan, split, base_model=model)
    predicted = memory.predict(*ours.sizes(plan, split, base_model=model), plan)
    trainee: Any = ours.build(plan, split, model, None)
    keep_freed_memory()
    rows = trainee.rows(examples, task)
    optimizer = loop.optimizer_of(plan, trainee)
    spent = work = 0.0
    with device.repeatable():
        for step in range(1, WARM + steps + 1):
            batch = [rows[row] for row in loop.batch_rows(plan, len(rows), step)]
            if not device.is_gpu():
                peaks.append(product_rate(trainee.head.weight.dtype, trainee.device))
            started = time.perf_counter()
            found = loop.gradients(trainee, batch, step)
            loop.update(plan, trainee, optimizer, loop.learning_rate(plan, step, plan.learning_rate), found.norm)
            if device.is_gpu():
                torch.cuda.synchronize()
            if step > WARM:
                spent += time.perf_counter() - started
                work += products(trainee, batch)
    return {
        "examples_per_second": steps * size / spent,
        "loss": found.loss,
        "share_of_peak": work / spent / statistics.median(peaks),
        "predicted_memory_bytes": predicted.of_training,
    }


def products(trainee: Any, batch: list[Any]) -> float:
    """Floating point operations of the products with frozen weights in one step, forward and backward."""
    from heldout.train.packing import pack

    layer = trainee.peft.get_base_model().base_model.layers[0]
    sizes = {
        name: module.in_features * module.out_features
        for name, module in layer.named_modules()
        if name.endswith("_proj")
    }
    qkv = sum(size for name, size in sizes.items() if name.endswith(("q_proj", "k_proj", "v_proj")))
    rest = sum(sizes.values()) - qkv
    layers = trainee.peft.get_base_model().config.num_hidden_layers
    total = 0.0
    for chosen in trainee.micro_batches(batch, training=True):
        one = pack([batch[i] for i in chosen])
        tokens, rows = len(one.ids), len(one.rows)
        total += 4 * tokens * layers * (qkv + rest) - 4 * (tokens - rows) * rest - 2 * tokens * qkv
        total += 4 * len(one.targets) * trainee.head.weight.numel()
    return total


def product_rate(dtype: Any, device: Any) -> float:
    """Floating point operations a second of a 1024 x 1024 x 1024 product, on a GPU of 8192; the best of a few."""
    import torch

    side = 1024 if torch.device(device).type == "cpu" else 8192
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def run_trl(task: str, steps: int, contender: str, model_name: str, size: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from heldout.engine import weights

    folder = base_folder(model_name)
    best = contender not in ("trl-default", "trl-fp32")
    low = contender in ("trl-bf16", "trl-liger") or (best and weights.choose_precision() == torch.bfloat16)
    rows = rows_of(file_of(task))
    if best:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=size,
            max_steps=WARM + steps,
            learning_rate=2e-4,
            use_cpu=not torch.cuda.is_available(),
            use_liger_kernel=contender == "trl-liger",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **({"gradient_checkpointing": False} if best else {}),
            **({} if contender == "trl-default" else {"bf16": low}),
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
    return {"examples_per_second": steps * size / (marks[-1] - marks[WARM - 1]), "loss": result.training_loss}


def child(task: str, steps: int, contender: str, model: str, size: int) -> None:
    from heldout.train.memory import PeakMemory

    with PeakMemory() as peak:
        if contender.startswith("heldout"):
            found = run_heldout(task, steps, contender, model, size)
        else:
            found = run_trl(task, steps, contender, model, size)
    print(json.dumps({**found, "peak_memory_bytes": peak.bytes}))


def measure(task: str, steps: int, contender: str, model: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", contender, "--tasks", task, "--steps", str(steps)]
    command += ["--model", model, "--batch", str(size)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{contender} failed:\n{finished.stderr[-3000:]}")
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def machine() -> str:
    import torch

    from heldout.engine.weights import choose_precision

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; heldout trains in {str(choose_precision()).removeprefix('torch.')}"
    rates = {dtype: product_rate(dtype, "cpu") / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    return (
        f"{torch.get_num_threads()} threads, matrix products {rates[torch.float32]:.0f} GFLOP/s fp32, "
        f"{rates[torch.bfloat16]:.0f} bf16; heldout trains in {str(choose_precision()).removeprefix('torch.')}"
    )


def contenders() -> list[str]:
    """Those that make sense here."""
    import torch

    if torch.cuda.is_available():
        return ["heldout", "trl-default", "trl-best", *(["trl-liger"] if find_spec("liger_kernel") else [])]
    return list(CONTENDERS[:5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = list(TASKS) if file_of(TASKS[0]).is_file() else ["tickets"]
    parser.add_argument("--tasks", nargs="+", default=default, help="tasks of the shared data, or tickets (examples/)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS)
    parser.add_argument("--model", default=MODEL, help="a base model's name or directory; tokenizer and template in it")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.tasks[0], asked.steps, asked.child, asked.model, asked.batch)
        return
    for task in asked.tasks:
        rows_of(file_of(task))
    chosen = asked.contenders or contenders()
    print(
        f"{Path(asked.model).name}, batch {asked.batch}, {asked.steps} steps, {asked.rounds} rounds; {machine()}\n",
        flush=True,
    )
    print("| task | trainer | examples/s | heldout is faster by | peak memory | heldout's share | share of peak |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for task in asked.tasks:
        found: dict[str, list[dict[str, float]]] = {one: [] for one in chosen}
        for round_ in range(1, asked.rounds + 1):
            for contender in chosen:
                found[contender].append(measure(task, asked.steps, contender, asked.model, asked.batch))
                rate = found[contender][-1]["examples_per_second"]
                print(
                    f"{task} round {round_}/{asked.rounds} {contender}: {rate:.2f} examples/s",
                    file=sys.stderr,
                    flush=True,
                )
        tell(task, found)


def tell(task: str, found: dict[str, list[dict[str, float]]]) -> None:
    """A task's rows of the table."""
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    ours = next(iter(medians.values()))
    for name, run in medians.items():
        share = f"{run['share_of_peak']:.0%}" if "share_of_peak" in run else ""
        print(
            f"| {task} | {name} | {run['examples_per_second']:.2f} | "
            f"{ours['examples_per_second'] / run['examples_per_second']:.1f}x | "
            f"{run['peak_memory_bytes'] / 2**30:.2f} GiB | "
            f"{ours['peak_memory_bytes'] / run['peak_memory_bytes']:.2f} | {share} |",
            flush=True,
        )
    if predicted := ours.get("predicted_memory_bytes"):
        off = predicted / ours["peak_memory_bytes"] - 1
        print(
            f"{task}: predicted memory of the steps alone {predicted / 2**30:.2f} GiB, {off:+.0%} of what was measured",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
