"""`heldout serve` as a user starts it, an unmodified openai client, and a job from upload to answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI
from tests.conftest import colour_row, write_rows

BASE = "gpt-4o-mini-2024-07-18"

#: Where no test asks a model anything, none is loaded to answer: every server would import torch for it.
NO_CHAT = {"HELDOUT_ENGINE_URL": "http://127.0.0.1:9/v1"}


class Served:
    """A running `heldout serve` and a client for it; `settings` are `HELDOUT_…` variables."""

    def __init__(self, data_dir: Path, model: Path, **settings: str) -> None:
        self.data_dir, self.model, self.settings = data_dir, model, settings
        self.start()

    def start(self) -> None:
        environment = os.environ | {
            "HELDOUT_DATA_DIR": str(self.data_dir),
            "HELDOUT_MODEL_ALIASES": json.dumps({BASE: str(self.model)}),
            "HELDOUT_PRECISION": "float32",
            "HELDOUT_CHECK_UPLOADS": "false",  # the job looks at the files too, and test_upload_findings has the rest
            **self.settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "heldout", "serve", "--port", "0"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+/v1", self.process.stdout.readline())
        assert found
        self.client = OpenAI(base_url=found[0], api_key="any", max_retries=8)

    def kill(self) -> None:
        """`kill -9` of the server; its children notice by themselves."""
        self.process.kill()
        self.process.wait()

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)

    def upload(self, path: Path) -> str:
        with path.open("rb") as content:
            return self.client.files.create(file=content, purpose="fine-tune").id

    def wait(self, job_id: str, until: Callable[[Any], bool] | None = None, seconds: float = 120) -> Any:
        """The job once `until` holds, or once it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.client.fine_tuning.jobs.retrieve(job_id)
            if (until and until(job)) or job.status in ("succeeded", "failed", "cancelled"):
                return job
            time.sleep(0.1)
        raise AssertionError(f"still {job.status}: {self.story(job_id)}")

    def story(self, job_id: str) -> list[str]:
        """All event messages, oldest first."""
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]

    def job_processes(self) -> list[psutil.Process]:
        """Of this server's jobs, whoever started them."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "heldout.processes.job" in line and "--check" not in line:
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    if process.environ().get("HELDOUT_DATA_DIR") == str(self.data_dir):
                        found.append(process)
        return found


@pytest.fixture
def served(tmp_path: Path, tiny_model: Path) -> Iterator[Served]:
    """A server that takes jobs; nobody asks it for an answer. A job asks its own models whatever the gate says."""
    one = Served(tmp_path / "data", tiny_model, HELDOUT_GATE="block", **NO_CHAT)
    yield one
    if one.process.poll() is None:
        one.close()


@pytest.fixture
def chatting(tmp_path: Path, tiny_model: Path) -> Iterator[Served]:
    """A server as a user starts it."""
    one = Served(tmp_path / "data", tiny_model)
    yield one
    if one.process.poll() is None:
        one.close()


def test_the_flow_of_openais_guide_works_with_only_base_url_changed(chatting: Served, tmp_path: Path) -> None:
    served = chatting
    client = served.client
    parts = {"train": range(40), "valid": range(1000, 1010)}
    train, valid = (
        served.upload(write_rows(tmp_path / f"{part}.jsonl", [colour_row(i) for i in numbers]))
        for part, numbers in parts.items()
    )
    job = client.fine_tuning.jobs.create(
        training_file=train,
        validation_file=valid,
        model=BASE,
        suffix="Colours",
        seed=1,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 8, "learning_rate": 0.01}},  # type: ignore[typeddict-unknown-key]
        },
    )
    assert job.status in ("validating_files", "queued")
    assert job.error is None
    assert job.fine_tuned_model is None
    job = served.wait(job.id, seconds=300)  # six trainings
    assert job.status == "succeeded", served.story(job.id)
    assert job.error is None
    assert job.finished_at
    assert re.fullmatch(rf"ft:{BASE}:heldout:colours:\w{{8}}", job.fine_tuned_model)
    assert job.hyperparameters.n_epochs == 8
    assert job.hyperparameters.batch_size == 8

    story = served.story(job.id)
    assert story[0] == f"Created fine-tuning job: {job.id}"
    assert "Files validated, moving job to queued state" in story
    assert story[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    first_of_training = next(i for i, text in enumerate(story) if text.startswith("Training "))
    assert re.match(r"Training [\d,]+ of [\d,]+ parameters \([\d.]+%\)", story[first_of_training])
    assert not any(text.startswith("Step") for text in story[:first_of_training])
    assert any(re.match(r"Step \d+/\d+: training loss=[\d.]+, validation loss=[\d.]+", text) for text in story)

    table = client.files.content(job.result_files[0]).text.splitlines()
    assert table[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    steps = [text for text in story if text.startswith("Step")]
    assert len(table) - 1 == len(steps)

    verdict = job.model_extra["x_verdict"]
    assert verdict["outcome"] in ("ship", "dont_ship", "inconclusive")
    assert verdict["reasons"]
    # 40 rows and no holdout file: folds are measured, and a client sees the steps of one training alone.
    assert (verdict["numbers"]["folds"], verdict["numbers"]["n_holdout"]) == (5, 40)
    assert "the served model was trained on all rows and was itself not measured" in verdict["reasons"][1]
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    told = [event.data["step"] for event in events if event.type == "metrics"][::-1]  # type: ignore[index]
    assert told == list(range(1, len(steps) + 1))
    assert sum(text.startswith("fold 5 of 5: the best step was") for text in story) == 1

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints
    assert [c.step_number for c in checkpoints] == sorted((c.step_number for c in checkpoints), reverse=True)
    assert sum(c.model_extra["x_best"] for c in checkpoints) == 1

    asked = colour_row(3001)["messages"][:2]  # type: ignore[index]
    for model in (job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint):
        answer = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=20)
        assert (answer.choices[0].message.content or "").startswith('{"colour":"')
        assert answer.choices[0].finish_reason == "stop"
    plain = answer
    stream = client.chat.completions.create(
        model=job.fine_tuned_model, messages=asked, temperature=0, max_tokens=20, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == (plain.choices[0].message.content if checkpoints[0].model_extra["x_best"] else text)

    listed = {model.id for model in client.models.list()}
    assert job.fine_tuned_model in listed
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=job.fine_tuned_model, messages=asked)


def test_trained_tokens_are_the_tokens_of_all_examples_times_the_epochs(
    served: Served, colours: dict[str, Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.model)
    rows = [json.loads(line)["messages"] for line in colours["train"].read_text().splitlines()]
    # Up to and including the end-of-turn token; the line feed after it is nobody's token.
    expected = sum(
        len(tokenizer(tokenizer.apply_chat_template(row, tokenize=False).rstrip("\n")).input_ids) for row in rows
    )
    job = served.client.fine_tuning.jobs.create(
        training_file=served.upload(colours["train"]),
        validation_file=served.upload(colours["valid"]),
        model=BASE,
        hyperparameters={"n_epochs": 2},
        extra_body={"x_holdout_file": served.upload(colours["holdout"])},
    )
    assert served.wait(job.id).trained_tokens == 2 * expected


def test_a_bad_file_fails_the_job_with_every_line_named(served: Served, tmp_path: Path) -> None:
    rows = [colour_row(i) for i in range(30)]
    rows[4]["messages"][2]["content"] = ""  # type: ignore[index]
    del rows[11]["messages"][2]  # type: ignore[attr-defined]
    job = served.client.fine_tuning.jobs.create(
        training_file=served.upload(write_rows(tmp_path / "bad.jsonl", rows)), model=BASE
    )
    job = served.wait(job.id)
    assert job.status == "failed"
    assert job.error.code == "invalid_training_file"
    assert job.error.param == "training_file"
    assert "Line 5" in job.error.message
    assert "Line 12" in job.error.message


def test_nine_examples_fail_with_openais_code_and_sentence(served: Served, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [colour_row(i) for i in range(9)])
    job = served.wait(served.client.fine_tuning.jobs.create(training_file=served.upload(few), model=BASE).id)
    assert job.error.code == "invalid_n_examples"
    assert job.error.message == "Training file has 9 example(s), but must have at least 10 examples"


def long_job(served: Served, colours: dict[str, Path], n_epochs: int = 50) -> str:
    """A job that trains for a long time, or as long as is said."""
    return served.client.fine_tuning.jobs.create(
        training_file=served.upload(colours["train"]),
        validation_file=served.upload(colours["valid"]),
        model=BASE,
        seed=5,
        extra_body={"x_holdout_file": served.upload(colours["holdout"])},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": n_epochs, "early_stopping": False}},  # type: ignore[typeddict-unknown-key]
        },
    ).id


def has_reached(served: Served, beginning: str) -> Callable[[Any], bool]:
    return lambda job: any(text.startswith(beginning) for text in served.story(job.id))


@pytest.mark.parametrize("stage", ["Created", "Files validated", "Fine-tuning job started", "Step 12/"])
def test_cancelling_stops_within_seconds_at_any_stage(served: Served, colours: dict[str, Path], stage: str) -> None:
    job_id = long_job(served, colours)
    served.wait(job_id, has_reached(served, stage))
    assert served.client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    deadline = time.monotonic() + 8
    while served.job_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not served.job_processes()
    assert served.client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        served.client.fine_tuning.jobs.cancel(job_id)


def test_a_job_process_killed_in_training_goes_on_from_its_last_checkpoint(
    served: Served, colours: dict[str, Path]
) -> None:
    job_id = long_job(served, colours, n_epochs=30)
    served.wait(job_id, has_reached(served, "Checkpoint created at step 20"))
    (process,) = served.job_processes()
    process.kill()
    job = served.wait(job_id)
    assert job.status == "succeeded", served.story(job_id)
    story = served.story(job_id)
    (resumed,) = [text for text in story if text.startswith("Training continues from the checkpoint of step")]
    assert int(resumed.rsplit(" ", 1)[-1]) >= 20
    assert sum(text == "Fine-tuning job started" for text in story) == 1
    table = served.client.files.content(job.result_files[0]).text.splitlines()
    assert [int(row.split(",")[0]) for row in table[1:]] == list(range(1, 301))


def test_a_killed_server_loses_no_file_job_or_event_and_the_job_goes_on(
    chatting: Served, colours: dict[str, Path]
) -> None:
    served = chatting
    job_id = long_job(served, colours, n_epochs=20)
    served.wait(job_id, has_reached(served, "Step 12/"))
    files = {file.id for file in served.client.files.list()}
    before = served.story(job_id)
    served.kill()
    served.start()
    assert {file.id for file in served.client.files.list()} >= files
    assert served.story(job_id)[: len(before)] == before
    assert served.wait(job_id).status == "succeeded", served.story(job_id)


def rows(served: Served, job: Any) -> list[int]:
    """The steps in a finished job's CSV."""
    table = served.client.files.content(job.result_files[0]).text.splitlines()
    return [int(row.split(",")[0]) for row in table[1:]]


