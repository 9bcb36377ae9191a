"""A classifier on an encoder through a live server: the same calls as for a chat model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from huggingface_hub import ModelCard
from tests.client.test_a_job_end_to_end import Served
from tests.conftest import colour_row, write_rows
from tests.documents import faults
from tests.torch.encoders import make_tiny_encoder

ENCODER = "team-encoder"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    encoder = make_tiny_encoder(tmp_path / "tiny-bert")
    one = Served(tmp_path / "data", encoder, HELDOUT_MODEL_ALIASES=json.dumps({ENCODER: str(encoder)}))
    yield one
    if one.process.poll() is None:
        one.close()


def create(served: Served, files: dict[str, Path], **hyperparameters: Any) -> Any:
    ids = {part: served.upload(path) for part, path in files.items()}
    return served.client.fine_tuning.jobs.create(
        model=ENCODER,
        suffix="colours",
        seed=1,
        training_file=ids["train"],
        validation_file=ids["valid"],
        extra_body={"x_holdout_file": ids["holdout"]},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )


def test_a_classifier_is_trained_judged_and_asked_as_a_chat_model_is(served: Served, colours: dict[str, Path]) -> None:
    client = served.client
    job = create(served, colours, n_epochs=12, learning_rate=2e-3, batch_size=8)
    job = served.wait(job.id)
    assert job.status == "succeeded", served.story(job.id)
    verdict = job.model_extra["x_verdict"]
    assert set(verdict["numbers"]["against"]) == {"constant", "tfidf-logistic", "frozen-encoder"}
    assert verdict["numbers"]["tuned"] > 0.7
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert len(checkpoints) > 1

    asked: Any = [{"role": "user", "content": "item 7 of the list is red and has size 3"}]
    rungs = [f"{job.fine_tuned_model}:rung-{name}" for name in ("frozen-encoder", "tfidf-logistic")]
    assert set(rungs) <= {model.id for model in client.models.list()}
    for model in (job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint, *rungs):
        answer = client.chat.completions.create(model=model, messages=asked)
        assert json.loads(answer.choices[0].message.content or "").keys() == {"colour"}
        assert answer.choices[0].logprobs is None

    choices = [
        choice
        for model in (*rungs, job.fine_tuned_model)
        for choice in client.chat.completions.create(
            model=model, messages=asked, logprobs=True, top_logprobs=3, n=2
        ).choices
    ]
    for choice in choices:
        assert choice.logprobs is not None
        (entry,) = choice.logprobs.content or []
        assert entry.token == choice.message.content
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.top_logprobs[0].token == entry.token
        assert len(entry.top_logprobs) == 3
        assert 0.25 < math.exp(entry.logprob) <= 1

    chunks = list(
        client.chat.completions.create(model=job.fine_tuned_model, messages=asked, logprobs=True, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [one.content[0].logprob for one in told if one.content] == [entry.logprob]

    long: Any = [{"role": "user", "content": "red " * 70}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens") as raised:
        client.chat.completions.create(model=job.fine_tuned_model, messages=long)
    assert raised.value.code == "context_length_exceeded"

    the_report_of_a_job_is_as_documented_and_its_command_makes_the_same_model(served, job, colours["train"].parent)

    with pytest.raises(openai.BadRequestError, match="is an encoder: it answers only after fine-tuning on labels"):
        client.chat.completions.create(model=ENCODER, messages=asked)


def the_report_of_a_job_is_as_documented_and_its_command_makes_the_same_model(
    served: Served, job: Any, folder: Path
) -> None:
    report = json.loads(served.client.files.content(job.result_files[1]).text)
    assert faults(report) == []
    again = report["reproduce"]
    assert "--suffix=colours" in again["arguments"]
    script = f'heldout() {{ "{sys.executable}" -m heldout "$@"; }}\n{again["command"]}'
    environment = {**os.environ, "HELDOUT_DATA_DIR": str(folder / "again"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = folder / f"{job.id}-again"
    second = json.loads((made / "report.json").read_text())
    assert second["plan"] == report["plan"]
    assert second["tuned"]["score"] == report["tuned"]["score"]
    (stored,) = (served.data_dir / "blobs" / "adapters" / job.id).glob("final")
    name = "adapter_model.safetensors"
    assert (made / "adapter" / name).read_bytes() == (stored / name).read_bytes()
    for rung, prefix in (("", "final"), (":rung-frozen-encoder", "rung-frozen-encoder")):
        card = ModelCard.load(stored.parent / prefix / "README.md")
        assert card.data.model_name == f"{job.fine_tuned_model}{rung}"
    assert not list(stored.parent.glob("step-*/README.md"))


def test_answers_that_are_no_labels_fail_the_job_at_validation(served: Served, colours: dict[str, Path]) -> None:
    rows = [colour_row(i) for i in range(80)]
    for i in (3, 4):
        rows[i]["messages"][2]["content"] = '{"colour":"red","size":3}'  # type: ignore[index]
    colours["train"] = write_rows(colours["train"].parent / "records.jsonl", rows)
    job = served.wait(create(served, colours).id)
    assert job.status == "failed"
    assert job.error.code == "invalid_training_file"
    assert "lines 4 and 5" in job.error.message
    assert "use a chat model" in job.error.message
    assert not any(text.startswith("Fine-tuning job started") for text in served.story(job.id))
