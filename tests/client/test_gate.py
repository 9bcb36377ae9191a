"""A model whose verdict is not `ship`, asked over the API: refused, warned of, released."""

from __future__ import annotations

import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from heldout.api.app import create_chat_app
from heldout.engine.base import Reply
from heldout.engine.remote import RemoteChat
from heldout.processes.inference import LocalChat
from heldout.records import File, Job, JobStatus, Model, rung_name
from heldout.settings import DEFAULT_MODEL, Settings

HELLO = [{"role": "user", "content": "hello big world"}]
WHY = "on 100 holdout examples the tuned model scores 40.0%"
FINAL, CHECKPOINT = "ft:m:heldout::abc", "ft:m:heldout::abc:ckpt-step-5"

REPORTS = {
    "step_metrics.csv": "step,train_loss\n1,0.5\n",
    "report.json": '{"version": 1}\n',
    "report.md": "# Don't ship it\n\nmeasured\n",
    "report.html": "<h1>Don't ship it</h1>\n<p>measured</p>\n",
}


def finished(live, outcome="dont_ship", **values):
    """A job that has ended with this verdict, or with none, its result files, its model and a checkpoint."""
    files = [File(filename=name, purpose="fine-tune-results", bytes=len(text)) for name, text in REPORTS.items()]
    for file in files:
        live.blobs.put(file.blob, io.BytesIO(REPORTS[file.filename].encode()))
        live.db.add_file(file)
    asked = {
        "status": JobStatus.SUCCEEDED,
        "model": "m",
        "base_model": DEFAULT_MODEL,
        "training_file": "file-a",
        "fine_tuned_model": FINAL,
        "result_files": [file.id for file in files],
        "verdict": {"outcome": outcome, "reasons": [WHY, "more"]} if outcome else None,
        **values,
    }
    job = Job(**asked)
    live.db.add_job(job)
    for name in (FINAL, CHECKPOINT):
        model = Model(
            id=name, job_id=job.id, base_model=DEFAULT_MODEL, blobs=f"adapters/{job.id}/x", owned_by="heldout"
        )
        live.db.add_model(model)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        live.blobs.put(f"adapters/{job.id}/x/{name}", io.BytesIO(b"weights"))
    return job


def ask(live, model=FINAL, **options):
    return live.client.chat.completions.with_raw_response.create(model=model, messages=HELLO, **options)


def release(live, job_id, **body):
    return live.client.post(f"/fine_tuning/jobs/{job_id}/release", body=body, cast_to=httpx.Response).json()


def story(live, job):
    return list(live.client.fine_tuning.jobs.list_events(job.id))[::-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [FINAL, CHECKPOINT])
@pytest.mark.parametrize("outcome", ["dont_ship", "inconclusive"])
def test_a_model_whose_verdict_is_not_ship_is_refused_before_the_first_byte(start, echo, outcome, model, stream):
    live = start(gate="block")
    job = finished(live, outcome)
    with pytest.raises(openai.PermissionDeniedError) as raised:
        ask(live, model, stream=stream)
    assert (raised.value.status_code, raised.value.code, raised.value.param) == (403, "model_not_released", "model")
    assert raised.value.type == "invalid_request_error"
    assert raised.value.response.headers["content-type"] == "application/json"
    assert all(part in raised.value.message for part in (model, outcome, WHY, f"heldout release {job.id}"))
    assert echo.requests == []


@pytest.mark.parametrize("model", [DEFAULT_MODEL, "gpt-4o-mini", "ft:m:elsewhere::of-another-engine"])
def test_a_model_that_no_job_here_made_is_not_gated(start, model):
    live = start(gate="block")
    finished(live)
    answer = ask(live, model)
    assert answer.parse().choices[0].message.content == "hello big world"
    assert "x-heldout-verdict" not in answer.headers


def test_a_cheaper_rung_of_a_job_is_not_gated_by_the_verdict_on_its_tuned_model(start):
    live = start(gate="block")
    job = finished(live)
    rung = rung_name(FINAL, "frozen-encoder")
    live.db.add_model(
        Model(id=rung, job_id=job.id, base_model=DEFAULT_MODEL, blobs=f"adapters/{job.id}/x", owned_by="heldout")
    )
    answer = ask(live, rung)
    assert answer.parse().choices[0].message.content == "hello big world"
    assert "x-heldout-verdict" not in answer.headers
    assert live.client.models.retrieve(rung).model_extra["x_outcome"] is None


