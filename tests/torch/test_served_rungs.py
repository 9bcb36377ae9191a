"""A rung as a model answers what the rung answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from heldout.engine import catalogue
from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.errors import ContextLengthExceeded, InvalidValue
from heldout.pipeline import encoder_rung
from heldout.pipeline.encoder_rung import tuned_encoder_rung
from heldout.pipeline.evaluate.answers import choose_metric
from heldout.pipeline.evaluate.scores import score_model, with_shots
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.pipeline.ladder import Rung, classical_rung, frozen_rung
from heldout.pipeline.request import Request, Tools
from heldout.pipeline.run import run_job
from heldout.pipeline.served_rungs import serve_frozen_encoder, serve_shots, serve_word_counts
from heldout.pipeline.watch import Silent
from heldout.train.trainer import TorchTrainer
from tests.conftest import colour_files, sources_of
from tests.torch.conftest import TOOLS, Recording, examples
from tests.torch.encoders import make_tiny_encoder
from tests.unit.conftest import example, split_of

COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-bert"))


@pytest.mark.parametrize("labels", [COLOURS, COLOURS[:2]], ids=["four labels", "two labels"])
def test_a_served_frozen_encoder_answers_as_the_rung_did(encoder: str, labels: Sequence[str], tmp_path: Path) -> None:
    rows = [
        example(f"item {i} of the list is {labels[i % len(labels)]} and has size {i}", f'{{"colour":"{one}"}}', i)
        for i, one in enumerate([labels[i % len(labels)] for i in range(120)], start=0)
    ]
    split = split_of(rows[:80], (), rows[80:])
    engine, facts = LocalEngine(**TOOLS), TorchTrainer(**TOOLS).facts(encoder)
    (rung,) = frozen_rung(split, choose_metric([row.target for row in rows]), engine, encoder, Silent())
    served = serve_frozen_encoder(split.train, engine, encoder, facts, directory=tmp_path / "rung")
    assert served is not None
    assert (served.rung, served.base_model) == (rung.name, encoder)
    model = ModelRef(base_model=encoder, adapter=str(served.directory))
    replies = engine.chat(model, [list(row.prompt) for row in split.holdout])
    assert tuple(reply.text for reply in replies) == rung.scores.answers
    assert len(set(rung.scores.answers)) == len(labels)
    chances = [math.exp(chance) for _, chance in replies[0].tokens[0].top]
    assert len(chances) == len(labels)
    assert sum(chances) == pytest.approx(1)
    with pytest.raises(ContextLengthExceeded):
        engine.chat(model, [[{"role": "user", "content": "red " * 600}]])


@pytest.mark.parametrize("labels", [COLOURS, COLOURS[:2]], ids=["four labels", "two labels"])
def test_served_word_counts_answer_as_the_rung_did_without_any_model(labels: Sequence[str], tmp_path: Path) -> None:
    rows = [
        example(
            f"item {i} of the list is {labels[i % len(labels)]}, size {i % 7}",
            labels[(i + i % 5 // 4) % len(labels)],
            i,
        )
        for i in range(120)
    ]
    split = split_of(rows[:80], (), rows[80:])
    rung = classical_rung(split, choose_metric([row.target for row in rows]))
    served = serve_word_counts(split.train, "no-such-model", directory=tmp_path / "rung")
    assert served.rung == rung.name
    assert not list(served.directory.glob("*.pkl")), "safetensors and JSON only"
    engine, model = LocalEngine(**TOOLS), ModelRef(base_model=served.base_model, adapter=str(served.directory))
    replies = engine.chat(model, [list(row.prompt) for row in split.holdout])
    assert tuple(reply.text for reply in replies) == rung.scores.answers
    assert len(set(rung.scores.answers)) == len(labels)
    [choice] = replies[0].tokens
    assert sum(math.exp(chance) for _, chance in choice.top) == pytest.approx(1)
    asked = [[*split.holdout[0].prompt, {"role": "assistant", "content": label}] for label in labels]
    assert engine.log_probs(model, asked) == pytest.approx([dict(choice.top)[label] for label in labels])
    with pytest.raises(InvalidValue, match="'mauve' is none of this model's"):
        engine.log_probs(model, [[*split.holdout[0].prompt, {"role": "assistant", "content": "mauve"}]])
    pieces = list(engine.stream(model, list(split.holdout[0].prompt)))
    assert "".join(piece.text for piece in pieces) == replies[0].text
    assert pieces[-1].finish_reason == "stop"


def test_a_served_prompt_answers_as_with_its_examples_sent_along(tiny_model: Path, tmp_path: Path) -> None:
    rows = examples(range(6))
    engine, base = LocalEngine(**TOOLS), ModelRef(base_model=str(tiny_model))
    metric, few = choose_metric([row.target for row in rows]), Sampling(max_tokens=12)
    scores = score_model(engine, base, rows[4:], metric, max_tokens=12, shots=rows[:4])
    rung = Rung(name="few-shot-4", kind="prompt", description="", scores=scores, shots=tuple(rows[:4]))
    served = serve_shots(rung, str(tiny_model), directory=tmp_path / "rung")
    model = ModelRef(base_model=served.base_model, adapter=str(served.directory))
    asked = [list(row.prompt) for row in rows[4:]]
    assert tuple(reply.text for reply in engine.chat(model, asked, few)) == scores.answers
    assert "".join(piece.text for piece in engine.stream(model, asked[0], few)) == scores.answers[0]
    assert engine.chat(base, asked, few)[0].prompt_tokens < engine.chat(model, asked, few)[0].prompt_tokens
    answered = [list(row.messages) for row in rows[4:]]
    sent_along = [[*with_shots(row.prompt, rows[:4]), row.messages[-1]] for row in rows[4:]]
    assert engine.log_probs(model, answered) == pytest.approx(engine.log_probs(base, sent_along))


def test_answers_of_several_forms_cannot_be_served(encoder: str, tmp_path: Path) -> None:
    rows = [example(f"item {i}", "red" if i % 2 else '{"colour":"blue"}', i) for i in range(20)]
    engine, facts = LocalEngine(**TOOLS), TorchTrainer(**TOOLS).facts(encoder)
    assert serve_frozen_encoder(rows, engine, encoder, facts, directory=tmp_path / "rung") is None
    assert not (tmp_path / "rung").exists()


def test_a_job_that_asks_for_it_judges_and_serves_an_encoder_tuned_beside_the_chat_model(
    tiny_model: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (encoder_rung, catalogue):
        monkeypatch.setattr(module, "bundled_encoder", lambda: encoder)
    files, engine, watch = colour_files(tmp_path), LocalEngine(**TOOLS), Recording()
    source = sources_of(files)
    outcome = run_job(
        Request(
            base_model=str(tiny_model),
            training=source["train"],
            validation=source["valid"],
            holdout=source["holdout"],
            hyperparameters=Hyperparameters(n_epochs=1, tuned_encoder=True),
            directory=tmp_path / "out",
            eval_budget=0.0,
        ),
        Tools(engine=engine, trainer=TorchTrainer(**TOOLS), watch=watch),
    )
    names = [rung.name for rung in outcome.rungs]
    assert names[:4] == ["constant", "tfidf-logistic", "frozen-encoder", "tuned-encoder"]
    steps = [step for kind, step in watch.story if kind == "metrics"]
    assert len(steps) == outcome.plan.total_steps, "the rung's steps are not the job's"
    assert any(message.startswith("tuned-encoder: ") for message in watch.messages)
    served = {one.rung: ModelRef(base_model=one.base_model, adapter=str(one.directory)) for one in outcome.served_rungs}
    assert served.keys() == {name for name in names if name.startswith(("tfidf", "frozen", "tuned-", "few-shot"))}
    holdout = [list(row.prompt) for row in outcome.split.holdout]
    for rung in outcome.rungs:
        if rung.name in served:
            replies = engine.chat(served[rung.name], holdout, Sampling(max_tokens=40))
            same = sum(
                reply.text.startswith(answer) for reply, answer in zip(replies, rung.scores.answers, strict=True)
            )
            assert same == len(holdout), rung.name


def test_an_encoder_is_not_tuned_beside_what_it_cannot_answer(tmp_path: Path) -> None:
    rows = [example(f"item {i}", "red" if i % 2 else '{"colour":"blue"}', i) for i in range(20)]
    watch = Recording()
    tools = Tools(engine=LocalEngine(**TOOLS), trainer=TorchTrainer(**TOOLS), watch=watch)
    split = split_of(rows, (), rows)
    assert tuned_encoder_rung(split, choose_metric(["red", "blue"]), tools, directory=tmp_path / "rung") == []
    assert "left out: a classifier needs" in watch.messages[-1]
