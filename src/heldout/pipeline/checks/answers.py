"""Answers that are written differently from the other answers of their file.

The usual form is inferred from the file (`forms.Form`): JSON with these keys and types and this spacing, a bare
label, or free text. What deviates is told by kind. A file whose answers have no usual form stays quiet.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from heldout.pipeline.checks.enumerations import is_word_of
from heldout.pipeline.checks.forms import (
    COMMON_SHARE,
    MIN_ANSWERS,
    RARE_SHARE,
    REQUIRED_SHARE,
    Answer,
    Form,
    Kind,
    Place,
    Wrap,
    kind_of,
    name_place,
    plain,
    read_answer,
    similar,
    spacing,
    walk,
)
from heldout.pipeline.checks.languages import language_of
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.types import Dataset, Example, Finding, Severity

#: A key that so many objects have is missed as a warning where it is not; between REQUIRED_SHARE and this, as a note.
SURELY_REQUIRED = 0.98
#: A spelling is a slip beside another one that is so many times as frequent.
SLIP_RATIO = 5

#: Answers up to this length, and so many of them, are remembered in order not to read equal ones twice.
_REPEATED_CHARACTERS = 500
_REPEATED = 10_000

Turn = Literal["last", "earlier"]


class _Kind(NamedTuple):
    severity: Severity
    what: str
    advice: str


#: In the order of harm: what breaks the program that reads the answers, then what only looks different.
_KINDS = {
    "answer_invalid_json": _Kind("warning", "Not valid JSON", "Correct them: a model learns to break JSON."),
    "answer_prose": _Kind("warning", "No JSON, where the others are JSON", "Write them as JSON, like the others."),
    "answer_extra_text": _Kind(
        "warning", "Text around what the others answer alone", "Remove the text: a parser stops at it."
    ),
    "answer_code_fence": _Kind(
        "warning", "In a code fence or not, unlike the others", "Write all answers with a code fence, or none."
    ),
    "answer_type": _Kind("warning", "Another type of value than in the others", "Use one type at each place."),
    "answer_key_name": _Kind(
        "warning", "A key under another name than in the others", "Use one name: programs look for one only."
    ),
    "answer_missing_key": _Kind("warning", "A key of the others is missing", "Add it, or leave the rows out."),
    "answer_extra_key": _Kind(
        "warning", "A key that the others do not have", "Remove it: a model learns to add it now and then."
    ),
    "answer_value_case": _Kind(
        "warning",
        "A value spelled differently than in the others",
        "Use one spelling: each counts as a value of its own.",
    ),
    "answer_whitespace": _Kind(
        "warning", "Other white space at the ends than in the others", "Remove it: a model learns to write it."
    ),
    "answer_spacing": _Kind(
        "warning", "JSON laid out differently than in the others", "Write all answers by one JSON writer."
    ),
    "answer_key_order": _Kind(
        "note",
        "Keys in another order than in the others",
        "One order is easier to learn; to a parser it makes no difference.",
    ),
    "answer_language": _Kind(
        "note",
        "Another language or script than in the others and in the question",
        "Leave it if it is meant; a model learns to switch now and then.",
    ),
}
#: In free text, white space is a blemish and breaks nothing.
_IN_FREE_TEXT: dict[str, Severity] = {"answer_whitespace": "note"}


class _Seen(NamedTuple):
    """One deviation of one answer. `detail` is shown in the message."""

    code: str
    detail: str
    severity: Severity | None = None  # other than the kind's own


def find_odd_answers(parts: Parts) -> Iterator[Finding]:
    """Answers that deviate from the usual form of their file."""
    for dataset in parts.given():
        usual = _count_forms(dataset)
        collected = _Collected()
        # Labels are given again and again. What was sound once is sound in every row.
        sound: set[tuple[Turn, str]] = set()
        for example in dataset.examples:
            for turn, text in _learned(example):
                if (turn, text) in sound:
                    continue
                odd = list(usual[turn].judge(text, example))
                for seen in odd:
                    collected.add(seen, example.line, text)
                if not odd and len(text) <= _REPEATED_CHARACTERS and len(sound) < _REPEATED:
                    sound.add((turn, text))
        yield from collected.findings(dataset)


def _count_forms(dataset: Dataset) -> dict[Turn, _Usual]:
    """What is usual for the last answers of a file, and for earlier ones."""
    usual: dict[Turn, _Usual] = {"last": _Usual(), "earlier": _Usual()}
    waiting: Counter[tuple[Turn, str]] = Counter()  # equal answers are read once
    for example in dataset.examples:
        for turn, text in _learned(example):
            if len(text) <= _REPEATED_CHARACTERS:
                waiting[turn, text] += 1
            else:
                usual[turn].form.add(read_answer(text))
        if len(waiting) >= _REPEATED:
            _read_waiting(waiting, usual)
    _read_waiting(waiting, usual)
    return usual


def _read_waiting(waiting: Counter[tuple[Turn, str]], usual: dict[Turn, _Usual]) -> None:
    for (turn, text), times in waiting.items():
        usual[turn].form.add(read_answer(text), times)
    waiting.clear()


def _learned(example: Example) -> Iterator[tuple[Turn, str]]:
    """The answers that training learns: the last one, and earlier ones, which may well have another form."""
    last = len(example.messages) - 1
    for position, weight in enumerate(example.weights):
        if weight or position == last:
            content = example.messages[position]["content"]
            if isinstance(content, str):
                yield ("last" if position == last else "earlier"), content


class _Keys(NamedTuple):
    """What is odd about a set of keys."""

    renamed: tuple[tuple[str, str], ...]  # (as written, as the others write it)
    missing: tuple[tuple[str, Severity], ...]
    extra: tuple[str, ...]


@dataclass
class _Usual:
    """A form, and what deviates from it. Ask only when all answers are counted: what is usual is remembered."""

    form: Form = field(default_factory=Form)
    kinds: dict[Place, Kind | None] = field(default_factory=dict)
    orders: dict[tuple[Place, frozenset[str]], tuple[str, ...] | None] = field(default_factory=dict)
    keys: dict[tuple[Place, frozenset[str]], _Keys] = field(default_factory=dict)
    closed: dict[Place, bool] = field(default_factory=dict)
    spellings: dict[Place, dict[str, str]] = field(default_factory=dict)

    def judge(self, text: str, example: Example) -> Iterator[_Seen]:
        """What is odd about one answer."""
        answer = read_answer(text)
        if self.edges is not None and answer.edges != self.edges:
            severity = None if self.is_json or self.labels else _IN_FREE_TEXT["answer_whitespace"]
            before, after = answer.edges
            yield _Seen("answer_whitespace", _name_edges(before, after), severity)
        if self.language is not None and answer.shape == "text":
            found = language_of(text)
            if found not in (None, self.language) and found != language_of(_asked(example, role="user")):
                yield _Seen("answer_language", f"{found} for {self.language}")
        if self.is_json:
            yield from self._judge_json(answer, example)
        elif self.labels:
            yield from self._judge_label(answer, example)

    @cached_property
    def is_json(self) -> bool:
        return self.form.is_json

    @cached_property
    def labels(self) -> dict[str, int]:
        return {} if self.is_json else self.form.labels

    @cached_property
    def edges(self) -> tuple[str, str] | None:
        return self.form.usual_edges()

    @cached_property
    def wrap(self) -> Wrap | None:
        return self.form.usual_wrap()

    @cached_property
    def language(self) -> str | None:
        """The language or script of free text; labels and JSON have none."""
        return None if self.is_json or self.labels else self.form.usual_language()

    @cached_property
    def slots(self) -> dict[str, str | None]:
        return {slot: self.form.usual_slot(slot) for slot in self.form.slots}

    def kind(self, place: Place) -> Kind | None:
        if place not in self.kinds:
            self.kinds[place] = self.form.usual_kind(place)
        return self.kinds[place]

    def _judge_json(self, answer: Answer, example: Example) -> Iterator[_Seen]:
        if answer.shape == "broken":
            yield _Seen("answer_invalid_json", shorten(answer.body))
            return
        if answer.shape == "text":
            yield _Seen("answer_prose", shorten(answer.body))
            return
        if answer.shape == "scalar":
            yield _Seen("answer_type", shorten(answer.body))
            return
        if answer.wrap == "text":
            yield _Seen("answer_extra_text", "")
        elif self.wrap is not None and answer.wrap != self.wrap:
            yield _Seen("answer_code_fence", "without" if self.wrap else "with")
        yield from self._judge_values(answer, example)
        odd = [
            f"{shorten(seen) if seen else 'nothing'} {slot}"
            for slot, seen in spacing(answer.body).items()
            if (usual := self.slots.get(slot)) is not None and usual != seen
        ]
        if odd:
            yield _Seen("answer_spacing", name_some(odd, at_most=2))

    def _judge_values(self, answer: Answer, example: Example) -> Iterator[_Seen]:
        todo = [*walk(answer.value)]
        strange: list[Place] = []  # what is inside a value of the wrong type or under an unknown key is no news
        for place, value in todo:
            if strange and any(place[: len(above)] == above for above in strange):
                continue
            kind, usual = kind_of(value), self.kind(place)
            if usual is not None and kind not in (usual, "null"):
                yield _Seen("answer_type", f"{kind} for {usual} at {name_place(place)}")
                strange.append(place)
            elif kind == "object":
                yield from self._judge_keys(place, value, example)
                keys = self._keys(place, frozenset(value))
                strange += [(*place, key) for key in [*keys.extra, *(old for old, _ in keys.renamed)]]
            elif kind == "text" and (known := self._other_spelling(place, value)) and value not in _asked(example):
                yield _Seen("answer_value_case", f"{shorten(value)} for {shorten(known)}")

    def _judge_keys(self, place: Place, value: dict[str, object], example: Example) -> Iterator[_Seen]:
        keys = tuple(value)
        odd = self._keys(place, frozenset(keys))
        for old, new in odd.renamed:
            yield _Seen("answer_key_name", f"{shorten(old)} for {shorten(new)}")
        for key, severity in odd.missing:
            yield _Seen("answer_missing_key", shorten(key), severity)
        for key in odd.extra:
            if not is_word_of(key, _asked(example, role="system")):
                yield _Seen("answer_extra_key", shorten(key))
        usual = self._order(place, frozenset(keys))
        if usual is not None and usual != keys:
            yield _Seen("answer_key_order", f"{', '.join(keys)} for {', '.join(usual)}"[:120])

    def _keys(self, place: Place, keys: frozenset[str]) -> _Keys:
        """What is odd about these keys; the same for all objects that have them."""
        known = self.keys.get((place, keys))
        if known is None:
            known = self._compare_keys(place, keys)
            if len(self.keys) < 10_000:
                self.keys[place, keys] = known
        return known

    def _order(self, place: Place, keys: frozenset[str]) -> tuple[str, ...] | None:
        if (place, keys) not in self.orders:
            if len(self.orders) >= 10_000:
                return None
            self.orders[place, keys] = self.form.usual_order(place, keys)
        return self.orders[place, keys]

    def _compare_keys(self, place: Place, keys: frozenset[str]) -> _Keys:
        objects = self.form.objects.get(place)
        if objects is None or objects.open or objects.n < MIN_ANSWERS:
            return _Keys((), (), ())
        count, n = objects.keys, objects.n
        missing = {key for key in count if count[key] >= REQUIRED_SHARE * n and key not in keys}
        rare = max(2, RARE_SHARE * n)
        renamed: dict[str, str] = {}
        for key in sorted(keys):
            for other in sorted(count, key=lambda one: -count[one]):
                if other in keys or count[other] <= SLIP_RATIO * count[key] or other in renamed.values():
                    continue
                if (
                    plain(key) == plain(other)
                    or (other in missing and count[key] <= rare and similar(key, other))
                    or (other in missing and self._same_values(place, key, other))
                ):
                    renamed[key] = other
                    break
        missing -= set(renamed.values())
        lacks: list[tuple[str, Severity]] = []
        if objects.sets[keys] <= rare:  # else it is a variant of the form
            lacks = [(key, "warning" if count[key] >= SURELY_REQUIRED * n else "note") for key in sorted(missing)]
        extra = [key for key in sorted(keys) if key not in renamed and count[key] <= rare and self._is_closed(place)]
        return _Keys(tuple(renamed.items()), tuple(lacks), tuple(extra))

    def _same_values(self, place: Place, key: str, other: str) -> bool:
        """True when a key holds values that belong to another one: it is another name for the same place."""
        known = self.form.value_set((*place, other))
        seen = self.form.values.get((*place, key))
        if not known or seen is None or seen.many:
            return False
        return sum(n for text, n in seen.texts.items() if text in known) >= 0.8 * sum(seen.kinds.values())

    def _is_closed(self, place: Place) -> bool:
        """True when keys are common or rare and nothing between: then a rare one is a slip. Where optional keys
        are part of the form they come in all frequencies, and a rare one is just the next."""
        if place not in self.closed:
            objects = self.form.objects[place]
            between = [
                n for n in objects.keys.values() if max(2, RARE_SHARE * objects.n) < n < COMMON_SHARE * objects.n
            ]
            common = {key for key, n in objects.keys.items() if n >= COMMON_SHARE * objects.n}
            fitting = sum(n for keys, n in objects.sets.items() if keys <= common)
            self.closed[place] = not between and fitting >= REQUIRED_SHARE * objects.n
        return self.closed[place]

    def _other_spelling(self, place: Place, value: str) -> str | None:
        """The usual spelling of a value of a closed set, where this is not it."""
        if place not in self.spellings:
            self.spellings[place] = _best_spellings(self.form.value_set(place))
        best = self.spellings[place].get(plain(value)) if self.spellings[place] else None
        if best is None or best == value:
            return None
        texts = self.form.values[place].texts
        return best if texts[best] >= SLIP_RATIO * texts[value] else None

    def _judge_label(self, answer: Answer, example: Example) -> Iterator[_Seen]:
        labels = self.labels
        if answer.shape in ("object", "array"):
            yield _Seen("answer_type", f"JSON for a bare label: {shorten(answer.body)}")
            return
        text = str(answer.value)
        if answer.wrap == "fence":
            yield _Seen("answer_code_fence", "with")
            return
        if text in labels or answer.shape == "broken":
            return
        if () not in self.spellings:
            self.spellings[()] = _best_spellings(labels)
        best = self.spellings[()].get(plain(text))
        if best is not None:
            if labels[best] >= SLIP_RATIO * self.form.bare.texts[text]:
                yield _Seen("answer_value_case", f"{shorten(text)} for {shorten(best)}")
            return
        held = [label for label in labels if is_word_of(label, text)]
        if held and not is_word_of(text, _asked(example, role="system")):
            rest = text.replace(max(held, key=len), "", 1)
            # "not spam" is a label of its own; "spam." and "I think it is spam" are not.
            if not re.search(r"\w", rest) or len(re.findall(r"\w+", rest)) >= 2:
                yield _Seen("answer_extra_text", shorten(text))


def _best_spellings(values: dict[str, int]) -> dict[str, str]:
    best: dict[str, str] = {}
    for text in sorted(values, key=lambda one: values[one]):  # the most frequent one stays
        best[plain(text)] = text
    return best


@dataclass
class _Collected:
    """Deviations by kind, while the file is gone through."""

    lines: dict[str, list[int]] = field(default_factory=dict)
    details: dict[str, dict[str, int]] = field(default_factory=dict)  # detail -> its first line
    examples: dict[str, str] = field(default_factory=dict)
    severities: dict[str, set[Severity]] = field(default_factory=dict)

    def add(self, seen: _Seen, line: int, text: str) -> None:
        lines = self.lines.setdefault(seen.code, [])
        if not lines or lines[-1] != line:
            lines.append(line)
        details = self.details.setdefault(seen.code, {})
        if len(details) < 100:
            details.setdefault(seen.detail, line)
        self.examples.setdefault(seen.code, shorten(text))
        self.severities.setdefault(seen.code, set()).add(seen.severity or _KINDS[seen.code].severity)

    def findings(self, dataset: Dataset) -> Iterator[Finding]:
        for code, kind in _KINDS.items():
            lines = self.lines.get(code)
            if not lines:
                continue
            shown = [f"line {line}: {detail}" for detail, line in self.details[code].items() if detail]
            where = name_some(shown, at_most=3) if shown else name_lines(lines)
            yield Finding(
                code=code,
                severity="warning" if "warning" in self.severities[code] else "note",
                message=f"{kind.what}: {len(lines)} of {len(dataset)} rows ({where}). {kind.advice}",
                file=dataset.name,
                lines=tuple(lines),
                example=self.examples[code],
            )


def _name_edges(before: str, after: str) -> str:
    named = [f"{shorten(blank)} {where}" for blank, where in ((before, "in front"), (after, "behind")) if blank]
    return " and ".join(named) or "none"


def _asked(example: Example, role: str | None = None) -> str:
    """The texts before the answer, of one role or of all."""
    return "\n".join(str(message["content"]) for message in example.prompt if role in (None, message["role"]))
