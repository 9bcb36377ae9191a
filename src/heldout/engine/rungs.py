"""Cheaper rungs as models: solved examples in front of a prompt, and a linear model on counts of words. No torch.

Each is a folder like an adapter's; `adapter_config.json` says under "heldout" what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heldout.engine.base import Message, ModelRef, Piece, Progress, Reply, TokenChoice
from heldout.engine.labels import CLASSIFIER, user_text
from heldout.errors import InvalidValue

if TYPE_CHECKING:
    import numpy as np

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHOTS, WORD_COUNTS = "shots", "word counts"
#: What of a vectorizer's settings changes what it counts.
COUNTING = ("ngram_range", "sublinear_tf", "token_pattern")


def behind(turns: Sequence[Message], prompt: Sequence[Message]) -> list[Message]:
    """The prompt with these turns before its first user message, after its own system message."""
    system = [message for message in prompt[:1] if message["role"] == "system"]
    return [*system, *turns, *prompt[len(system) :]]


def write_shots(directory: Path, turns: Sequence[Message]) -> None:
    """A prompt's solved examples as a model."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"heldout": SHOTS, "turns": list(turns)}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def with_its_shots(
    model: ModelRef, conversations: Sequence[Sequence[Message]]
) -> tuple[ModelRef, Sequence[Sequence[Message]]]:
    """The base model and what it is asked, where `model` is a prompt with solved examples; else both as they are."""
    config = _config_of(model)
    if config.get("heldout") != SHOTS:
        return model, conversations
    turns = config["turns"]
    return ModelRef(base_model=model.base_model), [behind(turns, prompt) for prompt in conversations]


@dataclass(frozen=True, kw_only=True, eq=False)
class WordCounts:
    """TF-IDF and logistic regression, as numbers."""

    vectorizer: Any
    weight: np.ndarray  # [labels, terms]
    bias: np.ndarray  # [labels]
    answers: tuple[str, ...]

    def chat(self, conversations: Sequence[Sequence[Message]], progress: Progress | None = None) -> list[Reply]:
        """The likeliest answer to each conversation. There is nothing to draw: temperature does not matter."""
        tell = progress or (lambda done, total: None)
        tell(0, len(conversations))
        replies = [self._reply(row) for row in self._log_probs(conversations)]
        tell(len(replies), len(replies))
        return replies

    def stream(self, conversation: Sequence[Message]) -> Iterator[Piece]:
        """The likeliest answer in one piece."""
        (reply,) = self.chat([conversation])
        return iter([Piece(text=reply.text, tokens=reply.tokens), Piece(finish_reason="stop", completion_tokens=1)])

    def log_probs(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """See Engine.log_probs: of the answer that the last message is. Raises InvalidValue when it is none."""
        said = [str(messages[-1]["content"]) for messages in conversations]
        if unknown := set(said) - set(self.answers):
            raise InvalidValue(f"{min(unknown)!r} is none of this model's {len(self.answers)} answers")
        found = self._log_probs([messages[:-1] for messages in conversations])
        return [float(row[self.answers.index(answer)]) for row, answer in zip(found, said, strict=True)]

    def _log_probs(self, conversations: Sequence[Sequence[Message]]) -> np.ndarray:
        from scipy.special import log_softmax

        counts = self.vectorizer.transform([user_text(messages) for messages in conversations])
        found: np.ndarray = log_softmax(counts @ self.weight.T + self.bias, axis=1)
        return found

    def _reply(self, log_probs: np.ndarray) -> Reply:
        ranked = tuple((self.answers[i], float(log_probs[i])) for i in (-log_probs).argsort(kind="stable").tolist())
        answer, log_prob = ranked[0]
        return Reply(
            text=answer,
            finish_reason="stop",
            prompt_tokens=0,  # no tokenizer reads it
            completion_tokens=1,  # one decision
            tokens=(TokenChoice(text=answer, log_prob=log_prob, top=ranked),),
        )


def write_word_counts(directory: Path, vectorizer: Any, classifier: Any) -> None:
    """A fitted TfidfVectorizer and LogisticRegression as numbers and text: nothing that runs when it is read."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weight, bias = rows_of_labels(classifier)
    tensors = {"weight": weight, "bias": bias, "idf": vectorizer.idf_}
    save_file(tensors, directory / TENSORS, metadata={"format": "np"})
    settings = vectorizer.get_params()
    config = {
        "heldout": WORD_COUNTS,
        "counting": {name: settings[name] for name in COUNTING},
        "answers": [str(answer) for answer in classifier.classes_],
        "terms": vectorizer.get_feature_names_out().tolist(),
    }
    (directory / CONFIG).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def word_counts(model: ModelRef) -> WordCounts | None:
    """The linear model on counts of words that `model` is; None when it is something else."""
    config = _config_of(model)
    return _read_word_counts(str(model.adapter)) if config.get("heldout") == WORD_COUNTS else None


def decides(model: ModelRef) -> bool:
    """True of a model that chooses one of its answers, with a probability for each: it writes no tokens."""
    return _config_of(model).get("heldout") in (CLASSIFIER, WORD_COUNTS)


def was_trained(model: ModelRef) -> bool:
    """True of an adapter or a classifier; a prompt and word counts are no training of a network."""
    return model.adapter is not None and _config_of(model).get("heldout") in (None, CLASSIFIER)


def rows_of_labels(classifier: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights [labels, n] and biases [labels] of a fitted LogisticRegression: for two labels it has one row, for the
    second against the first."""
    import numpy as np

    weight, bias = classifier.coef_, classifier.intercept_
    if len(classifier.classes_) == 2:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return np.ascontiguousarray(weight), np.ascontiguousarray(bias)


def _config_of(model: ModelRef) -> dict[str, Any]:
    path = Path(model.adapter) / CONFIG if model.adapter else None
    if path is None or not path.is_file():  # whoever loads an adapter says what is missing
        return {}
    return _read_config(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read_config(path: Path, changed: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


@lru_cache(maxsize=8)
def _read_word_counts(folder: str) -> WordCounts:
    from safetensors.numpy import load_file
    from sklearn.feature_extraction.text import TfidfVectorizer

    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(Path(folder) / TENSORS)
    counting = {**config["counting"], "ngram_range": tuple(config["counting"]["ngram_range"])}
    vectorizer = TfidfVectorizer(**counting, vocabulary=config["terms"])
    vectorizer.idf_ = tensors["idf"]
    return WordCounts(
        vectorizer=vectorizer, weight=tensors["weight"], bias=tensors["bias"], answers=tuple(config["answers"])
    )
