"""Any model on any file: tiny real models, an adapter from elsewhere, and the pairs of two models."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

import heldout
from heldout.api.app import create_chat_app
from heldout.engine.base import ModelRef, Sampling
from heldout.engine.local import LocalEngine
from heldout.errors import ContextLengthExceeded, InvalidHoldoutFile, InvalidTrainingFile, InvalidValue, ModelNotFound
from heldout.pipeline.consequences import CONSEQUENCES
from heldout.pipeline.evaluate.metrics.exact import exact_match
from heldout.pipeline.evaluation import Evaluation
from heldout.pipeline.training import Adapter
from heldout.processes.inference import LocalChat
from heldout.processes.tools import local_engine
from heldout.settings import Settings
from heldout.store.blobs import open_blobs
from heldout.store.db import open_db
from tests.conftest import colour_row, write_rows
from tests.documents import faults
from tests.torch.conftest import Recording, examples
from tests.torch.encoders import make_tiny_encoder

HELD = range(2000, 2048)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("data"), precision="float32")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows that nobody trained on."""
    return write_rows(tmp_path_factory.mktemp("held") / "held.jsonl", [colour_row(i) for i in HELD])


@pytest.fixture(scope="module")
def elsewhere(tiny_model: Path, trained: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder as PEFT leaves it: no report beside it, the base model by its path."""
    folder = tmp_path_factory.mktemp("elsewhere") / "adapter"
    shutil.copytree(trained.directory, folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(tiny_model))
    return folder


def change(config: Path, **keys: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))


@pytest.fixture(scope="module")
def judged(elsewhere: Path, held: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The adapter beside the cheaper rungs, with a report in `report`."""
    folder = tmp_path_factory.mktemp("judged")
    # Two of the held-out rows are in the training file.
    train = write_rows(folder / "train.jsonl", [colour_row(i) for i in (*range(160), 2000, 2001)])
    return heldout.evaluate(elsewhere, held, train=train, out=folder / "report", settings=settings)


def test_a_base_model_scores_what_its_own_answers_are_worth(
    tiny_model: Path, held: Path, settings: Settings, engine: LocalEngine
) -> None:
    done = heldout.evaluate(tiny_model, held, max_tokens=8, settings=settings)
    rows = examples(HELD)
    replies = engine.chat(ModelRef(base_model=str(tiny_model)), [row.prompt for row in rows], Sampling(max_tokens=8))
    assert done.scores.answers == tuple(reply.text for reply in replies)
    assert done.scores.per_example == tuple(exact_match(r.text, e.target) for r, e in zip(replies, rows, strict=True))
    assert (done.metric, len(done.examples), done.rungs, done.beside) == ("exact match", 48, (), "")
    assert any("is not known; with the training file" in note for note in done.notes)
    assert any("were cut at 8 tokens" in note for note in done.notes)


def test_an_adapter_from_elsewhere_is_judged_beside_its_base_model_and_cheap_rungs(judged: Evaluation) -> None:
    assert judged.scores.mean > 0.5, "it has learned the task"
    assert [rung.name for rung in judged.rungs][:4] == ["constant", "tfidf-logistic", "frozen-encoder", "zero-shot"]
    by_name = {rung.name: rung.scores for rung in judged.rungs}
    assert judged.against["zero-shot"].difference == pytest.approx(judged.scores.mean - by_name["zero-shot"].mean)
    assert judged.against["zero-shot"].p_better > 0.99
    best = max(judged.rungs, key=lambda rung: rung.scores.mean)
    assert best.name in judged.beside


def test_an_adapter_from_elsewhere_has_a_verdict_and_its_consequences_are_measured(judged: Evaluation) -> None:
    assert judged.verdict is not None
    assert judged.verdict.because in ("consequence", "cheaper_is_better"), "word counts know the colours as well"
    assert any("the model scores" in reason for reason in judged.verdict.reasons)
    assert judged.verdict.numbers["answers"]["model"]["score"] == judged.scores.mean
    measured = {one.name for one in judged.consequences if one.status != "not_measured"}
    assert len(judged.consequences) == len(CONSEQUENCES)
    assert {"format", "fragility", "generalisation", "memorisation", "calibration"} <= measured
    (gap,) = [one.numbers["n"] for one in judged.consequences if one.name == "generalisation"]
    assert set(gap) == {"train", "holdout"}, "whoever trained it may have stopped by any of the rows"


def test_every_further_model_that_looks_at_the_rows_needs_more_evidence(
    tiny_model: Path, elsewhere: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(80)])
    own = Settings(data_dir=tmp_path / "looks", precision="float32", eval_budget=0)
    other = write_rows(tmp_path / "other.jsonl", [colour_row(i) for i in range(3000, 3048)])
    again = shutil.copytree(elsewhere, tmp_path / "again")
    looks = []
    for model, file in [(elsewhere, held), (tiny_model, held), (elsewhere, held), (tiny_model, other), (again, other)]:
        done = heldout.evaluate(model, file, train=train, max_tokens=4, settings=own)
        assert done.verdict is not None
        looks.append(done.verdict.numbers["look"])
    assert looks == [1, 2, 1, 1, 2]
    forgetting = next(one for one in done.consequences if one.name == "forgetting")
    assert "the time for probes (0 s) was used up" in forgetting.sentence


