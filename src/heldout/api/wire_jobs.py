"""The shapes of fine-tuning jobs, their events and checkpoints on the wire."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt

from heldout.api.wire import Body
from heldout.errors import InvalidValue
from heldout.pipeline.evaluate.graders.read import checked_grader
from heldout.pipeline.hyperparameters import Hyperparameters
from heldout.records import Checkpoint, Event, Job

#: The three that OpenAI's contract has; clients read them off the job, whatever was asked.
OPENAI_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class MethodSettings(BaseModel):
    """What stands below `method.supervised`."""

    hyperparameters: dict[str, Any] | None = None


class Method(BaseModel):
    """`method`: a type, and the settings of that type under its name."""

    type: str = "supervised"
    supervised: MethodSettings | None = None


class CreateJob(Body):
    """The request for a job. Unknown keys at the top are ignored, as OpenAI does."""

    model: str
    training_file: str
    validation_file: str | None = None
    x_holdout_file: str | None = None
    x_keep_leaks: StrictBool = False
    x_grader: dict[str, Any] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = None  # deprecated: where the keys were before `method`
    integrations: Annotated[list[dict[str, Any]], Field(max_length=5)] | None = None
    metadata: Metadata | None = None

    def to_job(self, base_model: str) -> Job:
        """The job that is asked for. Raises InvalidValue for what this version does not do."""
        asked = self._hyperparameters()
        return Job(
            model=self.model,
            base_model=base_model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            holdout_file=self.x_holdout_file,
            keep_leaks=self.x_keep_leaks,
            suffix=_checked_suffix(self.suffix),
            seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
            method=_checked_method(self.method),
            hyperparameters=asked.as_dict(),
            grader=checked_grader(self.x_grader, metric=asked.metric),
            metadata=self.metadata or {},
        )

    def ignored_integrations(self) -> list[str]:
        """The names of what was asked to be told about the job, and will not be."""
        return [str(one.get("type", "unnamed")) for one in self.integrations or []]

    def _hyperparameters(self) -> Hyperparameters:
        """From `method`, or from the deprecated place; both are honoured."""
        new = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        asked = [Hyperparameters.parse(raw) for raw in (new, self.hyperparameters) if raw]
        if len(set(asked)) > 1:
            raise InvalidValue(
                "hyperparameters and method.supervised.hyperparameters differ; give only the latter.",
                param="hyperparameters",
            )
        return asked[0] if asked else Hyperparameters()


class ReleaseJob(Body):
    """The request to let the models of a job answer although its verdict is not `ship`."""

    reason: str


def _checked_suffix(suffix: str | None) -> str | None:
    if suffix and ":" in suffix:
        raise InvalidValue(
            f"suffix {suffix!r} contains ':', which separates the parts of a model's name.", param="suffix"
        )
    return suffix


def _checked_method(method: Method | None) -> str:
    if method and method.type != "supervised":
        raise InvalidValue(
            f"method.type {method.type!r} is not supported by this version; only 'supervised' is.",
            code="unsupported_value",
            param="method.type",
        )
    return "supervised"


class FineTuningJob(BaseModel):
    """A job, with every key clients validate. What starts with `x_` is ours."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: dict[str, Any] | None
    seed: int
    integrations: list[dict[str, Any]]
    metadata: dict[str, str]
    user_provided_suffix: str | None
    x_base_model: str
    x_holdout_file: str | None
    x_keep_leaks: bool
    x_grader: dict[str, Any] | None
    x_pause: str | None  # "pausing" or "paused"; the status stays one of the six
    x_plan: dict[str, Any] | None
    x_verdict: dict[str, Any] | None
    x_release: dict[str, Any] | None  # `reason` and `released_at`, once somebody overruled the verdict

    @classmethod
    def of(cls, job: Job, organization: str) -> FineTuningJob:
        return cls(
            id=job.id,
            created_at=job.created_at,
            finished_at=job.finished_at,
            estimated_finish=job.estimated_finish,
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            organization_id=organization,
            status=job.status.value,
            hyperparameters=_shown(OPENAI_HYPERPARAMETERS, job),
            method=_method(job),
            training_file=job.training_file,
            validation_file=job.validation_file,
            result_files=job.result_files,
            trained_tokens=job.trained_tokens,
            error=_error(job),
            seed=job.seed,
            integrations=[],
            metadata=job.metadata,
            user_provided_suffix=job.suffix,
            x_base_model=job.base_model,
            x_holdout_file=job.holdout_file,
            x_keep_leaks=job.keep_leaks,
            x_grader=job.grader,
            x_pause=job.pause,
            x_plan=job.plan,
            x_verdict=job.verdict,
            x_release=job.release,
        )


def _method(job: Job) -> dict[str, Any]:
    # Of our own knobs only those that were asked for; the rest of the plan is in x_plan.
    names = dict.fromkeys((*OPENAI_HYPERPARAMETERS, *job.hyperparameters))
    return {"type": job.method, job.method: {"hyperparameters": _shown(names, job)}}


def _shown(names: Iterable[str], job: Job) -> dict[str, Any]:
    """The plan's numbers once there is a plan; before, what was asked, or "auto"."""
    return {name: _planned(job, name) for name in names}


def _planned(job: Job, name: str) -> Any:
    if job.plan and name in job.plan:
        return job.plan[name]["value"]
    return job.hyperparameters.get(name, "auto")


def _error(job: Job) -> dict[str, Any] | None:
    # Null unless the job failed: with `{}` the client builds an error object that is true.
    if not job.error:
        return None
    return {key: job.error.get(key) for key in ("code", "message", "param")}


class JobEvent(BaseModel):
    """One line of a job's story."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]

    @classmethod
    def of(cls, event: Event) -> JobEvent:
        return cls(
            id=event.id,
            created_at=event.created_at,
            level=event.level,
            message=event.message,
            type=event.type,
            data=event.data,
        )


class JobCheckpoint(BaseModel):
    """A checkpoint that can be called; `x_best` marks the one the fine-tuned model is, or the middle one of three where
    it is their average."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
    x_best: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> JobCheckpoint:
        return cls(
            id=checkpoint.id,
            created_at=checkpoint.created_at,
            fine_tuning_job_id=checkpoint.job_id,
            fine_tuned_model_checkpoint=checkpoint.model,
            step_number=checkpoint.step,
            metrics=checkpoint.metrics,
            x_best=checkpoint.best,
        )


def metadata_filter(query: Iterable[tuple[str, str]]) -> dict[str, str] | None:
    """`metadata[k]=v` pairs of a query string; `metadata=null` asks for jobs without any (`{}`)."""
    pairs = list(query)
    if ("metadata", "null") in pairs:
        return {}
    wanted = {key[9:-1]: value for key, value in pairs if key.startswith("metadata[") and key.endswith("]")}
    return wanted or None