def is_paused(job: Any) -> bool:
    return job.x_pause == "paused"


def test_a_paused_job_frees_its_slot_survives_a_restart_and_goes_on_from_its_checkpoint(
    served: Served, colours: dict[str, Path]
) -> None:
    jobs = served.client.fine_tuning.jobs
    job_id = long_job(served, colours, n_epochs=30)
    served.wait(job_id, has_reached(served, "Checkpoint created at step 20"))
    assert jobs.pause(job_id).status == "running"
    job = served.wait(job_id, is_paused)
    assert (job.status, job.x_pause, job.estimated_finish) == ("queued", "paused", None)
    assert not served.job_processes()
    assert re.match(r"Paused at step \d+", served.story(job_id)[-1])

    other = long_job(served, colours, n_epochs=1)
    assert served.wait(other).status == "succeeded", served.story(other)
    assert is_paused(jobs.retrieve(job_id))

    served.close()
    served.start()
    jobs = served.client.fine_tuning.jobs
    time.sleep(2)  # several looks of the worker
    assert is_paused(jobs.retrieve(job_id))
    assert jobs.resume(job_id).x_pause is None
    job = served.wait(job_id)
    assert job.status == "succeeded", served.story(job_id)
    story = served.story(job_id)
    at = story.index("Fine-tuning job resumed")
    assert story[at + 1] == "Fine-tuning job goes on"
    (resumed,) = [text for text in story[at:] if text.startswith("Training continues from the checkpoint of step")]
    assert int(resumed.rsplit(" ", 1)[-1]) >= 20
    assert sum(text == "Fine-tuning job started" for text in story) == 1
    assert not any("unexpectedly" in text for text in story)
    assert rows(served, job) == list(range(1, 301))


