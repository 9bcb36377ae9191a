"""Prompts, and what transformers and PEFT alone say to them."""

from __future__ import annotations

from typing import Any

import torch

from heldout.engine.base import Message, ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from tests.torch.conftest import examples

TASK = [list(example.prompt) for example in examples(range(5))]


#: Prompts of different length that share nothing but the template's first words.
MIXED: list[list[Message]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "item 3 of the list is blue and has size 4, " * 6}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ünïcödé 漢字 😀"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c" * 30}],
]


GREEDY = Sampling(max_tokens=24)


def expected(model: Any, template: ChatTemplate, messages: list[Message], max_tokens: int = 24) -> tuple[str, str]:
    """Text and finish reason by transformers' own greedy search."""
    prompt = torch.tensor([template.prompt(messages)])
    (ids,) = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_tokens
    )
    new = ids[prompt.shape[1] :].tolist()
    return template.decode(new), "stop" if new[-1] in template.stop_ids else "length"


def check(engine: LocalEngine, model: ModelRef, conversations: list[list[Message]], wanted: list[Any]) -> None:
    together = engine.chat(model, conversations, GREEDY)
    assert [(reply.text, reply.finish_reason) for reply in together] == wanted
    alone = [engine.chat(model, [one], GREEDY)[0] for one in conversations]
    assert alone == together
