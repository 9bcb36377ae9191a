"""A tiny random encoder, and the colour task as it is told to one."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import colour_row


def make_tiny_encoder(folder: Path, *, layers: int = 2) -> Path:
    """Write a random BERT with a word tokenizer to `folder`; the same weights every time."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [str(message["content"]) for i in range(4) for message in colour_row(i)["messages"]]  # type: ignore[attr-defined]
    words = sorted({word for text in texts for word in re.findall("[a-z]+", text.lower())})
    # A trained vocabulary would not be the same in every process. Numbers are unknown words.
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            initializer_range=0.05,  # the words still show through two random layers
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
