"""The engine answers exactly as transformers does, however prompts are batched, chunked and shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from heldout.engine import cache, generate, likelihood, sharing
from heldout.engine.base import Message, ModelRef, Piece, Sampling
from heldout.engine.expected import Expected
from heldout.engine.local import LocalEngine
from heldout.engine.template import ChatTemplate
from heldout.engine.weights import load_model, load_tokenizer
from heldout.errors import ContextLengthExceeded, ModelNotFound
from heldout.pipeline.training import Adapter
from tests.torch.conftest import TOOLS, examples, stirred

T = TypeVar("T")

TASK = [list(example.prompt) for example in examples(range(5))]
#: Prompts of different length that share nothing but the template's first words.
MIXED: list[list[Message]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "item 3 of the list is blue and has size 4, " * 6}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ünïcödé 漢字 😀"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c" * 30}],
]
GREEDY = Sampling(max_tokens=24)


@pytest.fixture
def base(tiny_model: Path) -> ModelRef:
    return ModelRef(base_model=str(tiny_model))


@pytest.fixture
def tuned(tiny_model: Path, trained: Adapter) -> ModelRef:
    return ModelRef(base_model=str(tiny_model), adapter=str(trained.directory))


@pytest.fixture(scope="session")
def template(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_model))


@pytest.fixture(scope="session")
def plain(tiny_model: Path, trained: Adapter) -> dict[str | None, Any]:
    """The same models by transformers and PEFT alone: {adapter folder or None: model}."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    folder = str(trained.directory)
    return {None: load(), folder: PeftModel.from_pretrained(load(), folder).eval()}


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read a few tokens at a time, two rows at once, or one."""
    monkeypatch.setattr(cache, "TOKENS", 9)
    monkeypatch.setattr(cache, "CHUNK", 7)
    monkeypatch.setattr(sharing, "BATCH_ROWS", 2)


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


@pytest.mark.parametrize("steps", ["small", "large"])
def test_what_answers_are_expected_to_be_changes_no_answer(
    engine: LocalEngine, base: ModelRef, tuned: ModelRef, steps: str, request: pytest.FixtureRequest
) -> None:
    if steps == "small":
        request.getfixturevalue("small_steps")
    for model in (tuned, base):
        for conversations in (TASK, MIXED):
            plain = engine.chat(model, conversations, GREEDY)
            said = tuple(reply.text for reply in plain)
            beginnings = tuple(text[: len(text) // 2] + " and then something else" for text in said)
            for expected in (
                said,
                said[:1],
                beginnings,
                ("nobody says this",),
                ("",),
                (said[0] * 9,),
                (*said, *beginnings),
            ):
                assert engine.chat(model, conversations, replace(GREEDY, expected=expected)) == plain
                short = replace(GREEDY, max_tokens=3, expected=expected)
                assert engine.chat(model, conversations, short) == engine.chat(
                    model, conversations, Sampling(max_tokens=3)
                )


def test_expected_answers_are_read_in_fewer_passes(
    engine: LocalEngine, tuned: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [0]
    read = cache.read

    def counted(*given: Any) -> Any:
        passes[0] += 1
        return read(*given)

    monkeypatch.setattr(cache, "read", counted)

    def count(expected: tuple[str, ...]) -> int:
        passes[0] = 0
        engine.chat(tuned, TASK, replace(GREEDY, expected=expected))
        return passes[0]

    said = [reply.text for reply in engine.chat(tuned, TASK, GREEDY)]
    one_by_one = count(())
    assert one_by_one > 5
    assert count((said[0],)) < one_by_one
    assert count(tuple(said)) < one_by_one, "what all begin with, and each as soon as it can only be that one"
    assert count(("nobody says this",)) == one_by_one


def test_where_guesses_part_and_fail_the_slots_that_are_left_are_used_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = [0]
    keep = cache.Rows.keep

    def counted(rows: cache.Rows, which: Any) -> None:
        closed[0] += len(which) == len(rows.lengths)  # nobody is dropped: only the gaps are closed
        keep(rows, which)

    monkeypatch.setattr(cache.Rows, "keep", counted)
    model = load_model(tiny_model, torch.float32, cache.IMPLEMENTATION)
    prompts = [[first, first + 1] for first in range(100, 200)]
    with torch.no_grad():
        said = [one.tokens for one in generate.generate(model, prompts, [40] * 100, GREEDY, frozenset())]
        # Answers that begin differently: what is expected of one is expected of no other.
        rows = list({answer[0]: row for row, answer in enumerate(said)}.values())[:10]
        assert len(rows) == 10
        turns = {said[row][0]: (turn, said[row]) for turn, row in enumerate(rows)}

        class Guesses(Expected):
            """One row after the other has nine tokens guessed right, while all others have a wrong one."""

            def __bool__(self) -> bool:
                return True

            def after(self, begun: Sequence[int], most: int) -> list[int]:
                if not begun:
                    return []
                turn, answer = turns[begun[0]]
                at = len(begun)
                right = 4 * turn + 1 <= at < 4 * turn + 10
                return (answer[at : at + 9] if right else [(answer[at] + 1) % 500])[:most] if at < 40 else []

        found = generate.generate(
            model, [prompts[row] for row in rows], [40] * 10, GREEDY, frozenset(), expected=Guesses()
        )
    assert [one.tokens for one in found] == [said[row] for row in rows]
    assert closed[0] > 0


def test_the_end_of_a_turn_within_a_guess_ends_the_answer(
    tiny_model: Path, tuned: ModelRef, template: ChatTemplate, engine: LocalEngine
) -> None:
    (whole,) = engine.chat(tuned, [TASK[0]], GREEDY)
    goes_on = whole.text + "<|im_end|>\n<|im_start|>user\nand more"
    assert engine.chat(tuned, [TASK[0]], replace(GREEDY, expected=(goes_on,))) == [whole]


def test_in_bfloat16_expected_answers_differ_in_no_more_than_near_ties(tuned: ModelRef) -> None:
    engine = LocalEngine(**{**TOOLS, "precision": "bfloat16"})
    plain = engine.chat(tuned, TASK * 4, GREEDY)
    said = tuple(reply.text for reply in plain)
    ahead = engine.chat(tuned, TASK * 4, replace(GREEDY, expected=said))
    for messages, one, other in zip(TASK * 4, plain, ahead, strict=True):
        if one.text != other.text:
            both = [[*messages, {"role": "assistant", "content": reply.text}] for reply in (one, other)]
            a, b = engine.log_probs(tuned, both)
            assert abs(a - b) < 0.5, "rounding decided between two answers that are as likely"


def test_a_warm_answer_is_drawn_as_if_nothing_was_expected(engine: LocalEngine, base: ModelRef) -> None:
    warm = Sampling(max_tokens=24, temperature=1.0, seed=3)
    plain = engine.chat(base, TASK, warm)
    assert engine.chat(base, TASK, replace(warm, expected=tuple(reply.text for reply in plain))) == plain


def test_prompts_with_several_long_beginnings_read_each_beginning_once(
    engine: LocalEngine, tuned: ModelRef, plain: dict[str | None, Any], template: ChatTemplate
) -> None:
    systems = ["Name the colour. " * 20, "Name the colour, please. " * 20]
    conversations: list[list[Message]] = [
        [{"role": "system", "content": systems[i % 2]}, TASK[i % len(TASK)][-1]] for i in range(12)
    ]
    conversations.insert(3, MIXED[0])
    prompts = [template.prompt(one) for one in conversations]
    found = sharing.families(prompts)
    assert sorted(len(one.members) for one in found) == [1, 6, 6]
    assert sorted(i for one in found for i in one.members) == list(range(13))
    assert min(one.shared for one in found if len(one.members) == 6) > 100
    wanted = [expected(plain[tuned.adapter], template, one) for one in conversations]
    check(engine, tuned, conversations, wanted)


def test_families_keep_a_token_of_every_prompt_and_leave_small_ones_together() -> None:
    assert sharing.families([]) == []
    assert sharing.families([[1, 2, 3]]) == [(0, [0])]
    assert sharing.families([[1, 2, 3]] * 3) == [(2, [0, 1, 2])]
    assert sharing.families([[1, 2], [1, 2, 3, 4], [1, 2, 3, 5]]) == [(1, [0, 1, 2])]
    long = [[7] * 600 + [i] for i in range(2)]
    assert sharing.families([[7, 1], *long, [9]]) == [(600, [1, 2]), (0, [0, 3])]
    nested = [[7] * 600 + [8] * 2000 + [i] for i in range(3)]
    assert sharing.families([*long, *nested]) == [(2600, [2, 3, 4]), (600, [0, 1])]


def test_no_more_tokens_are_read_than_behind_one_beginning() -> None:
    def read(prompts: list[list[int]]) -> int:
        return sum(
            one.shared + sum(len(prompts[i]) - one.shared for i in one.members) for one in sharing.families(prompts)
        )

    for common, heads, own, questions in ((3000, 50, 300, 4), (1500, 40, 60, 10), (0, 20, 400, 5), (100, 3, 900, 30)):
        prompts = [
            [1] * common + [2 + head] * own + [99, question] for head in range(heads) for question in range(questions)
        ]
        assert read(prompts) <= common + sum(len(prompt) - common for prompt in prompts)
    assert read(prompts) < 5000, "three long beginnings are worth a family each"
    chain = [[1] * n for n in range(1, 1500)]  # rows that are each the beginning of the next
    assert sorted(i for one in sharing.families(chain) for i in one.members) == list(range(len(chain)))


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
    assert len(pieces) > 3, "it comes in pieces"


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
