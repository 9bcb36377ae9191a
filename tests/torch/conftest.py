"""Trainees, plans and models small enough for a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from heldout.engine import cache, device
from heldout.engine.base import Message, ModelRef, Progress, Reply, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.portions import Portions
from heldout.engine.template import ChatTemplate
from heldout.engine.weights import load_tokenizer
from heldout.kernels import Kernels, compiling
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import Adapter, CurvePoint
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Silent, Watch
from heldout.settings import read_settings
from heldout.train import sft
from heldout.train.checkpoint import ADAPTER
from heldout.train.sft import ChatTrainee
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_row
from tests.torch.cases import FAMILIES, make_family

#: One of tests.torch.cases.FAMILIES.
LLAMA = "llama, 2 queries a key"

PLAN = TrainPlan(
    n_epochs=3,
    batch_size=8,
    learning_rate_multiplier=1.0,
    learning_rate=5e-3,
    lr_search="off",
    warmup_ratio=0.06,
    warmup_steps=5,
    total_steps=30,
    end_share=1.0,
    kept_shares=(),
    eval_every=5,
    lora_r=8,
    lora_alpha=16.0,
    lora_dropout=0.0,
    target_modules=("all-linear",),
    freeze_layers=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    ema_decay=0.0,
    label_smoothing=0.0,
    neftune_noise_alpha=0.0,
    prompt_loss_weight=0.0,
    replay_ratio=0.0,
    augmentation="none",
    max_length=512,
    micro_tokens=2048,
    checkpointing=False,
    predicted_memory_bytes=0,
    early_stopping=True,
    patience=4,
    min_delta=0.0,
    min_delta_errors=0.5,
    seed=0,
    reasons={},
)


@pytest.fixture(scope="module")
def families(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family, by name."""
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root / str(i), tiny_model, name) for i, name in enumerate(FAMILIES)}


@pytest.fixture(autouse=True, scope="session")
def on_the_processor() -> Iterator[None]:
    """Where there is a GPU these tests leave it alone, but for test_gpu.py: what is exact here is compared with models
    on the processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that a test starts
        patch.setattr(device, "is_gpu", lambda: False)
        yield


@pytest.fixture
def plan() -> Callable[..., TrainPlan]:
    """A plan with some numbers changed."""
    return lambda **changes: replace(PLAN, **changes)


def examples(numbers: range) -> tuple[Example, ...]:
    """Examples of the colour task."""
    return tuple(
        Example(messages=tuple(colour_row(i)["messages"]), weights=(0, 0, 1), line=i + 1)  # type: ignore[arg-type]
        for i in numbers
    )


@pytest.fixture
def trainee(tiny_model: Path, plan: Callable[..., TrainPlan]) -> ChatTrainee:
    """The tiny model with an adapter whose B is not zero, so that every gradient path matters."""
    return stirred(sft.build_model(plan(), tiny_model, torch.float32))


def stirred(trainee: ChatTrainee) -> ChatTrainee:
    """Fill the adapter's zeros with small numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return trainee


def build(folder: Path, plan: TrainPlan = PLAN, precision: torch.dtype = torch.float32, **options: Any) -> ChatTrainee:
    """A trainee whose B is not zero, so that every gradient path matters."""
    return stirred(sft.build_model(plan, folder, precision, **options))


