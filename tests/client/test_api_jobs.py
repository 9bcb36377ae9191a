from __future__ import annotations

from dataclasses import replace

import httpx
import openai
import pytest

from heldout.records import Checkpoint, Event, JobStatus, Model
from heldout.settings import DEFAULT_MODEL


def method(**hyperparameters):
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def messages(live, job):
    return [event.message for event in live.client.fine_tuning.jobs.list_events(job.id)][::-1]


def test_a_new_job_has_every_key_that_clients_validate(live):
    file = live.upload()
    job = live.create_job(training_file=file.id, suffix="my-test", metadata={"team": "a"})
    asked = httpx.get(f"{live.url}/v1/fine_tuning/jobs/{job.id}").json()
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert 0 <= asked.pop("seed") < 2**31
    assert asked == {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": None,
        "estimated_finish": None,
        "model": "gpt-4o-mini-2024-07-18",
        "fine_tuned_model": None,
        "organization_id": "heldout",
        "status": "validating_files",
        "hyperparameters": auto,
        "method": {"type": "supervised", "supervised": {"hyperparameters": auto}},
        "training_file": file.id,
        "validation_file": None,
        "result_files": [],
        "trained_tokens": None,
        "error": None,
        "integrations": [],
        "metadata": {"team": "a"},
        "user_provided_suffix": "my-test",
        "x_base_model": DEFAULT_MODEL,
        "x_holdout_file": None,
        "x_keep_leaks": False,
        "x_grader": None,
        "x_pause": None,
        "x_plan": None,
        "x_verdict": None,
        "x_release": None,
    }


def test_a_job_begins_its_story_with_the_usual_events(live):
    train, valid = live.upload().id, live.upload().id
    job = live.create_job(model=DEFAULT_MODEL, training_file=train, validation_file=valid)
    assert messages(live, job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {train} and validation file: {valid}",
    ]


def test_an_alias_says_what_it_stands_for(live):
    job = live.create_job(model="gpt-4o-mini-2024-07-18")
    assert (job.model, job.x_base_model) == ("gpt-4o-mini-2024-07-18", DEFAULT_MODEL)
    assert any("alias" in message and DEFAULT_MODEL in message for message in messages(live, job))


def test_an_integration_is_never_ignored_in_silence(live):
    job = live.create_job(integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    (warning,) = [e for e in live.client.fine_tuning.jobs.list_events(job.id) if e.level == "warn"]
    assert "wandb" in warning.message


def test_explicit_nulls_and_unknown_top_level_keys_are_accepted(live):
    nothing = dict.fromkeys(["validation_file", "suffix", "seed", "method", "hyperparameters", "metadata"])
    body = {"model": DEFAULT_MODEL, "training_file": live.upload().id, "new_key": 1, **nothing}
    reply = httpx.post(f"{live.url}/v1/fine_tuning/jobs", json=body)
    assert (reply.status_code, reply.json()["metadata"]) == (200, {})


def test_our_own_knobs_and_holdout_file_travel_as_extras(live):
    holdout = live.upload().id
    asked = {"n_epochs": 3, "lora_r": 8, "early_stopping": {"patience": 2}}
    job = live.create_job(method=method(**asked), seed=5, extra_body={"x_holdout_file": holdout, "x_keep_leaks": True})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size, job.seed) == (3, "auto", 5)
    assert job.method.supervised.hyperparameters.lora_r == 8
    assert (job.x_holdout_file, live.db.get_job(job.id).holdout_file) == (holdout, holdout)
    assert (job.x_keep_leaks, live.db.get_job(job.id).keep_leaks) == (True, True)
    stored = {"n_epochs": 3, "lora_r": 8, "early_stopping": {"enabled": True, "patience": 2}}
    assert live.db.get_job(job.id).hyperparameters == stored


GRADER = {"type": "string_check", "name": "same", "operation": "ilike", "input": "{{sample.output_text}}"}


def test_a_grader_travels_as_an_extra(live):
    grader = {**GRADER, "reference": "{{item.target}}"}
    job = live.create_job(extra_body={"x_grader": grader})
    assert (job.x_grader, live.db.get_job(job.id).grader) == (grader, grader)
    assert live.create_job().x_grader is None


@pytest.mark.parametrize(
    ("grader", "hyperparameters", "says"),
    [
        ({**GRADER, "reference": "red", "operation": "is"}, {}, "operation"),
        ({"type": "python", "name": "mine", "source": "def grade(): ..."}, {}, "is not run"),
        ({**GRADER, "reference": "red"}, {"metric": "exact_match"}, "both given"),
        ("same", {}, "x_grader"),
    ],
)
def test_a_grader_that_cannot_score_is_refused_before_there_is_a_job(live, grader, hyperparameters, says):
    with pytest.raises(openai.BadRequestError, match=says):
        live.create_job(method=method(**hyperparameters), extra_body={"x_grader": grader})


