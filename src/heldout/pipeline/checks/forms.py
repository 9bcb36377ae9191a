"""The form of a file's answers, inferred from the file: what most answers have in common.

An answer is read once (`read_answer`); a `Form` counts what was read and then says what is usual. It keeps counts,
never answers: memory is bounded by the caps below, however long the file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from heldout.pipeline.checks.languages import language_of

#: From so many answers on there is a form to speak of.
MIN_ANSWERS = 10
#: So many answers must be JSON for JSON to be the form: a file where a third is prose means it.
JSON_SHARE = 0.7
#: A type, a spacing, an edge or an order is the usual one from this share on; below, both are in use.
USUAL_SHARE = 0.9
#: A key is in its place when at least so many objects have it.
REQUIRED_SHARE = 0.9
#: Keys in up to this share of the objects are rare ...
RARE_SHARE = 0.02
#: ... and from this share on they are common. Keys between the two mean that optional keys are part of the form.
COMMON_SHARE = 0.1
#: A value is one of a closed set (a label) when values given so often ...
FREQUENT = 3
#: ... are at least this share of all.
FREQUENT_SHARE = 0.8

_MAX_PLACES = 500
_MAX_KEYS = 200
_MAX_VALUES = 2000
_MAX_ORDERS = 20
_MAX_KEY_SETS = 1000
_VALUE_CHARACTERS = 80

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
BLANKS = "".join(chr(c) for c in range(0x3001) if chr(c).isspace()) + _INVISIBLE
_FENCE = re.compile(r"(`{1,3}|~{3})[ \t]*(?:[A-Za-z0-9_+-]*[ \t]*\r?\n)?(.*?)\s*\1\Z", re.DOTALL)
_FENCE_INSIDE = re.compile(r"```[A-Za-z0-9_+-]*\s*([{\[].*?)\s*```", re.DOTALL)
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d.eE+-]*")
_ESCAPED_LETTER = re.compile(r"\\u(?:00[89a-fA-F]|0[1-9a-fA-F]|[1-9a-fA-F])")
_STRUCTURE = re.compile(r"(\s*)([:,{}\[\]])(\s*)")

Shape = Literal["object", "array", "scalar", "broken", "text"]
Wrap = Literal["", "fence", "text"]
Kind = Literal["text", "number", "true or false", "null", "object", "array"]
#: Where in an answer a value stands: the keys on the way, "[]" for the items of an array.
Place = tuple[str, ...]


class Answer(NamedTuple):
    """One answer taken apart."""

    shape: Shape
    wrap: Wrap  # what stands around the JSON
    value: Any  # of the JSON; the bare text when there is none
    body: str  # the JSON as it is written
    edges: tuple[str, str]  # white space before and after


def read_answer(text: str) -> Answer:
    """An answer's JSON, or the bare text, without what stands around it."""
    inner = text.strip(BLANKS)
    edges = ("", "")
    if len(inner) != len(text):
        start = text.find(inner) if inner else len(text)
        edges = (text[:start], text[start + len(inner) :])
    shape, wrap, value, body = _read(inner)
    return Answer(shape, wrap, value, body, edges)


def _read(text: str) -> tuple[Shape, Wrap, Any, str]:
    first = text[:1]
    if first in ("{", "["):
        try:
            return _of(_DECODER.decode(text), "", text)
        except (ValueError, RecursionError):
            inside = _json_inside(text)
            return inside if inside is not None else ("broken", "", text, text)
    if first in ("`", "~") and (fenced := _FENCE.match(text)):
        body = fenced[2]
        if not body.startswith(("{", "[")):
            return "text", "fence", body, body
        try:
            return _of(_DECODER.decode(body), "fence", body)
        except (ValueError, RecursionError):
            return "broken", "fence", body, body
    if first == '"':
        try:
            return "scalar", "", _DECODER.decode(text), text
        except (ValueError, RecursionError):
            pass  # a sentence that starts with a quotation
    inside = _json_inside(text) if "{" in text else None
    if inside is not None:
        return inside
    if text.endswith("}") and ":" in text:
        return "broken", "", text, text
    return "text", "", text, text


def _json_inside(text: str) -> tuple[Shape, Wrap, Any, str] | None:
    """The first JSON object in a text that has more than that."""
    fenced = _FENCE_INSIDE.search(text) if "```" in text else None
    start = fenced.start(1) if fenced else text.find("{")
    if start < 0:
        return None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return _of(value, "text", text[start:end]) if isinstance(value, dict) and value else None