def gradients(trainee: Any) -> torch.Tensor:
    """All adapter gradients in one vector; they are cleared."""
    flat = torch.cat([p.grad.flatten() for p in trainee.parameters.values() if p.grad is not None])
    for parameter in trainee.parameters.values():
        parameter.grad = None
    return flat


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference relative to the norm."""
    return float((a - b).norm() / b.norm())


def parts(n_train: int = 80, n_valid: int = 24) -> Split:
    """The colour task, split as the `colours` files are."""
    split = {
        "train": examples(range(n_train)),
        "valid": examples(range(1000, 1000 + n_valid)),
        "holdout": examples(range(2000, 2048)),
    }
    return Split(**split, seed=0, groups=sum(map(len, split.values())))


class Recording(Silent):
    """A Watch that notes its story: ("message", text), ("metrics", step), ("checkpoint", step).

    It raises KeyboardInterrupt at the metrics of step `interrupt_at`: the job is killed there.
    """

    def __init__(self, interrupt_at: int = 0) -> None:
        self.story: list[tuple[str, Any]] = []
        self.interrupt_at = interrupt_at

    def message(self, text: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        self.story.append(("message", text))

    def metrics(self, point: CurvePoint, total_steps: int) -> None:
        self.story.append(("metrics", point.step))
        if point.step == self.interrupt_at:
            raise KeyboardInterrupt

    def checkpoint(self, step: int, folder: Path, metrics: dict[str, Any], *, again: bool = False) -> None:
        self.story.append(("checkpoint", step))

    @property
    def messages(self) -> list[str]:
        """The sentences alone."""
        return [what for kind, what in self.story if kind == "message"]


#: 6 steps an epoch, a checkpoint every 3; dropout draws random numbers in every step.
NOISY = replace(PLAN, lora_dropout=0.2, ema_decay=0.6, n_epochs=2, batch_size=4, total_steps=12, eval_every=3)
SMALL = parts(24, 6)


def mislabelled(split: Split) -> Split:
    """Two of three validation answers are another row's: the loss falls while the form of answers is learned, and
    rises once the colours are, whatever the machine rounds."""
    answers = [row.messages[-1] for row in split.valid]
    others = zip(split.valid, [*answers[1:], *answers[:1]], strict=True)
    wrong = [replace(row, messages=(*row.messages[:-1], other)) for row, other in others]
    return replace(split, valid=tuple(row if i % 3 == 0 else wrong[i] for i, row in enumerate(split.valid)))


#: A split and a plan whose lowest validation loss lies near step 27 of 72, at half of what the last steps have: on
#: whatever processor, with kernels and without. Without dropout, whose masks differ with kernels.
TURNING = mislabelled(SMALL)
TURNS = replace(
    NOISY,
    lora_dropout=0.0,
    learning_rate=0.02,
    warmup_steps=5,
    n_epochs=12,
    total_steps=72,
    early_stopping=False,
    seed=2,
)

#: Enough for the tiny model to answer most colours.
LEARNING = replace(PLAN, learning_rate=2e-2, lora_r=16, lora_alpha=32.0, n_epochs=6, total_steps=60)

TOOLS: dict[str, Any] = {"cache": read_settings().cache, "aliases": {}, "precision": "float32", "allow_paths": True}


class Noting(LocalEngine):
    """The engine, with a note of which model was asked what."""

    def __init__(self) -> None:
        super().__init__(**TOOLS)
        self.calls: list[tuple[ModelRef, list[Sequence[Message]]]] = []

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        self.calls.append((model, list(conversations)))
        return super().chat(model, conversations, sampling, progress)

    def questions(self, *, adapter: bool) -> list[str]:
        """What models with an adapter were asked, or without: the last message of each conversation."""
        asked = [some for model, some in self.calls if bool(model.adapter) == adapter]
        return [str(messages[-1]["content"]) for some in asked for messages in some]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Those of this machine; a test that needs them is skipped where there are none."""
    try:
        return compiling.load(read_settings().cache)
    except compiling.Unavailable as error:
        pytest.skip(f"no kernels: {error}")


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is as before after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(
    model: Path, directory: Path, plan: TrainPlan = PLAN, split: Split | None = None, watch: Watch | None = None
) -> Adapter:
    """Train in fp32 in `directory`; the colour task unless told otherwise."""
    trainer = TorchTrainer(**TOOLS)
    return trainer.train(plan, split or parts(), base_model=str(model), directory=directory, watch=watch or Silent())


def same_training(one: Adapter, other: Adapter) -> bool:
    """True when nothing but time distinguishes two trainings."""
    weights = [(adapter.directory / ADAPTER).read_bytes() for adapter in (one, other)]
    numbers = [
        (a.curve, a.best_step, a.last_step, a.trained_tokens, a.trained_parameters, a.stopped, a.proofs)
        for a in (one, other)
    ]
    return weights[0] == weights[1] and numbers[0] == numbers[1]


@pytest.fixture(scope="session")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that has learned the form of the colour task, so that it ends its turns."""
    return train(tiny_model, tmp_path_factory.mktemp("trained"), LEARNING)


@pytest.fixture(scope="session")
def engine() -> LocalEngine:
    """The serving path in fp32."""
    return LocalEngine(**TOOLS)


@pytest.fixture
def base(tiny_model: Path) -> ModelRef:
    return ModelRef(base_model=str(tiny_model))


@pytest.fixture
def tuned(tiny_model: Path, trained: Adapter) -> ModelRef:
    return ModelRef(base_model=str(tiny_model), adapter=str(trained.directory))


@pytest.fixture(scope="session")
def template(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_model))


@pytest.fixture(scope="session")
def plain(tiny_model: Path, trained: Adapter) -> dict[str | None, Any]:
    """The same models by transformers and PEFT alone: {adapter folder or None: model}."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    folder = str(trained.directory)
    return {None: load(), folder: PeftModel.from_pretrained(load(), folder).eval()}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read a few tokens at a time, two rows at once, or one."""
    monkeypatch.setattr(device, "portions", lambda: Portions(cached=4096, rows=2, read=9, padded=512))
    monkeypatch.setattr(cache, "CHUNK", 7)
