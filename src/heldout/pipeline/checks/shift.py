"""A validation or holdout file that is of another kind than the training file: other texts, other shares of labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from heldout.engine.labels import read_label
from heldout.pipeline.checks.groups import fold
from heldout.pipeline.checks.parts import ModelTools, Parts, name_some, shorten
from heldout.pipeline.checks.rows import Sampled, plain
from heldout.pipeline.types import Finding

#: How well a classifier tells the files apart: half of all pairs right by chance is 0.5.
SHIFTED, SEVERE = 0.60, 0.75
SURE = 0.01
PERMUTATIONS = 200
FOLDS = 5
#: Rows of each file that are compared, at most; an encoder is slower than counting words.
MOST, MOST_EMBEDDED = 2_000, 400
#: Fewer rows differ by chance.
LEAST = 20
#: Free answers that training teaches word for word: above this share the file asks for the same in other words.
KNOWN_ANSWERS = 0.8
#: Share of rows that would have to change their label for the shares to be equal.
LABEL_SHIFT = 0.20


def find_shift(parts: Parts) -> Iterator[Finding]:
    """A classifier that tells the files' prompts apart, on rows it was not fitted on."""
    train = _evenly(parts.rows.samples[0], MOST)
    for dataset, sample in zip(parts.rows.datasets[1:], parts.rows.samples[1:], strict=True):
        other = _evenly(sample, MOST)
        if min(len(train), len(other)) < LEAST:
            continue
        found = two_sample_test([row.text for row in train], [row.text for row in other], parts.model)
        if found.auc >= SHIFTED and found.p < SURE:
            reworded = not parts.rows.labels() and _known_answers(train, other) >= KNOWN_ANSWERS
            yield Finding(
                code="shift",
                severity="note" if reworded else "warning",
                message=(
                    f"{dataset.name} {'is of another kind than' if found.auc >= SEVERE else 'differs from'} "
                    f"{parts.train.name}: {found.means} tells a prompt of one file from one of the other in "
                    f"{found.auc:.0%} of pairs (50 % is chance; p {_p(found.p)}; {found.n_train} and {found.n_other} "
                    f"rows compared{_telling(found.words)}). " + _consequence(found.auc, reworded=reworded)
                ),
                file=dataset.name,
                example=shorten(other[found.farthest].text, at_most=200),
            )


def _known_answers(train: Sequence[Sampled], other: Sequence[Sampled]) -> float:
    """The share of the other file's answers that training teaches word for word."""
    known = {_label(row) for row in train}
    return sum(_label(row) in known for row in other) / len(other)


def _consequence(auc: float, *, reworded: bool) -> str:
    if reworded:
        return (
            "Its answers are those of the training file, asked for in other words: scores on it are about wording, "
            "which may be what you want."
        )
    harm = (
        "Training cannot be stopped or judged by such rows."
        if auc >= SEVERE
        else "Scores on it are about other inputs than training."
    )
    return f"{harm} Draw both files from the same source, or train on rows like those you will be asked."


def find_label_shift(parts: Parts) -> Iterator[Finding]:
    """Labels with other shares than in the training file."""
    if not parts.rows.labels():
        return
    train = Counter(_label(row) for row in parts.rows.samples[0])
    for dataset, sample in zip(parts.rows.datasets[1:], parts.rows.samples[1:], strict=True):
        other = Counter(_label(row) for row in sample)
        # Labels that training never shows are a finding of their own.
        known = Counter({label: n for label, n in other.items() if label in train})
        if known.total() < LEAST:
            continue
        change = {label: known[label] / known.total() - n / train.total() for label, n in train.items()}
        distance = sum(map(abs, change.values())) / 2
        if distance >= LABEL_SHIFT and _chance(train, known) < SURE:
            most = sorted(change, key=lambda label: -abs(change[label]))[:5]
            shown = name_some(
                [f"{shorten(one)} {train[one] / train.total():.0%} to {known[one] / known.total():.0%}" for one in most]
            )
            yield Finding(
                code="label_shift",
                severity="warning",
                message=(
                    f"Labels have other shares in {dataset.name} than in {parts.train.name} ({shown}); "
                    f"{distance:.0%} of the rows would have to change theirs. A model learns the training file's "
                    "shares too: give it those that it will meet."
                ),
                file=dataset.name,
            )


