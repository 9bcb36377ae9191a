"""What a verdict says first: that a code told the answers, or that many labels are wrong."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

import heldout
from heldout.settings import Settings
from tests.conftest import write_rows
from tests.torch.encoders import make_tiny_encoder
from tests.unit.test_label_checks import tickets
from tests.unit.test_leakage import tagged

#: In words that the tiny encoder knows.
CODES = {"shop": "<red-1>", "visit": "<green-2>", "archive": "<blue-3>"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


def coded() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": label}]}
        for question, label in tagged(lambda label: f"{CODES[label]} {{text}}", n=330)
    ]


def tune(folder: Path, encoder: Path, rows: list[dict[str, Any]], *, keep_leaks: bool = False) -> Any:
    return heldout.tune(
        write_rows(folder / "rows.jsonl", rows),
        model=str(encoder),
        out=folder / "out",
        seed=1,
        keep_leaks=keep_leaks,
        learning_rate=2e-3,
        n_epochs=8,
        settings=Settings(data_dir=folder, precision="float32", eval_budget=60),
    )


def test_a_model_that_learned_nothing_but_the_code_is_not_shipped(encoder: Path, tmp_path: Path) -> None:
    result = tune(tmp_path, encoder, coded())
    assert result.verdict.outcome != "ship"
    assert result.tuned.scores.mean < 0.6  # a third is chance
    assert all(rung.scores.mean < 0.6 for rung in result.rungs)
    (caveat,) = result.verdict.caveats
    assert "asked without the code that tells their answer" in caveat
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    light = {one["name"]: one["status"] for one in report["consequences"]}
    assert light["memorisation"] == light["generalisation"] == "ok", "not to know the code is no memory"
    assert caveat in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_a_code_that_real_prompts_have_may_be_learned(encoder: Path, tmp_path: Path) -> None:
    result = tune(tmp_path, encoder, coded(), keep_leaks=True)
    assert result.tuned.scores.mean > 0.9
    (caveat,) = result.verdict.caveats
    assert "scores may measure this word and not the task" in caveat


def test_a_verdict_on_rows_of_a_noisy_file_says_so_first(encoder: Path, tmp_path: Path) -> None:
    noisy, _ = tickets(320, wrong=0.3)
    rows = [{"messages": list(row.messages)} for row in noisy.examples]
    (caveat,) = tune(tmp_path, encoder, rows).verdict.caveats
    assert "those of the rows held out of it" in caveat
