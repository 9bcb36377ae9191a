"""The report in its four forms: what scripts read, and what people read."""

from __future__ import annotations

import html
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from heldout.pipeline import charts, layout, released, report
from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.crossfit import CrossFit, Fold
from heldout.pipeline.findings import markdown_text
from heldout.pipeline.hyperparameters import KNOBS
from heldout.pipeline.mistakes import Mistake
from heldout.pipeline.outcome import Outcome
from heldout.pipeline.selection import Candidate, Selection
from tests.unit.conftest import right, rung
from tests.unit.outcomes import ATTACK, CURVE, make_outcome


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    return make_outcome(tmp_path)


def test_wrong_answers_stand_beside_what_was_expected_as_texts(outcome: Outcome, tmp_path: Path) -> None:
    one = Mistake(
        line=7,
        asked=f"first\n{ATTACK}" + "x" * 400,
        expected="red|green",
        tuned="blue",
        baseline="red|green",
        score=0.0,
        baseline_score=1.0,
        alike=3,
    )
    report.write(replace(outcome, mistakes=(one,)), tmp_path)
    page, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "<small>line 7, 3 times, the baseline was better</small>" in page
    assert ATTACK not in page
    (row,) = [line for line in text.splitlines() if line.startswith("| 7 |")]
    assert "red\\|green | blue | red\\|green |" in row
    assert "xxx… |" in row
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["mistakes"] == [one.as_dict()]


@pytest.fixture
def written(outcome: Outcome, tmp_path: Path) -> Path:
    report.write(outcome, tmp_path)
    return tmp_path


def test_the_json_report_has_every_key_scripts_read(written: Path, outcome: Outcome) -> None:
    found = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert found["version"] == 1
    assert found["verdict"]["outcome"] == "ship"
    assert found["verdict"]["reasons"] == list(outcome.verdict.reasons)
    assert found["verdict"]["cheapest_as_good"] == "tuned"
    assert found["verdict"]["numbers"]["against"]["zero-shot"]["difference"] == pytest.approx(0.3)
    assert [(one["name"], one["metric"], one["score"]) for one in found["rungs"]] == [
        ("constant", "exact match", 0.3),
        ("zero-shot", "exact match", 0.6),
    ]
    assert found["rungs"][1]["interval"] == pytest.approx(outcome.rungs[1].scores.interval)
    assert found["tuned"]["score"] == 0.9
    assert found["tuned"]["kind"] == "tuned"
    assert found["tuned"]["n"] == 100
    assert found["data"] | {"sources": {}} == {
        "train": 80,
        "valid": 20,
        "holdout": 100,
        "groups": 200,
        "seed": 0,
        "sources": {},
    }
    assert found["findings"] == [
        {"code": "odd", "severity": "warning", "message": ATTACK, "file": "<b>.jsonl", "lines": [3], "example": ""}
    ]
    assert found["plan"]["n_epochs"]["value"] == outcome.plan.n_epochs
    assert found["plan"]["n_epochs"]["reason"]
    training = found["training"]
    assert training["examples_per_second"] == 9.5
    assert training["peak_memory_bytes"] == 3 * 2**29
    assert (training["best_step"], training["last_step"]) == (2, 3)
    assert [point["step"] for point in training["curve"]] == [1, 2, 3]
    assert [point["valid_loss"] for point in training["curve"]] == [None, 1.25, 1.75]
    assert (training["trained_tokens"], training["trained_parameters"]) == (12_345, 678)
    assert training["optimism"] == pytest.approx(0.05)
    assert found["adapter"] == str(written / "adapter")


