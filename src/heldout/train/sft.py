"""Supervised fine-tuning of a chat model: build_model, collate, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from heldout.engine import weights
from heldout.engine.template import ChatTemplate, Tokens
from heldout.errors import InvalidTrainingFile, InvalidValue
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.types import Example
from heldout.train import norms
from heldout.train.attention import IMPLEMENTATION
from heldout.train.lora import Dropout, fuse
from heldout.train.packing import Pack, pack

#: Supervised tokens whose logits exist at the same time; bounds the memory of the output head.
HEAD_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A base model with a fresh adapter, ready to be trained."""

    peft: Any  # saves and loads the adapter
    body: Any  # tokens -> hidden states
    head: torch.nn.Linear  # hidden states -> logits, frozen
    template: ChatTemplate
    dropout: Dropout
    parameters: dict[str, torch.nn.Parameter]  # what is trained, by name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device


def build_model(plan: TrainPlan, folder: Path, precision: torch.dtype) -> Trainee:
    """The base model with LoRA on all linear layers but the head. Adapter weights are fp32."""
    model = weights.load_model(folder, precision, IMPLEMENTATION)
    template = ChatTemplate(weights.load_tokenizer(folder))
    torch.manual_seed(plan.seed)  # A starts random, B at zero
    peft = get_peft_model(
        model,
        LoraConfig(
            r=plan.lora_r,
            lora_alpha=plan.lora_alpha,  # type: ignore[arg-type]  # a fraction is fine
            lora_dropout=plan.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    dropout = Dropout(plan.lora_dropout, plan.seed)
    fuse(peft, dropout)
    norms.fuse(model)
    return Trainee(
        peft=peft,
        body=model.base_model,
        head=model.get_output_embeddings(),
        template=template,
        dropout=dropout,
        parameters={name: p for name, p in peft.named_parameters() if p.requires_grad},
    )


def tokenize(template: ChatTemplate, examples: Sequence[Example], max_length: int, part: str) -> list[Tokens]:
    """Tokens of every example, proven: labels cover exactly the answers and their end-of-turn tokens,
    nothing is cut, nothing is empty. Raises InvalidTrainingFile naming every line that fails."""
    tokens, problems = [], []
    for example in examples:
        try:
            one = template.encode(example.messages, example.weights)
            _prove(template, example, one, max_length)
        except InvalidValue as error:
            problems.append(f"line {example.line}: {error}")
        else:
            tokens.append(one)
    if problems:
        shown = "; ".join(problems[:20]) + ("; …" if len(problems) > 20 else "")
        raise InvalidTrainingFile(f"{len(problems)} examples of {part} cannot be trained on: {shown}")
    return tokens


def _prove(template: ChatTemplate, example: Example, tokens: Tokens, max_length: int) -> None:
    """Check one example's labels against its messages, by a way that does not reuse how they were made."""
    if len(tokens) > max_length:
        raise InvalidValue(
            f"{len(tokens)} tokens, but max_length is {max_length}; the answer would be cut. "
            "Shorten the example or raise max_length."
        )
    runs: list[list[int]] = []
    for i, (token, supervised) in enumerate(zip(tokens.ids, tokens.supervised, strict=True)):
        if supervised:
            if i == 0 or not tokens.supervised[i - 1]:
                runs.append([])
            runs[-1].append(token)
    answers = [
        str(message["content"]) for message, weight in zip(example.messages, example.weights, strict=True) if weight
    ]
    if len(runs) != len(answers):
        raise InvalidValue(f"{len(answers)} answers to learn but {len(runs)} stretches of labels")
    for run, answer in zip(runs, answers, strict=True):
        if run[-1] not in template.stop_ids:
            raise InvalidValue("the answer's labels do not end with the end-of-turn token")
        # Templates may trim an answer; they may not change it.
        if template.tokenizer.decode(run[:-1]).strip() != answer.strip():
            raise InvalidValue(f"the labels spell {template.tokenizer.decode(run)!r}, not the answer")


def collate(trainee: Trainee, examples: Sequence[Tokens]) -> Pack:
    """One packed micro-batch on the model's device."""
    one = pack(examples)
    device = trainee.device
    return Pack(
        ids=one.ids.to(device),
        layout=one.layout.to(device),
        sources=one.sources.to(device),
        targets=one.targets.to(device),
        owners=one.owners.to(device),
        size=one.size,
    )


@dataclass(frozen=True)
class Losses:
    """Per supervised token of a pack: negative log-likelihood in nats, and whether the argmax is right."""

    nll: torch.Tensor  # [T], with gradient
    right: torch.Tensor  # [T] bool


def loss(trainee: Trainee, batch: Pack) -> Losses:
    """Run one pack. Logits exist at supervised positions only, a chunk at a time."""
    hidden = trainee.body(
        input_ids=batch.ids,
        position_ids=batch.layout.position_ids,
        layout=batch.layout,
        use_cache=False,
    ).last_hidden_state[0]
    nll, right = [], []
    chosen = hidden[batch.sources]
    for start in range(0, len(batch.targets), HEAD_CHUNK):
        targets = batch.targets[start : start + HEAD_CHUNK]
        logits = trainee.head(chosen[start : start + HEAD_CHUNK]).float()
        nll.append(F.cross_entropy(logits, targets, reduction="none"))
        right.append(logits.detach().argmax(dim=-1) == targets)
    return Losses(torch.cat(nll), torch.cat(right))