def test_where_no_looks_can_be_counted_it_is_said_and_no_answer_is_lost(
    elsewhere: Path, held: Path, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(80)])
    (tmp_path / "a file").write_text("")
    blocked = Settings(data_dir=tmp_path / "a file" / "data", precision="float32", eval_budget=0)
    done = heldout.evaluate(elsewhere, held, train=train, max_tokens=4, out=tmp_path / "report", settings=blocked)
    assert done.verdict is not None
    assert any("earlier looks at these rows are not counted" in note for note in done.notes)
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_judge_that_is_a_model_is_not_asked_hundreds_of_times_by_probes(
    elsewhere: Path, tiny_model: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(80)])
    grader = {
        "type": "score_model",
        "name": "judge",
        "model": str(tiny_model),
        "range": [0, 1],
        "input": [{"role": "user", "content": "{{sample.output_text}}"}],
    }
    done = heldout.evaluate(elsewhere, held, train=train, grader=grader, max_tokens=4, settings=settings)
    assert done.consequences == ()
    assert any("grader that asks a model" in note for note in done.notes)


def test_of_a_folder_of_weights_what_compares_with_the_base_is_not_measured(
    tiny_model: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(80)])
    done = heldout.evaluate(tiny_model, held, train=train, max_tokens=4, settings=settings)
    assert done.verdict is not None
    assert done.verdict.outcome != "ship", "nothing was learned"
    light = {one.name: one for one in done.consequences}
    for name in ("forgetting", "hallucination"):
        assert "before its training is not known" in light[name].sentence
    assert light["fragility"].status != "not_measured"


