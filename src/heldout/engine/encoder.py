"""Encoders in memory: a text becomes one vector, and with a trained head an answer.

A classifier is two files beside each other, like an adapter: `adapter_model.safetensors` holds every tensor
that was trained (the head, and the encoder's layers that were not frozen), `adapter_config.json` the labels.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import linear, normalize
from transformers import AutoModel, AutoTokenizer

from heldout.engine import device
from heldout.engine.base import Message, ModelRef, Piece, Progress, Reply, TokenChoice
from heldout.engine.labels import CLASSIFIER, Labels, text_of
from heldout.errors import ContextLengthExceeded, InvalidValue, ModelNotFound

#: Trained classifiers kept loaded on top of one encoder.
LOADED_CLASSIFIERS = 8


class Encoder:
    """An encoder and its tokenizer. Always fp32: small enough, and training and serving stay equal."""

    def __init__(self, folder: Path) -> None:
        try:
            self.network = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"The encoder in {folder} cannot be loaded: {error}") from error
        # It reads the first token's vector only; ours is the mean of all.
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.context = context(self.network.config, self.tokenizer)
        self.width = int(self.network.config.hidden_size)
        self.network.requires_grad_(False).eval().to(device.chosen())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The encoder's layers, lowest first."""
        count = self.network.config.num_hidden_layers
        found = [one for one in self.network.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count]
        if not found:
            raise ModelNotFound(f"{type(self.network).__name__} has no list of {count} layers: it cannot be trained")
        return found[0]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with the special tokens around it, however long."""
        # verbose: the warning about long texts; whoever calls says so better.
        return list(self.tokenizer(list(texts), truncation=False, verbose=False).input_ids) if texts else []

    def vectors(self, ids: Sequence[Sequence[int]], tensors: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """One vector for each text, [B, h]: the mean over its tokens, of length sqrt(h).

        Args:
            tensors: take the place of the network's own, by name.
        """
        longest = max(map(len, ids))
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        tokens = torch.full((len(ids), longest), self.tokenizer.pad_token_id or 0)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        inputs = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}
        hidden = functional_call(self.network, tensors or {}, (), inputs).last_hidden_state
        weight = inputs["attention_mask"][:, :, None].to(hidden.dtype)
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        # Length sqrt(h), so that a coordinate is about 1 whatever the width.
        return normalize(mean, dim=-1) * math.sqrt(self.width)

    def all_vectors(
        self,
        ids: Sequence[Sequence[int]],
        tensors: dict[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """`vectors` of many texts, [n, h], without gradient."""
        out = torch.empty(len(ids), self.width, device=self.device)
        tell = progress or (lambda done, total: None)
        done = 0
        tell(done, len(ids))
        with torch.no_grad():
            for rows in batches([len(one) for one in ids], limit=device.portions().padded):
                out[rows] = self.vectors([ids[row] for row in rows], tensors)
                done += len(rows)
                tell(done, len(ids))
        return out


def context(config: Any, tokenizer: Any) -> int:
    """The most tokens a text may have, special tokens included."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= int(config.pad_token_id) + 1  # their positions begin behind the padding's
    return min(positions, int(tokenizer.model_max_length))


def batches(lengths: Sequence[int], *, limit: int) -> list[list[int]]:
    """Indices of texts that are padded together: of similar length, at most `limit` padded tokens or one text."""
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        # Sorted: the newest is the longest.
        if not found or (len(found[-1]) + 1) * lengths[row] > limit:
            found.append([])
        found[-1].append(row)
    return found


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """What was trained on top of an encoder."""

    labels: Labels
    with_system: bool  # see labels.text_of
    max_length: int  # tokens of the longest text it takes, special tokens included
    tensors: dict[str, torch.Tensor]  # of the network, by name, those that were trained
    weight: torch.Tensor  # [labels, h] of the head
    bias: torch.Tensor  # [labels]

    def log_probs(self, encoder: Encoder, ids: Sequence[Sequence[int]], progress: Progress | None) -> torch.Tensor:
        """Log-probability (nats) of every label for every text, [n, labels], on the CPU."""
        features = encoder.all_vectors(ids, self.tensors, progress)
        return torch.log_softmax(linear(features, self.weight, self.bias), dim=-1).cpu()


