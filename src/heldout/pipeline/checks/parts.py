"""What checks look at, and how they name lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from heldout.pipeline.types import Dataset, Example, Finding

if TYPE_CHECKING:
    from heldout.pipeline.checks.near import Near
    from heldout.pipeline.checks.rows import Rows


@dataclass(frozen=True, kw_only=True)
class ModelTools:
    """What checks may ask of models; None where nobody is there to answer (an upload, a check without a model)."""

    kind: str | None = None  # of the base model: catalogue.CHAT or ENCODER
    limit: int | None = None  # tokens of an example, at most: `max_length`
    #: Tokens of each example as the base model's template renders it.
    count_tokens: Callable[[Sequence[Example]], list[int]] | None = None
    #: A vector of length 1 for each text, by an encoder as it is.
    embed: Callable[[Sequence[str]], Sequence[Sequence[float]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The files of one job as they were given, before anything is split off."""

    train: Dataset
    valid: Dataset | None = None
    holdout: Dataset | None = None
    model: ModelTools = ModelTools()

    def given(self) -> Iterator[Dataset]:
        """The files that there are."""
        return (dataset for dataset in (self.train, self.valid, self.holdout) if dataset is not None)

    @cached_property
    def rows(self) -> Rows:
        """What comparisons need of each row of the given files, in one pass that all checks share."""
        from heldout.pipeline.checks.rows import Rows

        return Rows.read(tuple(self.given()))

    @cached_property
    def near(self) -> Near:
        """Which rows of all files ask nearly the same; found once for all checks."""
        from heldout.pipeline.checks.near import find_near

        return find_near(self.rows)


#: A check looks at the data and yields what it sees; it never prints, drops or changes a row.
Check = Callable[[Parts], Iterable[Finding]]


def name_lines(lines: Sequence[int], *, at_most: int = 10) -> str:
    """ "line 3", "lines 3 and 8", "lines 1, 2, 3 and 7 more"."""
    if len(lines) == 1:
        return f"line {lines[0]}"
    shown = [str(line) for line in lines[:at_most]]
    last = f"{len(lines) - at_most} more" if len(lines) > at_most else shown.pop()
    return f"lines {', '.join(shown)} and {last}"


def shorten(text: str, *, at_most: int = 60) -> str:
    """An answer as it can stand in a sentence."""
    shown = repr(text)
    return shown if len(shown) <= at_most else f"{shown[: at_most - 1]}…"


def name_some(items: Sequence[str], *, at_most: int = 5, of: int | None = None) -> str:
    """The first few items, and how many more there are: of `of`, when only the first were written down."""
    more = (len(items) if of is None else of) - at_most
    return "; ".join(items[:at_most]) + (f"; and {more} more" if more > 0 else "")
