"""The card beside an adapter: read by Hugging Face's own library, and silent about the rows."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from heldout.engine.catalogue import ENCODER, hub_name
from heldout.pipeline import model_card
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.crossfit import CrossFit
from heldout.pipeline.findings import markdown_text
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.served_rungs import ServedRung
from heldout.processes.register import put_adapter, register
from heldout.records import Job
from heldout.settings import DEFAULT_ENCODER, DEFAULT_MODEL, Settings
from heldout.store.blobs import open_blobs
from heldout.store.db import open_db
from tests.unit.conftest import example, right, rung
from tests.unit.outcomes import ATTACK, make_outcome

NAME = "ft:tiny:us:tickets:abcd1234"
SECRET = "Mrs Ada Quill, account 4711"


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    return replace(make_outcome(tmp_path), base_model=DEFAULT_MODEL)


def card_of(outcome: Outcome) -> ModelCard:
    model_card.write(outcome, NAME)
    return ModelCard.load(outcome.adapter.directory / "README.md")


def metric_of(card: ModelCard) -> dict[str, Any]:
    """The one entry of the front matter's model-index, as it is written."""
    (model,) = card.data.to_dict()["model-index"]
    (result,) = model["results"]
    (metric,) = result["metrics"]
    return {"name": model["name"], **result, "metrics": metric}


def test_the_front_matter_is_hugging_faces(outcome: Outcome) -> None:
    card = card_of(outcome)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in card.data.tags
    assert card.data.license is None, "that is the owner's to give"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("exact_match", "exact match", 0.9)
    low, high = outcome.tuned.scores.interval
    assert result.metric_args == {"interval_95": [round(low, 4), round(high, 4)], "examples": 100}
    found = metric_of(card)
    assert found["name"] == NAME
    assert found["task"] == {"type": "text-generation"}
    assert found["dataset"]["split"] == "holdout"
    assert found["metrics"]["value"] == 0.9


def test_a_metric_without_a_name_there_is_called_custom(outcome: Outcome) -> None:
    scores = replace(outcome.tuned.scores, metric=f"my grader {ATTACK}")
    (result,) = card_of(replace(outcome, tuned=replace(outcome.tuned, scores=scores))).data.eval_results
    assert (result.metric_type, result.metric_name) == ("custom", f"my grader {ATTACK}")


def test_a_folder_is_no_base_model_for_the_hub(outcome: Outcome, tmp_path: Path) -> None:
    card = card_of(replace(outcome, base_model=str(tmp_path)))
    assert card.data.base_model is None
    assert 'base = "path/to/the/base/model"' in card.text
    assert hub_name(str(tmp_path)) is None
    assert hub_name("org/some-model") == "org/some-model"


def test_the_card_tells_the_verdict_the_numbers_and_the_limits(outcome: Outcome) -> None:
    lit = (
        Consequence(name="format", status="ok", sentence="all of the model's answers fit"),
        Consequence(name="fragility", status="fail", sentence="it breaks"),
    )
    (warning,) = outcome.findings
    notes = (replace(warning, severity="note", lines=(1, 2)), replace(warning, severity="note"))
    text = card_of(replace(outcome, consequences=lit, findings=(*notes, warning))).text
    assert "**Verdict: ship.**" in text
    assert all(markdown_text(reason) in text for reason in outcome.verdict.reasons)
    assert "| tuned (this one) | 90.0% | 82.6% to 94.5% |" in text
    assert "| zero-shot | 60.0% | 50.2% to 69.1% |" in text
    assert text.index("| 🔴 fails | fragility | it breaks |") < text.index("the model's answers fit |")
    assert "| lora\\_r | 8 | set in the request |" in text
    assert "batch\\_size" not in text, "what nobody set is the plan's"
    assert "80 examples to train on, 20 that stopped training and chose the checkpoint, 100 that decided" in text
    assert "- warning: `odd`, 1 finding about 1 line\n- note: `odd`, 2 findings about 3 lines\n" in text
    assert f'model="{NAME}"' in text
    assert "4-bit" in text, "the bundled weights are not quite the hub's"
    assert "products in float32, with kernels." in text
    assert "HELDOUT_PRECISION=float32 heldout tune" in text
    assert "5f" * 32 in text


def test_out_of_fold_scores_are_not_said_to_be_the_served_models(outcome: Outcome) -> None:
    split = replace(outcome.split, valid=(), holdout=())
    folds = tuple(SimpleNamespace() for _ in range(5))
    card = card_of(replace(outcome, split=split, crossfit=CrossFit(folds=folds, groups=100)))  # type: ignore[arg-type]
    found = metric_of(card)
    assert found["dataset"]["split"] == "out-of-fold"
    assert "was itself not measured" in found["dataset"]["name"]
    assert "models like this one that never saw it; this one was trained on all of them" in card.text


