"""Labels that do not fit their texts, by confident learning: what a model that has not seen a row says about it.

Two models are asked and their answers averaged: word and letter counts, and the frozen encoder where there is one. Each
is a ridge regression, for which leaving out every row in turn has a closed form. That a model disagrees with a label
does not make the label wrong: a hard task looks like that too. What tells them apart is in `_noise`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from heldout.engine.labels import text_of
from heldout.errors import ContextLengthExceeded
from heldout.pipeline.checks.groups import prompt_fingerprint
from heldout.pipeline.checks.labels import Classes, classes_of
from heldout.pipeline.checks.parts import ModelTools, Parts, name_some, shorten
from heldout.pipeline.types import Dataset, Finding

#: Rows to learn from, at least; and of a label, for it to take part.
MIN_ROWS = 50
MIN_PER_LABEL = 4
#: Rows that are looked at, at most: a sample of a longer file. More would hardly change the models.
MAX_ROWS = 20_000
#: An encoder reads 20 to 100 texts a second on a processor; with more rows than this, counting words does.
MAX_EMBEDDED = 2_000
#: Where the beginning of a text does not tell its label, neither does this check.
MAX_CHARACTERS = 1_000
#: From so many labels on, a wrong label can be told from a hard one by how far off it is.
MIN_LABELS = 6
#: Of the rows whose label is in the nearer half, the share that must be in the first eighth. A model that places them
#: worse does not know the task well enough to call labels wrong: it misses what few words say.
KNOWS_THE_TASK = 0.65
#: The share of wrong labels, at least (95 %), from which on the file is called noisy.
NOISY = 0.05
#: Below, only rows are told where the models are this sure of another label and the row's own is behind a quarter of
#: all; with fewer than MIN_LABELS, where its own is less likely than that.
SURE, UNSURE = 0.5, 0.1
#: Standard errors by which the models must beat chance for the labels to be predictable.
PREDICTABLE = 3.0

_RIDGE = 4.0
_DIMENSIONS = 256
_EXACT_ROWS = 1_500  # up to here all dimensions are kept
_MAX_WORDS = 20_000
_SHOWN = 8


def find_wrong_labels(parts: Parts) -> Iterator[Finding]:
    """Rows whose label is probably wrong, and files whose labels are noisy."""
    classes = classes_of(parts.train)
    rows = _rows(parts.train, classes) if classes is not None else None
    if classes is None or rows is None:
        return
    scores = _probabilities(rows, parts.model)
    of = f"{len(rows.lines)} of {len(parts.train)}" if rows.sampled else f"{len(parts.train)}"
    if _chance(scores, rows.labels) < PREDICTABLE:
        yield _unpredictable(parts.train, len(rows.names), of)
        return
    noise = _noise(scores, rows.labels)
    is_noisy = noise is not None and noise.at_least >= NOISY
    if noise is not None and is_noisy:
        yield Finding(
            code="label_noise",
            severity="warning",
            message=(
                f"About {noise.share:.0%} of the labels (at least {noise.at_least:.0%}) do not belong to their texts, "
                f"estimated on {of} rows. A model that fits these rows learns the mistakes; correct the labels before "
                "training, the most suspicious first."
            ),
            file=parts.train.name,
        )
    suspects = _suspects(scores, rows.labels, noise if is_noisy else None)
    if suspects:
        yield _wrong(parts.train, rows, scores, suspects, is_noisy=is_noisy, of=of)


def noise_caveats(findings: Iterable[Finding], *, holdout_given: bool) -> tuple[str, ...]:
    """What a verdict must say first where its rows are drawn from a file with noisy labels; nothing where not."""
    if holdout_given or not any(one.code == "label_noise" and one.severity == "warning" for one in findings):
        return ()
    return (
        "many labels of the training file seem wrong (label_noise), and so do those of the rows held out of it: good "
        "models score too low and real differences look smaller; correct the labels, or give a right holdout file",
    )


class _Rows(NamedTuple):
    """The rows that take part: one for each prompt."""

    lines: list[int]
    texts: list[str]
    labels: Any  # index of each row's label: numpy integers
    names: list[str]
    sampled: bool


def _rows(train: Dataset, classes: Classes) -> _Rows | None:
    """The rows to look at. Repeated prompts count once, and not at all when they are answered differently:
    that is told elsewhere, and what has a twin is not unseen."""
    import numpy as np

    counted = {label for label, n in classes.counts.items() if n >= MIN_PER_LABEL and not classes.is_slip(label)}
    wanted = set(random.Random(0).sample(range(len(train)), MAX_ROWS)) if len(train) > MAX_ROWS else None
    found: dict[str, tuple[int, str, str] | None] = {}
    for position, example in enumerate(train.examples):
        if wanted is not None and position not in wanted:
            continue
        label = classes.of(example)
        if label not in counted or label is None:
            continue
        prompt = prompt_fingerprint([message for message in example.prompt if message["role"] != "system"])
        if prompt not in found:
            text = text_of(example.prompt, with_system=False)
            found[prompt] = (example.line, text[:MAX_CHARACTERS], label)
        elif (known := found[prompt]) is not None and known[2] != label:
            found[prompt] = None
    kept = [row for row in found.values() if row is not None]
    frequent = {label for label, n in Counter(label for _, _, label in kept).items() if n >= MIN_PER_LABEL}
    kept = [row for row in kept if row[2] in frequent]
    names = sorted(frequent)
    if len(kept) < MIN_ROWS or len(names) < 2:
        return None
    position_of = {name: i for i, name in enumerate(names)}
    return _Rows(
        lines=[line for line, _, _ in kept],
        texts=[text for _, text, _ in kept],
        labels=np.array([position_of[label] for _, _, label in kept]),
        names=names,
        sampled=wanted is not None,
    )


def _probabilities(rows: _Rows, model: ModelTools) -> Any:
    """Rows x labels: how likely each label is to models that have seen all rows but this one."""
    import numpy as np

    views = [_left_out(_count_words(rows.texts), rows.labels)]
    if model.embed is not None and len(rows.texts) <= MAX_EMBEDDED:
        try:
            vectors = np.asarray(model.embed(rows.texts), dtype=np.float64)
        except ContextLengthExceeded:
            pass  # a text is longer than the encoder reads: counting words has no limit
        else:
            views.append(_left_out(vectors, rows.labels))
    return sum(views) / len(views)


def _count_words(texts: Sequence[str]) -> Any:
    """The texts as vectors, from their words, word pairs and parts of words."""
    import numpy as np
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils.extmath import randomized_svd

    # What occurs in one row alone says nothing about the others.
    texts = [text or "-" for text in texts]
    exact = len(texts) <= _EXACT_ROWS
    words = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=r"(?u)\b\w+\b",
        min_df=2,
        max_features=None if exact else _MAX_WORDS,
        dtype=np.float64 if exact else np.float32,
    )
    try:
        table = words.fit_transform(texts)
    except ValueError:  # no word occurs twice
        return np.zeros((len(texts), 1))
    if exact:  # parts of words help where words are seldom seen twice, and are slow to count
        parts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=2)
        table = hstack([table, parts.fit_transform(texts)]).tocsr()
    if exact:
        values, vectors = np.linalg.eigh((table @ table.T).toarray())
        return vectors * np.sqrt(np.maximum(values, 0.0))
    left, sizes, _ = randomized_svd(table, _DIMENSIONS, n_iter=1, random_state=0)
    return (left * sizes).astype(np.float64)


def _left_out(vectors: Any, labels: Any) -> Any:
    """What a ridge regression on all other rows says of each row, as probabilities.

    The hat matrix H of the regression on all rows gives the prediction without row i as
    (prediction_i - H_ii * label_i) / (1 - H_ii). The scale that turns the regression's values into probabilities is
    the one under which the labels as they are are likeliest.
    """
    import numpy as np
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, softmax

    n, k = len(labels), int(labels.max()) + 1
    given = np.eye(k)[labels]
    share = given.mean(axis=0)
    centred = vectors - vectors.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred if centred.shape[1] <= n else centred @ centred.T)
    values = np.maximum(values, 0.0)
    if centred.shape[1] <= n:
        left = centred @ (directions / np.sqrt(values + _RIDGE))
        weights = np.ones_like(values)
    else:
        left, weights = directions, values / (values + _RIDGE)
    own = (left**2 * weights).sum(axis=1) + 1 / n
    fitted = (left * weights) @ (left.T @ (given - share)) + share
    unseen = (fitted - own[:, None] * given) / (1 - own[:, None])

    def surprise(log_scale: float) -> float:
        return float(-log_softmax(np.exp(log_scale) * unseen, axis=1)[np.arange(n), labels].mean())

    scale = np.exp(minimize_scalar(surprise, bounds=(0.0, 4.0), method="bounded").x)
    return softmax(scale * unseen, axis=1)


def _chance(scores: Any, labels: Any) -> float:
    """By how many standard errors rows get a higher score for their own label than other rows do for it.

    The sum of the rank statistics of all labels: blind to how frequent a label is, unlike accuracy.
    """
    import numpy as np
    from scipy.stats import rankdata

    n, above, variance = len(labels), 0.0, 0.0
    for label in range(scores.shape[1]):
        own = labels == label
        count = int(own.sum())
        ranks = rankdata(scores[:, label])
        above += ranks[own].sum() - count * (n + 1) / 2
        variance += count * (n - count) * (n + 1) / 12
    return float(above / np.sqrt(variance))


@dataclass(frozen=True, kw_only=True)
class _Noise:
    share: float
    at_least: float  # with 95 % confidence


def _noise(scores: Any, labels: Any) -> _Noise | None:
    """The share of labels that were given without regard to the text; None where that cannot be told.

    A right label of a hard text is still among the first few that a model thinks of. A label given by accident is
    anywhere: as often in the last third of all labels as in any other. So the last third counts the accidents, and so
    does the second half; the lower count is taken, since right labels that strayed there only add to it. That
    holds of a model that knows the task: it must place the labels of the nearer half well.
    """
    import numpy as np

    n, k = scores.shape
    if k < MIN_LABELS:
        return None
    # In relation to how frequent a label is: a rare one is no accident.
    ranks = _ranks(scores / (np.bincount(labels, minlength=k) / n), labels)
    if (ranks[ranks < k / 2] < np.ceil(k / 8)).mean() < KNOWS_THE_TASK:
        return None
    found = []
    for last in (k // 3, k // 2):
        far = int((ranks >= k - last).sum())
        chance = last / (k - 1)  # of an accident to be there
        found.append(_Noise(share=min(1.0, far / n / chance), at_least=min(1.0, _at_least(far, n) / chance)))
    return min(found, key=lambda one: one.share)


def _ranks(scores: Any, labels: Any) -> Any:
    """How many labels each row's own one is behind."""
    return (scores > scores[range(len(labels)), labels][:, None]).sum(axis=1)


