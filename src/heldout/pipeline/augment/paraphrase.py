"""Copies of training rows that a chat model has reworded, and the filter that leaves most of them out.

A paraphrase is kept when it has the numbers and quotations of the original and no others, is about as near to it
as paraphrases are, and a classifier that never saw the row gives it the row's label.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from heldout.engine.base import Engine, Message, ModelRef, Reply, Sampling
from heldout.errors import InvalidValue
from heldout.kept import read_record, write_record
from heldout.pipeline.augment.copies import COPIES, Augmented, elsewhere, with_user_text
from heldout.pipeline.augment.perturb import pieces
from heldout.pipeline.checks.groups import fold, prompt_fingerprint
from heldout.pipeline.general_answers import is_whole
from heldout.pipeline.types import Example, Split
from heldout.pipeline.watch import Watch

FILE = "paraphrases.json"
#: Changes when the record on disk or what is asked does.
VERSION = 1
#: Rows that are asked about at once; what was answered is kept after each time.
AT_ONCE = 16
#: Cosine between the vectors of a text and its paraphrase: below it is another text, above nothing was reworded.
SIMILAR = (0.6, 0.95)
#: Parts of train; a row's paraphrases are judged by a classifier of the other parts.
PARTS = 5
#: Inverse strength of the classifier's penalty, as the frozen encoder's of the ladder.
C = 100.0
MAX_TOKENS = 80

ASK = "Say this in other words. Keep the meaning and every number. Answer with the new wording only:\n"
SHOTS = (
    ("Can I change the delivery address of my order?", "Is it possible to have my order sent to a different address?"),
    ("the app crashes every time i open it", "Whenever I start the app, it stops working."),
    ("I have waited 3 weeks and nobody has called me back.", "It has been 3 weeks and I still got no call from you."),
)

#: Why a paraphrase was left out, in the order in which it is looked at.
REASONS = (
    "cut or empty",
    "the same words",
    "other numbers or quotations",
    "another meaning",
    "hardly reworded",
    "another label",
    "a prompt of another part",
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A paraphrase that somebody has to judge."""

    row: int  # place in train
    text: str
    whole: bool


def paraphrased_copies(
    split: Split, engine: Engine, model: str, encoder: str | None, *, seed: int, directory: Path, watch: Watch
) -> Augmented:
    """For every row of train with one user message up to COPIES paraphrases of it.

    `model` rewords and `encoder` compares; what `model` wrote is kept in `directory`, so that a job which is taken up
    again asks nothing twice. Raises InvalidValue without an encoder.
    """
    if encoder is None:
        raise InvalidValue(
            "augmentation 'paraphrase' needs the bundled encoder to tell good paraphrases from bad ones, and it is not "
            "installed. Install it, or set augmentation to robust or none.",
            param="hyperparameters.augmentation",
        )
    texts = {i: text for i, example in enumerate(split.train) if (text := _only_user_text(example)) is not None}
    written = _ask(sorted(set(texts.values())), engine, model, seed=seed, directory=directory, watch=watch)
    offers = [
        Offer(row=i, text=reply.text.strip(), whole=is_whole(reply))
        for i, text in texts.items()
        for reply in written[text]
    ]
    verdicts = _judge(offers, split, texts, engine, encoder)
    copies: list[list[Example]] = [[] for _ in split.train]
    for offer, verdict in zip(offers, verdicts, strict=True):
        if verdict == "":
            some = copies[offer.row]
            some.append(with_user_text(split.train[offer.row], lambda _, new=offer.text: new, len(some) + 1))  # type: ignore[misc]
    kept, rejected = verdicts.count(""), Counter(one for one in verdicts if one)
    why = ", ".join(f"{reason} {rejected[reason]}" for reason in REASONS if rejected[reason])
    return Augmented(
        copies=tuple(map(tuple, copies)),
        sentence=(
            f"Augmentation: {model} wrote {len(offers)} paraphrases of {len(texts)} training rows, {kept} of them were "
            f"kept, for {sum(map(bool, copies))} rows"
            + (f"; left out: {why}" if why else "")
            + ". They take turns with the rows; steps stay as planned"
        ),
        data={"augmentation": "paraphrase", "offered": len(offers), "kept": kept, "left_out": dict(rejected)},
    )


def _only_user_text(example: Example) -> str | None:
    texts = [str(message["content"]) for message in example.prompt if message["role"] == "user"]
    return texts[0] if len(texts) == 1 else None