def test_no_text_of_the_data_is_in_the_card(outcome: Outcome) -> None:
    row = example(f"who is {SECRET}?", SECRET)
    quoting = f"{SECRET!r} is answered 90% of the time"
    groups = {"difference": 0.1, "interval": [0.0, 0.2]}
    lit = (
        Consequence(name="bias", status="fail", sentence=f"by the declared groups ({SECRET} 20)", numbers=groups),
        Consequence(
            name="fragility", status="fail", sentence=f"it's 3 points; {quoting}; more; and on", examples=(SECRET,)
        ),
        Consequence(name="format", status="not_measured", sentence=f"not measured: {quoting}"),
        Consequence(name="hallucination", status="not_measured", sentence=f'not measured: "{SECRET}" is code'),
    )
    told = replace(
        outcome,
        split=replace(outcome.split, train=(row,), valid=(row,), holdout=(row,)),
        rungs=(replace(outcome.rungs[0], description=f"always {SECRET!r}", shots=(row,)), outcome.rungs[1]),
        findings=(replace(outcome.findings[0], message=SECRET, example=SECRET),),
        consequences=lit,
        verdict=replace(outcome.verdict, reasons=tuple(f"{one.name} fails: {one.sentence}" for one in lit[:2])),
    )
    text = card_of(told).content
    for part in (SECRET, "Quill", "4711"):
        assert part not in text
    assert "| fragility | it's 3 points |" in text, "what comes before a quotation stays"
    assert "- fragility fails: it's 3 points" in text
    assert "stronger by +10.0 points" in text


def test_texts_cannot_become_markup_or_metadata(outcome: Outcome) -> None:
    name = f"{NAME}\n---\nlicense: mit\n{ATTACK}"
    odd = replace(outcome.rungs[1], name=f"a|b {ATTACK}")
    model_card.write(replace(outcome, rungs=(outcome.rungs[0], odd), base_model=ATTACK), name)
    card = ModelCard.load(outcome.adapter.directory / "README.md")
    assert card.data.license is None
    assert metric_of(card)["name"] == name
    outside = [part for i, part in enumerate(card.text.split("```")) if i % 2 == 0]
    assert "<script>" not in "".join(outside)


@pytest.mark.parametrize("trained", [True, False], ids=["a classifier", "the frozen encoder"])
def test_what_peft_cannot_load_does_not_say_that_it_can(outcome: Outcome, tmp_path: Path, trained: bool) -> None:
    frozen = rung("frozen-encoder", right(100, 80), kind="classical")
    job = replace(outcome, base_model=DEFAULT_ENCODER, kind=ENCODER, rungs=(*outcome.rungs, frozen))
    if trained:
        card = card_of(job)
    else:
        served = ServedRung(rung="frozen-encoder", base_model=DEFAULT_ENCODER, directory=tmp_path / "rung")
        model_card.write_rung(job, served, f"{NAME}:rung-frozen-encoder")
        card = ModelCard.load(tmp_path / "rung" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("heldout", "text-classification")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert metric_of(card)["metrics"]["value"] == (0.9 if trained else 0.8)
    assert "PeftModel" not in card.text
    assert ("**Verdict: ship.**" in card.text) == trained
    assert ("no verdict on this one" in card.text) != trained
    assert "frozen-encoder (this one)" in card.text or trained


@pytest.mark.parametrize(
    ("name", "pipeline_tag", "says"),
    [
        ("tfidf-logistic", "text-classification", "without any language model"),
        ("tuned-encoder", "text-classification", "fine-tuned with its defaults"),
        ("few-shot-4", "text-generation", "which are rows of the training file"),
    ],
)
def test_a_served_rung_says_what_it_is_and_what_it_holds(
    outcome: Outcome, tmp_path: Path, name: str, pipeline_tag: str, says: str
) -> None:
    job = replace(outcome, rungs=(*outcome.rungs, rung(name, right(100, 80), kind="classical")))
    served = ServedRung(rung=name, base_model=DEFAULT_MODEL, directory=tmp_path / "rung")
    model_card.write_rung(job, served, f"{NAME}:rung-{name}")
    card = ModelCard.load(tmp_path / "rung" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("heldout", pipeline_tag)
    assert says in card.text
    assert f"{name} (this one)" in card.text
    assert "PeftModel" not in card.text
    assert "lora" not in card.data.tags


def test_the_card_is_stored_and_served_with_the_adapter_and_pefts_own_is_not(outcome: Outcome, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    db, blobs = open_db(settings.database), open_blobs(settings.blobs)
    folder = outcome.adapter.directory
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (folder / name).write_text("PEFT's")
    for name in ("metrics.csv", "report.json", "report.md", "report.html"):
        (folder.parent / name).write_text("")
    put_adapter(blobs, "adapters/a-checkpoint", folder)
    assert not any(key.endswith("README.md") for key in blobs.keys("adapters/a-checkpoint"))
    job = Job(model="m", base_model=DEFAULT_MODEL, training_file="file-a")
    register(outcome, job, NAME, settings, db, blobs)
    prefix = f"adapters/{job.id}/final"
    assert len(list(blobs.keys(prefix))) == 3
    with blobs.open(f"{prefix}/README.md") as stored:
        text = io.TextIOWrapper(stored, encoding="utf-8").read()
    assert text == (folder / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.model_name == NAME
    assert len(list(folder.iterdir())) == 3, "nothing half written is left"