def test_the_markdown_report_has_a_table_of_the_rungs(written: Path) -> None:
    lines = (written / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Ship it"
    head = lines.index("| rung | score | 95 % interval | ms per answer | prompt tokens | what it is |")
    rows = lines[head + 2 : lines.index("", head)]
    assert [row.split(" | ")[0] for row in rows] == ["| constant", "| zero-shot", "| tuned"]
    assert rows[1] == "| zero-shot | 60.0% | 50.2% to 69.1% |  |  | the prompt |"
    assert markdown_text(ATTACK) in rows[0], "a bar in a text does not end the cell, and a tag is none"
    assert "| 2 (kept) | 1.5000 | 1.2500 | 1.1250 |" in lines
    assert "| 3 | 0.5000 | 1.7500 | 1.5000 |" in lines
    assert not any(line.startswith("| 1 |") for line in lines), "nothing was validated at step 1"
    assert any("9.5 examples a second, peak memory 1.50 GiB" in line for line in lines)
    told = "On the 20 validation rows that chose it, it scores 95.0%, on the holdout 90.0%: +5.0 points of optimism."
    assert any(told in line for line in lines)


def test_the_html_report_shows_texts_as_texts(written: Path) -> None:
    tags: list[str] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            tags.append(tag)

        def handle_data(self, data: str) -> None:
            texts.append(data)

    page = (written / "report.html").read_text(encoding="utf-8")
    Reader().feed(page)
    assert "script" not in tags
    assert "i" not in tags, "from the base model's name"
    assert sum(ATTACK in text for text in texts) == 3, "the finding, the rung's description and the command"
    assert any("tiny<i>" in text for text in texts)
    assert any("<b>.jsonl" in text for text in texts)
    assert {"h1", "svg", "table"} <= set(tags)
    assert "http" not in page.replace("http://www.w3.org", ""), "nothing is loaded from elsewhere"


def test_the_html_report_shows_the_names_of_rungs_as_texts(outcome: Outcome) -> None:
    odd = replace(outcome.rungs[1], name="<script>")
    verdict = replace(outcome.verdict, cheapest_as_good="<script>")
    assert "<script>" not in report.page(replace(outcome, rungs=(odd,), verdict=verdict))


@pytest.mark.parametrize("verdict", ["ship", "dont_ship", "inconclusive"])
def test_every_outcome_has_a_headline(outcome: Outcome, verdict: str) -> None:
    headline = {"ship": "Ship it", "dont_ship": "Don't ship it", "inconclusive": "Inconclusive"}[verdict]
    changed = replace(outcome, verdict=replace(outcome.verdict, outcome=verdict))
    assert report.markdown(changed).startswith(f"# {headline}\n")
    assert f'<h1 class="{verdict}">{headline}</h1>' in report.page(changed)


def test_a_report_without_findings_says_so(outcome: Outcome) -> None:
    clean = replace(outcome, findings=())
    assert report.markdown(clean).rstrip().endswith("None.")
    assert "<p>None.</p>" in report.page(clean)


def test_a_report_of_a_cross_fitted_job_says_who_was_measured_and_shows_the_folds(outcome: Outcome) -> None:
    scores = rung("tuned", right(20, 18)).scores
    fold = Fold(
        number=1,
        train=64,
        valid=16,
        best_step=12,
        best_epoch=1.5,
        last_step=24,
        learning_rate=1e-3,
        valid_loss=0.125,
        stopped="stopped",
        seconds=1.0,
        scores=scores,
    )
    last = Candidate(kind="last", step=3, valid_loss=math.nan, scores=())
    taken = Selection(chosen=last, reason="step 3 (the last) is taken", candidates=(last,))
    outcome = replace(outcome, adapter=replace(outcome.adapter, selection=taken))
    found = CrossFit(folds=tuple(replace(fold, number=number) for number in range(1, 6)), groups=100)
    measured_nothing = replace(
        outcome.adapter, curve=tuple(replace(point, valid_loss=None, valid_calibrated_loss=None) for point in CURVE)
    )
    whole = replace(outcome.split, valid=(), holdout=())
    crossfitted = replace(outcome, crossfit=found, adapter=measured_nothing, split=whole)
    text, page = report.markdown(crossfitted), report.page(crossfitted)
    for form in (text, page):
        assert "trained on 80 examples, judged on 100 examples, each answered by the one of 5 models" in form
        assert "the served model was trained on all rows and was itself not measured" in form
        assert "on the holdout" not in form
        assert "nobody trained on" not in form
        assert "validation loss" in form, "of the folds"
    assert "| 3 | 64 | 16 | 20 | 12 (1.5) | 0.1250 | 90.0% |" in text
    assert "<td class=n>12 (1.5)</td>" in page
    assert page.count("validation loss") == 1, "no line in the picture, no label"
    assert crossfitted.as_dict()["crossfit"]["folds"][4]["best_epoch"] == 1.5
    assert outcome.as_dict()["crossfit"] is None


def test_the_result_file_has_the_documented_columns_and_blanks(written: Path) -> None:
    assert (written / "metrics.csv").read_text() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
        "1,2.50000,0.25000,,\n"
        "2,1.50000,0.50000,1.25000,0.62500\n"
        "3,0.50000,1.00000,1.75000,0.50000\n"
    )