def test_a_page_without_a_verdict_has_a_title_that_can_be_read(
    tiny_model: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    heldout.compare(tiny_model, tiny_model, held, max_tokens=1, out=tmp_path / "report", settings=settings)
    page = (tmp_path / "report" / "report.html").read_text()
    (white,) = re.findall(r"([^{}]*) \{[^}]*color: #fff", page)
    assert white.strip().startswith("h1[class]")
    assert "<h1>" in page


def test_rows_of_the_training_file_are_left_out_by_name(judged: Evaluation) -> None:
    assert [example.line for example in judged.examples] == list(range(3, 49))
    (leak,) = [finding for finding in judged.findings if finding.code == "leak_removed"]
    assert leak.lines == (1, 2)
    assert not any("is not known" in note for note in judged.notes)


def test_the_report_has_every_row_and_needs_nothing_else(judged: Evaluation, tmp_path: Path) -> None:
    from heldout.pipeline import evaluation_report

    evaluation_report.write(judged, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == json.loads(json.dumps(judged.as_dict()))
    assert faults(stored) == []
    assert [row["line"] for row in stored["rows"]] == list(range(3, 49))
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(?:src|href|url)\s*[=(]", page)
    for one in judged.consequences:
        assert f"<td class=name>{one.name}</td>" in page
    for rung in judged.rungs:
        assert rung.name in page
        assert f"| {rung.name} |" in (tmp_path / "report.md").read_text()


def test_every_key_of_the_reports_is_in_the_documentation(
    judged: Evaluation, tiny_model: Path, held: Path, settings: Settings
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    pair = heldout.compare(tiny_model, tiny_model, held, max_tokens=1, settings=settings)
    for key in (*judged.as_dict(), *pair.as_dict()):
        assert f"`{key}`" in page, key


def test_a_folder_with_a_report_is_not_written_over(elsewhere: Path, held: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(InvalidValue, match="already holds a report"):
        heldout.evaluate(elsewhere, held, out=tmp_path)


def test_two_models_are_compared_row_by_row(
    elsewhere: Path, tiny_model: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    watch = Recording()
    pair = heldout.compare(elsewhere, tiny_model, held, out=tmp_path / "out", watch=watch, settings=settings)
    pairs = list(zip(pair.scores_a.per_example, pair.scores_b.per_example, strict=True))
    assert pair.wins == sum(x > y for x, y in pairs) > 20
    assert pair.comparison.difference == pytest.approx(pair.scores_a.mean - pair.scores_b.mean)
    assert pair.comparison.mid_p is not None
    assert pair.comparison.mid_p < 0.01
    assert pair.conclusion.startswith(f"{elsewhere} is better than {tiny_model}: +")
    assert len(pair.shown) == 10
    assert all(pairs[i][0] != pairs[i][1] for i in pair.shown)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert faults(stored) == []
    assert (stored["a_better"], stored["b_better"]) == (pair.wins, pair.losses)
    assert stored["rows"][0]["a"]["answer"] == pair.scores_a.answers[0]
    assert pair.conclusion in (tmp_path / "out" / "report.html").read_text()
    turned = heldout.compare(tiny_model, elsewhere, held, settings=settings)
    assert turned.comparison.difference == pytest.approx(-pair.comparison.difference)
    assert f"{tiny_model} is worse than {elsewhere}" in turned.conclusion


def test_a_model_against_itself_is_no_difference(tiny_model: Path, held: Path, settings: Settings) -> None:
    pair = heldout.compare(tiny_model, tiny_model, held, metric="chrf", max_tokens=4, settings=settings)
    assert (pair.wins, pair.losses, pair.comparison.difference, pair.comparison.mid_p) == (0, 0, 0, None)
    assert "A and B score the same on every one of 48 rows" in pair.conclusion


def test_few_rows_are_told_and_conclude_nothing(
    elsewhere: Path, tiny_model: Path, settings: Settings, tmp_path: Path
) -> None:
    few = write_rows(tmp_path / "few.jsonl", [colour_row(i) for i in range(2000, 2008)])
    pair = heldout.compare(elsewhere, tiny_model, few, metric="exact_match", settings=settings)
    assert "8 rows are too few for a verdict; 30 are the minimum" in pair.notes
    assert pair.conclusion.startswith("8 rows are too few to tell")


def test_rows_that_are_one_piece_of_evidence_count_once(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    again = write_rows(tmp_path / "again.jsonl", [colour_row(2000 + i % 4) for i in range(40)])
    done = heldout.evaluate(tiny_model, again, max_tokens=2, settings=settings)
    assert done.clusters < 30
    assert any("pieces of evidence" in note for note in done.notes)
    assert any("too few for a verdict" in note for note in done.notes)


def test_faulty_rows_are_all_listed_and_none_is_judged(tiny_model: Path, held: Path, tmp_path: Path) -> None:
    lines = held.read_text().splitlines()
    lines[2] = "{"
    lines[7] = json.dumps({"messages": [{"role": "user", "content": "no answer"}]})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidHoldoutFile) as raised:
        heldout.evaluate(tiny_model, bad)
    assert "Line 3" in str(raised.value)
    assert "Line 8" in str(raised.value)
    with pytest.raises(InvalidTrainingFile, match="Line 3"):
        heldout.evaluate(tiny_model, held, train=bad)


def test_a_prompt_that_is_too_long_is_told_with_its_line(tiny_model: Path, settings: Settings, tmp_path: Path) -> None:
    rows = [colour_row(i) for i in range(2000, 2005)]
    rows[3]["messages"][1]["content"] = "far too long " * 200  # type: ignore[index]
    file = write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(ContextLengthExceeded, match=r"maximum context length is 512 .* that of line 4"):
        heldout.evaluate(tiny_model, file, settings=settings)


def test_files_without_rows_and_no_files_are_told(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InvalidHoldoutFile, match="no examples"):
        heldout.evaluate(tiny_model, tmp_path / "empty.jsonl")
    with pytest.raises(InvalidValue, match=r"There is no file .*gone\.jsonl"):
        heldout.evaluate(tiny_model, tmp_path / "gone.jsonl")


def test_an_unknown_model_metric_or_two_ways_to_score_are_refused(tiny_model: Path, held: Path) -> None:
    with pytest.raises(ModelNotFound, match="no-such-model"):
        heldout.evaluate("no-such-model", held)
    with pytest.raises(InvalidValue, match="Metrics: exact_match, label_accuracy, number, sql"):
        heldout.evaluate(tiny_model, held, metric="accuracy")
    with pytest.raises(InvalidValue, match="give one of them"):
        heldout.evaluate(tiny_model, held, metric="chrf", grader={"type": "string_check"})


@pytest.mark.parametrize(
    ("keys", "lost", "why"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "", "of the kind 'PREFIX_TUNING'"),
        ({}, "adapter_model.safetensors", "Weights in pickles"),
        ({"base_model_name_or_path": None}, "", "which base model it belongs to"),
        ({"base_model_name_or_path": "gone-model"}, "", "The model 'gone-model' does not exist"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_refused(
    elsewhere: Path, held: Path, tmp_path: Path, keys: dict[str, Any], lost: str, why: str
) -> None:
    broken = tmp_path / "adapter"
    shutil.copytree(elsewhere, broken)
    change(broken / "adapter_config.json", **keys)
    if lost:
        (broken / lost).unlink()
    with pytest.raises(ModelNotFound, match=why):
        heldout.evaluate(broken, held)


def test_the_base_model_of_an_adapter_can_be_told(
    elsewhere: Path, tiny_model: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(elsewhere, moved)
    change(moved / "adapter_config.json", base_model_name_or_path="gone-model")
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    done = heldout.evaluate(moved, held, base=str(tiny_model), settings=settings)
    assert done.scores.mean > 0.5
    assert any("chat template of its own" in note for note in done.notes)


def test_an_evaluations_report_beside_an_adapter_is_no_jobs_report(
    elsewhere: Path, held: Path, settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(elsewhere, tmp_path / "adapter")
    for n in (1, 2):
        done = heldout.evaluate(
            tmp_path / "adapter", held, max_tokens=2, out=tmp_path if n == 1 else None, settings=settings
        )
        assert len(done.examples) == 48


def test_a_served_model_is_scored_as_the_same_model_here(tiny_model: Path, held: Path, settings: Settings) -> None:
    served = settings.model_copy(update={"model_aliases": {"hosted": str(tiny_model)}})
    chat = LocalChat(served, open_db(served.database), open_blobs(served.blobs), local_engine(served))
    with serving(create_chat_app(settings=served, chat=chat)) as url:
        asked = heldout.Endpoint(model="hosted", base_url=f"{url}/v1")
        pair = heldout.compare(asked, tiny_model, held, max_tokens=6, settings=settings)
    assert pair.scores_a.answers == pair.scores_b.answers
    assert pair.scores_a.prompt_tokens == pair.scores_b.prompt_tokens > 0


def test_a_model_behind_an_api_has_a_verdict_and_no_consequences(
    tiny_model: Path, held: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(80)])
    (tmp_path / "hosted").mkdir()  # a folder of the model's name is another model
    monkeypatch.chdir(tmp_path)
    served = settings.model_copy(update={"model_aliases": {"hosted": str(tiny_model)}})
    chat = LocalChat(served, open_db(served.database), open_blobs(served.blobs), local_engine(served))
    with serving(create_chat_app(settings=served, chat=chat)) as url:
        asked = heldout.Endpoint(model="hosted", base_url=f"{url}/v1")
        done = heldout.evaluate(asked, held, train=train, max_tokens=6, settings=settings)
    assert done.verdict is not None
    assert done.verdict.because == "cheaper_is_better"
    assert done.consequences == ()
    assert faults(json.loads(json.dumps(done.as_dict()))) == []


def test_a_classifier_is_judged_with_its_consequences(held: Path, settings: Settings, tmp_path: Path) -> None:
    encoder = make_tiny_encoder(tmp_path / "tiny-bert")
    train = write_rows(tmp_path / "train.jsonl", [colour_row(i) for i in range(80)])
    own = settings.model_copy(update={"data_dir": tmp_path / "data"})
    heldout.tune(
        train, model=str(encoder), out=tmp_path / "out", seed=1, settings=own, n_epochs=2, early_stopping=False
    )
    done = heldout.evaluate(tmp_path / "out", held, train=train, settings=own)
    assert done.verdict is not None
    light = {one.name: one.status for one in done.consequences}
    assert len(light) == len(CONSEQUENCES)
    assert light["forgetting"] == "not_measured", "it is only asked for labels"
    assert light["calibration"] != "not_measured"


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port of this machine, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


def test_a_grader_scores_instead_of_a_metric(elsewhere: Path, held: Path, settings: Settings, tmp_path: Path) -> None:
    check = {
        "type": "string_check",
        "name": "names the colour",
        "operation": "eq",
        "input": "{{ sample.output_json.colour }}",
        "reference": "{{ item.target_json.colour }}",
    }
    (tmp_path / "grader.json").write_text(json.dumps(check))
    by_file = heldout.evaluate(elsewhere, held, grader=tmp_path / "grader.json", max_tokens=12, settings=settings)
    plain = heldout.evaluate(elsewhere, held, max_tokens=12, settings=settings)
    assert by_file.metric == "names the colour"
    assert by_file.scores.per_example == plain.scores.per_example


def test_a_local_judge_that_says_no_number_is_told_of(
    elsewhere: Path, tiny_model: Path, held: Path, settings: Settings
) -> None:
    judge = {
        "type": "score_model",
        "model": str(tiny_model),
        "input": [{"role": "user", "content": "{{ sample.output_text }}: from 0 to 1?"}],
        "sampling_params": {"max_completions_tokens": 3},
    }
    done = heldout.evaluate(elsewhere, held, grader=judge, max_tokens=12, settings=settings)
    told = [note for note in done.notes if "gave no score from 0 to 1" in note]
    assert len(told) == 1
    assert done.scores.mean < 1
