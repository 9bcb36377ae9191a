"""The command line: one function per command. Imports that cost time live inside the functions."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from heldout.errors import UserError
from heldout.pipeline.hyperparameters import KNOBS, Knob, fold

#: Exit codes: what was asked for was done · it failed · it was asked for wrongly, or the data is bad ·
#: it was done, but the verdict is not `ship` (with --require-ship).
DONE, FAILED, WRONG, NOT_SHIPPED = 0, 1, 2, 3

app = typer.Typer(
    help="Fine-tune open-weight models on your own hardware, and ship only what generalises.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")]


def main() -> None:
    """The entry point: user errors become one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `heldout check … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
) -> None:
    """Serve OpenAI's fine-tuning API: server, worker and inference together, until Ctrl-C."""
    from heldout.processes.server import serve as run
    from heldout.settings import read_settings

    run(read_settings(), host=host, port=port, out=sys.stdout)


def _with_hyperparameters(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with a flag for every hyperparameter; those that were given reach it as `flags`."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        flags = {name: given.pop(name) for name in KNOBS}
        command(**given, flags={name: value for name, value in flags.items() if value is not None})

    own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "flags"]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(knob))
        for name, knob in KNOBS.items()
    ]
    # typer makes its options from the signature.
    run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    return run


def _flag(knob: Knob) -> Any:
    # The text is read and checked where the wire's is, so both say the same of the same value.
    option = typer.Option(
        metavar=knob.values.metavar or None,
        help=f"{knob.help} {knob.values.words[0].upper()}{knob.values.words[1:]}."
        if knob.values.metavar
        else knob.help,
        rich_help_panel=f"{knob.group} (left out: the plan chooses)",
        show_default=False,
    )
    return Annotated[str | None if knob.values.metavar else bool | None, option]


@app.command()
@_with_hyperparameters
def tune(
    train: Annotated[Path, typer.Argument(help="Training examples: JSONL in OpenAI's chat format.")],
    validation: Annotated[Path | None, typer.Option(help="Decides when to stop. Default: split off.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Decides the verdict. Default: split off.")] = None,
    model: Annotated[str, typer.Option(help="Bundled name, alias, directory or hub id.")] = "smollm2-135m-instruct",
    suffix: Annotated[str | None, typer.Option(help="Names the output folder heldout-SUFFIX.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a job exactly. Default: drawn.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for adapter and report.")] = None,
    keep_leaks: Annotated[
        bool,
        typer.Option(
            "--keep-leaks",
            help="Score rows that are in the training file, and ask with codes that tell the answers; "
            "the verdict says so.",
        ),
    ] = False,
    grader: Annotated[
        str | None,
        typer.Option(
            "--grader", metavar="FILE|JSON", help="One of OpenAI's graders as JSON: scores instead of a metric."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter by its name on the wire."),
    ] = None,
    as_json: AsJson = False,
    require_ship: Annotated[
        bool, typer.Option("--require-ship", help="Exit with 3 unless the verdict is ship.")
    ] = False,
    *,
    flags: dict[str, Any],
) -> None:
    """Run one job in the foreground: check, baselines, training, verdict."""
    from heldout.processes.foreground import tune as run
    from heldout.progress import TerminalWatch

    with _told_on_stderr(), TerminalWatch() as watch:
        result = run(
            train,
            validation,
            holdout,
            model=model,
            suffix=suffix,
            seed=seed,
            out=out,
            keep_leaks=keep_leaks,
            grader=grader,
            watch=watch,
            **_hyperparameters(set_ or [], flags),
        )
    if as_json:
        _print_json(result.outcome.as_dict() | {"report": str(result.report), "model": result.model})
    else:
        from heldout.printing import print_result

        print_result(result)
    if require_ship and result.verdict.outcome != "ship":
        sys.exit(NOT_SHIPPED)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSONL in OpenAI's chat format.")],
    validation: Annotated[Path | None, typer.Option(help="Checked together: leaks between them.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Checked together: leaks between them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Count lengths in this model's tokens; slower, loads torch.", show_default=False)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings make the exit code 2 as well.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Look at each row by itself; do not compare rows.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Every finding in full, however long.")] = False,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Write the report as one HTML page.")] = None,
) -> None:
    """Look for everything that is wrong with training data. Exit code 2 when a job would refuse it."""
    from heldout.processes.checking import check as run
    from heldout.progress import TerminalWatch

    with _told_on_stderr():
        files = [one for one in (file, validation, holdout) if one]
        if html and any(html.resolve() == one.resolve() for one in files):
            raise UserError(f"--html {html}: that is one of the files to check; choose another name")
        with TerminalWatch(fleeting=True) as watch:
            report = run(file, validation, holdout, model=model, quick=quick, watch=watch)
        if html:
            html.write_text(report.html(), encoding="utf-8")
    if as_json:
        _print_json(report.as_dict())
    else:
        from heldout.printing import print_report

        print_report(report, verbose=verbose)
    sys.exit(WRONG if report.refused or (strict and report.count("warning")) else DONE)


@app.command()
def fix(
    file: Annotated[Path, typer.Argument(help="JSONL in OpenAI's chat format; it is not changed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the repaired file goes.")],
    list_: Annotated[
        Path | None, typer.Option("--list", metavar="CHANGES", help="Write each change as a line of JSON.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT and CHANGES if they exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Repair what is safe to repair, into a new file, and say what was done to which line."""
    from heldout.pipeline.fix import fix as run

    with _told_on_stderr():
        fixed = run(file, out, changes=list_, force=force)
    if as_json:
        _print_json(fixed.as_dict())
    else:
        from heldout.printing import print_fixed

        print_fixed(fixed)


@app.command()
def advise(
    file: Annotated[Path, typer.Argument(help="Training examples: JSONL in OpenAI's chat format.")],
    validation: Annotated[Path | None, typer.Option(help="As for tune.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="As for tune.")] = None,
    model: Annotated[str, typer.Option(help="The base model of the job.")] = "smollm2-135m-instruct",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter of the job by its name on the wire."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Load no model: no duration, no tokens, no costs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say whether to fine-tune at all, and what a job would show, take and cost. Trains nothing."""
    from heldout.processes.advising import advise as run
    from heldout.progress import TerminalWatch

    with _told_on_stderr(), TerminalWatch() as watch:
        advice = run(
            file,
            validation,
            holdout,
            model=model,
            quick=quick,
            watch=watch,
            **_hyperparameters(set_ or [], {}),
        )
    if as_json:
        _print_json(advice.as_dict())
    else:
        from heldout.printing_advice import print_advice

        print_advice(advice)


#: Options that evaluate and compare share.
Train = Annotated[
    Path | None,
    typer.Option(help="The training file: its rows are left out, and prompts and cheap models made of it scored."),
]
MetricName = Annotated[str | None, typer.Option("--metric", help="How answers are scored. Default: what fits them.")]
GraderFile = Annotated[
    str | None,
    typer.Option("--grader", metavar="FILE|JSON", help="One of OpenAI's graders as JSON, instead of a metric."),
]
JudgeUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Where the model of a score_model grader answers. Default: here.")
]
JudgeKey = Annotated[str | None, typer.Option(metavar="NAME", help="The variable with the key for that.")]
BaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="Ask there, at a chat completions API (with its /v1).")
]
KeyEnv = Annotated[str | None, typer.Option(metavar="NAME", help="The environment variable with the key for that.")]
Base = Annotated[str | None, typer.Option(help="The base model of an adapter that was trained elsewhere.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="The most tokens of an answer. Default: a quarter more than the right ones.")
]
KeepLeaks = Annotated[bool, typer.Option("--keep-leaks", help="Score rows that are in the training file, too.")]
Seed = Annotated[int, typer.Option(help="Draws the examples that are shown in prompts.")]
ReportFolder = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write report.json, .md and .html there.")
]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Bundled name, ft: model, folder, hub id; or a name at --base-url.")],
    file: Annotated[Path, typer.Argument(help="JSONL in OpenAI's chat format, with the right answers.")],
    train: Train = None,
    metric: MetricName = None,
    grader: GraderFile = None,
    judge_base_url: JudgeUrl = None,
    judge_api_key_env: JudgeKey = None,
    base_url: BaseUrl = None,
    api_key_env: KeyEnv = None,
    base: Base = None,
    max_tokens: MaxTokens = None,
    keep_leaks: KeepLeaks = False,
    seed: Seed = 0,
    out: ReportFolder = None,
    as_json: AsJson = False,
) -> None:
    """Score any model on a file: base, tuned, trained elsewhere or behind an API. Trains nothing."""
    from heldout.processes.judging import evaluate as run
    from heldout.progress import TerminalWatch

    with _told_on_stderr(), TerminalWatch() as watch:
        done = run(
            _model_at(model, base_url, api_key_env),
            file,
            train=train,
            metric=metric,
            grader=grader,
            judge=_judge_at(judge_base_url, judge_api_key_env),
            base=base,
            max_tokens=max_tokens,
            keep_leaks=keep_leaks,
            seed=seed,
            out=out,
            watch=watch,
        )
    _print_evaluation(done, as_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="As for evaluate.")],
    b: Annotated[str, typer.Argument(help="As for evaluate.")],
    file: Annotated[Path, typer.Argument(help="JSONL in OpenAI's chat format, with the right answers.")],
    train: Annotated[Path | None, typer.Option(help="The training file: rows that leak from it are left out.")] = None,
    metric: MetricName = None,
    grader: GraderFile = None,
    judge_base_url: JudgeUrl = None,
    judge_api_key_env: JudgeKey = None,
    base_url_a: Annotated[str | None, typer.Option(metavar="URL", help="Where A answers. Default: here.")] = None,
    api_key_env_a: KeyEnv = None,
    base_url_b: Annotated[str | None, typer.Option(metavar="URL", help="Where B answers. Default: here.")] = None,
    api_key_env_b: KeyEnv = None,
    base: Base = None,
    max_tokens: MaxTokens = None,
    keep_leaks: KeepLeaks = False,
    seed: Seed = 0,
    out: ReportFolder = None,
    as_json: AsJson = False,
) -> None:
    """Say which of two models answers a file better, row by row, and how sure that is."""
    from heldout.processes.judging import compare as run
    from heldout.progress import TerminalWatch

    with _told_on_stderr(), TerminalWatch() as watch:
        done = run(
            _model_at(a, base_url_a, api_key_env_a),
            _model_at(b, base_url_b, api_key_env_b),
            file,
            train=train,
            metric=metric,
            grader=grader,
            judge=_judge_at(judge_base_url, judge_api_key_env),
            base=base,
            max_tokens=max_tokens,
            keep_leaks=keep_leaks,
            seed=seed,
            out=out,
            watch=watch,
        )
    _print_evaluation(done, as_json)


def _model_at(name: str, base_url: str | None, api_key_env: str | None) -> Any:
    """A model here, or behind an API."""
    from heldout.processes.judging import Endpoint

    if base_url is None:
        if api_key_env is not None:
            raise UserError(f"a key in {api_key_env} was given for {name}, but no base URL to send it to")
        return name
    return Endpoint(model=name, base_url=base_url, api_key=_key(api_key_env))


def _judge_at(base_url: str | None, api_key_env: str | None) -> Any:
    """Where judges answer, under the names that graders give them; None: here."""
    return _model_at("", base_url, api_key_env) if base_url or api_key_env else None


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable)
    if not key:
        raise UserError(f"the environment variable {variable} is not set; it should hold the API key")
    return key


def _print_evaluation(done: Any, as_json: bool) -> None:
    if as_json:
        _print_json(done.as_dict())
    else:
        from heldout.printing_evaluation import print_evaluation

        print_evaluation(done)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A base model, an ft: model, or an adapter's folder.")],
    message: Annotated[str | None, typer.Argument(help="Ask once; without it, talk.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
) -> None:
    """Talk to a model in this process. An adapter's folder brings its own base model."""
    from heldout.engine.base import Message, Sampling
    from heldout.processes.talk import caution, open_model

    with _told_on_stderr():
        engine, ref = open_model(model)
        if warning := caution(model):
            print(f"Mind: {warning}.", file=sys.stderr)
        history: list[Message] = [{"role": "system", "content": system}] if system else []
        sampling = Sampling(max_tokens=max_tokens)
        while True:
            asked = message if message is not None else _ask()
            if asked is None:
                return
            history.append({"role": "user", "content": asked})
            answer = ""
            for piece in engine.stream(ref, history, sampling):
                answer += piece.text
                print(piece.text, end="", flush=True)
            print()
            if message is not None:
                return
            history.append({"role": "assistant", "content": answer})


@app.command()
def jobs(
    job: Annotated[str | None, typer.Argument(help="One job, with its events.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs of this data directory, or tell the story of one."""
    from heldout.processes.talk import job_story, list_jobs
    from heldout.settings import read_settings

    with _told_on_stderr():
        story = job_story(read_settings(), job) if job else None
        rows = [] if job else list_jobs(read_settings())
    if as_json:
        _print_json(story if story is not None else rows)
    elif story is not None:
        for event in story["events"]:
            print(f"{event['time']}  {event['message']}")
    else:
        from heldout.printing import print_jobs

        print_jobs(rows)


@app.command()
def release(
    job: Annotated[str, typer.Argument(help="The job whose models may answer.")],
    reason: Annotated[str, typer.Option(help="Why, in a sentence; it goes into the report.")],
    as_json: AsJson = False,
) -> None:
    """Let a job's models answer although its verdict is not ship (HELDOUT_GATE=block)."""
    from heldout.processes.talk import release_job
    from heldout.settings import read_settings

    with _told_on_stderr():
        row = release_job(read_settings(), job, reason)
    if as_json:
        _print_json(row)
    else:
        print(f"Released {row['fine_tuned_model']} (verdict: {row['verdict']}). Reason: {row['release']['reason']}")


def _told_on_stderr() -> Any:
    """Wrap a command's work: what goes wrong is one sentence on stderr and an exit code."""
    import contextlib

    @contextlib.contextmanager
    def wrap() -> Any:
        try:
            yield
        except UserError as error:
            _fail(error)
        except (KeyboardInterrupt, typer.Exit, SystemExit):
            raise
        except Exception as error:  # noqa: BLE001 - told, with its trace, and exit code 1
            import traceback

            from heldout import disk
            from heldout.settings import read_settings

            if disk.is_full(error):
                print(f"failed: {disk.failure(error, read_settings())}", file=sys.stderr)
                sys.exit(FAILED)
            traceback.print_exc()
            print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(FAILED)

    return wrap()


def _fail(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(WRONG)


def _print_json(document: Any) -> None:
    from heldout.printing import print_json

    print_json(document)


def _hyperparameters(pairs: list[str], flags: dict[str, Any]) -> dict[str, Any]:
    """What `--set` and the flags say, in the wire's form."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected NAME=VALUE, for example --set n_epochs=3")
        values[name] = _json_or_text(value)
    given = fold({name: _json_or_text(value) if isinstance(value, str) else value for name, value in flags.items()})
    if twice := values.keys() & given.keys():
        raise UserError(f"{', '.join(sorted(twice))} was given both with --set and as a flag; give it once")
    return values | given


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


if __name__ == "__main__":
    main()
