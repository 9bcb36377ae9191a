"""The data that passes between stages: frozen, keyword-only, each with a promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from heldout.engine.base import Message

if TYPE_CHECKING:
    from heldout.pipeline.giveaways import Giveaways

Severity = Literal["error", "warning", "note"]

#: What the rows of a file are. "tools": conversations, some of which declare or call functions.
Format = Literal["chat", "preference", "tools"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training row: a conversation that ends with the assistant's answer.

    `line` is the row's line in the user's file, counted from 1. `weights[i]` is 1 if message i is an
    assistant message to learn from, else 0 (OpenAI's `weight: 0` masks an assistant message). `group` is
    what the user declared in `metadata.group`: rows of one group (a customer, a document) stay together.
    `copy` is 0 for the row as it is in the file; an augmented copy has its number, and the line and group of its row.
    """

    messages: tuple[Message, ...]
    weights: tuple[int, ...]
    line: int
    group: str | None = None
    copy: int = 0

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the final answer."""
        return self.messages[:-1]

    @property
    def target(self) -> str:
        """The final answer."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one file, in the file's order. `name` is how reports call the file.

    The examples of a big file lie on disk: going through them in order is cheap, keeping them is not. Of a
    preference row, the example is the prompt with the preferred answer. Rows that declare or call functions
    are no examples: there is no text to look at, so `other_rows` counts the sound ones.
    """

    name: str
    examples: Sequence[Example]
    format: Format = "chat"
    other_rows: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def sound_rows(self) -> int:
        """Examples, and sound rows that are none."""
        return len(self.examples) + self.other_rows


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something a check saw. A check never prints, never drops and never changes a row.

    `lines` are lines of the file called `file`, counted from 1 by line feed, blank lines included. One
    defect of many lines is one finding.
    """

    code: str
    severity: Severity
    message: str  # what is wrong and what to do, one or two sentences
    file: str
    lines: tuple[int, ...] = ()
    example: str = ""  # what it looks like in the first of the lines, short; empty where the message shows it

    def as_dict(self) -> dict[str, Any]:
        """As it goes on the wire and into the report."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "file": self.file,
            "lines": list(self.lines),
            "example": self.example,
        }


@dataclass(frozen=True, kw_only=True)
class Split:
    """Three disjoint parts of one job's data; no group of near duplicates appears in two of them, unless the
    user asked to keep leaks: then `caveats` says so."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...]  # decides when to stop, which checkpoint, which prompt
    holdout: tuple[Example, ...]  # decides the verdict; nothing before the verdict sees it
    seed: int
    groups: int  # distinct examples after grouping exact duplicates
    sources: dict[str, str] = field(default_factory=dict)  # part -> where it came from
    #: copies[i] take turns with train[i] (train/loop.py); empty: every row is learned as it is.
    copies: tuple[tuple[Example, ...], ...] = ()
    caveats: tuple[str, ...] = ()  # what a reader must know before any score, one sentence each
    giveaways: Giveaways | None = None  # what the rows of the holdout are asked without
