"""Names and ids that scripts take apart, and the moves a job may make."""

from __future__ import annotations

import pytest

from heldout.records import COMES_BEFORE, Job, JobStatus, checkpoint_name, fine_tuned_name, new_id

JOB = "ftjob-abcdefghXYZ"


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini-2024-07-18"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("/models/my model", "my-model"),
        ("/models/tiny/", "tiny"),
        ("./tiny", "tiny"),
        ("registry:5000/llama:latest", "llama-latest"),
        ("ft:gpt-4o-mini:acme:tickets:abcdefgh", "gpt-4o-mini"),
        ("modèle", "mod-le"),
        ("/", "model"),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "middle"),
    [
        (None, ""),
        ("", ""),
        ("tickets", "tickets"),
        ("My Tickets: v2/final", "my-tickets-v2-final"),
        (":::", ""),
        ("ünï", "n"),
        ("a_b.c-d", "a_b.c-d"),
    ],
)
def test_a_fine_tuned_name_is_five_fields_between_colons(
    model: str, base: str, suffix: str | None, middle: str
) -> None:
    assert fine_tuned_name(model, "acme", suffix, JOB).split(":") == ["ft", base, "acme", middle, "abcdefgh"]


def test_a_job_that_is_taken_up_again_keeps_its_models_name() -> None:
    first, again = (fine_tuned_name("base", "acme", None, JOB) for _ in range(2))
    assert first == again
    assert first != fine_tuned_name("base", "acme", None, "ftjob-ZZZZZZZZXYZ")


def test_a_checkpoint_is_called_by_its_model_and_step() -> None:
    assert checkpoint_name("ft:base:acme::abcdefgh", 20) == "ft:base:acme::abcdefgh:ckpt-step-20"


@pytest.mark.parametrize("kind", ["file-", "ftjob-", "ftckpt_"])
def test_ids_have_their_prefix_and_never_an_o(kind: str) -> None:
    # An "o" before a digit is a reasoning model to some clients.
    ids = [new_id(kind) for _ in range(300)]
    assert all(one.startswith(kind) and len(one) == len(kind) + 24 for one in ids)
    assert not {"o", "O"} & set("".join(one.removeprefix(kind) for one in ids))
    assert len(set(ids)) == 300
    assert all(one.removeprefix(kind).isalnum() for one in ids)


def test_a_job_moves_forward_only_and_an_ended_one_stays() -> None:
    assert set(COMES_BEFORE) == set(JobStatus) - {JobStatus.VALIDATING_FILES}, "every job begins with its files"
    for came_from in COMES_BEFORE.values():
        assert not any(status.ended for status in came_from)
    for end in (JobStatus.FAILED, JobStatus.CANCELLED):
        assert set(COMES_BEFORE[end]) == {status for status in JobStatus if not status.ended}
    assert COMES_BEFORE[JobStatus.SUCCEEDED] == (JobStatus.RUNNING,)
    assert COMES_BEFORE[JobStatus.RUNNING] == (JobStatus.QUEUED,)
    assert {status.value for status in JobStatus if status.ended} == {"succeeded", "failed", "cancelled"}


def test_a_job_that_was_asked_to_wait_is_paused_once_nothing_works_for_it() -> None:
    def pause(status: JobStatus, *, paused: bool = True, handle: str | None = None) -> str | None:
        job = Job(model="m", base_model="m", training_file="f", status=status, paused=paused, handle=handle)
        return job.pause

    assert pause(JobStatus.QUEUED) == "paused"
    assert pause(JobStatus.QUEUED, handle="leaving") == "pausing"
    assert pause(JobStatus.VALIDATING_FILES) == pause(JobStatus.RUNNING) == "pausing"
    assert not any(pause(status, paused=False) for status in JobStatus)
    assert not any(pause(status) for status in JobStatus if status.ended)