def _ask(
    texts: Sequence[str], engine: Engine, model: str, *, seed: int, directory: Path, watch: Watch
) -> dict[str, list[Reply]]:
    """COPIES replies for each text, from disk where they are known."""
    path, about = directory / FILE, {"version": VERSION, "model": model, "seed": seed, "copies": COPIES}
    record = read_record(path)
    if record is not None and {name: record[name] for name in about} != about:
        raise InvalidValue(
            f"{path} was written by a job with another model, another seed or another version of Heldout; delete it to "
            "have the paraphrases written again"
        )
    known = {one["text"]: [Reply(**reply) for reply in one["replies"]] for one in (record or {"texts": []})["texts"]}
    new = [text for text in texts if text not in known]
    for first in range(0, len(new), AT_ONCE):
        chosen = new[first : first + AT_ONCE]
        replies = engine.chat(
            ModelRef(base_model=model),
            [_question(text) for text in chosen for _ in range(COPIES)],
            # The draws depend on what is asked together, and that on the texts alone.
            Sampling(
                max_tokens=MAX_TOKENS, temperature=0.8, top_p=0.95, seed=zlib.crc32(f"{seed}/{chosen[0]}".encode())
            ),
            lambda done, total, first=first: watch.progress(  # type: ignore[misc]
                "paraphrases", first * COPIES + done, len(new) * COPIES
            ),
        )
        known |= {text: replies[i * COPIES : (i + 1) * COPIES] for i, text in enumerate(chosen)}
        stored = [{"text": text, "replies": [asdict(reply) for reply in some]} for text, some in known.items()]
        write_record(path, {**about, "texts": stored})
        watch.kept()
    return known


def _question(text: str) -> list[Message]:
    turns = [
        turn
        for shown, answer in SHOTS
        for turn in ({"role": "user", "content": ASK + shown}, {"role": "assistant", "content": answer})
    ]
    return [*turns, {"role": "user", "content": ASK + text}]


def _judge(offers: Sequence[Offer], split: Split, texts: dict[int, str], engine: Engine, encoder: str) -> list[str]:
    """Why each offer is left out; "" for one that is kept."""
    import numpy as np

    found = [_look(offer, texts[offer.row]) for offer in offers]
    rows = list(texts)
    place = {row: i for i, row in enumerate(rows)}
    open_ = [i for i, why in enumerate(found) if not why]
    if not open_:
        return found
    originals = np.asarray(engine.embed(encoder, [texts[row] for row in rows]))
    reworded = np.asarray(engine.embed(encoder, [offers[i].text for i in open_]))
    labels = [split.train[row].target for row in rows]
    judged = dict(_labelled(originals, labels, reworded, [place[offers[i].row] for i in open_]))
    others, seen = elsewhere(split), set()
    for j, i in enumerate(open_):
        offer = offers[i]
        near = float(reworded[j] @ originals[place[offer.row]])
        copy = with_user_text(split.train[offer.row], lambda _, new=offer.text: new, 1)  # type: ignore[misc]
        if near < SIMILAR[0]:
            found[i] = "another meaning"
        elif near > SIMILAR[1]:
            found[i] = "hardly reworded"
        elif judged[j] != labels[place[offer.row]]:
            found[i] = "another label"
        elif prompt_fingerprint(copy.prompt) in others:
            found[i] = "a prompt of another part"
        elif (offer.row, fold(offer.text)) in seen:
            found[i] = "the same words"
        else:
            seen.add((offer.row, fold(offer.text)))
    return found


def _look(offer: Offer, original: str) -> str:
    """What can be seen without a model."""
    if not offer.whole:
        return "cut or empty"
    if fold(offer.text) == fold(original):
        return "the same words"
    if not (_has_all(offer.text, original) and _has_all(original, offer.text)):
        return "other numbers or quotations"
    return ""


def _has_all(text: str, other: str) -> bool:
    """True when `text` has every number, quotation and the like that `other` has."""
    wanted = (one.text.strip(" .,;:?!") for one in pieces(other) if not one.free)
    return all(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text) for one in wanted)


def _labelled(
    originals: object, labels: Sequence[str], reworded: object, owners: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """(paraphrase, label) for each paraphrase, by a classifier that saw neither its row nor the others of its part."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    x, new, y = np.asarray(originals), np.asarray(reworded), np.asarray(labels)
    part = np.empty(len(y), dtype=int)
    part[np.argsort(y, kind="stable")] = np.arange(len(y)) % PARTS  # each label in all parts, as far as it goes
    for number in range(PARTS):
        asked = [i for i, owner in enumerate(owners) if part[owner] == number]
        rest = part != number
        if not asked:
            continue
        if len(set(y[rest])) < 2:
            yield from ((i, "") for i in asked)
            continue
        fitted = LogisticRegression(C=C, max_iter=1000).fit(x[rest], y[rest])
        yield from zip(asked, map(str, fitted.predict(new[asked])), strict=True)
