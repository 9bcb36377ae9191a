"""`make demo`: one fine-tuning job on this machine, from data to verdict, and two questions to the result."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console

HERE = Path(__file__).parent
OUT = HERE.parent / "demo-output"
QUESTIONS = (
    "The reservoir is full, the little motor hums, but the soil under my fern is bone dry since Tuesday.",
    "pls send the money back, the thing goes back in its box today",
)


def main() -> None:
    """Tune on the tickets, then serve the model and ask it."""
    started = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    os.environ.setdefault("HELDOUT_DATA_DIR", str(OUT / "data"))
    job = OUT / "job"
    shutil.rmtree(job, ignore_errors=True)

    console.rule("One job: check, split, cheaper rungs, training, verdict (three to eight minutes on two cores)")
    files = {part: HERE / f"tickets.{part}.jsonl" for part in ("train", "validation", "holdout")}
    tune = [sys.executable, "-m", "heldout", "tune", str(files["train"])]
    tune += ["--validation", str(files["validation"]), "--holdout", str(files["holdout"])]
    tune += ["--suffix", "tickets", "--seed", "0", "--out", str(job), "--json"]
    # Two epochs keep the demo short; left alone, the plan would take up to four and keep the best.
    tune += ["--set", "n_epochs=2"]
    finished = subprocess.run(tune, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(finished.returncode)
    report = json.loads(finished.stdout)

    console.rule("The verdict")
    console.print(f"{report['verdict']['outcome']}", style="bold")
    for reason in report["verdict"]["reasons"]:
        console.print(f"  - {reason}", markup=False)
    for rung in (*report["rungs"], report["tuned"]):
        low, high = rung["interval"]
        console.print(f"  {rung['name']:<16}{rung['score']:>7.1%}   95 % interval {low:.1%} to {high:.1%}")

    console.rule("Two questions nobody trained on, through the openai client")
    system = json.loads(files["train"].read_text().splitlines()[0])["messages"][0]
    serve = subprocess.Popen(
        [sys.executable, "-m", "heldout", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert serve.stdout is not None
        found = re.search(r"http://\S+", serve.stdout.readline())
        if found is None:
            sys.exit("the server did not start")
        client = OpenAI(base_url=found[0], api_key="not needed here", max_retries=10)
        console.print(f"client = OpenAI(base_url={found[0]!r}, …)   model={report['model']!r}", markup=False)
        for question in QUESTIONS:
            answer = client.chat.completions.create(
                model=report["model"],
                messages=[system, {"role": "user", "content": question}],
                temperature=0,
                max_tokens=30,
            )
            console.print(f"  {question}\n    -> {answer.choices[0].message.content}", markup=False)
    finally:
        serve.terminate()
        serve.wait(20)

    console.rule(f"Done in {time.monotonic() - started:.0f} s")
    console.print(f"Report:  {report['report']}\nAdapter: {report['adapter']}", markup=False)
    console.print("Your own file: .venv/bin/heldout tune FILE.jsonl   Your own scripts: .venv/bin/heldout serve")


if __name__ == "__main__":
    main()
