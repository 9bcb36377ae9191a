"""Answers that are written differently from the other answers of their file.

The usual form is inferred from the file (`forms.Form`): JSON with these keys and types and this spacing, a bare
label, or free text. What deviates is told by kind. A file whose answers have no usual form stays quiet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from heldout.pipeline.checks.forms import (
    COMMON_SHARE,
    MIN_ANSWERS,
    RARE_SHARE,
    REQUIRED_SHARE,
    Answer,
    Form,
    Place,
    kind_of,
    name_place,
    plain,
    read_answer,
    similar,
    spacing,
    walk,
)
from heldout.pipeline.checks.parts import Parts, name_lines, name_some, shorten
from heldout.pipeline.types import Dataset, Example, Finding, Severity

#: A key that so many objects have is missed as a warning where it is not; between REQUIRED_SHARE and this, as a note.
SURELY_REQUIRED = 0.98
#: A spelling is a slip beside another one that is so many times as frequent.
SLIP_RATIO = 5

Turn = Literal["last", "earlier"]


class _Kind(NamedTuple):
    severity: Severity
    what: str  # continues "3 answers "
    advice: str


#: In the order of harm: what breaks the program that reads the answers, then what only looks different.
_KINDS = {
    "answer_invalid_json": _Kind("warning", "are not valid JSON", "Correct them: a model learns to break JSON."),
    "answer_prose": _Kind("warning", "have no JSON, where the others are JSON", "Write them as JSON, like the others."),
    "answer_extra_text": _Kind(
        "warning", "have text around what the others answer alone", "Remove the text: a parser stops at it."
    ),
    "answer_code_fence": _Kind(
        "warning", "differ from the others in their code fence", "Write all answers with a code fence, or none."
    ),
    "answer_type": _Kind("warning", "hold another type of value than the others", "Use one type at each place."),
    "answer_key_name": _Kind(
        "warning", "call a key by another name than the others", "Use one name: a program that reads it finds one only."
    ),
    "answer_missing_key": _Kind("warning", "lack a key that the others have", "Add it, or leave the rows out."),
    "answer_extra_key": _Kind(
        "warning", "have a key that the others do not", "Remove it: a model learns to add it now and then."
    ),
    "answer_value_case": _Kind(
        "warning", "spell a value differently from the others", "Use one spelling: each counts as a value of its own."
    ),
    "answer_whitespace": _Kind(
        "warning", "differ from the others in the white space at their ends", "Remove it: a model learns to write it."
    ),
    "answer_spacing": _Kind(
        "warning", "lay their JSON out differently", "Write all answers by one JSON writer with one setting."
    ),
    "answer_key_order": _Kind(
        "note", "have their keys in another order", "One order is easier to learn; it makes no difference to a parser."
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
        forms: dict[Turn, _Usual] = {"last": _Usual(), "earlier": _Usual()}
        for example in dataset.examples:
            for turn, text in _learned(example):
                forms[turn].form.add(read_answer(text))
        if forms["last"].form.n + forms["earlier"].form.n == 0:
            continue
        collected = _Collected()
        for example in dataset.examples:
            for turn, text in _learned(example):
                for seen in forms[turn].judge(text, example):
                    collected.add(seen, example.line, text)
        yield from collected.findings(dataset, forms["last"])


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
    """A form, and what deviates from it. Ask only when all answers are counted."""

    form: Form = field(default_factory=Form)
    keys: dict[tuple[Place, frozenset[str]], _Keys] = field(default_factory=dict)
    closed: dict[Place, bool] = field(default_factory=dict)
    spellings: dict[Place, dict[str, str]] = field(default_factory=dict)
    labels: dict[str, int] | None = None

    def judge(self, text: str, example: Example) -> Iterator[_Seen]:
        """What is odd about one answer."""
        answer = read_answer(text)
        usual = self.form.usual_edges()
        if usual is not None and answer.edges != usual:
            severity = None if self.form.is_json or self.bare_labels() else _IN_FREE_TEXT["answer_whitespace"]
            before, after = answer.edges
            yield _Seen("answer_whitespace", _name_edges(before, after), severity)
        if self.form.is_json:
            yield from self._judge_json(answer, example)
        elif self.bare_labels():
            yield from self._judge_label(answer, example)

    def bare_labels(self) -> dict[str, int]:
        if self.labels is None:
            self.labels = self.form.labels if not self.form.is_json else {}
        return self.labels

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
        usual_wrap = self.form.usual_wrap()
        if answer.wrap == "text":
            yield _Seen("answer_extra_text", "")
        elif usual_wrap is not None and answer.wrap != usual_wrap:
            yield _Seen("answer_code_fence", "without" if usual_wrap else "with")
        yield from self._judge_values(answer, example)
        odd = [
            f"{shorten(seen) if seen else 'nothing'} {slot}"
            for slot, seen in spacing(answer.body).items()
            if (usual := self.form.usual_slot(slot)) is not None and usual != seen
        ]
        if odd:
            yield _Seen("answer_spacing", name_some(odd, at_most=2))

    def _judge_values(self, answer: Answer, example: Example) -> Iterator[_Seen]:
        todo = [*walk(answer.value)]
        strange: list[Place] = []  # what is inside a value of the wrong type or under an unknown key is no news
        for place, value in todo:
            if any(place[: len(above)] == above for above in strange):
                continue
            kind, usual = kind_of(value), self.form.usual_kind(place)
            if usual is not None and kind not in (usual, "null"):
                yield _Seen("answer_type", f"{kind} for {usual} at {name_place(place)}")
                strange.append(place)
            elif kind == "object":
                for seen in self._judge_keys(place, value, example):
                    yield seen
                keys = self._keys(place, frozenset(value))
                strange += [(*place, key) for key in [*keys.extra, *(old for old, _ in keys.renamed)]]
            elif kind == "text" and (known := self._other_spelling(place, value)):
                if value not in _asked(example):
                    yield _Seen("answer_value_case", f"{shorten(value)} for {shorten(known)}")

    def _judge_keys(self, place: Place, value: dict[str, object], example: Example) -> Iterator[_Seen]:
        keys = tuple(value)
        odd = self._keys(place, frozenset(keys))
        for old, new in odd.renamed:
            yield _Seen("answer_key_name", f"{shorten(old)} for {shorten(new)}")
        for key, severity in odd.missing:
            yield _Seen("answer_missing_key", shorten(key), severity)
        for key in odd.extra:
            if not _is_word_of(key, _asked(example, role="system")):
                yield _Seen("answer_extra_key", shorten(key))
        usual = self.form.usual_order(place, frozenset(keys))
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

    def _compare_keys(self, place: Place, keys: frozenset[str]) -> _Keys:
        objects = self.form.objects.get(place)
        if objects is None or objects.open or objects.n < MIN_ANSWERS:
            return _Keys((), (), ())
        count, n = objects.keys, objects.n
        missing = {key for key in count if count[key] >= REQUIRED_SHARE * n and key not in keys}
        rare = max(2, RARE_SHARE * n)
        renamed = {}
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
        variant = objects.sets[keys] > rare
        lacks: list[tuple[str, Severity]] = [
            (key, "warning" if count[key] >= SURELY_REQUIRED * n or not variant else "note")
            for key in sorted(missing)
            if not variant
        ]
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
        seen = self.form.values.get(place)
        best = self.spellings[place].get(plain(value))
        if best is None or best == value or seen is None:
            return None
        return best if seen.texts[best] >= SLIP_RATIO * seen.texts[value] else None

    def _judge_label(self, answer: Answer, example: Example) -> Iterator[_Seen]:
        labels = self.bare_labels()
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
        held = [label for label in labels if _is_word_of(label, text)]
        if held and not _is_word_of(text, _asked(example, role="system")):
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

    def findings(self, dataset: Dataset, usual: _Usual) -> Iterator[Finding]:
        for code, kind in _KINDS.items():
            lines = self.lines.get(code)
            if not lines:
                continue
            shown = [f"line {line}: {detail}" for detail, line in self.details[code].items() if detail]
            answers = "1 answer" if len(lines) == 1 else f"{len(lines)} of {len(dataset)} answers"
            where = name_some(shown, at_most=3) if shown else name_lines(lines)
            yield Finding(
                code=code,
                severity="warning" if "warning" in self.severities[code] else "note",
                message=f"{answers} {kind.what} ({where}). {kind.advice}",
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


def _is_word_of(word: str, text: str) -> bool:
    """True when the text has the word, not as a part of a longer one."""
    return bool(word) and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
