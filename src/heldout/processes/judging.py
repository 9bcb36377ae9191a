"""`heldout evaluate`, `heldout compare` and their functions: any model on any file, without a job."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from heldout.engine import catalogue, rungs
from heldout.engine.base import Engine, Message, ModelRef, Reply, Sampling
from heldout.engine.over_chat import ChatEngine
from heldout.engine.remote import RemoteChat
from heldout.errors import InvalidValue
from heldout.pipeline import evaluation_report
from heldout.pipeline.checks.groups import fingerprint
from heldout.pipeline.evaluate.answers import Metric, choose_metric
from heldout.pipeline.evaluate.graders.read import Ask, grader_json, grader_metric, read_grader
from heldout.pipeline.evaluation import Answerer, Evaluation, Judged, Pairing, compare_models, evaluate_model, read_rows
from heldout.pipeline.judgement import decide_on
from heldout.pipeline.request import first_look
from heldout.pipeline.types import Example
from heldout.pipeline.watch import Silent, Watch
from heldout.processes.foreground import make_folder, source
from heldout.processes.talk import find_model
from heldout.settings import Settings, read_settings
from heldout.store.db import open_db

if TYPE_CHECKING:
    from heldout.engine.local import LocalEngine


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model behind a chat completions API: a running `heldout serve`, a vLLM, a hosted service."""

    model: str
    base_url: str  # with its /v1
    api_key: str = ""


def evaluate(
    model: str | Path | Endpoint,
    file: str | Path,
    *,
    train: str | Path | None = None,
    metric: str | None = None,
    grader: str | Path | dict[str, Any] | None = None,
    judge: Endpoint | None = None,
    base: str | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    keep_leaks: bool = False,
    seed: int = 0,
    watch: Watch | None = None,
    settings: Settings | None = None,
) -> Evaluation:
    """How well a model answers the rows of a file. Nothing is trained.

    Args:
        model: a base model, an `ft:` model of this data directory, the folder of an adapter or of a model
            (safetensors), or an Endpoint.
        file: JSONL in OpenAI's chat format; the last message is the right answer.
        train: the training file, if there is one: rows that leak from it are left out, and prompts and cheap
            models that learn from it are scored beside the model.
        metric: a name (docs/metrics.md). Default: what fits the answers.
        grader: one of OpenAI's graders, as JSON in a file or as a dict; instead of a metric.
        judge: who answers for `score_model` graders. Default: a local model of the name in the grader.
        base: the base model of an adapter from elsewhere, where its own name for it is not known here.
        max_tokens: of an answer. Default: a quarter more than the longest right one, and a little.
        out: a folder for report.json, report.md and report.html.

    Raises UserError (faulty rows, unknown model, a model that does not answer); its message says what to do.
    """
    started = time.monotonic()
    with _Run(settings or read_settings(), watch or Silent(), out) as run:
        rows = read_rows(source(file), source(train) if train else None, run.watch, seed=seed, keep_leaks=keep_leaks)
        scored_by = run.metric(rows, metric, grader, judge)
        answerer = run.answerer(model, base)
        look = run.look(model, answerer.model) if train else first_look  # before anything is asked
        done = evaluate_model(
            answerer,
            rows,
            scored_by,
            run.watch,
            max_tokens=max_tokens,
            cheap=run.vectors(rows, scored_by),
            encoder=catalogue.bundled_encoder(),
        )
        if rows.split:
            verdict, consequences = decide_on(
                done,
                answerer,
                rows.split,
                scored_by,
                run.watch,
                clusters=rows.clusters,
                is_trained=run.is_trained(model, answerer.model, grader),
                seconds=run.settings.eval_budget,
                look=look,
            )
            done = replace(done, verdict=verdict, consequences=consequences)
        done = replace(done, notes=(*done.notes, *run.told), seconds=time.monotonic() - started)
        run.write(done)
    return done


def compare(
    a: str | Path | Endpoint,
    b: str | Path | Endpoint,
    file: str | Path,
    *,
    train: str | Path | None = None,
    metric: str | None = None,
    grader: str | Path | dict[str, Any] | None = None,
    judge: Endpoint | None = None,
    base: str | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    keep_leaks: bool = False,
    seed: int = 0,
    watch: Watch | None = None,
    settings: Settings | None = None,
) -> Pairing:
    """Which of two models answers the rows of a file better, row by row. Arguments and errors as for `evaluate`."""
    with _Run(settings or read_settings(), watch or Silent(), out) as run:
        rows = read_rows(source(file), source(train) if train else None, run.watch, seed=seed, keep_leaks=keep_leaks)
        scored_by = run.metric(rows, metric, grader, judge)
        answerers = (run.answerer(a, base), run.answerer(b, base))
        done = compare_models(*answerers, rows, scored_by, run.watch, max_tokens=max_tokens)
        done = replace(done, notes=(*done.notes, *run.told))
        run.write(done)
    return done


