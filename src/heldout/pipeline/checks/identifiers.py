"""What in a text identifies a person or opens a door: patterns, checksums and the words around them.

All patterns take time in proportion to the text: a line may have a million characters.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from heldout.pipeline.checks.national_ids import Span, find_national_ids, find_passports, luhn

#: Longer texts are hardly shared among rows, and too long to be kept.
SHARED_CHARACTERS = 5000


class Seen(NamedTuple):
    """One thing found in a text."""

    type: str
    value: str


def scan(text: str) -> tuple[Seen, ...]:
    """All personal data and secrets in a text, each once."""
    if _HINT.search(text) is None:
        return ()
    return _scan_shared(text) if len(text) <= SHARED_CHARACTERS else _scan(text)


def _scan(text: str) -> tuple[Seen, ...]:
    seen: dict[Seen, None] = {}
    has_number = _NUMBER.search(text) is not None
    lower = text.lower()
    for find in _FINDERS:
        if (find.needs_number and not has_number) or not (any(word in lower for word in find.words) or not find.words):
            continue
        spans = sorted(set(find.spans(text)))
        seen.update((Seen(find.type, text[start:end]), None) for start, end in spans)
        text = _blanked(text, spans)  # an IBAN's digits are no phone number
    return tuple(seen)


_scan_shared = lru_cache(maxsize=1024)(_scan)  # rows share their system prompt


def _blanked(text: str, spans: Sequence[Span]) -> str:
    if not spans:
        return text
    pieces: list[str] = []
    done = 0
    for start, end in spans:
        pieces += text[done:start], "▮" * (end - max(start, done))
        done = max(done, end)
    return "".join([*pieces, text[done:]])


#: All that is looked for has a digit or an @.
_HINT = re.compile(r"[@0-9]")
#: Six digits that may belong together: less is no account, no phone number and no national number.
_NUMBER = re.compile(r"[0-9](?:[^0-9\n]{0,3}[0-9]){5}")

# --- secrets

_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{18,}|"
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|"
    r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{40,}|"
    r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|dop_v1_[a-f0-9]{40,}|"
    r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r")(?![A-Za-z0-9])"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----")
_IN_URL = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,80}:([^\s/@]{3,80})@[\w.-]+")
_NAMED_SECRET = re.compile(
    r"(?<![A-Za-z])(?:(?i:passwords?|passwd|passphrase|passcode|pwd|passwort|kennwort|mot de passe|contraseña|secret|"
    r"api[ _-]?keys?|access[ _-]?keys?|(?:access|auth|bearer|api|session)[ _-]?tokens?|tokens?|bearer|credentials?|"
    r"(?:the|my|our|license|licence|encryption|private|secret) key))(?![A-Za-z])"
    r"[\"'`]?\s*(?:(?i:is|was|ist|est|es|are)\s*:?|[:=]|➜|->)?\s*[\"'`]?"
    r"([^\s\"'`,;]{6,})"
)
_PIN = re.compile(
    r"\b(?:PIN|[Pp]in(?:[ -]?code)?|PIN[ -]?[Cc]ode|[Cc]ode PIN|CVV2?|CVC|cvv|cvc|TAN|OTP|"
    r"[Oo]ne[ -]time (?:code|password)|[Vv]erification code|"
    r"[Ss]ecurity code)\s*(?:is|:|=|ist|number is)?\s*([0-9]{3,6})\b(?![.,:/-][0-9])"
)
_PLACEHOLDER = re.compile(r"example|your|xxx|\*{3}|<|\{|placeholder|dummy|redacted|\[", re.IGNORECASE)


_SECRET_WORDS = ("pass", "pwd", "wort", "contraseña", "mot de", "secret", "key", "token", "bearer", "credential")


def _tokens(text: str) -> Iterator[Span]:
    if "PRIVATE KEY" in text:
        yield from (found.span() for found in _PRIVATE_KEY.finditer(text))
    yield from (found.span() for found in _TOKENS.finditer(text))
    if "://" in text:
        yield from (found.span(1) for found in _IN_URL.finditer(text))


def _named_secrets(text: str) -> Iterator[Span]:
    for found in _NAMED_SECRET.finditer(text):
        bare = found.group(1).rstrip(".!?)]}>")
        if _is_made_up(bare):
            yield found.start(1), found.start(1) + len(bare)


def _pins(text: str) -> Iterator[Span]:
    yield from (found.span(1) for found in _PIN.finditer(text))


def _is_made_up(value: str) -> bool:
    """True of what nobody writes as a word: letters mixed with digits or signs, as in "Tr0ub4dor&3"."""
    if len(value) < 6 or _PLACEHOLDER.search(value) or "(" in value or "://" in value:
        return False
    digits, letters = sum(map(str.isdigit, value)), sum(map(str.isalpha, value))
    # "2-factor", "10-digit", "5-minute": a number before a word.
    return digits > 0 and letters > 0 and re.fullmatch(r"[0-9]+(?:st|nd|rd|th)?-?[A-Za-z-]+", value) is None


# --- e-mail, phone

_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
)
#: Addresses of a function, not of a person.
_ROLES = frozenset(
    "info support contact help helpdesk sales service hello hi noreply no-reply donotreply admin office mail team "
    "billing press privacy jobs careers hr orders returns feedback webmaster postmaster abuse security legal "
    "kontakt customerservice customer-service customercare enquiries inquiries newsletter marketing".split()
)
_CALLED = (
    r"(?i:phone|tele(?:fon|phone)?|tel|mobile|cell(?:phone)?|handy|fax|whats ?app|call(?:ed|ing)?|ring|dial|"
    r"text(?:ed)?|sms|reach|contact|hotline|téléphone|teléfono|portable|móvil|"
    r"(?:my|his|her|their|our|meine|mon|mi) (?:number|nummer|numéro|número))"
)
_BETWEEN = (
    r"(?:[\W_]|(?i:me|us|him|her|them|you|at|on|is|to|number|no|nr|under|unter|ist|au|al|the|our|my|this|please|back|directly|"
    r"or|by|via|home|work|office|line|number|nummer|numéro|número|text|phone|sms)\b){0,8}?"
)
_DIGITS = r"[0-9](?:[ ./()–-]{0,2}[0-9])"
_PHONES = (
    # +44 20 7946 0018, 0049 30 23125 042
    re.compile(r"(?<![\w.+/-])(?:\+ ?|00)[1-9](?:[ ./()–-]{0,3}[0-9]){7,14}(?![\w%]|[.,:/-][0-9])"),
    # (020) 7946 0018, (202) 555-0147
    re.compile(r"(?<![\w+])\(0?[1-9][0-9]{1,4}\) ?[0-9](?:[ ./–-]?[0-9]){4,8}(?![\w%]|[.,:/-][0-9])"),
    # 202-555-0147, 202.555.0147
    re.compile(r"(?<![\w.+/-])(?:1[ .-])?[2-9][0-9]{2}([ .-])[2-9][0-9]{2}\1[0-9]{4}(?![\w%]|[.,:/-][0-9])"),
    # 07700 900123, 030/23125042, 01 23 45 67 89
    re.compile(r"(?<![\w.+/-])0[1-9](?:[ ./–-]?[0-9]){8,9}(?![\w%]|[.,:/-][0-9])"),
)
#: After a word that says so, any row of 7 to 15 digits: "call 555-0199".
_CALLED_PHONE = re.compile(rf"\b{_CALLED}\b{_BETWEEN}(?<![\w.+/$€£-])(\+?\(?{_DIGITS}{{6,14}})(?![\w%]|[.,:/-][0-9])")
#: Numbers that nobody has at home: free, shared-cost and premium lines.
_SERVICE = re.compile(
    r"^(?:(?:00|\+)?(?:44|49|33|39|34))?0{0,2}(?:80[0-9]|84[2-5]|87[0-3]|9[01][0-9]|18[0-9]|137)[0-9]{4,}$"
)
_SERVICE_US = re.compile(r"^(?:\+?1)?(?:800|833|844|855|866|877|888|900)[0-9]{7}$")
_DATE = re.compile(
    r"(?:(?:19|20)[0-9]{2}[-./][0-9]{1,2}[-./][0-9]{1,2}|[0-9]{1,2}[-./][0-9]{1,2}[-./](?:19|20)?[0-9]{2})"
)


def _emails(text: str) -> Iterator[Span]:
    for found in _EMAIL.finditer(text):
        if found.group().partition("@")[0].lower().rstrip("0123456789") not in _ROLES:
            yield found.span()


def _phones(text: str) -> Iterator[Span]:
    spans = [found.span() for pattern in _PHONES for found in pattern.finditer(text)]
    spans += [found.span(1) for found in _CALLED_PHONE.finditer(text)]
    for start, end in spans:
        digits = re.sub(r"[^0-9+]", "", text[start:end])
        if not 7 <= len(digits) <= 16 or len(set(digits)) < 3 or _DATE.match(text, start):
            continue
        if not (_SERVICE.match(digits) or _SERVICE_US.match(digits)):
            yield start, end


# --- accounts: cards and IBANs

_CARD = re.compile(
    r"(?<![\w.+-])(?:[2-6][0-9]{3}(?:[ -]?[0-9]{4}){3}|3[0-9]{3}[ -]?[0-9]{6}[ -]?[0-9]{4,5})(?![\w-]|\.[0-9])"
)
_CARD_STARTS = re.compile(
    r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3(?:[47]|0[0-5]|[689]|5)|6(?:011|4[4-9]|5|2|7)|5[06-8]"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?(?![A-Za-z0-9])")
_IBAN_LENGTHS = {
    code: length
    for length, codes in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL",
        19: "MK SI",
        20: "AT BA EE KZ LT LU XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "PT",
        26: "IS TR",
        27: "FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB PL",
        29: "BR EG PS QA UA",
        30: "JO KW MU",
        31: "MT",
    }.items()
    for code in codes.split()
}


def _cards(text: str) -> Iterator[Span]:
    for found in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", found.group())
        if _CARD_STARTS.match(digits) and luhn(digits) and len(set(digits)) > 1:
            yield found.span()


def _ibans(text: str) -> Iterator[Span]:
    for found in _IBAN.finditer(text):
        # A word in capitals may follow: cut at the country's own length.
        length = _IBAN_LENGTHS.get(found.group()[:2])
        compact = found.group().replace(" ", "")
        if length and len(compact) >= length and mod97(compact[:length]):
            ends = (end for end in range(len(found.group()) + 1) if len(found.group()[:end].replace(" ", "")) == length)
            yield found.start(), found.start() + next(ends)


def mod97(iban: str) -> bool:
    """The checksum of an IBAN (ISO 13616)."""
    return int("".join(str(int(one, 36)) for one in iban[4:] + iban[:4])) % 97 == 1


# --- addresses on the net and in the street

_IPV4 = re.compile(r"(?<![\w.+-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w-]|\.[0-9])")
_VERSION = re.compile(
    r"(?i:version|release|build|firmware|\bv|\bver|update|upgrade|section|chapter|clause)\.?\s*:?\s*(?:is )?(?:to )?$"
)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:|:){2,7}(?::|[0-9A-Fa-f]{1,4}|:[0-9A-Fa-f]{1,4})(?![\w:])")


def _ip_addresses(text: str) -> Iterator[Span]:
    for found in _IPV4.finditer(text):
        if not _VERSION.search(text, max(0, found.start() - 24), found.start()) and _is_somebodys(found.group()):
            yield found.span()
    if text.count(":") >= 2:
        for found in _IPV6.finditer(text):
            if _is_somebodys(found.group()) and sum(map(str.isdigit, found.group())) >= 4:
                yield found.span()


def _is_somebodys(address: str) -> bool:
    """True of an address outside the private ranges. (Those for documentation count: files use them for real ones.)"""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.is_loopback or ip.is_unspecified or ip.is_link_local or ip.is_multicast:
        return False
    if ip.version == 6:
        return True
    if any(ip in one for one in _PRIVATE):
        return False
    # "1.2.3.4" is a section or a version more often than an address.
    return sum(map(str.isdigit, address)) >= 7


_PRIVATE = tuple(
    ipaddress.ip_network(one) for one in ("0.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "224.0.0.0/3")
)

_POSTCODE = (
    r"(?:[A-Z]{1,2}[0-9][A-Z0-9]? ?[0-9][A-Z]{2}|"  # SW1A 1AA
    r"[A-Z][0-9]{2} ?[A-Z0-9]{4}|"  # D02 XY45
    r"[A-Z]{2},? [0-9]{5}(?:-[0-9]{4})?|"  # IL 62704
    r"[A-Z][0-9][A-Z] ?[0-9][A-Z][0-9]|"  # K1A 0B1
    r"[0-9]{4,5}(?: [A-Z]{2})?)"  # 10969, 1012 AB
)
_NAME = r"[A-ZÀ-Þ][\w'’.-]*"
_STREETS = (
    # 17 Harbour Lane
    rf"[0-9]{{1,5}}[A-Za-z]?,? (?:{_NAME} ){{1,3}}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Ln|Drive|Dr|Court|Ct|Boulevard|"
    r"Blvd|Way|Place|Pl|Square|Sq|Terrace|Close|Crescent|Gardens|Grove|Hill|Parkway|Row|Mews|Quay|Walk)\b\.?",
    # Lindenstraße 12
    r"\b[A-ZÄÖÜ][\wäöüß-]*(?:straße|strasse|str\.|weg|platz|allee|gasse|ufer|damm)\s[0-9]{1,4}\s?[a-z]?\b",
    # 12 rue de la Paix
    r"[0-9]{1,4}(?: bis| ter)?,? (?:rue|avenue|boulevard|place|chemin|impasse|allée|quai) "
    rf"(?:de |du |des |la |le |les |l'|d')*{_NAME}",
    # Calle Mayor 5, Via Roma 10, Rua Augusta 20
    r"\b(?:Calle|Avenida|Plaza|Paseo|Via|Viale|Piazza|Corso|Rua|Praça) "
    rf"(?:{_NAME} |de |la |del |los |das |dos |da |do ){{0,4}}{_NAME},? (?:n\.?º? ?)?[0-9]{{1,4}}\b",
)
_LIVES = re.compile(
    r"(?i:\b(?:live|lives|living|lived|reside|residing|moved|address|home|house|deliver|send it|ship|adresse|wohne|"
    r"wohnt|anschrift|habite|domicile|vivo|dirección|domicilio|abito|indirizzo|endereço|moro)\b)[^.!?\n]{0,40}$"
)
_STREET = re.compile("|".join(f"(?:{one})" for one in _STREETS))
_AFTER_STREET = re.compile(rf"[^\n!?]{{0,40}}?(?<![\w]){_POSTCODE}(?![\w])")


def _postal_addresses(text: str) -> Iterator[Span]:
    """A street with a number, and a postcode behind it or "I live at" before it: else it may be any place."""
    for found in _STREET.finditer(text):
        before = text[max(0, found.start() - 60) : found.start()]
        if _AFTER_STREET.match(text, found.end()) or _LIVES.search(before) or re.search(rf"{_POSTCODE}[ ,]*$", before):
            yield found.span()


# --- people

_MONTH = (
    r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec|Jän|Mär|Mai|Okt|Dez|jan|fév|mars|avr|mai|juin|juil|août|sept|"
    r"oct|nov|déc|ene|abr|ago|dic)[a-zéû]*\.?"
)
_YEAR = r"(?:19|20)[0-9]{2}"
_DAY = (
    rf"(?:[0-9]{{1,2}}(?:st|nd|rd|th|\.)?(?: of| de)? {_MONTH},?(?: de)? {_YEAR}|"
    rf"{_MONTH} [0-9]{{1,2}}(?:st|nd|rd|th)?,? {_YEAR}|"
    rf"{_YEAR}[-/.][0-9]{{1,2}}[-/.][0-9]{{1,2}}|[0-9]{{1,2}}[-/.][0-9]{{1,2}}[-/.](?:{_YEAR}|[0-9]{{2}}))(?![\w-])"
)
_BORN = re.compile(
    r"(?i:\bborn(?: on)?|\bdate of birth|\bbirth ?date|\bbirthday|\bd\.?o\.?b\b\.?|\bgeboren(?: am)?|\bgeburtsdatum|"
    r"\bnée? le|\bdate de naissance|\bnacid[oa] el|\bfecha de nacimiento|\bnat[oa] il|\bdata di nascita)"
    rf"[\s:,(is]{{0,6}}({_DAY})"
)
_BIRTH_WORDS = ("born", "birth", "dob", "d.o.b", "o.b", "gebor", "geburt", "né", "naiss", "nac", "nat", "nasc")
_SOMEBODY = re.compile(rf"\b(?:I|I'm|my|My|ich|Ich|je|Je|soy|Soy)\b|\b{_NAME} {_NAME}")


def _birth_dates(text: str) -> Iterator[Span]:
    """A date of birth beside a name, or told by "I"."""
    for found in _BORN.finditer(text):
        if _SOMEBODY.search(text):
            yield found.span(1)


class _Finder(NamedTuple):
    type: str
    spans: Callable[[str], Iterator[Span]]
    needs_number: bool = False  # six digits that belong together
    words: tuple[str, ...] = ()  # one of them must be there: looking for words is fast, looking for patterns is not


#: In this order: what has a checksum or a name beside it goes before what is told by its form alone.
_FINDERS = (
    _Finder("secret", _tokens),
    _Finder("secret", _named_secrets, words=_SECRET_WORDS),
    _Finder("secret", _pins, words=("pin", "cvv", "cvc", "tan", "otp", "code", "one")),
    _Finder("email", _emails, words=("@",)),
    _Finder("iban", _ibans, needs_number=True),
    _Finder("card_number", _cards, needs_number=True),
    _Finder(
        "passport", find_passports, words=("pass", "licen", "schein", "ausweis", "identity", "id card", "pasaporte")
    ),
    _Finder("national_id", find_national_ids, needs_number=True),
    _Finder("ip_address", _ip_addresses),
    _Finder("name_and_birth_date", _birth_dates, words=_BIRTH_WORDS),
    _Finder("phone", _phones, needs_number=True),
    _Finder("postal_address", _postal_addresses),
)
