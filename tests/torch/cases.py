"""What exactness is tested on: tiny models of several families, and examples that share all kinds of prefixes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from heldout.engine.template import ChatTemplate, Tokens
from heldout.pipeline.types import Example
from heldout.train import sft
from tests.conftest import COLOURS

#: Heads of 12 numbers, unless told otherwise, in three layers.
#: Query heads to key heads: one to one, two to one, three to one.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, 2 queries a key": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama, 1 query a key": {"model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 3},
    "llama with biases": {
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2, 3 queries a key": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2},
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": None,
    },
    "qwen3, walked layer by layer": {
        "model_type": "qwen3",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "olmo2, run as a whole": {"model_type": "olmo2", "num_attention_heads": 4, "num_key_value_heads": 2},
}


def make_family(folder: Path, tiny_model: Path, family: str, width: int = 12) -> Path:
    """Write a random model of this family to `folder`, with heads of this width and the tiny model's tokenizer."""
    shape = {**FAMILIES[family]}
    kind = shape.pop("model_type")
    known = AutoConfig.from_pretrained(tiny_model)
    shape.setdefault("hidden_size", width * shape["num_attention_heads"])
    if kind in ("mistral", "qwen3"):  # whose default is another one
        shape["head_dim"] = width
    config = AutoConfig.for_model(
        kind,
        **shape,
        vocab_size=known.vocab_size,
        intermediate_size=160,
        num_hidden_layers=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        pad_token_id=known.pad_token_id,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1; then nothing would show that they are used
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / name).exists():
            shutil.copy2(tiny_model / name, folder / name)
    return folder


def chat(*turns: str, weights: tuple[int, ...] | None = None) -> Example:
    """system, user, assistant, user, assistant, …; the last answer is learned unless told otherwise."""
    roles = ["system", *(("user", "assistant") * len(turns))][: len(turns)]
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, turns, strict=True))
    return Example(messages=messages, weights=weights or (0,) * (len(turns) - 1) + (1,), line=1)  # type: ignore[arg-type]


SYSTEM = "Name the colour. Answer with JSON."
SHOTS = {
    "early": ("item 1 is red", '{"colour":"red"}', "item 2 is blue", '{"colour":"blue"}'),
    "late": ("item 91 is black", '{"colour":"black"}', "item 92 is green", '{"colour":"green"}'),
}


def asked(i: int) -> tuple[str, str]:
    """A question of its own, and its answer."""
    colour = COLOURS[i % 4]
    return f"item {i * 37} of the list is {colour}" + " and large" * (i % 3), f'{{"colour":"{colour}"}}'


def system_prompt() -> list[Example]:
    return [chat(SYSTEM, *asked(i)) for i in range(5)]


def few_shot_groups() -> list[Example]:
    return [chat(SYSTEM, *SHOTS[group], *asked(i)) for i, group in enumerate(("early", "late") * 3)]


def answers_to_one_prompt() -> list[Example]:
    question = "which colours are in the list of all items"
    return [chat(SYSTEM, question, answer) for answer in ("red", "red and blue", "red and green", "none", "none")]


def nothing_shared() -> list[Example]:
    return [chat(f"{i} {colour} size list item", *asked(i)) for i, colour in enumerate(COLOURS)]


def duplicates() -> list[Example]:
    return [chat(SYSTEM, *asked(1))] * 3 + [chat(SYSTEM, *asked(2))] * 2


def several_turns() -> list[Example]:
    first = asked(1)
    every, last = (0, 0, 1, 0, 1), (0, 0, 0, 0, 1)
    return [
        chat(SYSTEM, *first, *asked(2), weights=every),
        chat(SYSTEM, *first, *asked(3), weights=last),
        chat(SYSTEM, *first),
        chat(SYSTEM, *first, *asked(2), *asked(4), weights=(0, 0, 1, 0, 0, 0, 1)),
    ]


def one_example() -> list[Example]:
    return [chat(SYSTEM, *asked(0))]


SHARING: dict[str, Callable[[], list[Example]]] = {
    "one system prompt": system_prompt,
    "two groups with the same few-shot turns": few_shot_groups,
    "several answers to one prompt": answers_to_one_prompt,
    "nothing shared": nothing_shared,
    "identical examples": duplicates,
    "several turns": several_turns,
    "a single example": one_example,
}


def tokens_of(template: ChatTemplate, kind: str) -> list[Tokens]:
    """The examples of one kind; "prefix of another" and "everything" are made of the others."""
    if kind == "a prefix of another":
        row = tokens_of(template, "a single example")[0]
        # All answers there are, up to any place: the short ones end inside of the long ones.
        return [Tokens(row.ids[:n], (False,) * (n - 3) + (True,) * 3) for n in (len(row), len(row) - 1, 20, 12, 12)]
    if kind == "everything":
        return [row for one in (*SHARING, "a prefix of another") for row in tokens_of(template, one)]
    rows = sft.tokenize(template, SHARING[kind](), 512, "train")
    if kind == "nothing shared":  # not even the template's first tokens
        return [Tokens(row.ids[i:], row.supervised[i:]) for i, row in enumerate(rows)]
    return rows


KINDS = (*SHARING, "a prefix of another", "everything")
