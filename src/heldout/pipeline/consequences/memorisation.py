"""Memorisation: does the tuned model know its training answers better than others of their kind, or by heart?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from heldout.errors import ContextLengthExceeded
from heldout.pipeline.consequences.base import (
    LIKELY,
    SURE,
    Consequence,
    Subject,
    TunedModel,
    in_lots,
    not_measured,
    sample,
    short,
    status_of,
)
from heldout.pipeline.consequences.format import form_of
from heldout.pipeline.types import Example

NAME = "memorisation"
#: Answers of each side that are read.
READ, FEWEST = 100, 20
#: Membership AUC: 0.5 says that training answers are no likelier than unseen ones.
WARN_AUC, SEVERE_AUC = 0.70, 0.90
#: Answers of fewer tokens say the same by chance; of so many are so many asked for again.
LONG, RECITED = 30, 32
#: Likeness to the training answer that counts as said by heart.
VERBATIM = 0.9
#: Excess of such answers on training prompts over unseen prompts.
WARN_VERBATIM, FAIL_VERBATIM = 0.05, 0.20
DRAWS = 2_000


def measure(subject: Subject) -> Consequence:
    """Losses of training answers against those of unseen ones, and long answers that are said by heart.

    Only free text can fail: a label that the model is sure of gives nobody away.
    """
    if subject.budget.used_up:
        return not_measured(NAME, subject.budget.sentence)
    learned = subject.learned(READ, NAME)
    unseen = subject.unseen(range(len(subject.answered)))
    if subject.is_encoder:  # of labels that it does not know it has no probability
        known = {one.places: form_of([row.target for row in one.split.train], "label") for one in subject.models}
        unseen = [(one, row) for one, row in unseen if (fits := known[one.places]) and fits(row.target)]
    if min(len(learned), len(unseen)) < FEWEST:
        return not_measured(NAME, f"{FEWEST} training and held-out answers are needed to compare their likelihoods")
    try:
        seen, others = read(subject, learned, unseen)
    except ContextLengthExceeded as error:
        return not_measured(NAME, f"an answer does not fit: {error}")
    seen_losses, unseen_losses = ([one.loss for one in side] for side in (seen, others))
    auc, draws = membership(seen_losses, unseen_losses)
    numbers: dict[str, Any] = {
        "auc": auc,
        "interval": [_quantile(draws, 0.025), _quantile(draws, 0.975)],
        "p_warn": _share(draws, WARN_AUC),
        "p_severe": _share(draws, SEVERE_AUC),
        "train_loss": statistics.fmean(seen_losses),
        "holdout_loss": statistics.fmean(unseen_losses),
        "n_train": len(seen_losses),
        "n_holdout": len(unseen_losses),
    }
    if numbers["p_warn"] >= LIKELY and subject.base != subject.model and not subject.is_encoder:
        numbers |= beyond_the_base(subject, seen, others, draws)
    recited, examples = by_heart(subject) if subject.metric.form == "text" else (None, ())
    if recited:
        numbers["by_heart"] = recited
    severe = numbers["p_severe"] if subject.metric.form == "text" else 0.0
    status = status_of(
        fails=max(severe, recited["p_fail"] if recited else 0.0),
        warns=max(numbers["p_warn"], recited["p_warn"] if recited else 0.0),
    )
    sentence = _sentence(numbers, warned=status != "ok", one_decision=subject.is_encoder)
    if len(seen_losses) < len(learned):
        sentence += f"; {subject.budget.sentence}"
    return Consequence(
        name=NAME,
        status=status,
        sentence=sentence,
        numbers=numbers,
        examples=examples,
    )


class Read(NamedTuple):
    """An answer, and how unlikely its model finds it."""

    row: Example
    loss: float  # nats per token


def beyond_the_base(
    subject: Subject, seen: Sequence[Read], unseen: Sequence[Read], draws: Sequence[float]
) -> dict[str, Any]:
    """What of a suspicious AUC training has added: a base model that tells the two sides apart too, because they are of
    different kinds, remembers none of them. Probabilities of 0.5 plus what the AUC is above the base model's (or above
    0.5), on the same draws of the same examples. Nothing when the time for probes is used up."""
    if subject.budget.used_up:
        return {}
    rows = [one.row for one in (*seen, *unseen)]
    log_probs = subject.engine.log_probs(
        subject.base,
        [row.messages for row in rows],
        lambda done, total: subject.watch.progress("consequences: reading answers, base model", done, total),
    )
    found = per_token(subject, rows, log_probs)
    auc, base = membership(found[: len(seen)], found[len(seen) :])
    added = [0.5 + ours - max(0.5, theirs) for ours, theirs in zip(draws, base, strict=True)]
    return {"base_auc": auc, "p_warn": _share(added, WARN_AUC), "p_severe": _share(added, SEVERE_AUC)}


def read(
    subject: Subject, learned: Sequence[tuple[TunedModel, Example]], unseen: Sequence[tuple[TunedModel, Example]]
) -> tuple[list[Read], list[Read]]:
    """Losses of examples that models learned and of READ that they never saw, or of fewer when the time for probes is
    used up before: FEWEST or a few more of each at a time."""
    sides = [learned, [unseen[i] for i in sample(unseen, READ, subject.seed, NAME)]]
    lots = max(1, min(map(len, sides)) // FEWEST)
    parts = [in_lots(len(side), lots, subject.seed, NAME) for side in sides]
    found: tuple[list[Read], list[Read]] = ([], [])
    for number in range(lots):
        if number and subject.budget.used_up:
            break
        rows = [[side[i] for i in part[number]] for side, part in zip(sides, parts, strict=True)]
        asked = [*rows[0], *rows[1]]
        log_probs = subject.read_each([(one, row.messages) for one, row in asked], "reading answers")
        examples = [row for _, row in asked]
        both = [Read(*one) for one in zip(examples, per_token(subject, examples, log_probs), strict=True)]
        found[0].extend(both[: len(rows[0])])
        found[1].extend(both[len(rows[0]) :])
    return found


def per_token(subject: Subject, examples: Sequence[Example], log_probs: Sequence[float]) -> list[float]:
    """Nats per token of each answer. A classifier's answer is one decision."""
    if subject.is_encoder:
        return [-one for one in log_probs]
    counts = subject.engine.count_tokens(subject.model.base_model, [example.target for example in examples])
    return [-one / (count + 1) for one, count in zip(log_probs, counts, strict=True)]  # 1: the end of the turn