def test_the_deprecated_place_for_hyperparameters_is_honoured(live):
    assert live.create_job(hyperparameters={"n_epochs": 4}).hyperparameters.n_epochs == 4
    same = live.create_job(hyperparameters={"n_epochs": 4}, method=method(n_epochs=4))
    assert same.hyperparameters.n_epochs == 4


def test_the_plan_replaces_auto_with_its_numbers(live):
    job = live.create_job(method=method(lora_r=8))
    plan = {name: {"value": 2, "reason": "measured"} for name in ("n_epochs", "batch_size", "lora_r")}
    live.db.update_job(job.id, plan=plan)
    job = live.client.fine_tuning.jobs.retrieve(job.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, "auto")
    assert job.method.supervised.hyperparameters.lora_r == 2
    assert job.x_plan["n_epochs"]["reason"] == "measured"


def test_a_finished_job_shows_what_came_of_it(live):
    job = live.create_job()
    live.db.move_job(job.id, JobStatus.QUEUED)
    live.db.move_job(job.id, JobStatus.RUNNING)
    verdict = {"outcome": "ship"}
    live.db.move_job(job.id, JobStatus.SUCCEEDED, fine_tuned_model="ft:x", trained_tokens=9, verdict=verdict)
    job = live.client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("succeeded", "ft:x", 9)
    assert (job.error, job.x_verdict) == (None, verdict)


def test_a_failed_job_says_why_on_its_error(live):
    job = live.create_job()
    error = {"code": "invalid_n_examples", "message": "has 7", "param": "training_file"}
    live.db.move_job(job.id, JobStatus.FAILED, error=error)
    assert live.client.fine_tuning.jobs.retrieve(job.id).error.model_dump() == error


