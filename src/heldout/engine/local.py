"""The engine of this process: base models, and the adapters and classifiers on top of them, in torch."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from heldout.engine import cache, catalogue, device, frozen, generate, likelihood, rungs, weights
from heldout.engine.base import Message, ModelRef, Piece, Progress, Reply, Sampling
from heldout.engine.encoder import LoadedEncoder
from heldout.engine.expected import Expected
from heldout.engine.template import ChatTemplate
from heldout.errors import ContextLengthExceeded, InvalidValue, ModelNotFound
from heldout.kernels import Kernels, compiling

_log = logging.getLogger(__name__)

#: Adapters kept loaded on top of one base model.
LOADED_ADAPTERS = 8


class Loaded:
    """One base model in memory with the adapters on top of it."""

    def __init__(self, folder: Path, precision: torch.dtype, kernels: Kernels | None) -> None:
        """`kernels`: to multiply with, if they are for such a model."""
        taken = frozen.taking(kernels, weights.config_of(folder), precision)
        self.model = weights.load_model(folder, precision, cache.IMPLEMENTATION, taken)
        self.template = ChatTemplate(weights.load_tokenizer(folder), _end_ids(self.model))
        self.context = weights.context_of(self.model.config.to_dict())
        self._peft: PeftModel | None = None
        self._count = 0
        self._expected: tuple[tuple[str, ...], Expected] = ((), Expected())
        self._adapters: OrderedDict[str, str] = OrderedDict()  # folder -> name; a name may not contain dots

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[Any]:
        """The model with this adapter switched on, or with none."""
        if adapter is None:
            with self._peft.disable_adapter() if self._peft else contextlib.nullcontext():
                yield self.model
            return
        name = self._load(adapter)
        assert self._peft is not None
        self._peft.set_adapter(name)
        yield self.model

    def expected(self, sampling: Sampling) -> Expected:
        """What greedy answers are likely to be. The last ones are kept: probes ask many times."""
        texts = sampling.expected if sampling.temperature <= 0 else ()
        if texts != self._expected[0]:
            self._expected = (texts, Expected(self.template.answers(texts)))
        return self._expected[1]

    def _load(self, adapter: str) -> str:
        if adapter not in self._adapters:
            if not (Path(adapter) / "adapter_model.safetensors").is_file():
                raise ModelNotFound(f"There is no adapter (adapter_model.safetensors) in {adapter}")
            self._count += 1
            name = f"adapter_{self._count}"
            # PEFT puts its layers into self.model; the wrapper only manages them.
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, adapter, adapter_name=name)
            else:
                self._peft.load_adapter(adapter, adapter_name=name)
            self._peft.eval()
            self._adapters[adapter] = name
            if len(self._adapters) > LOADED_ADAPTERS:
                self._peft.delete_adapter(self._adapters.popitem(last=False)[1])
        self._adapters.move_to_end(adapter)
        return self._adapters[adapter]


class LocalEngine:
    """Loads a base model at its first use; keeps one chat model and one encoder. Calls take turns."""

    def __init__(
        self,
        *,
        cache: Path,
        aliases: dict[str, str],
        precision: str = "auto",
        allow_paths: bool = False,
        use_kernels: bool = True,
    ) -> None:
        """`use_kernels`: where they can be compiled (heldout/kernels)."""
        self.cache = cache
        self._use_kernels, self._told = use_kernels, False
        self.aliases = aliases
        self.allow_paths = allow_paths
        self._precision = precision
        # Not an RLock: a stream may be continued and closed by another thread than the one that began it.
        self._lock = threading.Lock()
        self._name: str | None = None
        self._loaded: Loaded | None = None
        # Beside the chat model: it is small, and the ladder asks both in turn.
        self._encoder: LoadedEncoder | None = None

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        progress: Progress | None = None,
    ) -> list[Reply]:
        """See Engine.chat."""
        if counts := rungs.word_counts(model):
            return counts.chat(conversations, progress)
        model, conversations = rungs.with_its_shots(model, conversations)
        with self._lock, torch.no_grad():
            if encoder := self._encoder_called(model.base_model):
                return encoder.chat(model, conversations, progress)
            loaded = self._base(model.base_model)
            prompts = [loaded.template.prompt(messages) for messages in conversations]
            limits = [_room(prompt, sampling, loaded.context) for prompt in prompts]
            expected = loaded.expected(sampling)
            with loaded.using(model.adapter) as network:
                answers = generate.generate(
                    network, prompts, limits, sampling, loaded.template.stop_ids, progress, expected
                )
        return [
            _reply(loaded.template, prompt, new, ended, sampling.stop)
            for prompt, (new, ended) in zip(prompts, answers, strict=True)
        ]

    def stream(
        self, model: ModelRef, conversation: Sequence[Message], sampling: Sampling = Sampling()
    ) -> Iterator[Piece]:
        """See Engine.stream."""
        if counts := rungs.word_counts(model):
            return counts.stream(conversation)
        model, [conversation] = rungs.with_its_shots(model, [conversation])
        with self._lock:
            if encoder := self._encoder_called(model.base_model):
                return encoder.stream(model, conversation)
            loaded = self._base(model.base_model)
            prompt = loaded.template.prompt(conversation)
            limit = _room(prompt, sampling, loaded.context)
            with loaded.using(model.adapter):
                pass  # a missing adapter is known before the first token
        return self._stream(loaded, model.adapter, prompt, limit, sampling)

    def _stream(
        self, loaded: Loaded, adapter: str | None, prompt: list[int], limit: int, sampling: Sampling
    ) -> Iterator[Piece]:
        new: list[int] = []
        sent = ""
        finish = "length"
        with self._lock, loaded.using(adapter) as network:
            tokens = generate.generate_stream(network, prompt, limit, sampling, loaded.template.stop_ids)
            for token in tokens:
                if token is None:
                    finish = "stop"
                    break
                new.append(token)
                text, stopped = _cut(loaded.template.decode(new), sampling.stop)
                # Half a character, or what may become a stop string, waits for its other half.
                ready = text if stopped else _settled(text, sampling.stop)
                if len(ready) > len(sent):
                    yield Piece(text=ready[len(sent) :])
                    sent = ready
                if stopped:
                    finish = "stop"
                    break
        text, _ = _cut(loaded.template.decode(new), sampling.stop)
        yield Piece(
            text=text[len(sent) :],
            finish_reason=finish,
            prompt_tokens=len(prompt),
            completion_tokens=len(new),
        )

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        """See Engine.log_probs."""
        if counts := rungs.word_counts(model):
            return counts.log_probs(conversations)
        model, conversations = rungs.with_its_shots(model, conversations)
        with self._lock, torch.no_grad():
            if encoder := self._encoder_called(model.base_model):
                return encoder.log_probs(model, conversations, progress)
            loaded = self._base(model.base_model)
            with loaded.using(model.adapter) as network:
                rows = [loaded.template.encode(messages, [0] * (len(messages) - 1) + [1]) for messages in conversations]
                if (longest := max(map(len, rows), default=0)) > loaded.context:
                    raise ContextLengthExceeded.of(longest, loaded.context)
                return likelihood.log_probs(network, rows, progress)

    def count_tokens(self, base_model: str, texts: Sequence[str]) -> list[int]:
        """See Engine.count_tokens."""
        with self._lock:
            if encoder := self._encoder_called(base_model):
                return [len(ids) for ids in encoder.encoder.tokenize(texts)]
            template = self._base(base_model).template
        return [len(ids) for ids in template.answers(texts)]

    def embed(self, encoder: str, texts: Sequence[str]) -> list[list[float]]:
        """See Engine.embed."""
        with self._lock:
            loaded = self._encoder_called(encoder)
            if loaded is None:
                raise InvalidValue(f"{encoder} is a chat model, not an encoder", param="model")
            return loaded.embed(texts)

    def close(self) -> None:
        """See Engine.close."""
        with self._lock:
            self._free()

    def _free(self) -> None:
        self._name = self._loaded = self._encoder = None

    def folder(self, base_model: str) -> Path:
        """The prepared folder of a base model; may take half a minute the first time."""
        source = catalogue.resolve(base_model, self.aliases, allow_paths=self.allow_paths)
        return weights.prepare(source, self.cache)

    def is_prepared(self, base_model: str) -> bool:
        """False when `folder` would take a while. Raises ModelNotFound."""
        source = catalogue.resolve(base_model, self.aliases, allow_paths=self.allow_paths)
        return weights.is_prepared(source, self.cache)

    def _encoder_called(self, name: str) -> LoadedEncoder | None:
        """The encoder of this name; None when the name is a chat model's."""
        if self._encoder is not None and self._encoder.name == name:
            return self._encoder
        if self._name == name:
            return None
        folder = self.folder(name)
        if catalogue.kind_of(folder) == catalogue.CHAT:
            return None
        self._encoder = LoadedEncoder(name, folder)
        return self._encoder

    def _base(self, name: str) -> Loaded:
        if self._loaded is None or self._name != name:
            self._name = self._loaded = None  # one chat model at a time: two may not fit
            precision = weights.choose_precision(self._precision)
            self._loaded, self._name = Loaded(self.folder(name), precision, self._kernels()), name
        return self._loaded

    def _kernels(self) -> Kernels | None:
        if device.is_gpu():
            return None
        kernels, why_not = compiling.choose(self.cache, use=self._use_kernels)
        if why_not and self._use_kernels and not self._told:
            self._told = True
            _log.warning(
                "Answers come slower and models take up to twice the memory: there are no kernels, %s", why_not
            )
        return kernels


