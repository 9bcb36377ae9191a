"""What we cannot train is refused when the plan is made, with what is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import heldout
from heldout.engine import cache, generate
from heldout.engine.base import ModelRef, Sampling
from heldout.engine.expected import Expected
from heldout.engine.local import LocalEngine
from heldout.engine.weights import load_model
from heldout.errors import ContextLengthExceeded, InvalidTrainingFile, InvalidValue, ModelNotFound
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.plan import make_plan
from heldout.settings import Settings
from heldout.train import sft
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_files
from tests.torch.cases import FAMILIES, make_family
from tests.torch.conftest import PLAN, SMALL, TOOLS, Recording

SHORT = Sampling(max_tokens=4)

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "other names": ("gpt2", {}, r"\(type 'gpt2'\) does not say hidden_size, num_hidden_layers, .*intermediate_size"),
    "a number that is none": (
        "llama",
        {"intermediate_size": None},
        "config.json .* cannot be read: .*intermediate_size",
    ),
    "no context": ("recurrent_gemma", {}, "does not say max_position_embeddings"),
    "linear attention": ("qwen3_next", {}, "layers of the kind 'linear_attention'"),
    "recurrent layers": ("jamba", {}, r"recurrent layers \(attn_layer_period\)"),
    "capped scores": ("gemma2", {"final_logit_softcapping": None}, "attention scores that are capped"),
    "rescaled logits": ("cohere2", {}, r"logits that are rescaled \(logit_scale\)"),
    "attention sinks": ("gpt_oss", {}, "attention sinks"),
}


def config_only(folder: Path, tiny_model: Path, kind: str, **shape: Any) -> Path:
    """A model of this architecture as far as its files tell without weights."""
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    config = {**AutoConfig.for_model(kind).to_dict(), "architectures": ["SomethingForCausalLM"], **shape}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_an_architecture_that_we_cannot_train_is_refused_with_what_is_missing(
    tiny_model: Path, tmp_path: Path, case: str
) -> None:
    kind, shape, sentence = REFUSED[case]
    folder = config_only(tmp_path / "model", tiny_model, kind, **shape)
    with pytest.raises(ModelNotFound, match=f"(?s){sentence}") as told:
        TorchTrainer(**TOOLS).facts(str(folder))
    assert str(folder) in str(told.value)


def test_a_job_with_such_a_model_fails_before_anything_is_done(tiny_model: Path, tmp_path: Path) -> None:
    folder = config_only(tmp_path / "model", tiny_model, "gpt2")
    watch = Recording()
    with pytest.raises(ModelNotFound, match="is not a chat model we can train"):
        heldout.tune(
            colour_files(tmp_path)["train"],
            model=str(folder),
            out=tmp_path / "out",
            watch=watch,
            settings=Settings(data_dir=tmp_path, precision="float32"),
        )
    assert watch.story == []


def test_architectures_that_we_train_are_not_refused(tiny_model: Path, tmp_path: Path) -> None:
    for number, family in enumerate(FAMILIES):
        folder = make_family(tmp_path / str(number), tiny_model, family)
        assert TorchTrainer(**TOOLS).facts(str(folder)).context == 512, family
        assert TorchTrainer(**TOOLS).fit(PLAN, SMALL, base_model=str(folder)).predicted_memory_bytes, family


@pytest.fixture
def windowed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mistral that looks back 40 tokens."""
    monkeypatch.setitem(FAMILIES, "windowed", {**FAMILIES["mistral"], "sliding_window": 40})
    return make_family(tmp_path / "windowed", tiny_model, "windowed")


def test_a_sliding_window_is_the_most_that_a_model_reads(windowed: Path) -> None:
    trainer = TorchTrainer(**TOOLS)
    facts = trainer.facts(str(windowed))
    assert facts.context == 40
    with pytest.raises(InvalidValue, match=r"max_length 41 is more than this model reads \(40 tokens\)"):
        make_plan(Hyperparameters(max_length=41), SMALL, facts, seed=0)
    plan = make_plan(Hyperparameters(), SMALL, facts, seed=0)
    assert plan.max_length == 40
    with pytest.raises(
        InvalidTrainingFile, match=r"longer than max_length \(40 tokens\).*: line 1 \(\d+ tokens\), line 2"
    ):
        trainer.fit(plan, SMALL, base_model=str(windowed))


def test_a_conversation_longer_than_the_window_is_refused_as_too_long(windowed: Path) -> None:
    engine, model = LocalEngine(**TOOLS), ModelRef(base_model=str(windowed))
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 40 tokens"):
        engine.chat(model, [[{"role": "user", "content": "blue " * 60}]], SHORT)
    assert engine.chat(model, [[{"role": "user", "content": "blue"}]], SHORT)[0].completion_tokens <= 40


def test_what_is_read_ahead_for_one_row_counts_for_no_other_rows_window(windowed: Path) -> None:
    model = load_model(windowed, torch.float32, cache.IMPLEMENTATION)
    prompts, limits = [[*range(100, 137)], [2, 3, 4]], [3, 37]  # both end where the window does
    with torch.no_grad():
        plain = generate.generate(model, prompts, limits, Sampling(), frozenset())
        first, *rest = plain[1].tokens
        # How it goes on is known behind its first token, when the long row is almost full.
        late = Expected([[first, *rest], [first + 1], [first + 2]])
        assert generate.generate(model, prompts, limits, Sampling(), frozenset(), expected=late) == plain


def test_what_an_architecture_cannot_do_is_told_when_the_plan_is_made(tiny_model: Path, tmp_path: Path) -> None:
    # So many layers, and so long an example, that most of the memory is for what layers keep.
    sizes = {"num_hidden_layers": 48, "hidden_size": 48, "intermediate_size": 160, "num_attention_heads": 4}
    known = {"num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 512}
    folder = str(config_only(tmp_path / "olmo2", tiny_model, "olmo2", **sizes, **known))
    trainer = TorchTrainer(**TOOLS)
    with pytest.raises(InvalidValue, match="freeze_layers=1 is not supported for models of type 'olmo2'"):
        trainer.fit(replace(PLAN, freeze_layers=1), SMALL, base_model=folder)
    system, _, answer = SMALL.train[0].messages
    long = replace(SMALL.train[0], messages=(system, {"role": "user", "content": "blue " * 400}, answer))
    split = replace(SMALL, train=(long, *SMALL.train[1:]))
    most = trainer.fit(PLAN, split, base_model=folder).predicted_memory_bytes
    least, sentence = most // 2, ""
    while most - least > 256:
        limit = (least + most) // 2
        try:
            TorchTrainer(**TOOLS, memory_limit=limit).fit(PLAN, split, base_model=folder)
            most = limit
        except InvalidValue as error:
            least, sentence = limit, str(error)
    assert "checkpointing is not supported for models of type 'olmo2'" in sentence, "just below what is enough without"


def test_a_window_that_no_layer_has_is_none() -> None:
    config = {"max_position_embeddings": 512, "sliding_window": 40}
    assert sft.weights.context_of(config) == 40
    assert sft.weights.context_of({**config, "layer_types": ["full_attention"]}) == 512
    assert sft.weights.context_of({**config, "layer_types": ["full_attention", "sliding_attention"]}) == 40
    assert sft.weights.context_of({**config, "use_sliding_window": False}) == 512
