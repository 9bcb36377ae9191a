"""Does the server keep answering while a job trains, and does the job keep training while it answers?

    .venv/bin/python benchmarks/latency.py [--chats 20] [HELDOUT_THREADS=1 HELDOUT_NICE=0 ...]

A real server with the bundled model and the tickets of the examples. The same short chat is asked again and
again: alone; beside a training job; and the job's steps are counted in as much time without chats.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import APIStatusError, OpenAI

OWN = Path(__file__).parents[1] / "examples"
MODEL = "smollm2-135m-instruct"


def ask(client: OpenAI) -> float:
    """Seconds until a short chat is answered."""
    began = time.perf_counter()
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Write three words about the sea."}],
        max_tokens=16,
        temperature=0,
    )
    return time.perf_counter() - began


def told(name: str, client: OpenAI, chats: int) -> float:
    """Ask that often, print a row; the seconds it all took."""
    times = sorted(ask(client) for _ in range(chats))
    print(f"| {name} | {statistics.median(times):.2f} s | {times[int(0.9 * (chats - 1))]:.2f} s | {times[-1]:.2f} s |")
    return sum(times)


def upload(client: OpenAI, part: str) -> str:
    with (OWN / f"tickets.{part}.jsonl").open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


def step_of(client: OpenAI, job: str) -> int:
    """The newest training step; 0 before the first. Ends the program when the job has ended."""
    now = client.fine_tuning.jobs.retrieve(job)
    if now.status in ("failed", "succeeded", "cancelled"):
        sys.exit(f"the job has {now.status} before it was measured: {now.error}")
    steps = (re.match(r"Step (\d+)/", event.message) for event in client.fine_tuning.jobs.list_events(job, limit=20))
    return max((int(step[1]) for step in steps if step), default=0)


def steps_during(client: OpenAI, job: str, seconds: float, work: Any) -> float:
    """Steps a minute while `work` is done, or while nothing is for `seconds`."""
    first, began = step_of(client, job), time.perf_counter()
    work() if work else time.sleep(seconds)
    return 60 * (step_of(client, job) - first) / (time.perf_counter() - began)


def measure(client: OpenAI, chats: int) -> None:
    for _ in range(60):
        try:
            ask(client)
            break
        except APIStatusError:  # the model is still being loaded
            time.sleep(1)
    print("| chats | median | 90 % | slowest |\n|---|--:|--:|--:|")
    told("alone", client, chats)
    job = client.fine_tuning.jobs.create(
        training_file=upload(client, "train"),
        validation_file=upload(client, "validation"),
        model=MODEL,
        extra_body={"x_holdout_file": upload(client, "holdout")},
        hyperparameters={"n_epochs": 20},
    ).id
    while step_of(client, job) < 2:
        time.sleep(1)
    busy = steps_during(client, job, 0, lambda: told("beside a training job", client, chats))
    free = steps_during(client, job, 60, None)
    print(f"\nThe job takes {busy:.0f} steps a minute beside these chats, {free:.0f} without.")
    client.fine_tuning.jobs.cancel(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("settings", nargs="*", help="HELDOUT_… variables of the server, name=value")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"HELDOUT_DATA_DIR": folder} | dict(one.split("=", 1) for one in asked.settings)
        command = [sys.executable, "-m", "heldout", "serve", "--port", "0"]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            if found is None:
                sys.exit("the server did not start")
            url = found[0] if found[0].endswith("/v1") else f"{found[0]}/v1"
            measure(OpenAI(base_url=url, api_key="any", max_retries=8), asked.chats)
        finally:
            server.terminate()
            server.wait(20)


if __name__ == "__main__":
    main()
