"""The server's configuration: the only reader of the environment. Scaling out is a change of URLs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from heldout import machine
from heldout.errors import InvalidValue

#: The bundled chat model: 135M parameters, instruct-tuned, Apache-2.0.
DEFAULT_MODEL = "smollm2-135m-instruct"

#: The bundled sentence encoder, for classifiers: 22M parameters, Apache-2.0, in an MIT-licensed package.
DEFAULT_ENCODER = "all-minilm-l6-v2"

#: Names that existing scripts ask for, and what they get here unless the operator says otherwise.
#: The fine-tuned model keeps the name that was asked for, so a script that parses it goes on working.
HOSTED_NAMES = (
    "gpt-3.5-turbo-0125",
    "gpt-3.5-turbo-1106",
    "gpt-3.5-turbo",
    "gpt-4o-mini-2024-07-18",
    "gpt-4o-mini",
    "gpt-4o-2024-08-06",
    "gpt-4.1-2025-04-14",
    "gpt-4.1-mini-2025-04-14",
    "gpt-4.1-nano-2025-04-14",
)


class Settings(BaseSettings):
    """Every knob of the server, from `HELDOUT_…` variables; a URL left empty means the embedded default."""

    model_config = SettingsConfigDict(env_prefix="HELDOUT_", frozen=True, extra="ignore")

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "heldout")
    cache_dir: Path = Field(default_factory=lambda: Path.home() / ".cache" / "heldout")  # unpacked base models
    database_url: str = ""  # sqlite:///<data_dir>/heldout.db
    blobs_url: str = ""  # file:<data_dir>/blobs
    executor_url: str = "local:"
    engine_url: str = "local:"
    organization: str = Field(
        default="heldout", pattern="^[A-Za-z0-9_.-]+$"
    )  # the third field of ft: names, and organization_id on the wire
    api_key: str = ""  # empty: no key is asked for
    model_aliases: dict[str, str] = Field(default_factory=lambda: dict.fromkeys(HOSTED_NAMES, DEFAULT_MODEL))
    max_file_bytes: int = 512 * 1024 * 1024
    check_uploads: bool = True  # look at training files when they are uploaded; a job looks at them in any case
    gate: Literal["off", "warn", "block"] = "warn"  # what happens when a model is asked whose verdict is not `ship`
    concurrent_jobs: int = Field(default=1, ge=1)
    precision: str = Field(default="auto", pattern="^(auto|float32|bfloat16)$")
    kernels: str = Field(default="auto", pattern="^(auto|off)$")  # operations compiled for this processor
    threads: int = Field(default=0, ge=0)  # of a job process; 0: see `job_threads`
    inference_threads: int = Field(default=0, ge=0)  # of the inference process; 0 as above
    nice: int = Field(default=10, ge=0, le=19)  # added to a job process's niceness
    eval_budget: float | None = Field(default=None, ge=0)  # seconds for probes of a tuned model; none: by its training
    memory_limit: ByteSize = ByteSize(0)  # "8GB", "512MiB" or bytes; 0: what there is

    price_input: float | None = Field(default=None, ge=0)  # per million prompt tokens of a hosted model
    price_output: float | None = Field(default=None, ge=0)  # per million answer tokens of a hosted model
    price_training: float | None = Field(default=None, ge=0)  # per million tokens that a hosted service trains on
    price_hour: float | None = Field(default=None, ge=0)  # of this machine

    @field_validator("eval_budget", "price_input", "price_output", "price_training", "price_hour", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return value or 0

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.root / 'heldout.db'}"

    @property
    def blobs(self) -> str:
        """The blob store's URL."""
        return self.blobs_url or f"file:{self.root / 'blobs'}"

    @property
    def root(self) -> Path:
        """The data directory, absolute: child processes run elsewhere."""
        return self.data_dir.expanduser().absolute()

    @property
    def cache(self) -> Path:
        """Where base models lie unpacked, for all data directories; safe to delete."""
        return self.cache_dir.expanduser().absolute()

    @property
    def adapters(self) -> Path:
        """Local copies of adapters from the blob store; safe to delete."""
        return self.root / "cache"

    @property
    def job_threads(self) -> int:
        """Threads a job computes with: as set, else every core it may use."""
        return self.threads or _cores()

    @property
    def uses_kernels(self) -> bool:
        """Whether to compute with kernels where they can be compiled."""
        return self.kernels == "auto"

    @property
    def chat_threads(self) -> int:
        """Threads the inference process answers with: as set, else every core it may use."""
        return self.inference_threads or _cores()

    @property
    def of_jobs(self) -> dict[str, str]:
        """The variables that decide what a job computes, as a job elsewhere would have to be told them."""
        found = {"HELDOUT_THREADS": str(self.job_threads)}  # sums of products differ with their number
        for name in ("precision", "kernels", "eval_budget", "memory_limit"):
            if (value := getattr(self, name)) != Settings.model_fields[name].default:
                found[f"HELDOUT_{name.upper()}"] = str(int(value) if name == "memory_limit" else value)
        return found

    def work(self, job_id: str) -> Path:
        """A job's working directory: resumable checkpoints, its log, its report."""
        return self.root / "jobs" / job_id


def _cores() -> int:
    # The variable that every OpenMP program heeds; "4,2" is for nested regions, which there are none of.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(machine.cores(), int(asked)) if asked.isdecimal() and int(asked) else machine.cores()


def read_settings() -> Settings:
    """The settings of this process. Raises InvalidValue naming every variable that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        problems = [f"HELDOUT_{'.'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors()]
        raise InvalidValue("; ".join(problems)) from error
    except SettingsError as error:  # not JSON where JSON is expected
        raise InvalidValue(f"{error}; it must be JSON") from error
