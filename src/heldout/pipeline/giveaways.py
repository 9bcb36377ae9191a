"""Held-out questions that give their answers away: asked without what does, as they will be asked in use.

A code that somebody's tool wrote into every row tells the answer there and in the held-out rows of the same file, so
that a model which learned nothing but the code looks perfect to the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heldout.engine.labels import user_text
from heldout.pipeline.augment.copies import with_user_text
from heldout.pipeline.checks.parts import name_lines, name_some
from heldout.pipeline.checks.rows import Rows, Sampled
from heldout.pipeline.checks.shortcuts import HOLDS, Token, label_of, one_of_each, shortcut_tokens, tokens_of
from heldout.pipeline.types import Example, Finding, Severity

_WITHOUT = "scores say what is known without it; if real prompts have it, keep it (--keep-leaks, x_keep_leaks)"
_WITH = "scores may measure this and not the task"


@dataclass(frozen=True, kw_only=True)
class Giveaways:
    """The tokens in the questions of a job's files that give answers away."""

    left_out: tuple[Token, ...] = ()  # a question asks the same without them
    kept: tuple[Token, ...] = ()  # they may be part of what is asked, or the user wants them kept

    def asked(self, rows: Sequence[Example]) -> tuple[Example, ...]:
        """The rows as they are asked. One that would ask nothing is asked as it is."""
        if not self.left_out:
            return tuple(rows)
        without = [with_user_text(row, self._without, row.copy) for row in rows]
        return tuple(one if tokens_of(user_text(one.prompt)) else row for row, one in zip(rows, without, strict=True))

    def told(self, rows: Sequence[Example], file: str) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
        """What a reader must know of these held-out rows: findings, and caveats for the verdict."""
        changed = [row.line for row, asked in zip(rows, self.asked(rows), strict=True) if row != asked]
        telling = [row.line for row in rows if any(one.is_in(user_text(row.prompt)) for one in self.kept)]
        of = f"of {len(rows)} held-out questions"
        without = f"{len(changed)} {of} are asked without what gives their answers away ({_shown(self.left_out)})"
        having = f"{len(telling)} {of} have something in them that gives their answers away ({_shown(self.kept)})"
        findings, caveats = [], []
        if changed:
            findings.append(_finding("giveaway_removed", "note", without, changed, file, _WITHOUT))
            caveats.append(f"{without}: {_WITHOUT}")
        if telling:
            findings.append(_finding("giveaway_kept", "warning", having, telling, file, _WITH))
            caveats.append(f"{having}: {_WITH}")
        return tuple(findings), tuple(caveats)

    def _without(self, text: str) -> str:
        for token in self.left_out:
            text = token.without(text)
        return text


def find_giveaways(rows: Rows, *, with_valid: bool, with_holdout: bool = False, keep: bool = False) -> Giveaways:
    """The shortcut tokens (checks/shortcuts.py) of the training file that tell the answers of held-out rows too.

    Args:
        rows: of the training file, the validation file (`with_valid`) and the holdout file (`with_holdout`).
        keep: leave none out of a question.
    """
    tokens = shortcut_tokens(rows, with_valid=with_valid)
    if with_holdout:
        tokens = tuple(token for token in tokens if _holds(token, rows.samples[-1]))
    left_out = () if keep else tuple(token for token in tokens if token.means_nothing)
    return Giveaways(left_out=left_out, kept=tuple(token for token in tokens if token not in left_out))


def _holds(token: Token, rows: Sequence[Sampled]) -> bool:
    """True when the rows that have the token have its label."""
    having = [label_of(row) for row in rows if token.is_in(row.text)]
    return having.count(token.label) >= HOLDS * len(having) > 0


def _shown(tokens: Sequence[Token]) -> str:
    return name_some([token.told for token in one_of_each(tokens)])


def _finding(code: str, severity: Severity, sentence: str, lines: Sequence[int], file: str, means: str) -> Finding:
    return Finding(
        code=code,
        severity=severity,
        message=f"{sentence}: {name_lines(lines)}; {means}.",
        file=file,
        lines=tuple(lines),
    )
