"""TRL's own loss curves beside those of our loop with TRL's settings: what lets `truth.py` run TRL's arms in it.

Both begin with the same adapter and see the same tokens in the same order. Dropout is off in both, since the two draw
it differently, and both compute in float32. The tokens are ours: TRL's own end with the line feed behind the turn, one
more token to predict that is soon certain, so that the mean over an answer of ten is a tenth lower.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import truth_arms as arms
from benchmarks.common import MODEL, base_folder, trainer
from benchmarks.truth_traps import Row, rows_for

from heldout.engine.template import Tokens
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Silent
from heldout.train import loop


def same_curve(task: str = "sms-spam", n: int = 64) -> None:
    """Print both curves of both arms, and the largest relative difference of a step."""
    print(f"{task}, {n} rows, three epochs, full depth, no dropout\n")
    print("| arm | trainer | loss of each step |\n|---|---|---|")
    for name, asked in (("trl-default", arms.TRL_DEFAULT), ("trl-advised", arms.TRL_ADVISED)):
        rows = rows_for(task, n, 0).train
        plan = arms.plan_for(arms.examples(rows), 0, asked | {"lora_dropout": 0.0})
        with tempfile.TemporaryDirectory() as directory:
            ours, tokens = our_losses(plan, rows, Path(directory))
            # Where training begins: the checkpoint before the first step.
            theirs = trl_losses(plan, asked, tokens, Path(directory) / "step-000000", Path(directory) / "trl")
        worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        for who, losses in (("ours", ours), ("TRL", theirs)):
            print(f"| {name} | {who} | {' '.join(f'{loss:.4f}' for loss in losses)} |")
        print(f"| {name} | largest relative difference | {worst:.2%} |", flush=True)


def our_losses(plan: TrainPlan, rows: Sequence[Row], directory: Path) -> tuple[list[float], list[Tokens]]:
    """The loss of each step in our loop, and the rows as tokens."""
    examples = arms.examples(rows)
    split = Split(train=examples, valid=(), holdout=(), seed=plan.seed, groups=len(examples))
    trainee: Any = trainer("float32").build(plan, split, MODEL, None)
    tokens = trainee.rows(examples, "train")
    course = loop.run(plan, trainee, tokens, [], checkpoints=directory, watch=Silent())
    return [point.train_loss for point in course.curve], tokens


def trl_losses(
    plan: TrainPlan, asked: dict[str, Any], rows: Sequence[Tokens], adapter: Path, directory: Path
) -> list[float]:
    """The loss of each step of TRL's SFTTrainer that begins with `adapter`."""
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    order = [row for step in range(1, plan.total_steps + 1) for row in loop.batch_rows(plan, len(rows), step)]
    completions = asked["prompt_loss_weight"] == 0
    seen = [{"input_ids": list(rows[row].ids)} for row in order]
    if completions:  # TRL's way to learn from them only
        seen = [
            one | {"completion_mask": list(map(int, rows[row].supervised))}
            for one, row in zip(seen, order, strict=True)
        ]
    config = SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=plan.batch_size,
        num_train_epochs=1,  # all three stand in the rows
        learning_rate=asked["learning_rate"],
        completion_only_loss=completions,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    folder = base_folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = InOrder(
        model=PeftModel.from_pretrained(base, adapter, is_trainable=True),
        args=config,
        train_dataset=Dataset.from_list(seen),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trained.train()
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