@pytest.mark.parametrize(
    ("asked", "param", "code", "words"),
    [
        ({"training_file": "file-none"}, "training_file", "invalid_training_file", "No such File object"),
        ({"validation_file": "file-none"}, "validation_file", "invalid_validation_file", "No such File"),
        ({"model": "no-such-model"}, "model", "model_not_found", "Tried"),
        ({"model": "ft:a:b::c"}, "model", "unsupported_value", "base models only"),
        ({"suffix": "a:b"}, "suffix", "invalid_value", "':'"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value", "64"),
        ({"seed": -1}, "seed", "invalid_value", "greater than or equal to 0"),
        ({"seed": True}, "seed", "invalid_value", "valid integer"),
        ({"method": {"type": "dpo"}}, "method.type", "unsupported_value", "'supervised'"),
        ({"method": method(n_epochs=0)}, "hyperparameters.n_epochs", "invalid_value", "from 1 to 50"),
        ({"method": method(lora_r=True)}, "hyperparameters.lora_r", "invalid_value", "from 1 to 256"),
        ({"method": method(lora_q=1)}, "hyperparameters.lora_q", "unknown_parameter", "lora_r"),
        (
            {"method": method(n_epochs=2), "hyperparameters": {"n_epochs": 3}},
            "hyperparameters",
            None,
            "differ",
        ),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value", "512"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "invalid_value", "16"),
        ({"integrations": [{"type": "wandb"}] * 6}, "integrations", "invalid_value", "5"),
    ],
)
def test_a_wrong_request_is_refused_naming_the_parameter(live, asked, param, code, words):
    with pytest.raises(openai.APIStatusError) as raised:
        live.create_job(**asked)
    assert raised.value.status_code == (404 if code == "model_not_found" else 400)
    assert (raised.value.param, raised.value.code) == (param, code or "invalid_value")
    assert words in raised.value.message
    assert live.client.fine_tuning.jobs.list().data == []


def test_a_file_with_another_purpose_is_no_training_file(live):
    file = live.upload(purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        live.create_job(training_file=file.id)


def test_listing_more_events_than_a_page_ends_and_repeats_none(live):
    job = live.create_job()
    for step in range(45):
        live.db.add_event(Event(job_id=job.id, message=f"Step {step}", type="metrics", data={"step": step}))
    events = list(live.client.fine_tuning.jobs.list_events(job.id))
    assert len(events) == len({event.id for event in events}) == 48
    assert (events[0].data, events[-1].message) == ({"step": 44}, f"Created fine-tuning job: {job.id}")
    (latest,) = live.client.fine_tuning.jobs.list_events(job.id, limit=1).data
    assert latest == events[0]


def test_listing_jobs_by_pages_meets_each_one_once_newest_first(live):
    file = live.upload().id
    ids = [live.create_job(training_file=file).id for _ in range(5)]
    page = live.client.fine_tuning.jobs.list(limit=2)
    assert (page.has_more, [job.id for job in page.data]) == (True, ids[:-3:-1])
    assert (page.first_id, page.last_id) == (ids[-1], ids[-2])
    assert [job.id for job in live.client.fine_tuning.jobs.list(limit=2)] == ids[::-1]


def test_an_unknown_cursor_is_refused_not_answered_with_the_first_page(live):
    job = live.create_job()
    for list_page in (live.client.files.list, live.client.fine_tuning.jobs.list):
        with pytest.raises(openai.BadRequestError) as raised:
            list_page(after="nothing")
        assert raised.value.param == "after"
    with pytest.raises(openai.BadRequestError):
        live.client.fine_tuning.jobs.list_events(job.id, after="nothing")


def test_jobs_are_found_by_their_metadata(live):
    file = live.upload().id
    keys = ["team", "a.b", 'with "quotes"', "with 'single' ones", "ключ"]
    jobs = {key: live.create_job(training_file=file, metadata={key: "v", "n": "1"}).id for key in keys}
    plain = live.create_job(training_file=file).id
    for key, job_id in jobs.items():
        assert [job.id for job in live.client.fine_tuning.jobs.list(metadata={key: "v"})] == [job_id]
    assert live.client.fine_tuning.jobs.list(metadata={"team": "w"}).data == []
    assert len(list(live.client.fine_tuning.jobs.list(metadata={"n": "1"}, limit=2))) == len(keys)
    without = live.client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in without] == [plain]


def test_cancelling_ends_the_job_and_says_so(live):
    job = live.client.fine_tuning.jobs.cancel(live.create_job().id)
    assert (job.status, job.error) == ("cancelled", None)
    assert job.finished_at is not None
    assert messages(live, job)[-1] == "Fine-tuning job cancelled"


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_an_action_the_status_forbids_is_one_request_and_a_400_with_a_code(live, action):
    job = live.create_job()
    live.db.move_job(job.id, JobStatus.CANCELLED)
    requests: list[object] = []  # every one the client really sends, its silent repetitions included
    live.client._client.event_hooks = {"request": [requests.append]}
    with pytest.raises(openai.BadRequestError) as raised:
        getattr(live.client.fine_tuning.jobs, action)(job.id)
    assert "'cancelled'" in raised.value.message
    assert raised.value.code == "invalid_status"
    assert len(requests) == 1
    live.client._client.event_hooks = {}
    assert len(messages(live, job)) == 3


@pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING])
def test_pausing_keeps_the_status_says_so_beside_it_and_can_be_taken_back(live, status):
    jobs, job = live.client.fine_tuning.jobs, live.create_job()
    live.db.add_job(replace(live.db.get_job(job.id), id="ftjob-other", status=status))
    for job in (jobs.pause("ftjob-other"), jobs.retrieve("ftjob-other")):
        assert (job.status, job.x_pause) == (status.value, "paused" if status is JobStatus.QUEUED else "pausing")
    with pytest.raises(openai.BadRequestError, match=f"has status '{status.value}' and is already paus") as raised:
        jobs.pause("ftjob-other")
    assert raised.value.code == "invalid_status"
    job = jobs.resume("ftjob-other")
    assert (job.status, job.x_pause) == (status.value, None)
    with pytest.raises(openai.BadRequestError, match=f"has status '{status.value}' and is not paused") as raised:
        jobs.resume("ftjob-other")
    assert raised.value.code == "invalid_status"
    told = messages(live, job)
    assert (len(told), told[1]) == (2, "Fine-tuning job resumed")
    assert told[0].startswith("Fine-tuning job paus")


def test_a_paused_job_can_be_cancelled(live):
    job = live.create_job()
    live.client.fine_tuning.jobs.pause(job.id)
    job = live.client.fine_tuning.jobs.cancel(job.id)
    assert (job.status, job.x_pause) == ("cancelled", None)


def test_an_unknown_job_is_a_404_in_openai_words(live):
    for call in ("retrieve", "cancel", "pause", "resume", "list_events"):
        with pytest.raises(openai.NotFoundError, match="Could not find fine tune") as raised:
            getattr(live.client.fine_tuning.jobs, call)("ftjob-none")
        assert raised.value.code == "fine_tune_not_found"
    with pytest.raises(openai.NotFoundError):
        live.client.fine_tuning.jobs.checkpoints.list("ftjob-none")


def test_checkpoints_are_listed_with_their_metrics_and_the_best_one_marked(live):
    job = live.create_job()
    for step in range(1, 13):
        name = f"ft:m:heldout::x:ckpt-step-{step}"
        checkpoint = Checkpoint(job_id=job.id, step=step, model=name, metrics={"valid_loss": 0.5})
        model = Model(id=name, job_id=job.id, base_model="m", blobs=f"adapters/x/{step}", owned_by="heldout")
        live.db.add_checkpoint(checkpoint, model)
    live.db.mark_best(job.id, 7)
    page = live.client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (len(page.data), page.has_more) == (10, True)
    every = list(page)
    assert [one.step_number for one in every] == list(range(12, 0, -1))
    assert [one.step_number for one in every if one.x_best] == [7]
    assert (every[0].metrics.valid_loss, every[0].fine_tuning_job_id) == (0.5, job.id)
