"""The Trainer that the pipeline asks for: prepare, prove, train, hand over the best adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from heldout.engine import catalogue, weights
from heldout.errors import ModelNotFound
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import Adapter, ModelFacts, Proof
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch
from heldout.train import checkpoint, loop, sft
from heldout.train.memory import PeakMemory, keep_freed_memory
from heldout.train.sft import Trainee

#: Conversations whose log-probabilities the serving path must reproduce.
PROOFS = 8


class TorchTrainer:
    """Trains LoRA adapters in this process."""

    def __init__(
        self, *, cache: Path, aliases: dict[str, str], precision: str = "auto", allow_paths: bool = False
    ) -> None:
        self.cache = cache
        self.aliases = aliases
        self.allow_paths = allow_paths
        self._precision = precision

    def facts(self, base_model: str) -> ModelFacts:
        """See Trainer.facts."""
        folder = self._folder(base_model)
        config = json.loads((folder / "config.json").read_text())
        try:
            return ModelFacts(
                hidden_size=config["hidden_size"],
                layers=config["num_hidden_layers"],
                context=config["max_position_embeddings"],
                parameters=_stored_parameters(folder),
            )
        except KeyError as missing:
            raise ModelNotFound(
                f"The model in {folder} is not a chat model we can train: {missing} is not in its config.json"
            ) from missing

    def train(
        self,
        plan: TrainPlan,
        split: Split,
        *,
        base_model: str,
        directory: Path,
        watch: Watch,
        cache: Path | None = None,
    ) -> Adapter:
        """See Trainer.train."""
        checkpoints = directory / "checkpoints"
        keep_freed_memory()
        with PeakMemory() as peak:
            trainee = sft.build_model(plan, self._folder(base_model), weights.choose_precision(self._precision))
            train = sft.tokenize(trainee.template, split.train, plan.max_length, "the training data")
            valid = sft.tokenize(trainee.template, split.valid, plan.max_length, "the validation data")
            trained = sum(p.numel() for p in trainee.parameters.values())
            _announce(trainee, trained, plan, watch)
            course, stopping = loop.run(plan, trainee, train, valid, checkpoints=checkpoints, watch=watch)
        best = checkpoints / f"step-{stopping.best_step:06d}"
        # Restored from disk: what is proven below is what was saved.
        checkpoint.load_adapter(best, trainee)
        return Adapter(
            directory=checkpoint.publish(best, directory / "adapter"),
            best_step=stopping.best_step,
            last_step=course.step,
            curve=tuple(course.curve),
            trained_tokens=course.trained_tokens,
            trained_parameters=trained,
            examples_per_second=course.examples / course.step_seconds,
            seconds=course.seconds,
            peak_memory_bytes=peak.bytes,
            precision=str(trainee.head.weight.dtype).removeprefix("torch."),
            stopped=course.stopped,
            proofs=_prove(trainee, (split.valid or split.train)[:PROOFS], plan.max_length),
        )

    def _folder(self, base_model: str) -> Path:
        source = catalogue.resolve(base_model, self.aliases, allow_paths=self.allow_paths)
        return weights.prepare(source, self.cache)


def _announce(trainee: Trainee, trained: int, plan: TrainPlan, watch: Watch) -> None:
    total = sum(p.numel() for p in trainee.peft.parameters())
    precision = str(trainee.head.weight.dtype).removeprefix("torch.")
    watch.message(
        f"Training {trained:,} of {total:,} parameters ({trained / total:.2%}): LoRA r={plan.lora_r} on all "
        f"linear layers, {precision} products, fp32 adapter, {torch.get_num_threads()} threads",
        data={"trained_parameters": trained, "parameters": total, "share": trained / total},
    )


def _prove(trainee: Trainee, examples: tuple[Example, ...], max_length: int) -> tuple[Proof, ...]:
    """What the trainer thinks of a few answers, with the weights that were saved."""
    proofs = []
    for example in examples:
        # The last answer only: that is what a server is asked for.
        weights_ = (0,) * (len(example.messages) - 1) + (1,)
        tokens = trainee.template.encode(example.messages, weights_)
        with torch.no_grad():
            trainee.peft.eval()
            trainee.dropout.stop()
            losses = sft.loss(trainee, sft.collate(trainee, [tokens]))
        proofs.append(Proof(messages=example.messages, log_prob=-float(losses.nll.sum())))
    return tuple(proofs)


def _stored_parameters(folder: Path) -> int:
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                count += size
    return count
