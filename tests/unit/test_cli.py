"""The command line as scripts see it: exit codes, one JSON document on stdout, sentences on stderr."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from heldout.cli import main
from heldout.pipeline.hyperparameters import KNOBS
from heldout.records import Job, JobStatus
from heldout.settings import Settings
from heldout.store.blobs import open_blobs
from heldout.store.db import open_db
from tests.conftest import colour_files, colour_row, write_rows
from tests.documents import faults

COMMANDS = ("serve", "tune", "check", "fix", "evaluate", "compare", "chat", "jobs", "release")


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str


def heldout(folder: Path, *arguments: str | Path) -> Run:
    """`python -m heldout …` in a process of its own, with its data below `folder`."""
    environment = {
        **os.environ,
        "HELDOUT_DATA_DIR": str(folder / "data"),
        "HELDOUT_PRECISION": "float32",
        "HELDOUT_GATE": "block",  # a job asks its own models whatever their verdict will be
        "PYTHONPATH": os.pathsep.join(sys.path),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "heldout", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """The same in this process, where torch is loaded already: it saves ten seconds a command."""
    monkeypatch.setenv("HELDOUT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HELDOUT_PRECISION", "float32")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Run:
        monkeypatch.setattr(sys, "argv", ["heldout", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Run(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_help_lists_the_commands(tmp_path: Path) -> None:
    done = heldout(tmp_path, "--help")
    assert done.code == 0
    assert all(command in done.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(here: Callable[..., Run], command: str) -> None:
    done = here(command, "--help")
    assert done.code == 0
    assert "--help" in done.out


def test_every_hyperparameter_is_a_flag_of_tune_in_a_group(tmp_path: Path) -> None:
    shown = heldout(tmp_path, "tune", "--help").out
    for name, knob in KNOBS.items():
        assert f"--{name.replace('_', '-')} " in shown, name
        assert f" {knob.group} " in shown
    assert "--no-early-stopping" in shown


@pytest.mark.parametrize("arguments", [["bake"], ["tune"], ["check", "a.jsonl", "--colour"]])
def test_a_command_line_that_is_wrong_exits_with_2(here: Callable[..., Run], arguments: list[str]) -> None:
    done = here(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err


def test_a_good_file_is_checked_with_exit_code_0(tmp_path: Path) -> None:
    files = colour_files(tmp_path)
    done = heldout(tmp_path, "check", files["train"], "--validation", files["valid"], "--holdout", files["holdout"])
    assert done.code == 0
    assert "train.jsonl: 80 sound rows; " in done.out
    assert "holdout.jsonl: 48 sound rows." in done.out
    assert done.out.endswith("A job would take this.\n")
    assert all(line.startswith("checks: ") for line in done.err.splitlines()), "only where a machine is slow"


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """Twenty rows, of which lines 3 and 17 are no JSON and line 8 ends with the user."""
    path = write_rows(tmp_path / "bad.jsonl", [colour_row(i) for i in range(20)])
    lines = path.read_text().splitlines()
    lines[2] = lines[16] = '{"messages": ['
    lines[7] = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_bad_file_is_checked_with_exit_code_2_and_every_line_is_named(tmp_path: Path, bad_file: Path) -> None:
    done = heldout(tmp_path, "check", bad_file)
    assert done.code == 2
    assert "17 sound rows, 3 with errors" in done.out
    assert "lines 3, 17: " in done.out
    assert "line 8: " in done.out
    assert "A job would refuse this for 3 rows." in done.out


def test_findings_as_json(here: Callable[..., Run], bad_file: Path) -> None:
    done = here("check", bad_file, "--json")
    assert done.code == 2
    found = json.loads(done.out)
    assert found["files"] == [{"name": str(bad_file), "part": "train", "sound": 17, "faulty": 3}]
    assert found["refused"] is True
    errors = [one for one in found["findings"] if one["severity"] == "error"]
    assert sorted(line for one in errors for line in one["lines"]) == [3, 8, 17]


def test_with_strict_a_warning_is_enough_for_exit_code_2(here: Callable[..., Run], tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [colour_row(i) for i in range(20)])
    assert "few_examples" in here("check", few).out
    assert here("check", few).code == 0
    assert here("check", few, "--strict").code == 2
    assert here("check", few, "--strict", "--json").code == 2


def test_the_report_as_a_page_stands_beside_the_one_on_stdout(
    here: Callable[..., Run], bad_file: Path, tmp_path: Path
) -> None:
    done = here("check", bad_file, "--json", "--html", "report.html")
    assert done.code == 2
    json.loads(done.out)
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "last_not_assistant" in page


def test_the_page_does_not_take_the_place_of_the_data(here: Callable[..., Run], bad_file: Path) -> None:
    before = bad_file.read_bytes()
    done = here("check", bad_file, "--html", bad_file)
    assert done.code == 2
    assert "one of the files to check" in done.err
    assert bad_file.read_bytes() == before


def test_fix_writes_a_new_file_and_says_what_it_did(here: Callable[..., Run], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [colour_row(i) for i in range(60)])
    with rows.open("a") as out:
        out.write("\n" + rows.read_text().splitlines()[4] + "\n")
    done = here("fix", rows, "-o", "out.jsonl", "--list", "changes.jsonl")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "blank_line: blank line left out (line 61)",
        "exact_duplicate: copy of an earlier row left out (line 62)",
        f"out.jsonl: 60 of 62 lines. {rows} is as it was.",
    ]
    assert len((tmp_path / "changes.jsonl").read_text().splitlines()) == 2
    assert "exists" in here("fix", rows, "-o", "out.jsonl").err
    again = here("fix", rows, "-o", "out.jsonl", "--force", "--json")
    assert [one["lines"] for one in json.loads(again.out)["changes"]] == [[61], [62]]
    left = {one["code"] for one in json.loads(here("check", "out.jsonl", "--json").out)["findings"]}
    assert not left & {"blank_line", "exact_duplicate"}
    missing = here("fix", "gone.jsonl", "-o", "x.jsonl")
    assert (missing.code, missing.err) == (2, "error: There is no file gone.jsonl\n")


@pytest.mark.parametrize("command", ["check", "tune"])
@pytest.mark.parametrize("option", ["", "--validation", "--holdout"])
def test_a_missing_file_is_named_with_exit_code_2(
    here: Callable[..., Run], colours: dict[str, Path], command: str, option: str
) -> None:
    done = here(command, colours["train"], option, "gone.jsonl") if option else here(command, "gone.jsonl")
    assert done.code == 2
    assert done.err == "error: There is no file gone.jsonl\n"
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--set n_epochs", "expected NAME=VALUE"),
        ("--set n_epochs=0", "a whole number from 1 to 50"),
        ("--set n_epochs=many", "n_epochs: 'many'"),
        ("--set epochs=3", "Unknown hyperparameter 'epochs'"),
        ("--n-epochs 0", "n_epochs: 0. Expected a whole number from 1 to 50"),
        ("--n-epochs many", "n_epochs: 'many'"),
        ("--patience 0", "early_stopping.patience: 0. Expected a whole number of at least 1"),
        ("--target-modules q_proj,", "target_modules: 'q_proj,'"),
        ("--learning-rate 1e-4 --learning-rate-multiplier 2", "give one of them"),
        ("--lora-r 4 --set lora_r=8", "lora_r was given both with --set and as a flag"),
    ],
)
def test_a_hyperparameter_out_of_range_is_told_before_any_work(
    here: Callable[..., Run], colours: dict[str, Path], tmp_path: Path, arguments: str, sentence: str
) -> None:
    before = set(tmp_path.iterdir())
    done = here("tune", colours["train"], *arguments.split())
    assert done.code == 2
    assert sentence in done.err
    assert set(tmp_path.iterdir()) == before


def test_flags_ask_for_what_the_wire_asks_for(here: Callable[..., Run], bad_file: Path, tiny_model: Path) -> None:
    flags = (
        "--n-epochs 7 --batch-size 4 --learning-rate 2e-3 --lr-search light --warmup-ratio 0.1 --max-grad-norm 2 "
        "--max-length 99 --lora-r 5 --lora-alpha 7.5 --target-modules q_proj,v_proj --freeze-layers 0.5 "
        "--lora-dropout 0.1 --weight-decay 0.01 --label-smoothing 0.2 --neftune-noise-alpha 5 "
        "--prompt-loss-weight 0.3 --ema-decay 0.75 --replay-ratio 0.25 --augmentation robust "
        "--no-early-stopping --patience 3 --min-delta 0.05 --metric chrf"
    )
    done = here("tune", bad_file, "--model", tiny_model, "--out", "out", *flags.split())
    assert done.code == 2
    assert "Line 3" in done.err, "refused for its rows, not for its flags"
    assert json.loads(Path("out/request.json").read_text())["request"]["hyperparameters"] == {
        "n_epochs": 7,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "lr_search": "light",
        "warmup_ratio": 0.1,
        "max_grad_norm": 2.0,
        "max_length": 99,
        "lora_r": 5,
        "lora_alpha": 7.5,
        "target_modules": ["q_proj", "v_proj"],
        "freeze_layers": 0.5,
        "lora_dropout": 0.1,
        "weight_decay": 0.01,
        "label_smoothing": 0.2,
        "neftune_noise_alpha": 5.0,
        "prompt_loss_weight": 0.3,
        "ema_decay": 0.75,
        "replay_ratio": 0.25,
        "augmentation": "robust",
        "early_stopping": {"enabled": False, "patience": 3, "min_delta": 0.05},
        "metric": "chrf",
    }


def test_set_and_flags_ask_together(here: Callable[..., Run], bad_file: Path, tiny_model: Path) -> None:
    asked = ("--set", "freeze_layers=fast", "--set", "lora_r=4", "--learning-rate-multiplier", "3")
    here("tune", bad_file, "--model", tiny_model, "--out", "out", *asked)
    assert json.loads(Path("out/request.json").read_text())["request"]["hyperparameters"] == {
        "freeze_layers": "fast",
        "lora_r": 4,
        "learning_rate_multiplier": 3.0,
    }


def test_a_bad_file_is_not_trained_on(here: Callable[..., Run], bad_file: Path, tiny_model: Path) -> None:
    done = here("tune", bad_file, "--model", tiny_model, "--out", "out")
    assert done.code == 2
    assert "Line 3" in done.err
    assert "Line 8" in done.err
    assert done.out == ""


def test_an_unknown_model_is_told_with_what_was_tried(here: Callable[..., Run], colours: dict[str, Path]) -> None:
    done = here("tune", colours["train"], "--model", "no-such-model", "--out", "out")
    assert done.code == 2
    assert "The model 'no-such-model' does not exist. Tried: an alias" in done.err
    assert "a directory with a config.json at" in done.err
    assert "a Hugging Face id" in done.err
    assert "Traceback" not in done.err
    assert not Path("out").exists()


def test_there_are_no_jobs_in_an_empty_data_directory(tmp_path: Path) -> None:
    done = heldout(tmp_path, "jobs")
    assert (done.code, done.out, done.err) == (0, "No jobs yet in this data directory.\n", "")


def test_jobs_as_json_and_unknown_jobs(here: Callable[..., Run]) -> None:
    assert json.loads(here("jobs", "--json").out) == []
    done = here("jobs", "ftjob-none")
    assert done.code == 2
    assert "ftjob-none" in done.err


def test_a_job_that_was_asked_to_wait_is_listed_as_paused_or_pausing(
    here: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    db = open_db(Settings(data_dir=tmp_path / "data").database)
    for status, handle, paused in (
        (JobStatus.QUEUED, None, False),
        (JobStatus.QUEUED, None, True),
        (JobStatus.RUNNING, "process", True),
        (JobStatus.FAILED, None, True),
    ):
        job = Job(model="m", base_model="m", training_file="file-a", status=status, handle=handle, paused=paused)
        db.add_job(job)
    listed = json.loads(here("jobs", "--json").out)
    assert [(row["status"], row["pause"]) for row in listed] == [
        ("failed", None),
        ("running", "pausing"),
        ("queued", "paused"),
        ("queued", None),
    ]
    lines = here("jobs").out.splitlines()[1:]
    assert [line.split()[3] for line in lines] == ["failed", "pausing", "paused", "queued"]


@dataclass(frozen=True)
class Finished:
    """What one `heldout tune` left behind."""

    run: Run
    files: dict[str, Path]
    out: Path


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`tune` on too few steps to learn anything, so that the verdict cannot be `ship`."""
    folder = tmp_path_factory.mktemp("cli")
    files = colour_files(folder)
    run = heldout(
        folder,
        *("tune", files["train"], "--validation", files["valid"], "--holdout", files["holdout"]),
        *("--model", tiny_model, "--seed", "1", "--out", "out", "--set", "n_epochs=1", "--set", "learning_rate=1e-5"),
        *("--json", "--require-ship"),
    )
    return Finished(run, files, folder / "out")


