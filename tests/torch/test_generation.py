"""The engine answers exactly as transformers does, however prompts are batched, chunked and shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from heldout.engine import generate
from heldout.engine.base import Message, ModelRef, Piece, Sampling
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.errors import ContextLengthExceeded, ModelNotFound
from tests.torch.conftest import TOOLS, stirred
from tests.torch.generating import GREEDY, MIXED, TASK, check, expected

T = TypeVar("T")


@pytest.mark.parametrize("conversations", [TASK, MIXED], ids=["a shared prefix", "nothing shared"])
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_greedy_answers_are_those_of_transformers(
    request: pytest.FixtureRequest,
    engine: LocalEngine,
    plain: dict[str | None, Any],
    template: ChatTemplate,
    base: ModelRef,
    tuned: ModelRef,
    adapter: bool,
    conversations: list[list[Message]],
) -> None:
    model = tuned if adapter else base
    wanted = [expected(plain[model.adapter], template, one) for one in conversations]
    assert len(set(wanted)) > 1
    check(engine, model, conversations, wanted)
    # The prompts are longer than a chunk now, and more than a batch.
    request.getfixturevalue("small_steps")
    check(engine, model, conversations, wanted)


def test_the_trained_model_ends_its_turns_and_the_base_model_does_not(
    engine: LocalEngine, base: ModelRef, tuned: ModelRef
) -> None:
    # Both ways of ending occur in the comparison above.
    assert {reply.finish_reason for reply in engine.chat(tuned, TASK, GREEDY)} == {"stop"}
    assert "length" in {reply.finish_reason for reply in engine.chat(base, TASK, GREEDY)}


def test_equal_and_nested_prompts_in_one_batch_are_answered_alike(engine: LocalEngine, tuned: ModelRef) -> None:
    longer = [*TASK[0], {"role": "assistant", "content": "red"}, {"role": "user", "content": "and now?"}]
    replies = engine.chat(tuned, [TASK[0], longer, TASK[0]], GREEDY)
    assert replies[0] == replies[2] == engine.chat(tuned, [TASK[0]], GREEDY)[0]
    assert replies[1] == engine.chat(tuned, [longer], GREEDY)[0]


@pytest.mark.parametrize("small", [False, True])
def test_a_stream_is_the_chat_in_pieces(
    request: pytest.FixtureRequest, engine: LocalEngine, base: ModelRef, tuned: ModelRef, small: bool
) -> None:
    if small:
        request.getfixturevalue("small_steps")
    most = 0
    for model in (base, tuned):
        for conversation in (TASK[0], *MIXED):
            (reply,) = engine.chat(model, [conversation], GREEDY)
            pieces = list(engine.stream(model, conversation, GREEDY))
            assert "".join(piece.text for piece in pieces) == reply.text
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            assert pieces[-1].finish_reason == reply.finish_reason
            assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (
                reply.prompt_tokens,
                reply.completion_tokens,
            )
            most = max(most, len(pieces))
    assert most > 3, "it comes in pieces"


def test_a_stop_string_ends_the_answer_before_it(engine: LocalEngine, tuned: ModelRef) -> None:
    (whole,) = engine.chat(tuned, [TASK[0]], GREEDY)
    text = whole.text
    assert len(text) > 8
    for stop in ((text[4:7],), (text[2:-1],), (text[5], text[2:4]), (text[0],), ("nowhere", text[-2:] + "!")):
        kept = min((text[: text.find(one)] for one in stop if one in text), key=len, default=text)
        sampling = Sampling(max_tokens=24, stop=stop)
        (reply,) = engine.chat(tuned, [TASK[0]], sampling)
        assert (reply.text, reply.finish_reason) == (kept, "stop")
        pieces = list(engine.stream(tuned, TASK[0], sampling))
        assert "".join(piece.text for piece in pieces) == kept
        assert pieces[-1].finish_reason == "stop"


def test_the_token_limit_cuts_the_answer_and_says_so(engine: LocalEngine, base: ModelRef, tuned: ModelRef) -> None:
    (whole,) = engine.chat(tuned, [TASK[0]], GREEDY)
    for model in (base, tuned):
        (reply,) = engine.chat(model, [TASK[0]], Sampling(max_tokens=2))
        assert (reply.finish_reason, reply.completion_tokens) == ("length", 2)
        assert list(engine.stream(model, TASK[0], Sampling(max_tokens=2)))[-1].finish_reason == "length"
    assert reply.text
    assert whole.text.startswith(reply.text)
    exactly = Sampling(max_tokens=whole.completion_tokens)
    assert engine.chat(tuned, [TASK[0]], exactly)[0].text == whole.text


def test_only_the_likeliest_token_is_left_at_top_p_0(engine: LocalEngine, base: ModelRef) -> None:
    warm = Sampling(max_tokens=24, temperature=1.5, top_p=0.0)
    assert engine.chat(base, MIXED, warm) == engine.chat(base, MIXED, GREEDY)


def test_a_seed_repeats_a_warm_answer(engine: LocalEngine, base: ModelRef) -> None:
    def texts(seed: int) -> list[str]:
        sampling = Sampling(max_tokens=24, temperature=1.0, top_p=0.95, seed=seed)
        streamed = "".join(piece.text for piece in engine.stream(base, TASK[0], sampling))
        return [*(reply.text for reply in engine.chat(base, TASK, sampling)), streamed]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    greedy = [reply.text for reply in engine.chat(base, TASK, GREEDY)]
    assert texts(1)[: len(greedy)] != greedy


def test_top_p_draws_from_the_likeliest_tokens_only() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for top_p in (0.4, 0.6, 0.9, 1.0):
        drawn = generate.pick(logits, Sampling(temperature=1.0, top_p=top_p), generator)
        counts[top_p] = torch.bincount(drawn, minlength=4) / 2000
    assert counts[0.4].tolist() == [1, 0, 0, 0]
    assert counts[0.6].tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert counts[0.9].tolist() == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.05)
    assert counts[1.0].tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)


def test_a_conversation_beyond_the_context_is_refused_in_openais_words(engine: LocalEngine, base: ModelRef) -> None:
    long: list[Message] = [{"role": "user", "content": "xyzzy " * 300}]
    words = (
        r"This model's maximum context length is 512 tokens\. However, your messages resulted in \d{3,4} tokens\. "
        r"Please reduce the length of the messages\."
    )
    with pytest.raises(ContextLengthExceeded, match=words):
        engine.chat(base, [TASK[0], long], GREEDY)
    with pytest.raises(ContextLengthExceeded, match=words):
        engine.stream(base, long, GREEDY)  # before the first piece
    assert engine.chat(base, [TASK[0]], GREEDY), "the engine goes on"


def test_an_answer_ends_at_the_end_of_the_context(engine: LocalEngine, base: ModelRef, template: ChatTemplate) -> None:
    conversation: list[Message] = [{"role": "user", "content": ""}]
    while len(template.prompt(conversation)) < 505:
        conversation[0]["content"] += "q"
    room = 512 - len(template.prompt(conversation))
    (reply,) = engine.chat(base, [conversation], Sampling(max_tokens=100))
    assert (reply.completion_tokens, reply.finish_reason) == (room, "length")


def test_adapters_and_base_take_turns_without_a_trace(
    engine: LocalEngine, base: ModelRef, tuned: ModelRef, trainee: Any, tmp_path: Path
) -> None:
    stirred(stirred(trainee)).peft.save_pretrained(tmp_path)
    other = ModelRef(base_model=base.base_model, adapter=str(tmp_path))
    first = {ref.adapter: engine.chat(ref, TASK, GREEDY) for ref in (base, tuned, other)}
    texts = [tuple(reply.text for reply in replies) for replies in first.values()]
    assert len(set(texts)) == 3
    for ref in (tuned, base, other, base, tuned, tuned, other, base):
        assert engine.chat(ref, TASK, GREEDY) == first[ref.adapter]


def test_more_adapters_than_fit_are_loaded_again(
    monkeypatch: pytest.MonkeyPatch, tuned: ModelRef, trainee: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr("heldout.engine.local.LOADED_ADAPTERS", 2)
    engine = LocalEngine(**TOOLS)
    refs = [tuned]
    for i in range(2):
        stirred(trainee).peft.save_pretrained(tmp_path / str(i))
        refs.append(ModelRef(base_model=tuned.base_model, adapter=str(tmp_path / str(i))))
    first = [engine.chat(ref, TASK[:2], GREEDY) for ref in refs]
    assert [engine.chat(ref, TASK[:2], GREEDY) for ref in refs] == first


def test_a_stream_may_wander_between_threads(engine: LocalEngine, tuned: ModelRef) -> None:
    (whole,) = engine.chat(tuned, [TASK[0]], GREEDY)
    stream = in_another_thread(lambda: engine.stream(tuned, TASK[0], GREEDY))
    first = in_another_thread(lambda: next(stream))
    second = in_another_thread(lambda: next(stream))
    assert whole.text.startswith(first.text + second.text)
    assert second.text
    in_another_thread(lambda: close(stream))
    assert in_another_thread(lambda: engine.chat(tuned, [TASK[0]], GREEDY)) == [whole], "the engine is free again"


def test_a_stream_that_was_never_read_keeps_nobody_waiting(engine: LocalEngine, base: ModelRef) -> None:
    stream = engine.stream(base, TASK[0], GREEDY)
    assert in_another_thread(lambda: engine.chat(base, [TASK[0]], GREEDY))
    close(stream)


def test_a_chat_waits_for_a_stream_and_both_answer_as_alone(
    engine: LocalEngine, base: ModelRef, tuned: ModelRef
) -> None:
    wanted = engine.chat(base, TASK, GREEDY)
    text = engine.chat(tuned, [TASK[1]], GREEDY)[0].text
    stream = engine.stream(tuned, TASK[1], GREEDY)
    begun = next(stream).text
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.chat, base, TASK, GREEDY)
        assert begun + "".join(piece.text for piece in stream) == text
        assert waiting.result(timeout=30) == wanted


def in_another_thread(work: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=30)


def close(stream: Iterator[Piece]) -> None:
    stream.close()  # type: ignore[attr-defined]


def test_a_folder_without_an_adapter_is_no_model(engine: LocalEngine, base: ModelRef, tmp_path: Path) -> None:
    ref = ModelRef(base_model=base.base_model, adapter=str(tmp_path / "none"))
    for ask in (
        lambda: engine.chat(ref, TASK, GREEDY),
        lambda: engine.stream(ref, TASK[0], GREEDY),
        lambda: engine.log_probs(ref, TASK),
    ):
        with pytest.raises(ModelNotFound, match=str(tmp_path / "none")):
            ask()
    assert engine.chat(base, TASK[:1], GREEDY), "the engine goes on"


def test_progress_counts_up_to_all_answers(engine: LocalEngine, tuned: ModelRef, small_steps: None) -> None:
    told: list[tuple[int, int]] = []
    engine.chat(tuned, TASK, GREEDY, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)


def test_a_closed_engine_loads_again(engine: LocalEngine, base: ModelRef) -> None:
    before = engine.chat(base, TASK[:1], GREEDY)
    engine.close()
    assert engine.chat(base, TASK[:1], GREEDY) == before


def test_tokens_are_counted_as_the_model_counts_them(
    engine: LocalEngine, base: ModelRef, template: ChatTemplate
) -> None:
    texts = ["red", "", "item 3 of the list", "漢字"]
    counts = [len(template.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert engine.count_tokens(base.base_model, texts) == counts
    assert counts[1] == 0 < counts[0] < counts[2]
