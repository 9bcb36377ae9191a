"""A classifier on an encoder: build_model, rows, losses. See docs/design/encoder-classifiers.md."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, dropout
from transformers import AutoConfig, AutoTokenizer

from heldout.engine import device
from heldout.engine.catalogue import ENCODER
from heldout.engine.encoder import Encoder, batches, context
from heldout.engine.labels import Labels, classifier_config, text_of, varies_in_system
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.encoder_memory import EncoderShapes
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import ModelFacts
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch
from heldout.train.method import TEMPERATURES, Learned, Losses, add_gradients

#: Inverse strength of the penalty on the first head. Stronger than the rung has it: a head that fits train
#: perfectly would leave the layers nothing to learn from.
FIRST_HEAD_C = 10.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as a classifier takes it."""

    ids: tuple[int, ...]  # tokens of its text, special tokens included
    label: int

    def __len__(self) -> int:
        return len(self.ids)


class ClassifierTrainee:
    """An encoder of which the upper layers are trained, and a linear head on the mean of its vectors."""

    precision = "float32"
    kernels = False

    def __init__(self, encoder: Encoder, labels: Labels, plan: TrainPlan, *, with_system: bool) -> None:
        self.encoder, self.labels, self.plan, self.with_system = encoder, labels, plan, with_system
        self.head = torch.nn.Linear(encoder.width, len(labels)).to(encoder.device)
        self.trained = encoder.layers[plan.freeze_layers :]
        self.trained.requires_grad_(True)
        for module in self.trained.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = plan.lora_dropout
        layers = {id(parameter) for parameter in self.trained.parameters()}
        self.parameters: dict[str, torch.nn.Parameter] = {
            f"encoder.{name}": p for name, p in encoder.network.named_parameters() if id(p) in layers
        } | {f"head.{name}": p for name, p in self.head.named_parameters()}
        self._step = 0
        self._training = False
        self._cache: dict[tuple[int, ...], torch.Tensor] = {}  # tokens -> [h], while no layer is trained

    @property
    def description(self) -> str:
        """See Trainee.description."""
        upper, head = len(self.trained), f"a linear head for {len(self.labels)} labels"
        return f"the upper {upper} of {len(self.encoder.layers)} layers and {head}" if upper else head

    @property
    def size(self) -> int:
        """See Trainee.size."""
        return sum(p.numel() for module in (self.encoder.network, self.head) for p in module.parameters())

    def rows(self, examples: Sequence[Example], part: str) -> list[Row]:
        """See Trainee.rows. A text that is too long is refused: a cut one may have lost what decides."""
        ids = self.encoder.tokenize([text_of(one.prompt, with_system=self.with_system) for one in examples])
        rows, problems = [], []
        for example, one in zip(examples, ids, strict=True):
            label = self.labels.index(example.target)
            if len(one) > self.plan.max_length:
                problems.append(f"line {example.line}: {len(one)} tokens, but max_length is {self.plan.max_length}")
            elif label is None:
                problems.append(f"line {example.line}: {example.target!r} is none of the {len(self.labels)} labels")
            else:
                rows.append(Row(ids=tuple(one), label=label))
        if problems:
            shown = "; ".join(problems[:20]) + ("; …" if len(problems) > 20 else "")
            raise InvalidTrainingFile(f"{len(problems)} examples of {part} cannot be trained on: {shown}")
        return rows

    def prepare(self, rows: Sequence[Row], watch: Watch) -> None:
        """See Trainee.prepare: what a wholly frozen encoder says of a text never changes."""
        if not len(self.trained):
            self._vectors(rows)

    def log_prob(self, example: Example) -> float:
        """See Trainee.log_prob."""
        self.stop()
        with torch.no_grad():
            return -float(self.losses(self.rows([example], "the proof")).nll[0])

    def micro_batches(self, rows: Sequence[Row], *, training: bool) -> list[list[int]]:
        """See Trainee.micro_batches: rows of similar length."""
        return batches(
            [len(row) for row in rows], limit=self.plan.micro_tokens if training else device.portions().padded
        )

    def weight(self, row: Row) -> float:
        """See Trainee.weight: one prediction, the class."""
        return 1.0

    def start(self, step: int, rows: Sequence[Row]) -> None:
        """See Trainee.start. Frozen layers stay as they are served: no dropout in them."""
        self._step, self._training = step, True
        self.trained.train()

    def stop(self) -> None:
        """See Trainee.stop."""
        self._training = False
        self.trained.eval()

    def losses(self, rows: Sequence[Row], number: int = 0) -> Losses:
        """See Trainee.losses."""
        if self._training:
            torch.manual_seed(hash((self.plan.seed, self._step, number)) % (1 << 62))
        vectors = dropout(self._vectors(rows), self.plan.lora_dropout, training=self._training)
        logits = self.head(vectors)
        targets = torch.tensor([row.label for row in rows], device=logits.device)
        smoothing = self.plan.label_smoothing if self._training else 0.0
        return Losses(
            loss=cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing),
            nll=cross_entropy(logits.detach(), targets, reduction="none"),
            right=logits.argmax(dim=-1) == targets,
            owners=torch.arange(len(rows), device=logits.device),
            weights=torch.ones(len(rows), device=logits.device),
            tempered=torch.stack([cross_entropy(logits.detach() / t, targets, reduction="none") for t in TEMPERATURES])
            if not self._training
            else logits.new_empty(0, len(rows)),
        )

    def learn(self, rows: Sequence[Row], number: int, weight: float) -> Learned:
        """See Trainee.learn."""
        return add_gradients(self.losses(rows, number), weight)

    def _vectors(self, rows: Sequence[Row]) -> torch.Tensor:
        if len(self.trained):
            return self.encoder.vectors([row.ids for row in rows])
        new = [ids for ids in dict.fromkeys(row.ids for row in rows) if ids not in self._cache]
        if new:
            self._cache.update(zip(new, self.encoder.all_vectors(new), strict=True))
        return torch.stack([self._cache[row.ids] for row in rows])

    def save(self, folder: Path) -> None:
        """See Trainee.save: every trained tensor, and what turns a text into an answer."""
        tensors = {name: p.detach().contiguous() for name, p in self.parameters.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "model_type": self.encoder.network.config.model_type,
            **classifier_config(
                self.labels,
                width=self.encoder.width,
                frozen_layers=self.plan.freeze_layers,
                max_length=self.plan.max_length,
                with_system=self.with_system,
            ),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))

    def load(self, folder: Path) -> None:
        """See Trainee.load."""
        tensors = load_file(folder / "adapter_model.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def fit_head(self, rows: Sequence[Row]) -> None:
        """Begin with the best head for the encoder as it is: a random one would drag good layers about
        until it fits (Kumar et al. 2022)."""
        vectors = self.encoder.all_vectors([row.ids for row in rows]) / math.sqrt(self.encoder.width)
        weight, bias = logistic_regression(vectors.cpu(), [row.label for row in rows], len(self.labels))
        with torch.no_grad():
            self.head.weight.copy_(weight / math.sqrt(self.encoder.width))
            self.head.bias.copy_(bias)


def facts(folder: Path, parameters: int) -> ModelFacts:
    """What the plan must know of the encoder in `folder`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = load_tokenizer(folder)
    return ModelFacts(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        context=context(config, tokenizer),
        parameters=parameters,
        kind=ENCODER,
        gpu=device.is_gpu(),
    )


def shapes(plan: TrainPlan, folder: Path, parameters: int, split: Split) -> tuple[EncoderShapes, int]:
    """What memory depends on, without loading the encoder: its sizes, and the tokens of the longest text."""
    config, tokenizer = AutoConfig.from_pretrained(folder, trust_remote_code=False), load_tokenizer(folder)
    hidden, layers = config.hidden_size, config.num_hidden_layers - plan.freeze_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    examples = (*split.train, *split.valid, *split.holdout)
    with_system = varies_in_system([example.prompt for example in examples])
    texts = [text_of(example.prompt, with_system=with_system) for example in examples]
    ids = tokenizer(texts, truncation=False, verbose=False).input_ids
    found = EncoderShapes(
        parameters=parameters,
        # Four square matrices of attention and two of the inner layer; biases and norms are next to nothing.
        trained=layers * hidden * (4 * hidden + 2 * inner) + hidden * len({one.target for one in split.train}),
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=config.num_attention_heads,
    )
    return found, max(map(len, ids))


def load_tokenizer(folder: Path) -> Any:
    """The encoder's tokenizer alone."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def count_tokens(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Tokens of every prompt with all of its messages, special tokens included. (The checks leave a system prompt
    out that all rows share, as `text_of` does.)"""
    texts = [text_of(example.prompt, with_system=True) for example in examples]
    return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids] if texts else []


def build_model(plan: TrainPlan, folder: Path, split: Split) -> ClassifierTrainee:
    """The encoder in `folder` with the best head for it as it is, fitted on train. The embeddings and the
    plan's freeze_layers lower layers stay as they are.

    Raises InvalidTrainingFile when answers are no labels, or texts are too long.
    """
    examples = (*split.train, *split.valid)
    trainee = ClassifierTrainee(
        Encoder(folder),
        Labels.of(example.target for example in examples),
        plan,
        with_system=varies_in_system([example.prompt for example in examples]),
    )
    trainee.fit_head(trainee.rows(split.train, "the training data"))
    return trainee


def logistic_regression(vectors: torch.Tensor, labels: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [count, h] and bias [count] for vectors [n, h] of length 1. A label without a row gets the weight
    0 and the lowest bias."""
    from sklearn.linear_model import LogisticRegression

    weight, bias = torch.zeros(count, vectors.shape[1]), torch.zeros(count)
    seen = sorted(set(labels))
    if len(seen) < 2:
        return weight, bias
    fitted = LogisticRegression(C=FIRST_HEAD_C, max_iter=1000).fit(vectors.numpy(), list(labels))
    found, intercept = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(seen) == 2:  # one row, for the second against the first
        found, intercept = torch.cat([-found, found]) / 2, torch.cat([-intercept, intercept]) / 2
    bias.fill_(float(intercept.min()))
    weight[seen], bias[seen] = found.float(), intercept.float()
    return weight, bias