def _of(value: Any, wrap: Wrap, body: str) -> tuple[Shape, Wrap, Any, str]:
    shape: Shape = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "scalar"
    return shape, wrap, value, body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key stands twice")
    return keys


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")  # Python reads NaN and Infinity; other parsers do not


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def kind_of(value: Any) -> Kind:
    """JSON's word for a value, without telling whole numbers from others."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "number"
    if value is None:
        return "null"
    return "object" if isinstance(value, dict) else "array"


def walk(value: Any) -> Iterator[tuple[Place, Any]]:
    """Every value in a JSON value, with its place; the outermost first."""
    todo: list[tuple[Place, Any]] = [((), value)]
    while todo:
        place, value = todo.pop()
        yield place, value
        if type(value) is dict:
            todo += [(_below(place, key), inner) for key, inner in value.items()]
        elif type(value) is list:
            item = _below(place, "[]")
            todo += [(item, inner) for inner in value]


@lru_cache(maxsize=4096)
def _below(place: Place, key: str) -> Place:
    return (*place, key)


def name_place(place: Place) -> str:
    """ "items[].price"; "the answer" for the whole."""
    return ".".join(place).replace(".[]", "[]") or "the answer"


@lru_cache(maxsize=8192)
def plain(name: str) -> str:
    """A name without what differs between spellings of one name: case, blanks, hyphens, underscores."""
    return re.sub(r"[\s_\-]+", "", name.strip(BLANKS).casefold())


def similar(a: str, b: str) -> bool:
    """True for two spellings of one name: equal but for case and separators, or a slip apart."""
    a, b = plain(a), plain(b)
    if a == b:
        return True
    if min(len(a), len(b)) < 4 or re.sub(r"\D", "", a) != re.sub(r"\D", "", b):
        return False  # "step1" and "step2" are two names
    from difflib import SequenceMatcher

    return SequenceMatcher(None, a, b, autojunk=False).ratio() >= 0.8


def spacing(body: str) -> Mapping[str, str]:
    """How JSON is laid out: the white space on either side of each sign of structure, where it is the same
    throughout; "mixed" where it is not."""
    slots = _spacing_of(_NUMBER.sub("0", _JSON_STRING.sub("s", body)))
    if body.isascii() and "\\u" not in body:
        return slots
    escaped = _ESCAPED_LETTER.search(body) is not None
    return {**slots, "other letters": "escaped" if escaped else "as they are"}


@lru_cache(maxsize=4096)  # the answers of a file share a few skeletons
def _spacing_of(skeleton: str) -> Mapping[str, str]:
    slots: dict[str, str] = {}
    for before, sign, after in _STRUCTURE.findall(skeleton):
        if sign in ":,":
            _slot(slots, f"before {sign}", before)
        _slot(slots, f"after {sign}", after) if sign in ":,{[" else _slot(slots, f"before {sign}", before)
    return slots


def _slot(slots: dict[str, str], name: str, blank: str) -> None:
    # An array's or object's depth sets its indentation, so only that there is a line's end counts.
    seen = "line end" if "\n" in blank else blank
    slots[name] = seen if slots.get(name, seen) == seen else "mixed"


@dataclass
class _Objects:
    """The keys of all objects at one place."""

    n: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    sets: Counter[frozenset[str]] = field(default_factory=Counter)
    orders: dict[frozenset[str], Counter[tuple[str, ...]]] = field(default_factory=dict)
    open: bool = False  # more keys than a form has: the keys are data

    def add(self, keys: tuple[str, ...], times: int) -> None:
        self.n += times
        if self.open:
            return
        for key in keys:
            self.keys[key] += times
        chosen = frozenset(keys)
        if len(self.keys) > _MAX_KEYS:
            self.open = True
            self.keys.clear()
            self.sets.clear()
            self.orders.clear()
        elif chosen in self.sets or len(self.sets) < _MAX_KEY_SETS:
            self.sets[chosen] += times
            orders = self.orders.setdefault(chosen, Counter())
            if keys in orders or len(orders) < _MAX_ORDERS:
                orders[keys] += times


@dataclass
class _Values:
    """What stands at one place: kinds, and short texts as long as they are few."""

    kinds: Counter[Kind] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    many: bool = False  # too many different texts, or long ones: no closed set

    def add(self, value: Any, times: int) -> None:
        kind = kind_of(value)
        self.kinds[kind] += times
        if kind == "text" and not self.many:
            self.texts[value if len(value) <= _VALUE_CHARACTERS else ""] += times
            if len(self.texts) > _MAX_VALUES:
                self.many = True
                self.texts.clear()


def closed_set(texts: Mapping[str, int]) -> dict[str, int]:
    """The values of a closed set, or nothing when these texts are no such thing."""
    total = sum(texts.values())
    frequent = {text: n for text, n in texts.items() if n >= FREQUENT and text}
    few_others = len(texts) - len(frequent) <= max(10, 2 * len(frequent))
    if total < MIN_ANSWERS or not few_others or sum(frequent.values()) < FREQUENT_SHARE * total:
        return {}
    return frequent


@dataclass
class Form:
    """Counts of what answers look like. Add all of them, then ask what is usual."""

    n: int = 0
    shapes: Counter[Shape] = field(default_factory=Counter)
    json_wraps: Counter[Wrap] = field(default_factory=Counter)
    edges: Counter[tuple[str, str]] = field(default_factory=Counter)
    slots: dict[str, Counter[str]] = field(default_factory=dict)
    objects: dict[Place, _Objects] = field(default_factory=dict)
    values: dict[Place, _Values] = field(default_factory=dict)
    bare: _Values = field(default_factory=_Values)  # answers without JSON
    languages: Counter[str | None] = field(default_factory=Counter)  # of them

    def add(self, answer: Answer, times: int = 1) -> None:
        """Count an answer that is given so many times."""
        self.n += times
        if answer.edges in self.edges or len(self.edges) < _MAX_KEYS:
            self.edges[answer.edges] += times
        # JSON somewhere in prose is prose, until it is known that JSON is the form.
        has_json = answer.shape in ("object", "array")
        if not has_json or answer.wrap == "text":
            self.shapes["text" if has_json else answer.shape] += times
            if answer.shape == "text":
                self.languages[language_of(answer.body)] += times
                if not answer.wrap:
                    self.bare.add(answer.value, times)
            return
        self.shapes[answer.shape] += times
        self.json_wraps[answer.wrap] += times
        for slot, seen in spacing(answer.body).items():
            self.slots.setdefault(slot, Counter())[seen] += times
        for place, value in walk(answer.value):
            if place not in self.values:
                if len(self.values) >= _MAX_PLACES:
                    continue
                self.values[place] = _Values()
            self.values[place].add(value, times)
            if isinstance(value, dict):
                self.objects.setdefault(place, _Objects()).add(tuple(value), times)

    @property
    def is_json(self) -> bool:
        """True when JSON is what the file answers."""
        found = self.shapes["object"] + self.shapes["array"]
        return self.n >= MIN_ANSWERS and found >= JSON_SHARE * self.n

    @property
    def labels(self) -> dict[str, int]:
        """The labels, when the file answers with bare labels."""
        texts = self.shapes["text"]
        return closed_set(self.bare.texts) if texts >= JSON_SHARE * self.n and not self.bare.many else {}

    def usual_edges(self) -> tuple[str, str] | None:
        return _usual(self.edges)

    def usual_wrap(self) -> Wrap | None:
        return _usual(self.json_wraps, 0.5)

    def usual_language(self) -> str | None:
        """The language that nearly all texts have of which it can be told."""
        return _usual(Counter({language: n for language, n in self.languages.items() if language is not None}), 0.95)

    def usual_kind(self, place: Place) -> Kind | None:
        """What stands at a place; None where several kinds do. Null is a way to leave a place empty."""
        seen = self.values.get(place)
        return _usual(Counter({kind: n for kind, n in seen.kinds.items() if kind != "null"})) if seen else None

    def usual_slot(self, slot: str) -> str | None:
        return _usual(self.slots.get(slot, Counter()))

    def usual_order(self, place: Place, keys: frozenset[str]) -> tuple[str, ...] | None:
        seen = self.objects.get(place)
        return _usual(seen.orders.get(keys, Counter())) if seen else None

    def value_set(self, place: Place) -> dict[str, int]:
        """The closed set of texts at a place; nothing where texts are free."""
        seen = self.values.get(place)
        return closed_set(seen.texts) if seen and not seen.many else {}


def _usual(counts: Counter[Any], share: float = USUAL_SHARE) -> Any:
    total = sum(counts.values())
    if total < MIN_ANSWERS:
        return None
    [(first, n)] = counts.most_common(1)
    return first if n >= share * total else None
