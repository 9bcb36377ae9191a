"""Before the first step every label is proven: the answers and their end-of-turn tokens, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import heldout
from heldout.engine.template import Tokens
from heldout.errors import InvalidTrainingFile
from heldout.pipeline.types import Example
from heldout.settings import Settings
from heldout.train import sft
from heldout.train.sft import ChatTrainee
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_row, write_rows
from tests.torch.conftest import PLAN, SMALL, TOOLS, Recording, examples


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


def too_long(part: tuple[Example, ...], *rows: int) -> tuple[Example, ...]:
    """The examples, the answers of these rows grown over 400 tokens."""
    return tuple(
        replace(one, messages=(*one.messages[:2], {"role": "assistant", "content": "blue " * 400}))
        if i in rows
        else one
        for i, one in enumerate(part)
    )


def test_every_example_that_would_be_cut_is_named_with_its_length_and_the_limit(trainee: ChatTrainee) -> None:
    with pytest.raises(InvalidTrainingFile) as told:
        sft.tokenize(trainee.template, too_long(examples(range(40)), 1, 7, *range(10, 40)), 100, "the training data")
    assert re.fullmatch(
        r"32 examples of the training data are longer than max_length \(100 tokens\), and their answers would be cut: "
        r"line 2 \(\d{3,4} tokens\), line 8 \(\d{3,4} tokens\), line 11 .*line 28 \(\d{3,4} tokens\), and 12 more\. "
        r"Shorten them, or raise max_length as far as the model reads\.",
        str(told.value),
    )


def test_examples_of_every_part_that_would_be_cut_are_named_at_once(tiny_model: Path) -> None:
    split = replace(SMALL, train=too_long(SMALL.train, 3), valid=too_long(SMALL.valid, 2))
    with pytest.raises(InvalidTrainingFile) as told:
        TorchTrainer(**TOOLS).fit(replace(PLAN, max_length=100), split, base_model=str(tiny_model))
    assert re.search(r"1 examples of the training data .*line 4 \(", str(told.value))
    assert re.search(r"1 examples of the validation data .*line 1003 \(", str(told.value))


@pytest.mark.parametrize("n", [320, 40], ids=["with a holdout", "cross-fitted"])
def test_a_job_with_examples_that_would_be_cut_fails_before_anything_is_answered_or_trained(
    tiny_model: Path, tmp_path: Path, n: int
) -> None:
    rows = [colour_row(i) for i in range(n)]
    lines = range(5, n, 8)
    for line in lines:
        rows[line - 1]["messages"][2]["content"] = f"{line} blue, " * 400  # type: ignore[index]
    watch = Recording()
    with pytest.raises(InvalidTrainingFile) as told:
        heldout.tune(
            write_rows(tmp_path / "train.jsonl", rows),
            model=str(tiny_model),
            out=tmp_path / "out",
            watch=watch,
            settings=Settings(data_dir=tmp_path, precision="float32"),
            seed=0,
        )
    if n == 40:
        assert all(f"line {line} (" in str(told.value) for line in lines), "whatever fold it is in"
    assert "max_length (512 tokens)" in str(told.value)
    assert not any("Training" in text or "holdout (" in text or "zero-shot" in text for text in watch.messages)


def test_checks_count_the_tokens_that_are_trained_on(trainee: ChatTrainee, tiny_model: Path) -> None:
    rows = too_long(examples(range(12)), 3)
    counted = TorchTrainer(**TOOLS).count_tokens(rows, base_model=str(tiny_model))
    assert counted == [len(one) for one in sft.tokenize(trainee.template, rows, 10_000, "train")]


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