def use_threads(count: int) -> None:
    """How many threads torch computes with in this process, from now on."""
    torch.set_num_threads(count)


def _end_ids(model: Any) -> tuple[int, ...]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _room(prompt: Sequence[int], sampling: Sampling, context: int) -> int:
    room = context - len(prompt)
    if room < 1:
        raise ContextLengthExceeded.of(len(prompt), context)
    # Without a limit a model that never ends its turn would keep the machine busy to the end of its context.
    return min(room, 1024 if sampling.max_tokens is None else max(1, sampling.max_tokens))


def _reply(template: ChatTemplate, prompt: list[int], new: list[int], ended: bool, stop: tuple[str, ...]) -> Reply:
    text, stopped = _cut(template.decode(new), stop)
    return Reply(
        text=text,
        finish_reason="stop" if ended or stopped else "length",
        prompt_tokens=len(prompt),
        completion_tokens=len(new),
    )


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    found = [at for one in stop if one and (at := text.find(one)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _settled(text: str, stop: tuple[str, ...]) -> str:
    """The part of a growing text that no later token can take back."""
    text = text.rstrip("\ufffd")
    hold = max(
        (n for one in stop for n in range(1, len(one)) if text.endswith(one[:n])),
        default=0,
    )
    return text[: len(text) - hold]
