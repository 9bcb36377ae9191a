"""The command that runs a job again, and what must be the same for it to give the same model."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from heldout.pipeline.findings import escaped
from heldout.pipeline.hyperparameters import KNOBS, Hyperparameters
from heldout.pipeline.request import Request, Source

#: Packages that compute, or decide what is computed.
PACKAGES = ("torch", "transformers", "peft", "scikit-learn")


@dataclass(frozen=True, kw_only=True)
class UsedFile:
    """A file of the job as it was: whoever has one with this checksum has the same."""

    part: str  # train, valid or holdout
    name: str
    bytes: int
    sha256: str

    @classmethod
    def read(cls, part: str, source: Source) -> UsedFile:
        """Read it once, from its beginning to its end."""
        digest, size = hashlib.sha256(), 0
        with source.open() as content:
            while block := content.read(1 << 20):
                digest.update(block)
                size += len(block)
        return cls(part=part, name=source.name, bytes=size, sha256=digest.hexdigest())

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {"part": self.part, "name": self.name, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A job as a command line, whichever way it came. Every value that decides something is in it."""

    arguments: tuple[str, ...]  # of the program `heldout`
    environment: dict[str, str]
    files: tuple[UsedFile, ...]
    versions: dict[str, str]

    @property
    def command(self) -> str:
        """One line for a shell, whatever the values are."""
        return " ".join(self._words())

    @property
    def shown(self) -> str:
        """The same on several lines, for people."""
        return " \\\n  ".join(self._words())

    @property
    def sentence(self) -> str:
        """What must be the same."""
        others = ", ".join(f"{name} {number}" for name, number in self.versions.items() if name != "heldout")
        return (
            f"Made by Heldout {self.versions['heldout']} with {others}. The same files, versions and kind of machine "
            "give the same model."
        )

    def as_dict(self) -> dict[str, Any]:
        """As it goes into the report."""
        return {
            "command": self.command,
            "arguments": list(self.arguments),
            "environment": self.environment,
            "files": [one.as_dict() for one in self.files],
            "versions": self.versions,
        }

    def _words(self) -> Iterator[str]:
        # A variable's name must not be quoted, or the shell takes it for a program.
        first = [f"{name}={quoted(value)}" for name, value in self.environment.items()]
        yield " ".join([*first, "heldout", *map(quoted, self.arguments[:2])])
        yield from map(quoted, self.arguments[2:])


def quoted(text: str) -> str:
    """The text as one word of a shell. What cannot be seen, or turns the direction of a line, is written as bash's
    escapes: a command that is copied from a page must be the one that is read there."""
    if text == escaped(text):
        return shlex.quote(text)
    data = text.encode("utf-8", "surrogateescape")  # a file name need not be a text
    inner = "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\x{b:02x}" for b in data)
    return f"$'{inner}'"


def reproduction_of(request: Request) -> Reproduction:
    """How to run this job again. Its files are read, for their checksums."""
    parts = (("train", request.training), ("valid", request.validation), ("holdout", request.holdout))
    return Reproduction(
        arguments=tuple(_arguments(request)),
        environment=dict(sorted(request.environment.items())),
        files=tuple(UsedFile.read(part, source) for part, source in parts if source),
        versions={
            "heldout": version("heldout"),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    )


def _arguments(request: Request) -> Iterator[str]:
    yield "tune"
    # A leading dash would make an option of it.
    yield f"./{request.training.name}" if request.training.name.startswith("-") else request.training.name
    if request.validation:
        yield f"--validation={request.validation.name}"
    if request.holdout:
        yield f"--holdout={request.holdout.name}"
    yield f"--model={request.base_model}"
    if request.suffix:
        yield f"--suffix={request.suffix}"
    yield f"--seed={request.seed}"
    # Its own folder is finished, and a finished one is refused.
    yield f"--out={request.directory.name or 'heldout'}-again"
    if request.keep_leaks:
        yield "--keep-leaks"
    if request.grader is not None:
        yield f"--grader={json.dumps(request.grader, ensure_ascii=False)}"
    yield from flags(request.hyperparameters)


def flags(asked: Hyperparameters) -> Iterator[str]:
    """What was asked for as options of `heldout tune`; the rest is left to the plan again."""
    for name, value in asked_values(asked).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        else:
            yield f"--{option}={value if isinstance(value, str) else json.dumps(value)}"


def asked_values(asked: Hyperparameters) -> Mapping[str, Any]:
    """Only what was asked for, by the names of the command line's options."""
    found = {name: getattr(asked, name) for name in KNOBS}
    return {name: value for name, value in found.items() if value is not None}