@pytest.mark.parametrize(
    ("outcome", "status"), [("ship", JobStatus.SUCCEEDED), (None, JobStatus.RUNNING), (None, JobStatus.CANCELLED)]
)
@pytest.mark.parametrize("gate", ["block", "warn"])
def test_a_model_with_the_verdict_ship_or_none_yet_answers_without_a_word(start, gate, outcome, status):
    live = start(gate=gate)
    finished(live, outcome, status=status)
    for model in (FINAL, CHECKPOINT):
        assert "x-heldout-verdict" not in ask(live, model).headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [FINAL, CHECKPOINT])
def test_unless_told_otherwise_the_model_answers_and_the_answer_says_what_the_verdict_is(live, model, stream):
    finished(live, "inconclusive")
    answer = ask(live, model, stream=stream)
    assert (answer.status_code, answer.headers["x-heldout-verdict"]) == (200, "inconclusive")
    assert answer.parse()


def test_the_log_says_once_that_a_model_answers_in_spite_of_its_verdict(live, caplog):
    finished(live)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ask(live)
        ask(live, CHECKPOINT)
    told = [record.getMessage() for record in caplog.records if "HELDOUT_GATE" in record.getMessage()]
    assert [line.split(" answers although the verdict of its job is ")[0] for line in told] == [FINAL, CHECKPOINT]


def test_without_a_gate_nothing_is_said(start, caplog):
    live = start(gate="off")
    finished(live)
    assert "x-heldout-verdict" not in ask(live).headers
    assert caplog.records == []


def test_a_released_model_and_its_checkpoints_answer(start):
    live = start(gate="block")
    job = finished(live)
    answer = release(live, job.id, reason="  the risk is\n accepted, TICKET-7 ")
    assert answer["x_release"]["reason"] == "the risk is accepted, TICKET-7"
    assert answer["x_verdict"]["outcome"] == "dont_ship", "a release does not make the verdict a better one"
    for model in (FINAL, CHECKPOINT):
        raw = ask(live, model)
        assert raw.parse().choices[0].message.content == "hello big world"
        assert "x-heldout-verdict" not in raw.headers


def test_a_release_is_on_the_job_on_its_models_and_in_its_story(live):
    job = finished(live)
    assert (live.client.models.retrieve(FINAL).x_outcome, live.client.models.retrieve(FINAL).x_release) == (
        "dont_ship",
        None,
    )
    recorded = release(live, job.id, reason="accepted")["x_release"]
    assert abs(recorded["released_at"] - job.created_at) < 60
    assert live.client.fine_tuning.jobs.retrieve(job.id).x_release == recorded
    listed = {model.id: model for model in live.client.models.list()}
    for model in (live.client.models.retrieve(CHECKPOINT), listed[FINAL], listed[CHECKPOINT]):
        assert (model.x_outcome, model.x_release) == ("dont_ship", recorded)
    assert (listed[DEFAULT_MODEL].x_outcome, listed[DEFAULT_MODEL].x_release) == (None, None)
    (event,) = story(live, job)
    assert event.message == "Released although the verdict is dont_ship: accepted"
    assert (event.level, event.data) == ("warn", {"release": recorded})


def test_a_release_is_in_every_form_of_the_report(live):
    job = finished(live)
    recorded = release(live, job.id, reason="<b>we</b> [accept](x)")["x_release"]
    files = live.client.fine_tuning.jobs.retrieve(job.id).result_files
    contents = [live.client.files.content(one).read().decode() for one in files]
    assert [live.client.files.retrieve(one).filename for one in files] == list(REPORTS), "scripts take the first"
    assert [live.client.files.retrieve(one).bytes for one in files] == [len(text.encode()) for text in contents]
    csv, as_json, markdown, page = contents
    assert (files[0], csv) == (job.result_files[0], REPORTS["step_metrics.csv"])
    assert json.loads(as_json) == {"version": 1, "release": recorded}
    assert "UTC:** \\<b\\>we\\</b\\> \\[accept\\](x)\n\nmeasured" in markdown
    assert "UTC:</b> &lt;b&gt;we&lt;/b&gt; [accept](x)</p>\n<p>measured" in page
    before = live.client.files.content(job.result_files[1]).read().decode()
    assert before == REPORTS["report.json"], "the report as it was is still there under its own id"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"reason": ""}, "invalid_value"),
        ({"reason": " \n\t\x00 "}, "invalid_value"),
        ({"reason": "x" * 1001}, "invalid_value"),
        ({"reason": 7}, "invalid_value"),
        ({"reason": None}, "invalid_value"),
    ],
)
def test_a_release_without_a_reason_is_refused_and_recorded_nowhere(start, body, code):
    live = start(gate="block")
    job = finished(live)
    with pytest.raises(openai.BadRequestError) as raised:
        release(live, job.id, **body)
    assert (raised.value.code, raised.value.param) == (code, "reason")
    assert (live.db.get_job(job.id), story(live, job)) == (job, [])
    with pytest.raises(openai.PermissionDeniedError):
        ask(live)