def membership(seen: Sequence[float], unseen: Sequence[float]) -> tuple[float, list[float]]:
    """The chance that a training answer has the smaller loss of a pair, and bootstrap draws of it (seeded)."""
    import numpy as np

    a, b = np.asarray(seen), np.asarray(unseen)
    smaller = (a[:, None] < b[None, :]) + 0.5 * (a[:, None] == b[None, :])
    rng = np.random.default_rng(0)
    weights = (rng.standard_exponential((DRAWS, len(a))), rng.standard_exponential((DRAWS, len(b))))
    left, right = (one / one.sum(axis=1, keepdims=True) for one in weights)
    return float(smaller.mean()), [float(one) for one in ((left @ smaller) * right).sum(axis=1)]


def by_heart(subject: Subject) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """How often long answers are said almost word for word, to training prompts and to unseen ones: what both share
    are templates. Nothing where there are too few long answers."""
    lengths = {}
    for part, rows in (("train", subject.split.train), ("holdout", subject.answered)):
        counts = subject.engine.count_tokens(subject.model.base_model, [row.target for row in rows])
        lengths[part] = [i for i, count in enumerate(counts) if count >= LONG]
    if min(map(len, lengths.values())) < FEWEST or subject.budget.used_up:
        return None, ()
    long = {subject.split.train[i].line for i in lengths["train"]}
    short_ones = {row.line for row in subject.split.train} - long
    train = subject.learned(RECITED, "by heart", but=short_ones)
    replies = subject.ask_each([(one, example.prompt) for one, example in train], "training answers by heart")
    said = [(reply.text, example.target) for reply, (_, example) in zip(replies, train, strict=True)]
    seen = [likeness(text, target) >= VERBATIM for text, target in said]
    unseen = [
        likeness(subject.tuned.scores.answers[i], subject.answered[i].target) >= VERBATIM for i in lengths["holdout"]
    ]
    first = next((example for (_, example), one in zip(train, seen, strict=True) if one), None)
    shown = (f"train line {first.line} is answered by heart: {short(first.target, 100)!r}",) if first else ()
    warns, fails = (
        p_rate_above(sum(seen), len(seen), sum(unseen), len(unseen), m) for m in (WARN_VERBATIM, FAIL_VERBATIM)
    )
    return {
        "train": sum(seen) / len(seen),
        "holdout": sum(unseen) / len(unseen),
        "n_train": len(seen),
        "n_holdout": len(unseen),
        "p_warn": warns,
        "p_fail": fails,
    }, shown


def likeness(one: str, other: str) -> float:
    """Share of the words of the longer text that both have in the same order, 0 to 1."""
    a, b = one.split(), other.split()
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / max(len(a), len(b), 1)


def p_rate_above(k: int, n: int, other_k: int, other_n: int, margin: float) -> float:
    """Posterior probability that one rate is above another by more than the margin: Beta(1 + k, 1 + n - k) each."""
    import numpy as np

    rng = np.random.default_rng(0)
    one = rng.beta(1 + k, 1 + n - k, 20_000)
    other = rng.beta(1 + other_k, 1 + other_n - other_k, 20_000)
    return float((one - other > margin).mean())


def _sentence(numbers: dict[str, Any], *, warned: bool, one_decision: bool) -> str:
    low, high = numbers["interval"]
    parts = [
        f"a training answer is likelier to the tuned model than an unseen one in {numbers['auc']:.0%} of pairs "
        f"(membership AUC {numbers['auc']:.2f}, 95 % interval {low:.2f} to {high:.2f}; 0.5 is none); loss "
        f"{numbers['train_loss']:.3f} against {numbers['holdout_loss']:.3f} nats{'' if one_decision else ' per token'} "
        f"of {numbers['n_train']} and {numbers['n_holdout']}"
    ]
    if "base_auc" in numbers:
        parts.append(f"to the base model in {numbers['base_auc']:.0%} of the same pairs")
    if numbers["p_severe"] >= SURE:
        parts.append("that is severe: who holds the model can tell what it was trained on")
    if recited := numbers.get("by_heart"):
        parts.append(
            f"{recited['train']:.0%} of {recited['n_train']} long training answers are said by heart, "
            f"{recited['holdout']:.0%} of {recited['n_holdout']} unseen ones"
        )
    if warned:
        parts.append("fewer epochs or a smaller learning_rate memorise less")
    return "; ".join(parts)


def _share(draws: Sequence[float], above: float) -> float:
    return sum(one > above for one in draws) / len(draws)


def _quantile(draws: Sequence[float], q: float) -> float:
    return sorted(draws)[min(len(draws) - 1, int(q * len(draws)))]