def load_classifier(folder: Path, encoder: Encoder) -> Classifier:
    """What training saved in `folder`. Raises ModelNotFound when it is not there, or is of another encoder."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors", device=str(encoder.device))
    except FileNotFoundError as missing:
        raise ModelNotFound(f"There is no classifier in {folder}: {missing.filename} is missing") from missing
    if config.get("heldout") != CLASSIFIER:
        raise ModelNotFound(f"{folder} holds no classifier but an adapter of a chat model")
    own = dict(encoder.network.named_parameters())
    trained = {name.removeprefix("encoder."): one for name, one in tensors.items() if name.startswith("encoder.")}
    if any(name not in own or own[name].shape != one.shape for name, one in trained.items()):
        where = encoder.network.name_or_path
        raise ModelNotFound(f"The classifier in {folder} was trained on another encoder than the one in {where}")
    return Classifier(
        labels=Labels(key=config["key"], names=tuple(config["labels"]), answers=tuple(config["answers"])),
        with_system=config["with_system"],
        max_length=config["max_length"],
        tensors=trained,
        weight=tensors["head.weight"],
        bias=tensors["head.bias"],
    )


class LoadedEncoder:
    """One encoder in memory with the classifiers on top of it: the encoder's side of LocalEngine."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.encoder = Encoder(folder)
        self._classifiers: OrderedDict[str, Classifier] = OrderedDict()  # by folder

    def chat(
        self,
        model: ModelRef,
        conversations: Sequence[Sequence[Message]],
        progress: Progress | None = None,
    ) -> list[Reply]:
        """The likeliest answer to each conversation. There is nothing to draw: temperature does not matter."""
        classifier = self.classifier(model)
        ids = self._read(classifier, conversations)
        log_probs = classifier.log_probs(self.encoder, ids, progress)
        return [_reply(classifier.labels, len(one), row) for one, row in zip(ids, log_probs, strict=True)]

    def stream(self, model: ModelRef, conversation: Sequence[Message]) -> Iterator[Piece]:
        """The likeliest answer in one piece."""
        (reply,) = self.chat(model, [conversation])
        return iter(
            [
                Piece(text=reply.text, tokens=reply.tokens),
                Piece(
                    finish_reason=reply.finish_reason,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                ),
            ]
        )

    def log_probs(
        self, model: ModelRef, conversations: Sequence[Sequence[Message]], progress: Progress | None = None
    ) -> list[float]:
        """See Engine.log_probs: of the class that the last message names. Raises InvalidValue when it is none."""
        classifier = self.classifier(model)
        ids = self._read(classifier, [messages[:-1] for messages in conversations])
        found = classifier.log_probs(self.encoder, ids, progress)
        return [
            float(row[_index(classifier.labels, str(messages[-1]["content"]))])
            for row, messages in zip(found, conversations, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """See Engine.embed."""
        ids = self.encoder.tokenize(texts)
        _refuse_long(ids, self.encoder.context)
        vectors: list[list[float]] = normalize(self.encoder.all_vectors(ids), dim=-1).tolist()
        return vectors

    def classifier(self, model: ModelRef) -> Classifier:
        """What was trained. Raises InvalidValue for the encoder alone."""
        if model.adapter is None:
            raise InvalidValue(
                f"{self.name} is an encoder: it answers only after fine-tuning on labels. "
                "Train it on examples whose answers are labels, and ask the fine-tuned model.",
                code="unsupported_value",
                param="model",
            )
        if model.adapter not in self._classifiers:
            self._classifiers[model.adapter] = load_classifier(Path(model.adapter), self.encoder)
            if len(self._classifiers) > LOADED_CLASSIFIERS:
                self._classifiers.popitem(last=False)
        self._classifiers.move_to_end(model.adapter)
        return self._classifiers[model.adapter]

    def _read(self, classifier: Classifier, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
        ids = self.encoder.tokenize([text_of(prompt, with_system=classifier.with_system) for prompt in prompts])
        _refuse_long(ids, classifier.max_length)
        return ids


def _refuse_long(ids: Sequence[Sequence[int]], limit: int) -> None:
    longest = max(map(len, ids), default=0)
    if longest > limit:
        raise ContextLengthExceeded.of(longest, limit)


def _index(labels: Labels, answer: str) -> int:
    index = labels.index(answer)
    if index is None:
        raise InvalidValue(f"{answer!r} is none of this model's {len(labels)} answers")
    return index


def _reply(labels: Labels, prompt_tokens: int, log_probs: torch.Tensor) -> Reply:
    likeliest = [int(i) for i in torch.argsort(log_probs, descending=True, stable=True)]
    ranked = tuple((labels.answers[i], float(log_probs[i])) for i in likeliest)
    answer, log_prob = ranked[0]
    return Reply(
        text=answer,
        finish_reason="stop",
        prompt_tokens=prompt_tokens,
        completion_tokens=1,  # one decision
        tokens=(TokenChoice(text=answer, log_prob=log_prob, top=ranked),),
    )