class _Run:
    """One evaluation: its models, loaded at their first use, and where its report goes."""

    def __init__(self, settings: Settings, watch: Watch, out: str | Path | None) -> None:
        self.settings, self.watch = settings, watch
        self.told: list[str] = []  # by judges
        self.directory = _directory(out)
        self._local: LocalEngine | None = None
        self._services: list[RemoteChat] = []

    def metric(
        self, rows: Judged, name: str | None, grader: str | Path | dict[str, Any] | None, judge: Endpoint | None
    ) -> Metric:
        """What was asked for, or what fits the answers."""
        usual = choose_metric(rows.targets, name)
        if grader is None:
            return usual
        if name is not None:
            raise InvalidValue("A metric and a grader were both given; give one of them.", param="grader")
        return grader_metric(read_grader(grader_json(grader), self._judge(judge), self._tell), usual)

    def answerer(self, model: str | Path | Endpoint, base: str | None) -> Answerer:
        """A model to be judged."""
        if isinstance(model, Endpoint):
            return Answerer(name=model.model, engine=self._remote(model), model=ModelRef(base_model=model.model))
        ref = find_model(str(model), self.settings, base=base)
        engine = self.local(ref.base_model)
        adapter = Path(ref.adapter) if ref.adapter else None
        decides = rungs.decides(ref)
        return Answerer(
            name=str(model),
            engine=engine,
            model=ref,
            is_prompted=not decides,
            notes=_template_note(adapter, engine.folder(ref.base_model)) if adapter and not decides else (),
        )

    def look(self, model: str | Path | Endpoint, ref: ModelRef) -> Callable[[Sequence[Example]], int]:
        """Counts the models that looked at (nearly) the same rows, in the data directory. Where there is none to write
        in, none are counted, and that is said."""
        where = (model.base_url, model.model) if isinstance(model, Endpoint) else _weights(ref)
        try:
            database = open_db(self.settings.database)
        except (OSError, SQLAlchemyError) as error:
            # Not its URL, which may hold a password.
            self._tell(f"earlier looks at these rows are not counted: the database cannot be opened ({error})")
            return first_look

        def look(examples: Sequence[Example]) -> int:
            rows = [fingerprint(one.messages) for one in examples]
            return database.look(hashlib.sha256(repr(("evaluate", where, rows)).encode()).hexdigest(), rows)

        return look

    def is_trained(
        self, model: str | Path | Endpoint, ref: ModelRef, grader: str | Path | dict[str, Any] | None
    ) -> bool:
        """True where the consequences of training can be measured: of an adapter, a classifier or a folder of weights,
        scored without a model, which probes would ask hundreds of times."""
        if isinstance(model, Endpoint):
            return False
        if grader is not None and '"score_model"' in json.dumps(grader_json(grader)):
            self._tell("the consequences of training are not measured with a grader that asks a model")
            return False
        if ref.adapter is None and Path(ref.base_model).is_dir():
            self._tell(f"the weights in {ref.base_model} are taken for trained on these training rows")
            return True
        return rungs.was_trained(ref)

    def vectors(self, rows: Judged, metric: Metric) -> Engine | None:
        """The engine of the frozen rung, where there will be one."""
        encoder = catalogue.bundled_encoder()
        return self.local(encoder) if rows.split and metric.form == "label" and encoder else None

    def local(self, base_model: str) -> LocalEngine:
        """The engine of this process, this base model ready to be loaded. Raises ModelNotFound."""
        if self._local is None:
            # torch and transformers come in here.
            from heldout.processes.tools import local_engine

            self._local = local_engine(self.settings)
        if not self._local.is_prepared(base_model):
            self.watch.message(f"Unpacking the bundled model {base_model} (about half a minute, once)")
        return self._local

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        """Free what was loaded."""
        if self._local:
            self._local.close()
        for service in self._services:
            service.close()

    def write(self, done: Evaluation | Pairing) -> None:
        """The report, if one was asked for."""
        if self.directory:
            evaluation_report.write(done, self.directory)

    def _remote(self, endpoint: Endpoint) -> ChatEngine:
        if not endpoint.base_url.startswith(("http://", "https://")):
            raise InvalidValue(
                f"{endpoint.base_url!r} is no base URL: it begins with http:// or https://", param="base_url"
            )
        self._services.append(RemoteChat(endpoint.base_url, api_key=endpoint.api_key))
        return ChatEngine(service=self._services[-1])

    def _judge(self, judge: Endpoint | None) -> Ask:
        def ask(model: str, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Reply]:
            if judge:
                engine: Engine = self._remote(judge)
                ref = ModelRef(base_model=judge.model or model)
            else:
                ref = find_model(model, self.settings)
                engine = self.local(ref.base_model)
            return engine.chat(
                ref, conversations, sampling, lambda done, total: self.watch.progress("judge", done, total)
            )

        return ask

    def _tell(self, text: str) -> None:
        self.told.append(text)
        self.watch.message(text, level="warn")


def _weights(ref: ModelRef) -> tuple[object, ...]:
    """What tells one state of a model's weights from another."""
    folder = Path(ref.adapter or ref.base_model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return (ref.base_model, *((str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns) for one in files))


def _template_note(adapter: Path, base: Path) -> tuple[str, ...]:
    """An adapter that was trained with another chat template than its base model's answers worse than it could."""
    own = _chat_template(adapter)
    if own is None or own == _chat_template(base):
        return ()
    return (
        f"the adapter in {adapter} brings a chat template of its own, which differs from its base model's; it was "
        "asked with its base model's",
    )


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def _directory(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    directory = Path(out)
    if (directory / evaluation_report.JSON).exists():
        raise InvalidValue(f"{directory} already holds a report; choose another --out or delete it")
    return make_folder(directory)