@pytest.mark.parametrize("stage", ["Created", "Files validated", "Fine-tuning job started"])
def test_a_job_can_be_paused_before_it_trains(served: Served, colours: dict[str, Path], stage: str) -> None:
    jobs = served.client.fine_tuning.jobs
    job_id = long_job(served, colours, n_epochs=2)
    served.wait(job_id, has_reached(served, stage))
    jobs.pause(job_id)
    job = served.wait(job_id, is_paused)
    assert (job.status, job.x_pause) == ("queued", "paused"), served.story(job_id)
    assert not served.job_processes()
    assert "Files validated, moving job to queued state" in served.story(job_id)
    assert not any(text.startswith("Step") for text in served.story(job_id))
    jobs.resume(job_id)
    assert served.wait(job_id).status == "succeeded", served.story(job_id)


def test_a_pause_at_any_moment_costs_no_attempt_and_a_kill_in_between_is_survived(
    served: Served, colours: dict[str, Path]
) -> None:
    jobs = served.client.fine_tuning.jobs
    job_id = long_job(served, colours, n_epochs=2)
    for moment in (0.0, 0.4, 0.8, 1.6):  # more often than a job may die
        served.wait(job_id, lambda _: bool(served.job_processes()))
        time.sleep(moment)
        jobs.pause(job_id)
        if moment == 0.4:
            for process in served.job_processes():
                process.kill()
        job = served.wait(job_id, is_paused)
        assert (job.status, job.x_pause) == ("queued", "paused"), served.story(job_id)
        jobs.resume(job_id)
    assert served.wait(job_id).status == "succeeded", served.story(job_id)