@pytest.mark.parametrize(
    ("status", "outcome", "words"),
    [
        (JobStatus.SUCCEEDED, "ship", "is 'ship': its models answer without a release"),
        (JobStatus.RUNNING, None, "has no verdict yet"),
        (JobStatus.FAILED, None, "made no model"),
        (JobStatus.CANCELLED, None, "made no model"),
    ],
)
def test_where_there_is_nothing_to_release_a_sentence_says_so(live, status, outcome, words):
    job = finished(live, outcome, status=status)
    with pytest.raises(openai.BadRequestError, match=words) as raised:
        release(live, job.id, reason="because")
    assert raised.value.code == "invalid_status"
    assert live.db.get_job(job.id) == job


def test_a_job_that_is_not_there_cannot_be_released(live):
    with pytest.raises(openai.NotFoundError) as raised:
        release(live, "ftjob-none", reason="because")
    assert raised.value.code == "fine_tune_not_found"


def test_the_same_release_again_changes_nothing_and_another_reason_is_refused(live):
    job = finished(live)
    first = release(live, job.id, reason="accepted")
    assert release(live, job.id, reason="accepted") == first
    with pytest.raises(openai.BadRequestError, match="already released, with the reason 'accepted'"):
        release(live, job.id, reason="another one")
    assert len(story(live, job)) == 1
    assert live.client.fine_tuning.jobs.retrieve(job.id).x_release == first["x_release"]


def test_of_many_releases_at_the_same_time_one_is_recorded_and_the_others_leave_nothing(live):
    job = finished(live)
    before = len(list(live.blobs.keys("files")))

    def attempt(number):
        try:
            return release(live, job.id, reason=f"reason {number}")
        except openai.BadRequestError as refused:
            return refused

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(attempt, range(6)))
    (won,) = [one for one in answers if isinstance(one, dict)]
    assert live.db.get_job(job.id).release == won["x_release"]
    assert len(story(live, job)) == 1
    assert len(list(live.blobs.keys("files"))) == before + 3


def test_a_report_that_was_deleted_does_not_stop_a_release(start):
    live = start(gate="block")
    job = finished(live)
    live.client.files.delete(job.result_files[2])
    after = release(live, job.id, reason="accepted")
    assert after["result_files"][2] == job.result_files[2]
    assert ask(live).status_code == 200


class OneWord:
    """An engine that says one word."""

    def chat(self, model, conversations, sampling):
        return [Reply(text="word", finish_reason="stop", prompt_tokens=1, completion_tokens=1) for _ in conversations]


@pytest.mark.parametrize("stream", [False, True])
def test_the_inference_process_is_no_way_around_the_gate(start, serving_app, tmp_path, stream):
    settings = Settings(data_dir=tmp_path, gate="block")
    live = start(gate="off")  # the server lets everything pass
    chat = LocalChat(settings, live.db, live.blobs, OneWord())
    job = finished(live)
    remote = RemoteChat(f"{serving_app(create_chat_app(settings=settings, chat=chat))}/v1")
    behind = start(chat=remote, gate="off")
    with pytest.raises(openai.PermissionDeniedError, match="verdict of its job") as raised:
        ask(behind, stream=stream)
    assert (raised.value.code, raised.value.param) == ("model_not_released", "model")
    release(live, job.id, reason="accepted")
    assert ask(behind).parse().choices[0].message.content == "word"
    remote.close()
