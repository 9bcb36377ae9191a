"""National numbers and passports: by form and checksum, or by the word before them where the form is too common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: Where in a text: from, up to.
Span = tuple[int, int]


def luhn(digits: str) -> bool:
    """The check digit of cards and of several national numbers (ISO/IEC 7812)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (1 + place % 2)
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


class _Id(NamedTuple):
    """A national number: its form, its check, and whether its form is too common to count without its name."""

    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool]
    name: str = ""  # must stand before it, within a few words; empty: the form is enough


def _weighted(digits: str, weights: Sequence[int]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def _cpf(digits: str) -> bool:
    first = _weighted(digits, range(10, 1, -1)) * 10 % 11 % 10
    second = _weighted(digits, range(11, 1, -1)) * 10 % 11 % 10
    return digits[9:] == f"{first}{second}" and len(set(digits)) > 1


def _chinese(value: str) -> bool:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return "10X98765432"[_weighted(value[:17], weights) % 11] == value[17].upper()


def _norwegian(digits: str) -> bool:
    first = _weighted(digits, (3, 7, 6, 1, 8, 9, 4, 5, 2, 1))
    return first % 11 == 0 and _weighted(digits, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1)) % 11 == 0


def _pesel(digits: str) -> bool:
    return _weighted(digits, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def _steuer_id(digits: str) -> bool:
    product = 10
    for digit in digits[:10]:
        total = (int(digit) + product) % 10 or 10
        product = 2 * total % 11
    return (11 - product) % 10 == int(digits[10])


def _spanish(value: str) -> bool:
    number = value[:-1].upper().translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == value[-1].upper()


def _french(digits: str) -> bool:
    return (97 - int(digits[:13]) % 97) == int(digits[13:])


def _verhoeff(digits: str) -> bool:
    check = 0
    for place, digit in enumerate(reversed(digits)):
        permuted = int(digit)
        for _ in range(place % 8):
            permuted = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[permuted]
        check = _dihedral(check, permuted)
    return check == 0


def _dihedral(a: int, b: int) -> int:
    if a < 5:
        return (a + b) % 5 if b < 5 else (a + b - 5) % 5 + 5
    return (a - 5 - b) % 5 + 5 if b < 5 else (a - b) % 5


def _always(value: str) -> bool:
    return True


def _ssn(digits: str) -> bool:
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


_EDGE, _END = r"(?<![\w.+/-])", r"(?![\w-]|[.,/][0-9])"
_IDS = (
    _Id(re.compile(rf"{_EDGE}[0-9]{{3}}-[0-9]{{2}}-[0-9]{{4}}{_END}"), _ssn),
    _Id(
        re.compile(rf"{_EDGE}[0-9]{{3}}[- ]?[0-9]{{2}}[- ]?[0-9]{{4}}{_END}"),
        _always,
        r"SSN|social security|tax ?id|ITIN",
    ),
    _Id(
        re.compile(rf"{_EDGE}[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{{2}} ?[0-9]{{2}} ?[0-9]{{2}} ?[A-D]{_END}"),
        _always,
    ),
    _Id(re.compile(rf"{_EDGE}[0-9]{{3}}\.[0-9]{{3}}\.[0-9]{{3}}-[0-9]{{2}}{_END}"), _cpf),
    _Id(re.compile(rf"{_EDGE}[0-9]{{11}}{_END}"), _cpf, "CPF"),
    _Id(re.compile(rf"{_EDGE}[1-9][0-9]{{5}}(?:19|20)[0-9]{{2}}(?:0[1-9]|1[0-2])[0-9]{{5}}[0-9Xx]{_END}"), _chinese),
    _Id(re.compile(rf"{_EDGE}(?:[0-9]{{8}}|[XYZ][0-9]{{7}})-?[A-HJ-NP-TV-Z]{_END}"), _spanish),
    _Id(re.compile(rf"{_EDGE}[A-Z]{{6}}[0-9]{{2}}[A-EHLMPRST][0-9]{{2}}[A-Z][0-9]{{3}}[A-Z]{_END}"), _always),
    _Id(
        re.compile(rf"{_EDGE}[12] ?[0-9]{{2}} ?[0-9]{{2}} ?[0-9]{{2}} ?[0-9]{{3}} ?[0-9]{{3}} ?[0-9]{{2}}{_END}"),
        _french,
    ),
    _Id(
        re.compile(rf"{_EDGE}(?:19|20)?[0-9]{{2}}(?:0[1-9]|1[0-2])[0-3][0-9][-+][0-9]{{4}}{_END}"),
        lambda value: luhn(value[-10:]),
    ),
    _Id(re.compile(rf"{_EDGE}[2-9][0-9]{{3}} [0-9]{{4}} [0-9]{{4}}{_END}"), _verhoeff),
    _Id(re.compile(rf"{_EDGE}[2-9][0-9]{{11}}{_END}"), _verhoeff, "aadhaar"),
    _Id(re.compile(rf"{_EDGE}[A-Z]{{5}}[0-9]{{4}}[A-Z]{_END}"), _always, "PAN"),
    _Id(
        re.compile(rf"{_EDGE}[0-3][0-9][01][0-9]{{3}} ?[0-9]{{5}}{_END}"),
        _norwegian,
        "fødselsnummer|personnummer|national id",
    ),
    _Id(re.compile(rf"{_EDGE}[0-9]{{11}}{_END}"), _pesel, "PESEL"),
    _Id(
        re.compile(rf"{_EDGE}[1-9][0-9] ?[0-9]{{3}} ?[0-9]{{3}} ?[0-9]{{3}}{_END}"), _steuer_id, r"steuer|tax|IdNr|TIN"
    ),
    _Id(
        re.compile(rf"{_EDGE}[0-9]{{9}}{_END}"),
        lambda value: _weighted(value, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0,
        "BSN|burgerservicenummer",
    ),
    _Id(re.compile(rf"{_EDGE}[0-9]{{3}}[- ]?[0-9]{{3}}[- ]?[0-9]{{3}}{_END}"), luhn, r"\bSIN\b|social insurance"),
    _Id(re.compile(rf"{_EDGE}[0-9]{{3}} ?[0-9]{{3}} ?[0-9]{{4}}{_END}"), _always, r"\bNHS\b"),
)
_PASSPORT = re.compile(
    r"(?i:passport|reisepass|passeport|pasaporte|passaporto|driver'?s? licen[cs]e|driving licen[cs]e|führerschein|"
    r"identity card|id card|personalausweis)(?i: number| no\.?| nr\.?|nummer| id)?\s*(?:is|ist|:|#|=)?\s*"
    r"([A-Z]{0,3}[0-9][A-Z0-9]{5,14})\b"
)


def find_national_ids(text: str) -> Iterator[Span]:
    for one in _IDS:
        if one.name and re.search(one.name, text, re.IGNORECASE) is None:
            continue
        for found in one.pattern.finditer(text):
            compact = re.sub(r"[^0-9A-Za-z]", "", found.group())
            before = text[max(0, found.start() - 30) : found.start()]
            if one.is_valid(compact) and (not one.name or re.search(one.name, before, re.IGNORECASE)):
                yield found.span()


def find_passports(text: str) -> Iterator[Span]:
    yield from (found.span(1) for found in _PASSPORT.finditer(text))
