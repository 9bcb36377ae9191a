from __future__ import annotations

import subprocess
import sys

import httpx
import openai
import pytest

KEYS = {"message", "type", "param", "code"}


def error(reply):
    """The envelope, checked for what every failure must have."""
    assert reply.headers["x-request-id"].startswith("req_")
    assert set(reply.json()) == {"error"}
    assert set(reply.json()["error"]) == KEYS
    return reply.json()["error"]


def test_an_unknown_route_has_the_envelope(live):
    reply = httpx.get(f"{live.url}/v1/nothing")
    assert (reply.status_code, error(reply)["code"]) == (404, "unknown_url")
    assert "GET /v1/nothing" in error(reply)["message"]


def test_a_wrong_http_method_has_the_envelope(live):
    reply = httpx.put(f"{live.url}/v1/files")
    assert (reply.status_code, error(reply)["code"]) == (405, "method_not_supported")
    assert "POST" in reply.headers["allow"]


@pytest.mark.parametrize("body", [b'{"model": ', b"\xff\xfe", b"[1]", b"", b"null", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400_with_the_envelope(live, body):
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{live.url}/v1/fine_tuning/jobs", content=body, headers=headers)
    assert reply.status_code == 400
    assert error(reply)["type"] == "invalid_request_error"


def test_malformed_json_says_where(live):
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{live.url}/v1/fine_tuning/jobs", content='{"model": "a",}', headers=headers)
    assert error(reply)["code"] == "invalid_json"
    assert "at character 14" in error(reply)["message"]


def test_a_missing_parameter_is_named_and_all_of_them_are_told(live):
    reply = httpx.post(f"{live.url}/v1/fine_tuning/jobs", json={})
    assert (error(reply)["code"], error(reply)["param"]) == ("missing_required_parameter", "model")
    assert "'training_file'" in error(reply)["message"]


def test_a_query_parameter_out_of_range_is_a_400(live):
    with pytest.raises(openai.BadRequestError) as raised:
        live.client.fine_tuning.jobs.list(limit=101)
    assert (raised.value.param, raised.value.code) == ("limit", "invalid_value")


def test_a_bug_is_a_500_that_leaks_nothing_and_names_its_log_line(live, monkeypatch, caplog):
    monkeypatch.setattr(live.db, "get_file", lambda file_id: 1 / 0)
    reply = httpx.get(f"{live.url}/v1/files/file-1")
    assert (reply.status_code, error(reply)["type"], error(reply)["code"]) == (
        500,
        "server_error",
        "server_error",
    )
    request_id = reply.headers["x-request-id"]
    assert request_id in error(reply)["message"]
    assert "division" not in reply.text
    assert any(request_id in line.getMessage() and line.exc_info for line in caplog.records)


def test_broken_text_in_a_request_is_refused(live):
    headers = {"content-type": "application/json"}
    for broken in (r'"hyperparameters": {"\ud800": 1}', r'"training_file": "\ud800"', r'"suffix": "\ud800:"'):
        body = '{"model": "smollm2-135m-instruct", "training_file": "x", ' + broken + "}"
        reply = httpx.post(f"{live.url}/v1/fine_tuning/jobs", content=body, headers=headers)
        assert reply.status_code == 400
        assert "surrogate" in error(reply)["message"]


def test_every_reply_has_openais_headers(live):
    raw = live.client.files.with_raw_response.list()
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["openai-organization"] == "heldout"
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_a_server_with_a_key_lets_only_that_key_in(start):
    live = start(api_key="right")
    assert live.client.files.list().data == []
    for wrong in ("wrong", "rightt"):
        with pytest.raises(openai.AuthenticationError) as raised:
            live.client.with_options(api_key=wrong).files.list()
        assert raised.value.code == "invalid_api_key"
    reply = httpx.post(f"{live.url}/v1/fine_tuning/jobs", content=b"{")
    assert (reply.status_code, error(reply)["code"]) == (401, "invalid_api_key")


def test_health_and_the_front_page_are_open(start):
    live = start(api_key="right")
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    assert httpx.get(live.url).json()["base_url"] == f"{live.url}/v1"


def test_the_http_surface_starts_without_the_heavy_libraries():
    poison = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'sklearn', 'scipy'])); "
    subprocess.run([sys.executable, "-c", f"{poison}import heldout.api.app, heldout.engine.remote"], check=True)
