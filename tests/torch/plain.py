"""The plain way to fine-tune: transformers and PEFT as they come, one example at a time, full logits, autograd.

What train/ computes differently has to agree with this; nothing here comes from train/ but the order of the
batches and the learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from heldout.engine.template import Tokens
from heldout.train import loop
from heldout.train.sft import ChatTrainee


class Curve(NamedTuple):
    """Losses over a training, and the adapter it ended with."""

    train: list[float]  # mean nats per supervised token of each step's batch
    valid: list[float]  # mean nats per token of each example, averaged; after the last step
    weights: torch.Tensor  # all adapter weights in one vector


class Plain:
    """The base model with the adapter that a trainee has right now."""

    def __init__(self, folder: Path, trainee: ChatTrainee) -> None:
        plan = trainee.plan
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        (targets,) = {tuple(sorted(one.target_modules)) for one in trainee.peft.peft_config.values()}
        trained = list(range(plan.freeze_layers, base.config.num_hidden_layers))
        config = LoraConfig(
            r=plan.lora_r,
            lora_alpha=plan.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=list(targets),
            layers_to_transform=trained if plan.freeze_layers else None,
            task_type="CAUSAL_LM",
        )
        self.plan = plan
        self.peft = get_peft_model(base, config).eval()
        self.parameters = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        assert list(self.parameters) == list(trainee.parameters), "adapters at other places"
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(trainee.parameters[name])

    def logits(self, row: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at all tokens but the last, and the tokens that follow."""
        return self.peft(input_ids=torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.ids[1:])

    def gradients(self, rows: Sequence[Tokens]) -> float:
        """Gradients of one batch's mean loss; returns the mean over supervised tokens, without smoothing."""
        plan = self.plan
        counts = [[1.0 if s else plan.prompt_loss_weight for s in row.supervised[1:]] for row in rows]
        total = sum(map(sum, counts))
        nats = count = 0.0
        for row, weights in zip(rows, counts, strict=True):
            logits, targets = self.logits(row)
            losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=plan.label_smoothing)
            (losses @ torch.tensor(weights) / total).backward()
            supervised = torch.tensor(row.supervised[1:])
            nats += float(F.cross_entropy(logits.detach()[supervised], targets[supervised], reduction="sum"))
            count += int(supervised.sum())
        return nats / count

    def valid_loss(self, rows: Sequence[Tokens]) -> float:
        """Mean over examples of the mean over their supervised tokens."""
        means = []
        for row in rows:
            supervised = torch.tensor(row.supervised[1:])
            with torch.no_grad():
                logits, targets = self.logits(row)
                means.append(float(F.cross_entropy(logits[supervised], targets[supervised])))
        return sum(means) / len(means)

    def train(self, rows: Sequence[Tokens], valid: Sequence[Tokens]) -> Curve:
        """All steps of the plan."""
        plan = self.plan
        optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=plan.weight_decay, foreach=False)
        train_losses, valid_losses = [], []
        for step in range(1, plan.total_steps + 1):
            batch = [rows[i] for i in loop.batch_rows(plan, len(rows), step)]
            train_losses.append(self.gradients(batch))
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), plan.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(plan, step, plan.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        if valid:
            valid_losses.append(self.valid_loss(valid))
        return Curve(train_losses, valid_losses, vector(self.parameters))


def vector(parameters: dict[str, Any]) -> torch.Tensor:
    """Adapter weights in one vector."""
    return torch.cat([p.detach().flatten() for p in parameters.values()])