def test_a_paused_job_is_cancelled_at_once(served: Served, colours: dict[str, Path]) -> None:
    jobs = served.client.fine_tuning.jobs
    job_id = long_job(served, colours)
    served.wait(job_id, has_reached(served, "Step 12/"))
    jobs.pause(job_id)
    served.wait(job_id, is_paused)
    assert jobs.cancel(job_id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="has status 'cancelled' and can no longer be resumed"):
        jobs.resume(job_id)
    time.sleep(1)
    assert not served.job_processes()


def test_the_server_answers_while_a_job_trains_and_the_job_says_what_it_computes_with(
    tmp_path: Path, tiny_model: Path, colours: dict[str, Path]
) -> None:
    served = Served(tmp_path / "data", tiny_model, HELDOUT_THREADS="2", HELDOUT_NICE="3", HELDOUT_INFERENCE_THREADS="1")
    try:
        job_id = long_job(served, colours)
        served.wait(job_id, has_reached(served, "Step 12/"))
        (process,) = served.job_processes()
        niceness = process.nice()
        autogroup = Path(
            f"/proc/{process.pid}/autogroup"
        )  # Linux may share out time by session, whatever processes are
        if autogroup.exists():
            assert autogroup.read_text().split()[-1] == str(niceness)
        asked = colour_row(3001)["messages"][:2]  # type: ignore[index]
        answer = served.client.chat.completions.create(model=BASE, messages=asked, max_tokens=5)
        assert answer.usage.completion_tokens >= 1
        assert served.client.fine_tuning.jobs.retrieve(job_id).status == "running"
        assert niceness == min(19, os.nice(0) + 3)
        assert f"Computing with 2 threads at nice level {niceness}" in served.story(job_id)
        assert any(re.match(r"Training .* 2 threads$", text) for text in served.story(job_id))
        served.client.fine_tuning.jobs.cancel(job_id)
    finally:
        served.close()


def test_a_job_that_dies_again_and_again_fails_with_the_tail_of_its_log(
    served: Served, colours: dict[str, Path]
) -> None:
    job_id = long_job(served, colours)
    killed: set[int] = set()
    while served.client.fine_tuning.jobs.retrieve(job_id).status != "failed":
        for process in served.job_processes():
            if process.pid not in killed:
                killed.add(process.pid)
                process.kill()
        time.sleep(0.05)
    error = served.client.fine_tuning.jobs.retrieve(job_id).error
    assert error is not None
    assert "ended 3 times" in error.message
    assert "end of its log" in error.message


def test_the_server_answers_quickly_and_stops_cleanly_on_ctrl_c(tmp_path: Path, tiny_model: Path) -> None:
    served = Served(tmp_path / "data", tiny_model)
    assert served.client.models.list().data
    parent = psutil.Process(served.process.pid)
    deadline = time.monotonic() + 10
    while len(children := parent.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert served.close() == 0
    assert served.process.stdout is not None
    assert "Stopped" in served.process.stdout.read()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
