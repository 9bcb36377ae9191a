"""Supervised fine-tuning of a chat model: build_model, tokenize, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file

from heldout.engine import frozen, stored, weights
from heldout.engine.frozen import FrozenLinear
from heldout.engine.template import ChatTemplate, Tokens
from heldout.errors import InvalidTrainingFile, InvalidValue, ModelNotFound
from heldout.kernels import Kernels
from heldout.pipeline.memory import Shapes, Sizes, valid_tokens
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Watch
from heldout.train import body, head, lora
from heldout.train.activations import Activations
from heldout.train.attention import IMPLEMENTATION
from heldout.train.dropout import DrawnOnGpu, Dropout
from heldout.train.graphs import Filled, Graphs, fill
from heldout.train.method import TEMPERATURES, Learned, Losses, add_gradients
from heldout.train.packing import Pack, micro_batches, pack
from heldout.train.products import Dense, Held

#: What must be known of a model's size.
SHAPES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
#: Lines that are named in one refusal.
SHOWN = 20


class ChatTrainee:
    """A base model with a fresh adapter, ready to be trained."""

    def __init__(self, peft: Any, template: ChatTemplate, plan: TrainPlan, kernels: Kernels | None) -> None:
        model = peft.get_base_model()
        self.peft, self.template, self.plan = peft, template, plan
        self.activations: Activations | None = None
        self.head: torch.nn.Linear = model.get_output_embeddings()  # frozen
        held = isinstance(self.head, FrozenLinear)
        self.output = Held.of([self.head.frozen]) if held else Dense.of(self.head)
        on_gpu = self.device.type == "cuda"
        masks = (plan.lora_dropout, plan.seed)
        self.dropout = DrawnOnGpu(*masks, like=self.head.weight) if on_gpu else Dropout(*masks)
        lora.fuse(peft, self.dropout)
        self.body = body.Body(
            model, self.dropout, cut=plan.freeze_layers, checkpoint=plan.checkpointing, kernels=kernels
        )
        self.parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        self.graphs = Graphs(self.run_filled, self.parameters.values()) if on_gpu and self.body.fused else None
        self._widest = max(p.shape[-1] for name, p in self.parameters.items() if ".lora_A." in name)
        self._step = 0
        self._longest = 0  # tokens of the longest row so far
        self._training = False

    @property
    def precision(self) -> str:
        """See Trainee.precision."""
        return str(self.head.weight.dtype).removeprefix("torch.")

    @property
    def kernels(self) -> bool:
        """See Trainee.kernels."""
        return self.body.uses_kernels

    @property
    def description(self) -> str:
        """See Trainee.description."""
        plan = self.plan
        targets = "all linear layers" if plan.target_modules == ("all-linear",) else ", ".join(plan.target_modules)
        cut = f" above layer {plan.freeze_layers}" if plan.freeze_layers else ""
        return f"LoRA r={plan.lora_r} on {targets}{cut}"

    @property
    def size(self) -> int:
        """See Trainee.size."""
        return sum(p.numel() for p in self.peft.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def rows(self, examples: Sequence[Example], part: str) -> list[Tokens]:
        """See Trainee.rows."""
        found = tokenize(self.template, examples, self.plan.max_length, part)
        self._longest = max(self._longest, *map(len, found), 0)
        return found

    def prepare(self, rows: Sequence[Tokens], watch: Watch) -> None:
        """See Trainee.prepare: what leaves the frozen layers."""
        if self.activations is None:
            return
        computed = self.activations.prepare(rows, lambda done, total: watch.progress("frozen layers", done, total))
        watch.message(
            f"The {self.plan.freeze_layers} frozen layers are computed once: for {computed} examples now, "
            f"{len(rows) - computed} were known"
        )

    def log_prob(self, example: Example) -> float:
        """See Trainee.log_prob: of the last answer only, which is what a server is asked for."""
        weights_ = (0,) * (len(example.messages) - 1) + (1,)
        self.stop()
        with torch.no_grad():
            return -float(self.losses([self.template.encode(example.messages, weights_)]).nll.sum())

    def micro_batches(self, rows: Sequence[Tokens], *, training: bool) -> list[list[int]]:
        """See Trainee.micro_batches: packs of at most so many packed tokens."""
        limit = self.plan.micro_tokens if training else valid_tokens(self.plan)
        return micro_batches(rows, range(len(rows)), limit=limit)

    def weight(self, row: Tokens) -> float:
        """See Trainee.weight."""
        supervised = sum(row.supervised[1:])
        return supervised + self.plan.prompt_loss_weight * (len(row) - 1 - supervised)

    def start(self, step: int, rows: Sequence[Tokens]) -> None:
        """See Trainee.start."""
        self._step, self._training = step, True
        packed = max(min(self.plan.micro_tokens, sum(map(len, rows))), *map(len, rows))
        if self.device.type == "cuda":
            # The same in all steps: recorded graphs know where masks are, and a resumed job must find them there too.
            packed = max(self.plan.micro_tokens, self._longest, packed)
        self.dropout.start(step, self._widest * packed)
        if self.graphs:
            self.graphs.start(self.dropout.address)

    def stop(self) -> None:
        """See Trainee.stop."""
        self._training = False
        self.dropout.stop()

    def losses(self, rows: Sequence[Tokens], number: int = 0) -> Losses:
        """See Trainee.losses."""
        plan, training = self.plan, self._training
        self.dropout.next_pack(number)
        one = pack(rows, prompt_weight=plan.prompt_loss_weight if training else 0.0).to(self.device)
        hidden = self.body.above(self._enter(one, rows, number), one.layout, one.rows)
        # index_select, here and below: where a row is taken several times, its gradient is added up in a fixed order.
        # That of plain indexing is added in whatever order threads come, and a resumed job would end elsewhere.
        loss, nll, right, tempered = head.losses(
            hidden.index_select(0, one.sources),
            self.output,
            one.targets,
            smoothing=plan.label_smoothing if training else 0.0,
            temperatures=() if training else TEMPERATURES,
        )
        entries = one.entries
        return Losses(
            loss=loss.index_select(0, entries),
            nll=nll[entries],
            right=right[entries],
            owners=one.owners,
            weights=one.weights,
            tempered=tempered[:, entries],
        )

    def learn(self, rows: Sequence[Tokens], number: int, weight: float) -> Learned:
        """See Trainee.learn."""
        if not self.graphs:
            return add_gradients(self.losses(rows, number), weight)
        self.dropout.next_pack(number)
        one = pack(rows, prompt_weight=self.plan.prompt_loss_weight)
        x = self._enter(one.to(self.device), rows, number)
        nll, right = (found.cpu()[one.entries] for found in self.graphs.learn(fill(one, x, weight)))
        return Learned(nll, right, one.weights)

    def run_filled(self, filled: Filled) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of a filled pack (see graphs.Run)."""
        hidden = self.body.above(filled.x, filled.layout, filled.rows)
        loss, nll, right, _ = head.losses(
            hidden.index_select(0, filled.sources),
            self.output,
            filled.targets,
            smoothing=self.plan.label_smoothing,
        )
        (loss * filled.weights).sum().backward()
        return nll, right

    def _enter(self, one: Pack, rows: Sequence[Tokens], number: int) -> torch.Tensor:
        """What enters the first trained layer, [L, h]."""
        if self.plan.freeze_layers:
            return self.activations.of(one, rows) if self.activations else self.body.below(one)
        noise = self.plan.neftune_noise_alpha if self._training else 0.0
        return self.body.embed(one, noise, hash((self.plan.seed, self._step, number)) % (1 << 62))

    def save(self, folder: Path) -> None:
        """See Trainee.save: the standard PEFT layout."""
        self.peft.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """See Trainee.load."""
        tensors = load_file(folder / "adapter_model.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                # PEFT leaves the adapter's own name ("default") out of the file.
                parameter.copy_(tensors[name.replace(".default.", ".")])


def build_model(
    plan: TrainPlan,
    folder: Path,
    precision: torch.dtype,
    activations: Path | None = None,
    kernels: Kernels | None = None,
) -> ChatTrainee:
    """The base model with LoRA on the plan's modules of the layers above the cut. Adapter weights are fp32.

    Args:
        activations: folder of cached activations of frozen layers; None computes them every time.
        kernels: for a processor only; None computes with torch's operations.

    Raises InvalidValue when the model has none of the target modules, or cannot be cut.
    """
    model = weights.load_model(folder, precision, IMPLEMENTATION, freezing(kernels, config_of(folder), precision))
    template = ChatTemplate(weights.load_tokenizer(folder))
    torch.manual_seed(plan.seed)  # A starts random, B at zero
    names = linear_names(model)
    targets = names if plan.target_modules == ("all-linear",) else list(plan.target_modules)
    trained = range(plan.freeze_layers, model.config.num_hidden_layers)
    try:
        peft = get_peft_model(
            model,
            LoraConfig(
                r=plan.lora_r,
                lora_alpha=plan.lora_alpha,  # type: ignore[arg-type]  # a fraction is fine
                lora_dropout=plan.lora_dropout,
                target_modules=targets,
                layers_to_transform=list(trained) if plan.freeze_layers else None,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise InvalidValue(
            f"target_modules={targets!r} does not fit this model: {error}", param="hyperparameters.target_modules"
        ) from error
    if targets is not names:
        _refuse_without_layers(peft, targets, names, plan.freeze_layers)
    trainee = ChatTrainee(peft, template, plan, kernels)
    if activations is not None and plan.freeze_layers:
        trainee.activations = Activations.of_model(activations, trainee.body, folder, precision, valid_tokens(plan))
    return trainee


def config_of(folder: Path) -> dict[str, Any]:
    """The chat model's config. Raises ModelNotFound when it is none that can be trained."""
    config = weights.config_of(folder)
    missing = [name for name in SHAPES if not isinstance(config.get(name), int)]
    if missing:
        raise ModelNotFound(
            f"The model in {folder} is not a chat model we can train: its config.json (type {config['model_type']!r}) "
            f"does not say {', '.join(missing)}. What can be trained are decoders with the layers of Llama, Mistral, "
            "Qwen or a like one."
        )
    weights.refuse_unknown_arithmetic(folder, config)
    return config


def freezing(kernels: Kernels | None, config: Mapping[str, Any], precision: torch.dtype) -> Kernels | None:
    """The kernels if all products with base weights are to be theirs (engine/frozen.py)."""
    return frozen.taking(kernels, config, precision) if body.is_fused(config) else None


def shapes(
    config: Mapping[str, Any], folder: Path, precision: torch.dtype, *, gpu: bool, kernels: Kernels | None = None
) -> Shapes:
    """A base model's sizes from its config.json and its files; `precision`: of its products."""
    heads, width = config["num_attention_heads"], weights.head_width(config)
    taken = freezing(kernels, config, precision)
    return Shapes(
        parameters=stored.parameters(folder),
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=width,
        number=precision.itemsize,
        held=(stored.precision(folder) if taken and precision == torch.float32 else precision).itemsize,
        frozen=taken is not None,
        gpu=gpu,
        kernel_threads=torch.get_num_threads() if kernels and kernels.attends(width) else 0,
    )


def sizes(plan: TrainPlan, model: Shapes, batches: Sequence[Sequence[Tokens]], others: Sequence[Tokens]) -> Sizes:
    """What memory depends on: of the largest step among `batches`, and of the longest example of all."""
    q, kv, wide = model.heads * model.head_width, model.kv_heads * model.head_width, model.intermediate
    names = {
        "q_proj": model.hidden + q,
        "k_proj": model.hidden + kv,
        "v_proj": model.hidden + kv,
        "o_proj": q + model.hidden,
        "gate_proj": model.hidden + wide,
        "up_proj": model.hidden + wide,
        "down_proj": wide + model.hidden,
    }
    targets = names if plan.target_modules == ("all-linear",) else set(plan.target_modules) & set(names)
    packs = [pack(batch, prompt_weight=plan.prompt_loss_weight) for batch in batches]
    return Sizes(
        packed=max(len(one.ids) for one in packs),
        longest=max(len(row) for rows in (*batches, others) for row in rows),
        predictions=max(len(one.targets) for one in packs),
        trained=plan.lora_r * sum(names[name] for name in targets) * (model.layers - plan.freeze_layers),
        ranks=plan.lora_r * len(targets),
    )


def _refuse_without_layers(peft: Any, targets: Sequence[str], names: Sequence[str], cut: int) -> None:
    """Raise InvalidValue when a target got no adapter, or one where none is trained. PEFT passes over a name that
    fits nothing as long as another one fits."""
    model = peft.get_base_model()
    head_ = model.get_output_embeddings()
    adapted = [name for name, one in model.named_modules() if isinstance(one, Linear) and one is not head_]
    useless = [name for name in targets if not any(f".{one}".endswith(f".{name}") for one in adapted)]
    if useless:
        above = f" above layer {cut}" if cut else ""
        raise InvalidValue(
            f"target_modules: {', '.join(map(repr, useless))} names no linear layer{above} of this model that can get "
            f"an adapter. There are {', '.join(names)}; the output head and the embeddings stay as they are.",
            param="hyperparameters.target_modules",
        )


def linear_names(model: Any) -> list[str]:
    """The names of all linear layers but the output head, as PEFT's "all-linear" means them."""
    head_ = model.get_output_embeddings()
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head_
    }
    return sorted(found)


def tokenize(template: ChatTemplate, examples: Sequence[Example], max_length: int, part: str) -> list[Tokens]:
    """Tokens of every example, proven: labels cover exactly the answers and their end-of-turn tokens,
    nothing is cut, nothing is empty. Raises InvalidTrainingFile naming every line that fails."""
    tokens: list[Tokens] = []
    long: list[str] = []
    problems: list[str] = []
    for example in examples:
        try:
            one = template.encode(example.messages, example.weights)
            if len(one) > max_length:
                long.append(f"line {example.line} ({len(one)} tokens)")
                continue
            _prove(template, example, one)
        except InvalidValue as error:
            problems.append(f"line {example.line}: {error}")
        else:
            tokens.append(one)
    refusals = []
    if long:
        refusals.append(
            f"{len(long)} examples of {part} are longer than max_length ({max_length} tokens), and their answers would "
            f"be cut: {_first(long, ', ')}. Shorten them, or raise max_length as far as the model reads."
        )
    if problems:
        refusals.append(f"{len(problems)} examples of {part} cannot be trained on: {_first(problems, '; ')}")
    if refusals:
        raise InvalidTrainingFile("\n".join(refusals))
    return tokens


def count_tokens(template: ChatTemplate, examples: Sequence[Example]) -> list[int]:
    """Tokens of every example as `tokenize` makes them; 0 where it would name a problem of the template."""

    def count(example: Example) -> int:
        try:
            return len(template.encode(example.messages, example.weights))
        except InvalidValue:
            return 0

    return [count(example) for example in examples]


def _first(found: Sequence[str], between: str) -> str:
    more = len(found) - SHOWN
    return between.join(found[:SHOWN]) + (f"{between}and {more} more" if more > 0 else "")


def _prove(template: ChatTemplate, example: Example, tokens: Tokens) -> None:
    """Check one example's labels against its messages, by a way that does not reuse how they were made."""
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
