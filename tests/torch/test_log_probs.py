"""Likelihoods of answers are those of a plain computation, however many are read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heldout.engine import cache, likelihood
from heldout.engine.base import Message, ModelRef
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.errors import ContextLengthExceeded
from tests.torch.conftest import examples
from tests.torch.generating import MIXED, TASK


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("steps", ["small", "large"])
def test_log_probabilities_are_those_of_a_plain_computation(
    engine: LocalEngine,
    plain: dict[str | None, Any],
    template: ChatTemplate,
    base: ModelRef,
    tuned: ModelRef,
    adapter: bool,
    steps: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if steps == "small":
        request.getfixturevalue("small_steps")
    model = tuned if adapter else base
    conversations = [list(example.messages) for example in examples(range(4))]
    conversations.append([*MIXED[3], {"role": "assistant", "content": "two answers, the last one counts"}])
    labels = ("red", "blue and a half", "r", "red")
    conversations += [[*TASK[4], {"role": "assistant", "content": label}] for label in labels]
    conversations.insert(2, [*TASK[4], {"role": "assistant", "content": "green"}])
    wanted = [log_prob(plain[model.adapter], template, messages) for messages in conversations]
    assert engine.log_probs(model, conversations) == pytest.approx(wanted, rel=1e-4)
    assert engine.log_probs(model, conversations[-4:]) == pytest.approx(wanted[-4:], rel=1e-4), "one prompt"
    assert engine.log_probs(model, conversations[:1]) == pytest.approx(wanted[:1], rel=1e-4)
    assert engine.log_probs(model, []) == []
    monkeypatch.setattr(likelihood, "LARGE", 40)  # the answers to one prompt are several trees now
    assert engine.log_probs(model, conversations) == pytest.approx(wanted, rel=1e-4)


def test_a_long_prompt_is_read_once_for_all_its_labels(
    engine: LocalEngine, tuned: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CHUNK", 50)
    monkeypatch.setattr(likelihood, "LARGE", 60)
    places = [0]
    read = cache.read_masked

    def counted(model: Any, rows: Any, own: Any, *more: Any) -> Any:
        places[0] += sum(map(len, own))
        return read(model, rows, own, *more)

    monkeypatch.setattr(cache, "read_masked", counted)
    texts = [TASK[0][-1]["content"] * 12, TASK[1][-1]["content"]]
    asked = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"label {i}"}]
        for text in texts
        for i in range(9)
    ]
    engine.log_probs(tuned, asked)
    prompts = engine.count_tokens(tuned.base_model, texts)
    assert prompts[0] > 100
    assert places[0] < sum(prompts) + 200


def log_prob(model: Any, template: ChatTemplate, messages: list[Message]) -> float:
    """Of the last message, by transformers alone."""
    prompt = template.prompt(messages[:-1])
    answer = template.tokenizer(f"{messages[-1]['content']}<|im_end|>", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    chances = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return sum(float(chances[i, token]) for i, token in enumerate(answer))


def test_reading_answers_tells_how_far_it_is_and_can_be_stopped(engine: LocalEngine, base: ModelRef) -> None:
    told: list[tuple[int, int]] = []
    conversations = [list(example.messages) for example in examples(range(60))]
    engine.log_probs(base, conversations, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, 60), (60, 60))
    assert len(told) > 2

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.log_probs(base, conversations, stop)
    assert engine.log_probs(base, conversations[:1]), "the engine goes on"


def test_an_answer_that_does_not_fit_is_not_read(engine: LocalEngine, base: ModelRef) -> None:
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 512 tokens"):
        engine.log_probs(base, [[*TASK[0], {"role": "assistant", "content": "word " * 600}]])