def test_a_job_in_json_mode_prints_one_document_and_tells_its_story_on_stderr(finished: Finished) -> None:
    report = json.loads(finished.run.out)
    assert report["verdict"]["outcome"] == "dont_ship"
    assert report["data"] | {"groups": 0, "sources": {}} == {
        "train": 80,
        "valid": 24,
        "holdout": 48,
        "seed": 1,
        "groups": 0,
        "sources": {},
    }
    assert report["report"] == "out/report.html"
    assert report["plan"]["learning_rate"] == {"value": 1e-5, "reason": "set in the request"}
    on_disk = json.loads((finished.out / "report.json").read_text())
    assert {key: report[key] for key in on_disk} == on_disk
    assert faults(report) == faults(on_disk) == []
    story = finished.run.err
    parts = (
        "80 examples to train on",
        "zero-shot: ",
        "Plan: at most 1 epochs",
        "Training ",
        "train: 10/10",
        "Verdict:",
    )
    assert all(part in story for part in parts)
    assert "Traceback" not in story


def test_the_printed_command_makes_the_same_model_again(finished: Finished) -> None:
    report = json.loads(finished.run.out)
    again = report["reproduce"]
    folder = finished.out.parent
    script = f'heldout() {{ "{sys.executable}" -m heldout "$@"; }}\n{again["command"]}'
    environment = {**os.environ, "HELDOUT_DATA_DIR": str(folder / "again"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = folder / "out-again"
    second = json.loads((made / "report.json").read_text())
    for key in ("plan", "asked", "data", "rungs", "tuned"):
        pairs = [one[key] if isinstance(one[key], list) else [one[key]] for one in (report, second)]
        for one in (*pairs[0], *pairs[1]):
            one.pop("ms_per_answer", None)
        assert pairs[0] == pairs[1], key
    assert second["training"]["curve"] == report["training"]["curve"]
    weights = [(one / "adapter" / "adapter_model.safetensors").read_bytes() for one in (finished.out, made)]
    assert weights[0] == weights[1]
    sums = {part: hashlib.sha256(path.read_bytes()).hexdigest() for part, path in finished.files.items()}
    assert {one["part"]: one["sha256"] for one in again["files"]} == sums


def test_the_lines_of_the_model_card_load_the_adapter_and_answer_as_heldout_does(
    finished: Finished, here: Callable[..., Run], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import ModelCard

    report = json.loads(finished.run.out)
    card = ModelCard.load(finished.out / "adapter" / "README.md")
    assert card.data.model_name == report["model"]
    (result,) = card.data.eval_results
    assert result.metric_value == round(report["tuned"]["score"], 4)
    assert report["reproduce"]["command"].split(" --")[0] in card.text
    (lines,) = [block for block in card.text.split("```python\n")[1:] if "PeftModel" in block]
    asked = "item 7 of the list is red and has size 3"
    code = lines.split("```")[0].replace("path/to/the/base/model", str(tiny_model)).replace("…", asked)
    told = here("chat", finished.out, asked, "--max-tokens", "64").out.strip()
    capsys.readouterr()
    exec(code.replace("path/to/this/folder", str(finished.out / "adapter")), {})
    assert capsys.readouterr().out.split("<|im_end|>")[0].strip() == told


def test_evaluate_gives_the_served_model_the_score_of_its_verdict(
    finished: Finished, here: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads(finished.run.out)
    monkeypatch.setenv("HELDOUT_DATA_DIR", str(finished.out.parent / "data"))
    room = ("--train", finished.files["train"], "--json")
    done = here("evaluate", report["model"], finished.files["holdout"], *room)
    assert done.code == 0, done.err
    again = json.loads(done.out)
    assert again["score"] == report["tuned"]["score"]
    assert again["interval"] == report["tuned"]["interval"]
    assert {rung["name"] for rung in again["rungs"]} == {rung["name"] for rung in report["rungs"]}
    for name in ("constant", "zero-shot"):
        assert again["against"][name]["difference"] == report["verdict"]["numbers"]["against"][name]["difference"]


def test_tune_scores_by_a_grader_that_asks_no_model(
    here: Callable[..., Run], colours: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    grader = {
        "type": "string_check",
        "name": "begins with a brace",
        "operation": "like",
        "input": "{{ sample.output_text }}",
        "reference": '{"colour"',
    }
    (tmp_path / "grader.json").write_text(json.dumps(grader))
    files = (colours["train"], "--validation", colours["valid"], "--holdout", colours["holdout"])
    asked = ("--model", tiny_model, "--out", "out", "--n-epochs", "1", "--json", "--grader", "grader.json")
    report = json.loads(here("tune", *files, *asked).out)
    constant, classical = report["rungs"][:2]
    assert (constant["metric"], constant["score"]) == ("begins with a brace", 1)
    assert classical["name"] == "tfidf-logistic", "the answers are labels still"
    told = here("tune", *files, *asked[:4], "--grader", "grader.json", "--metric", "chrf")
    assert (told.code, told.err) == (2, "error: A metric and a grader were both given; give one of them.\n")
    (tmp_path / "grader.json").write_text(json.dumps({"type": "score_model", "model": "m", "input": []}))
    assert "a job asks no judge" in here("tune", *files, *asked[:2], "--grader", "grader.json").err


def test_a_verdict_other_than_ship_exits_with_3_when_ship_is_required(finished: Finished) -> None:
    assert finished.run.code == 3


def test_without_that_a_finished_job_exits_with_0(
    here: Callable[..., Run], colours: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    few = write_rows(tmp_path / "few.jsonl", [colour_row(i) for i in range(2000, 2020)])
    files = (colours["train"], "--holdout", few)
    done = here("tune", *files, "--model", tiny_model, "--out", "out", "--set", "n_epochs=1", "--seed", "1")
    assert done.code == 0
    assert "Verdict: inconclusive" in done.out, "20 rows are held out"
    assert "tfidf-logistic" in done.out
    assert "out/report.html" in done.out


def test_a_finished_job_is_not_overwritten(here: Callable[..., Run], finished: Finished) -> None:
    done = here("tune", finished.files["train"], "--out", finished.out)
    assert done.code == 2
    assert "already holds a finished job" in done.err


@pytest.mark.parametrize("folder", [".", "adapter"])
def test_an_adapters_folder_answers(here: Callable[..., Run], finished: Finished, folder: str) -> None:
    answers = [here("chat", finished.out / folder, text, "--max-tokens", "8") for text in ("hello", "hello", "bye")]
    assert [one.code for one in answers] == [0, 0, 0]
    assert all(one.out.endswith("\n") and one.out.strip() for one in answers)
    assert answers[0].out == answers[1].out != answers[2].out
    assert answers[0].err == ""


def test_a_model_that_is_not_to_ship_is_released_with_a_reason_and_its_report_says_so(
    here: Callable[..., Run], finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELDOUT_DATA_DIR", str(finished.out.parent / "data"))
    monkeypatch.setenv("HELDOUT_GATE", "block")
    monkeypatch.setenv("COLUMNS", "200")
    (job,) = json.loads(here("jobs", "--json").out)
    assert (job["verdict"], job["release"]) == ("dont_ship", None)
    looked = here("chat", job["fine_tuned_model"], "hello", "--max-tokens", "8")
    assert (looked.code, looked.err) == (0, "Mind: the verdict on this model is dont_ship.\n")
    assert here("release", job["id"]).code == 2, "no reason"
    empty = here("release", job["id"], "--reason", " ")
    assert (empty.code, empty.err[:31]) == (2, "error: A release needs a reason")

    done = here("release", job["id"], "--reason", "accepted by Kim")
    assert (done.code, done.out) == (
        0,
        f"Released {job['fine_tuned_model']} (verdict: dont_ship). Reason: accepted by Kim\n",
    )
    again = json.loads(here("release", job["id"], "--reason", "accepted by Kim", "--json").out)
    assert again["release"]["reason"] == "accepted by Kim"
    assert here("release", job["id"], "--reason", "another").code == 2
    assert "dont_ship (released)" in here("jobs").out
    assert here("chat", job["fine_tuned_model"], "hello", "--max-tokens", "8").err == ""

    settings = Settings(data_dir=finished.out.parent / "data")
    db, blobs = open_db(settings.database), open_blobs(settings.blobs)
    files = [db.get_file(one) for one in db.get_job(job["id"]).result_files]
    report, markdown, page = (blobs.open(file.blob).read().decode() for file in files[1:])
    assert json.loads(report) == json.loads((finished.out / "report.json").read_text()) | {"release": again["release"]}
    assert "accepted by Kim" in markdown.splitlines()[2]
    assert page.index("</h1>") < page.index("accepted by Kim") < page.index("<svg")


def test_a_folder_without_a_model_is_no_model(here: Callable[..., Run], tmp_path: Path) -> None:
    done = here("chat", tmp_path, "hello")
    assert done.code == 2
    assert str(tmp_path) in done.err
    (tmp_path / "adapter_config.json").write_text("{}")
    done = here("chat", tmp_path, "hello")
    assert done.code == 2
    assert "nor a report.json beside it says which base model" in done.err