def test_the_report_says_why_training_ended_and_why_this_checkpoint_was_taken(outcome: Outcome) -> None:
    for written in (report.markdown(outcome), report.page(outcome)):
        assert "All 3 steps taken. Step 2 (the lowest validation loss) is chosen" in written


def test_the_loss_curves_show_where_training_stopped_before_its_planned_end() -> None:
    stopped = charts.losses(CURVE, best_step=2, planned=30)
    assert "kept: step 2" in stopped
    assert f"stopped: step {CURVE[-1].step}" in stopped
    assert "30 steps planned" in stopped
    assert "stopped" not in charts.losses(CURVE, best_step=2, planned=CURVE[-1].step)


def test_a_caveat_stands_before_every_number(outcome: Outcome, tmp_path: Path) -> None:
    caveat = "2 of 100 holdout rows are in the training file <t> and were kept: the score may measure memory"
    marked = replace(
        outcome,
        verdict=replace(outcome.verdict, caveats=(caveat,)),
        split=replace(outcome.split, caveats=(caveat,)),
    )
    report.write(marked, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert next(iter(found)) == "caveats"
    assert found["caveats"] == found["verdict"]["caveats"] == [caveat]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index(markdown_text(caveat)) < text.index("examples nobody trained on (see the caveat)")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("2 of 100 holdout rows are in the training file &lt;t&gt;") < page.index("<ul>")


def test_a_release_stands_below_the_headline_and_its_reason_is_text(written: Path) -> None:
    release = {"reason": ATTACK, "released_at": 1_700_000_000}
    told = {
        name: released.ADD_TO[name]((written / name).read_text(encoding="utf-8"), release)
        for name in (report.JSON, report.MARKDOWN, report.HTML)
    }
    before = json.loads((written / report.JSON).read_text(encoding="utf-8"))
    assert json.loads(told[report.JSON]) == before | {"release": release}
    lines = told[report.MARKDOWN].splitlines()
    when = "Released all the same on 2023-11-14 22:13 UTC"
    assert lines[:3] == ["# Ship it", "", rf"**{when}:** \<script\>alert(1)\</script\> \| a"]
    assert lines[3:] == (written / report.MARKDOWN).read_text(encoding="utf-8").splitlines()[1:]
    page = told[report.HTML]
    assert f'</h1>\n<p class="release"><b>{when}:</b> &lt;script&gt;alert(1)&lt;/script&gt; | a</p>\n' in page
    assert "<script" not in page


def test_the_report_says_whether_more_examples_would_pay(outcome: Outcome) -> None:
    from heldout.pipeline.advise.learning_curve import draw_curve, predict

    heading = "More data?"
    assert heading not in report.markdown(outcome) + report.page(outcome), "not where it was not estimated"
    curve = draw_curve(["a", "b"] * 50, lambda taught, asked: ["a"] * len(asked))
    more = predict(curve, 100, rung=f"a rung {ATTACK}")
    told = replace(outcome, more_data=more)
    assert heading in report.markdown(told)
    assert markdown_text(more.sentence) in report.markdown(told)
    assert heading in report.page(told)
    assert ATTACK not in report.page(told)
    assert told.as_dict()["more_data"]["gain"] == more.gain


def test_the_lights_stand_in_the_report_the_worst_first_and_examples_are_texts(outcome: Outcome) -> None:
    found = (
        Consequence(name="bias", status="not_measured", sentence="not measured: nobody is named"),
        Consequence(name="format", status="ok", sentence="all fit"),
        Consequence(name="fragility", status="fail", sentence=f"it breaks {ATTACK}", examples=(ATTACK,)),
        Consequence(name="memorisation", status="warn", sentence="it knows"),
    )
    lit = replace(outcome, consequences=found)
    text, page = report.markdown(lit), report.page(lit)
    assert "| ⚪ not measured | bias | Nobody is named. |" in text
    for form in (text, page):
        places = [form.index(one) for one in ("It breaks", "It knows", "All fit", "Nobody is named")]
        assert places == sorted(places)
    assert "<script>" not in page
    assert f"- fragility: {markdown_text(ATTACK)}" in text
    assert [one["name"] for one in lit.as_dict()["consequences"]] == ["bias", "format", "fragility", "memorisation"]
    assert "may have made worse" not in report.markdown(outcome) + report.page(outcome)


def test_the_report_has_every_hyperparameter_with_its_value_and_who_chose_it(outcome: Outcome) -> None:
    rows = {row[0]: row[1:] for row in report.plan_rows(outcome)}
    assert rows.keys() == outcome.plan.as_dict().keys() | KNOBS.keys()
    assert all(value and why for value, _, why in rows.values()), "nothing is left blank"
    assert {name for name, (_, origin, _) in rows.items() if origin == "asked"} == {"lora_r", "min_delta"}
    assert {name for name, (_, origin, _) in rows.items() if origin == "default"} == KNOBS.keys() - {
        "lora_r",
        "min_delta",
    }
    assert rows["lora_r"] == ["8", "asked", "set in the request"]
    assert rows["early_stopping"][0] == "true"
    assert rows["metric"][:2] == ["exact match", "default"]
    for name, (value, origin, _) in rows.items():
        assert f"| {markdown_text(name)} | {value} | {origin} | " in report.markdown(outcome)
        assert f"<td class=name>{name}</td><td class=n>{value}</td><td class=name>{origin}</td>" in report.page(outcome)
    assert outcome.as_dict()["asked"] == {"lora_r": 8, "early_stopping": {"min_delta": 0.5}}


def test_the_report_ends_with_the_command_that_runs_it_again(written: Path, outcome: Outcome) -> None:
    found = json.loads((written / "report.json").read_text(encoding="utf-8"))["reproduce"]
    assert found == outcome.reproduction.as_dict()
    assert found["files"] == [{"part": "train", "name": "<b>.jsonl", "bytes": 1234, "sha256": "5f" * 32}]
    words = ("HELDOUT_PRECISION=float32 heldout tune '<b>.jsonl'", f"'--suffix={ATTACK}'", "--seed=5")
    command = " \\\n  ".join(words)
    text, page = ((written / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    assert f"```sh\n{command}\n```" in text
    assert f"<pre>{html.escape(command)}</pre>" in page
    for form in (text, page):
        assert "5f" * 32 in form
        assert "Made by Heldout 0.1.0 with python 3.12.1." in form


def test_a_command_cannot_end_its_block_in_markdown(outcome: Outcome) -> None:
    fences = "```\n# Don't ship it\n````"
    again = replace(outcome.reproduction, arguments=("tune", "a.jsonl", f"--suffix={fences}"))
    lines = report.markdown(replace(outcome, reproduction=again)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("sh") and line.startswith("```"))
    fence = lines[start].removesuffix("sh")
    end = lines.index(fence, start + 1)
    assert lines[end + 2] == "| file | used as | bytes | sha256 |", "the first such line is the block's own end"
    assert "# Don't ship it" not in lines, "what is no visible text is written as an escape"
    assert layout.markdown_code("a ```` b") == ["`````", "a ```` b", "`````"]


def test_short_columns_are_not_broken_within_a_word() -> None:
    table = layout.html_table(("short", "n", "long"), [["learning_rate_multiplier", "1", "x" * 64]], ("n",))
    assert "<td class=name>learning_rate_multiplier</td><td class=n>1</td><td>xxxx" in table
