"""Before the first step every label is proven: the answers and their end-of-turn tokens, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heldout.engine.template import Tokens
from heldout.errors import InvalidTrainingFile
from heldout.train import sft
from heldout.train.sft import ChatTrainee
from tests.torch.conftest import examples


def test_labels_are_the_answer_and_its_end_of_turn_token(trainee: ChatTrainee) -> None:
    (tokens,) = sft.tokenize(trainee.template, examples(range(1)), 512, "train")
    labels = [token for token, supervised in zip(tokens.ids, tokens.supervised, strict=True) if supervised]
    assert trainee.template.tokenizer.decode(labels) == '{"colour":"red"}<|im_end|>'


def test_the_prompt_is_tokenised_as_it_will_be_when_serving(trainee: ChatTrainee) -> None:
    (example,) = examples(range(1))
    (tokens,) = sft.tokenize(trainee.template, (example,), 512, "train")
    prompt = trainee.template.prompt(example.prompt)
    assert list(tokens.ids[: len(prompt)]) == prompt
    assert not any(tokens.supervised[: len(prompt)])


def test_an_example_that_would_be_cut_fails_with_its_line(trainee: ChatTrainee) -> None:
    short, long = examples(range(2))
    longer = replace(long, messages=(*long.messages[:2], {"role": "assistant", "content": "blue " * 400}))
    with pytest.raises(InvalidTrainingFile, match=r"line 2: \d+ tokens, but max_length is 100"):
        sft.tokenize(trainee.template, (short, longer), 100, "the training data")


def test_labels_that_miss_the_end_of_turn_are_refused(trainee: ChatTrainee, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainee.template.encode

    def forgetful(*args: object) -> Tokens:
        tokens = whole(*args)  # type: ignore[arg-type]
        return Tokens(tokens.ids[:-1], tokens.supervised[:-1])

    monkeypatch.setattr(trainee.template, "encode", forgetful)
    with pytest.raises(InvalidTrainingFile, match="end-of-turn"):
        sft.tokenize(trainee.template, examples(range(1)), 512, "train")


def test_labels_that_cover_the_prompt_are_refused(trainee: ChatTrainee, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainee.template.encode

    def greedy(*args: object) -> Tokens:
        tokens = whole(*args)  # type: ignore[arg-type]
        return Tokens(tokens.ids, (True,) * len(tokens))

    monkeypatch.setattr(trainee.template, "encode", greedy)
    with pytest.raises(InvalidTrainingFile, match="labels spell"):
        sft.tokenize(trainee.template, examples(range(1)), 512, "train")