def _at_least(count: int, n: int) -> float:
    """The share that is surely exceeded: the lower end of Wilson's interval, 95 % on that side."""
    from scipy.stats import binomtest

    return float(binomtest(count, n).proportion_ci(confidence_level=0.9, method="wilson").low)


def _suspects(scores: Any, labels: Any, noise: _Noise | None) -> list[int]:
    """Rows whose label is probably wrong, most suspicious first. Without established noise only the sure ones."""
    import numpy as np

    if (scores.argmax(axis=1) == labels).all():
        return []  # and no library is loaded to say so
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    n, k = scores.shape
    flagged = find_label_issues(labels, scores, filter_by="both", n_jobs=1)
    quality = get_label_quality_scores(labels, scores, method="normalized_margin")
    own = scores[np.arange(n), labels]
    best = scores.max(axis=1)
    if noise is None:
        flagged &= (best >= SURE) & (_ranks(scores, labels) >= k / 4 if k >= MIN_LABELS else own <= UNSURE)
    rows = [int(row) for row in np.flatnonzero(flagged)]
    rows.sort(key=lambda row: float(quality[row]))
    return rows if noise is None else rows[: int(np.ceil(noise.share * n))]


def _wrong(train: Dataset, rows: _Rows, scores: Any, suspects: list[int], *, is_noisy: bool, of: str) -> Finding:
    shown = [
        f"line {rows.lines[row]}: {shorten(rows.names[rows.labels[row]])}, the others say "
        f"{shorten(rows.names[int(scores[row].argmax())])} ({scores[row].max():.2f})"
        for row in suspects
    ]
    if is_noisy:
        advice = "Look at them, the first ones above all, and correct what is wrong."
    else:
        advice = "They may be right and only hard; a look at the first ones will tell."
    return Finding(
        code="wrong_label",
        severity="warning" if is_noisy else "note",
        message=(
            f"The label does not fit the text in {len(suspects)} of {of} rows, judging by the other rows "
            f"({name_some(shown, at_most=_SHOWN)}). {advice}"
        ),
        file=train.name,
        lines=tuple(sorted(rows.lines[row] for row in suspects)),
        example=shorten(rows.texts[suspects[0]]),
    )


def _unpredictable(train: Dataset, k: int, of: str) -> Finding:
    # Few labels are often answers that need thought ("yes", "B"), which counting words cannot give.
    return Finding(
        code="label_noise",
        severity="warning" if k >= MIN_LABELS else "note",
        message=(
            f"The labels cannot be predicted from the texts at all (tried on {of} rows, each judged by the others). "
            "Either they belong to other texts (a shuffled column?), or telling them needs more than the words of the "
            "text. Check some rows by hand before training."
        ),
        file=train.name,
    )
