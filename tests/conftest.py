"""Small real things that tests share: a tiny random chat model, and the bundled one."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from heldout.pipeline.request import Source

# Before torch is loaded: tiny models gain nothing from threads, and the processes that some tests start would wait for
# each other's. A thread that waits for another one leaves its core to other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SHARED = Path(__file__).parents[1].parent / "shared" / "data"

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

COLOURS = ("red", "green", "blue", "black")


def colour_row(i: int) -> dict[str, object]:
    """One labelled example: the label stands in the text, so that even a tiny model can learn it."""
    colour = COLOURS[i % len(COLOURS)]
    return {
        "messages": [
            {"role": "system", "content": "Name the colour. Answer with JSON."},
            {"role": "user", "content": f"item {i} of the list is {colour} and has size {i % 7}"},
            {"role": "assistant", "content": json.dumps({"colour": colour}, separators=(",", ":"))},
        ]
    }


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def colour_files(folder: Path) -> dict[str, Path]:
    """Three files of one easy task: 80 to train on, 24 to stop by, 48 held out."""
    parts = {"train": range(80), "valid": range(1000, 1024), "holdout": range(2000, 2048)}
    return {
        part: write_rows(folder / f"{part}.jsonl", [colour_row(i) for i in numbers]) for part, numbers in parts.items()
    }


def sources_of(files: dict[str, Path]) -> dict[str, Source]:
    """The files as a job reads them."""
    from heldout.pipeline.request import Source

    return {part: Source(name=path.name, open=partial(path.open, "rb")) for part, path in files.items()}


@pytest.fixture
def colours(tmp_path: Path) -> dict[str, Path]:
    """The three files of `colour_files`."""
    return colour_files(tmp_path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama of 2 layers, a byte-level tokenizer and a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def make_tiny_model(folder: Path) -> Path:
    """Write the tiny model to `folder`; the same weights every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    corpus = [message["content"] for i in range(200) for message in colour_row(i)["messages"]]  # type: ignore[attr-defined]
    inner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.4,  # large enough for logits that an adapter can move
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