class TwoSamples(NamedTuple):
    """How well the best of the classifiers tells two lists of texts apart."""

    auc: float
    p: float
    means: str  # what it looks at
    n_train: int
    n_other: int
    farthest: int  # the text of the other list that is least like the first list
    words: tuple[str, ...]  # that tell most for the other list


def two_sample_test(train: Sequence[str], other: Sequence[str], model: ModelTools) -> TwoSamples:
    """Logistic regression on words and word pairs, and on an encoder's vectors where there is one; the area under
    the curve of its out-of-fold scores.

    The p-value is of PERMUTATIONS shuffles of who belongs to which list, on the scores as they are (the classifier
    is not fitted anew), times the number of classifiers.
    """
    results = [_by_words(train, other)]
    if model.embed is not None:
        few = _evenly(train, MOST_EMBEDDED), _evenly(other, MOST_EMBEDDED)
        if min(map(len, few)) >= LEAST:
            results.append(_by_vectors(*few, model.embed))
    best = max(results, key=lambda result: result.auc)
    return best._replace(p=min(1.0, best.p * len(results)))


def _by_words(train: Sequence[str], other: Sequence[str]) -> TwoSamples:
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, preprocessor=plain, token_pattern=r"\S+")
    features = vectorizer.fit_transform([*train, *other])
    found = _test(features, len(train), len(other), "a classifier on words")
    if found.auc < SHIFTED:
        return found
    is_other = np.arange(len(train) + len(other)) >= len(train)
    weights = LogisticRegression(C=10, class_weight="balanced", max_iter=200).fit(features, is_other).coef_[0]
    names = vectorizer.get_feature_names_out()
    return found._replace(words=tuple(names[i] for i in np.argsort(-weights, kind="stable")[:5]))


def _by_vectors(train: Sequence[str], other: Sequence[str], embed: Any) -> TwoSamples:
    import numpy as np

    features = np.asarray(embed([*train, *other]), dtype=float)
    return _test(features, len(train), len(other), "a classifier on an encoder's vectors")


def _test(features: Any, n_train: int, n_other: int, means: str) -> TwoSamples:
    import numpy as np
    from scipy.stats import rankdata
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    is_other = np.arange(n_train + n_other) >= n_train
    scores = np.empty(len(is_other))
    for fit, score in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, is_other):
        model = LogisticRegression(C=10, class_weight="balanced", max_iter=200).fit(features[fit], is_other[fit])
        scores[score] = model.decision_function(features[score])
    ranks = rankdata(scores)

    def auc(other: Any) -> float:
        """Of all pairs, how many have the other file's row above."""
        return float((ranks[other].sum() - n_other * (n_other + 1) / 2) / (n_train * n_other))

    found = auc(is_other)
    rng = np.random.default_rng(0)
    above = sum(auc(rng.permutation(is_other)) >= found for _ in range(PERMUTATIONS))
    return TwoSamples(
        auc=found,
        p=(1 + above) / (1 + PERMUTATIONS),
        means=means,
        n_train=n_train,
        n_other=n_other,
        farthest=int(np.argmax(scores[n_train:])),
        words=(),
    )


def _chance(one: Counter[str], other: Counter[str]) -> float:
    """p-value of equal shares, by chi-square."""
    from scipy.stats import chi2_contingency

    labels = list(one)
    return float(chi2_contingency([[one[label] for label in labels], [other[label] for label in labels]]).pvalue)


def _label(row: Sampled) -> str:
    label = read_label(row.answer)
    return fold(row.answer if label is None else label.name)


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly over the list."""
    n = len(items)
    return [one for i, one in enumerate(items) if n <= most or i * most // n != (i - 1) * most // n]


def _telling(words: Sequence[str]) -> str:
    return f"; most telling: {', '.join(map(repr, words))}" if words else ""


def _p(p: float) -> str:
    return "below 0.005" if p < 0.005 else f"{p:.3f}"
