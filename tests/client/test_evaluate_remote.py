"""Models behind a chat completions API are judged like local ones: a real server, a real connection."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.conftest import write_rows

import heldout
from heldout.cli import main
from heldout.engine.base import ChatRequest, ModelRef, Reply, Sampling
from heldout.engine.over_chat import ChatEngine
from heldout.errors import EngineUnavailable, InvalidValue, ModelNotFound, Unauthorized


@pytest.fixture
def file(tmp_path):
    """40 rows: of every four, three have the answer that an echo gives."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"word{i} number {i}"},
                {"role": "assistant", "content": f"word{i} number {i}" if i % 4 else f"another {i}"},
            ]
        }
        for i in range(40)
    ]
    return write_rows(tmp_path / "held.jsonl", rows)


def endpoint(live, model="m", **options):
    return heldout.Endpoint(model=model, base_url=f"{live.url}/v1", **options)


def test_a_remote_model_is_scored_by_its_answers(live, file, echo):
    done = heldout.evaluate(endpoint(live), file, metric="exact_match")
    assert (done.model, done.scores.mean, done.scores.per_example[:5]) == ("m", 0.75, (0, 1, 1, 1, 0))
    assert done.scores.answers == tuple(f"word{i} number {i}" for i in range(40)), "in the file's order"
    assert {request.model for request in echo.requests} == {"m"}
    assert all(request.sampling.temperature == 0 for request in echo.requests)
    assert max(request.sampling.max_tokens for request in echo.requests) == done.max_tokens >= len("word39 number 39")


def test_solved_examples_are_shown_to_the_same_model_if_there_are_any(live, file, tmp_path, echo):
    asked = [({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"answer {i}"}) for i in range(60)]
    train = write_rows(tmp_path / "train.jsonl", [{"messages": list(one)} for one in asked])
    done = heldout.evaluate(endpoint(live), file, train=train, metric="exact_match")
    assert [rung.name for rung in done.rungs] in (["constant", "few-shot-4"], ["constant", "few-shot-8"])
    assert done.rungs[1].description.startswith("the same model with ")
    assert max(len(request.messages) for request in echo.requests) in (9, 17)


def test_two_remote_models_are_compared(live, file):
    pair = heldout.compare(endpoint(live, "a"), endpoint(live, "b"), file, metric="exact_match")
    assert (pair.a, pair.b, pair.wins, pair.losses, pair.comparison.mid_p) == ("a", "b", 0, 0, 1)


def test_a_remote_judge_is_asked_for_its_score(live, file):
    grader = {
        "type": "score_model",
        "model": "judge",
        "range": [0, 40],
        "input": [{"role": "user", "content": "{{ item.line }}"}],
    }
    done = heldout.evaluate(endpoint(live), file, grader=grader, judge=endpoint(live, ""))
    assert done.scores.per_example == pytest.approx([line / 40 for line in range(1, 41)])


def test_a_model_that_cannot_answer_ends_the_evaluation(live, file, tmp_path):
    with pytest.raises(ModelNotFound, match="'unknown' does not exist"):
        heldout.evaluate(endpoint(live, "unknown"), file)
    with pytest.raises(InvalidValue, match="begins with http"):
        heldout.evaluate(heldout.Endpoint(model="m", base_url="127.0.0.1:8000/v1"), file)
    assert not list(tmp_path.glob("report*"))


def test_a_server_that_wants_a_key_gets_it(start, file):
    live = start(api_key="secret")
    with pytest.raises(Exception, match="API key") as raised:
        heldout.evaluate(endpoint(live, api_key="wrong"), file)
    assert raised.value.status == Unauthorized.status
    assert heldout.evaluate(endpoint(live, api_key="secret"), file, metric="exact_match").scores.mean == 0.75


class Busy:
    """A chat service that is busy for so many requests."""

    def __init__(self, times):
        self.times, self.asked = times, 0
        self.lock = threading.Lock()

    def chat(self, request: ChatRequest) -> list[Reply]:
        with self.lock:
            self.asked += 1
            if self.asked <= self.times:
                raise EngineUnavailable("starting")
        return [Reply(text="yes", finish_reason="stop", prompt_tokens=1, completion_tokens=1)]


def test_a_busy_server_is_asked_again_and_not_for_ever():
    conversations = [[{"role": "user", "content": "?"}]] * 3
    busy = Busy(2)
    replies = ChatEngine(service=busy, waits=(0, 0)).chat(ModelRef(base_model="m"), conversations, Sampling())
    assert [reply.text for reply in replies] == ["yes"] * 3
    gone = Busy(10**6)
    with pytest.raises(EngineUnavailable, match="starting"):
        ChatEngine(service=gone, waits=(0, 0)).chat(ModelRef(base_model="m"), conversations, Sampling())
    assert gone.asked <= 9


def test_a_server_of_another_kind_is_told_by_its_answer(file):
    class Page(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(InvalidValue, match="Is the base URL right, with its /v1"):
            heldout.evaluate(heldout.Endpoint(model="m", base_url=url), file)
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command in this process: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELDOUT_DATA_DIR", str(tmp_path / "data"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["heldout", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_command_prints_one_document_or_a_page_and_writes_the_report(start, file, command, monkeypatch, tmp_path):
    live = start(api_key="secret")
    monkeypatch.setenv("MY_KEY", "secret")
    at = ("--base-url", f"{live.url}/v1", "--api-key-env", "MY_KEY", "--metric", "exact_match")
    code, out, err = command("evaluate", "m", file, *at, "--json", "-o", "out")
    document = json.loads(out)
    assert (code, document["score"], document["n"], document["metric"]) == (0, 0.75, 40, "exact match")
    assert "m: 40/40, done" in err
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == document
    code, out, err = command("evaluate", "m", file, *at)
    assert code == 0
    assert "m scores 75.0% (exact match) on 40 rows, 95 % interval 59.8% to 85.8%." in out
    assert "another 0" in out
    code, out, err = command("evaluate", "m", file, *at, "-o", "out")
    assert (code, out) == (2, "")
    assert "already holds a report" in err


def test_the_compare_command_says_who_is_better(live, file, command):
    at = ("--base-url-a", f"{live.url}/v1", "--base-url-b", f"{live.url}/v1")
    code, out, _ = command("compare", "one", "two", file, *at)
    assert code == 0
    assert "one and two score the same on every one of 40 rows" in out
    assert "probability that A is better" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--api-key-env", "MY_KEY"], "no base URL to send it to"),
        (["--base-url", "http://127.0.0.1:9/v1", "--api-key-env", "NOT_SET"], "NOT_SET is not set"),
        (["--metric", "accuracy"], "There is no metric 'accuracy'. Metrics: exact_match"),
        (["--grader", "gone.json"], "There is no file gone.json"),
    ],
)
def test_what_was_asked_for_wrongly_is_one_sentence(file, command, arguments, why):
    code, out, err = command("evaluate", "m", file, *arguments)
    assert (code, out) == (2, "")
    assert why in err
    assert "Traceback" not in err
