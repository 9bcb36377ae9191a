"""The command line: one function per command. Imports that cost time live inside the functions."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from heldout.errors import UserError
from heldout.pipeline.hyperparameters import KNOBS, Knob, fold

if TYPE_CHECKING:
    from heldout.pipeline.types import Finding
    from heldout.processes.foreground import Result

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
            "--keep-leaks", help="Score validation and holdout rows that are in the training file; the verdict says so."
        ),
    ] = False,
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
            watch=watch,
            **_hyperparameters(set_ or [], flags),
        )
    if as_json:
        _print_json(result.outcome.as_dict() | {"report": str(result.report), "model": result.model})
    else:
        _print_result(result)
    if require_ship and result.verdict.outcome != "ship":
        sys.exit(NOT_SHIPPED)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSONL in OpenAI's chat format.")],
    validation: Annotated[Path | None, typer.Option(help="Checked together: leaks between them.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Checked together: leaks between them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look for everything that is wrong with a training file. Exit code 2 when a job would refuse it."""
    from heldout.pipeline.run import Request, check_files
    from heldout.processes.foreground import source

    with _told_on_stderr():
        training = source(file)
        request = Request(
            base_model="",
            training=training,
            validation=source(validation) if validation else None,
            holdout=source(holdout) if holdout else None,
            directory=Path(),
        )
        parts, findings = check_files(request)
    if as_json:
        _print_json(
            {
                "files": {one.name: len(one) for one in parts.given()},
                "findings": [finding.as_dict() for finding in findings],
            }
        )
    else:
        _print_findings(findings, {one.name: len(one) for one in parts.given()})
    sys.exit(WRONG if any(finding.severity == "error" for finding in findings) else DONE)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A base model, an ft: model, or an adapter's folder.")],
    message: Annotated[str | None, typer.Argument(help="Ask once; without it, talk.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
) -> None:
    """Talk to a model in this process. An adapter's folder brings its own base model."""
    from heldout.engine.base import Message, Sampling
    from heldout.processes.talk import open_model

    with _told_on_stderr():
        engine, ref = open_model(model)
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
        _print_jobs(rows)


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

            traceback.print_exc()
            print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(FAILED)

    return wrap()


def _fail(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(WRONG)


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


def _print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=2))


def _print_result(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    colour = {"ship": "green", "dont_ship": "red"}.get(result.verdict.outcome, "yellow")
    console.print(f"\nVerdict: [bold {colour}]{result.verdict.outcome}[/]")
    for caveat in result.verdict.caveats:
        console.print(f"  Mind: {caveat}", markup=False)
    for reason in result.verdict.reasons:
        console.print(f"  - {reason}", markup=False)
    table = Table(box=None, padding=(0, 2))
    for column, side in (("rung", "left"), ("score", "right"), ("95 % interval", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for rung in (*result.rungs, result.tuned):
        low, high = rung.scores.interval
        name = f"[bold]{rung.name}[/]" if rung is result.tuned else rung.name
        table.add_row(name, f"{rung.scores.mean:.1%}", f"{low:.1%} to {high:.1%}")
    console.print(table)
    console.print(f"Cheapest as good: {result.verdict.cheapest_as_good}")
    console.print(
        f"Model:   {result.model}\nAdapter: {result.adapter}\nReport:  {result.report}", markup=False, soft_wrap=True
    )


def _print_findings(findings: tuple[Finding, ...], sizes: dict[str, int]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    order = {"error": 0, "warning": 1, "note": 2}
    colours = {"error": "red", "warning": "yellow", "note": "blue"}
    for finding in sorted(findings, key=lambda one: order[one.severity]):
        console.print(f"[bold {colours[finding.severity]}]{finding.severity}[/] {finding.code}", end="  ")
        console.print(f"{finding.file}: {finding.message}", markup=False)
    counted = ", ".join(f"{n} sound examples in {name}" for name, n in sizes.items())
    console.print(f"{len(findings)} findings; {counted}" if findings else f"Nothing to complain about: {counted}")


def _print_jobs(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print("No jobs yet in this data directory.")
        return
    table = Table(box=None, padding=(0, 2))
    for column in ("job", "created", "status", "verdict", "model"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["id"],
            row["created"],
            row["pause"] or row["status"],
            row["verdict"] or "",
            row["fine_tuned_model"] or row["model"],
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
