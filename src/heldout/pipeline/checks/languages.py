"""The language of a text where it is plain, by script and, among languages in Latin letters, by their small words."""

from __future__ import annotations

import re
from collections import Counter

#: What is read of a text, in characters from its start.
READ = 400
#: Small words of one language, and none of another, that tell a language.
ENOUGH = 3

_SCRIPTS = (
    (0x0041, 0x024F, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0530, 0x058F, "Armenian"),
    (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x06FF, "Arabic"),
    (0x0750, 0x077F, "Arabic"),
    (0x0900, 0x097F, "Devanagari"),
    (0x0980, 0x09FF, "Bengali"),
    (0x0B80, 0x0BFF, "Tamil"),
    (0x0C00, 0x0C7F, "Telugu"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Korean"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x3040, 0x30FF, "Chinese or Japanese"),
    (0x4E00, 0x9FFF, "Chinese or Japanese"),
    (0xAC00, 0xD7A3, "Korean"),
)

#: Frequent words that are words in one of these languages only.
_SMALL_WORDS = {
    "English": "the and are were with that this for you your it from have which would there what not been they",
    "German": "der und ist nicht das den dem ein eine mit auf für sie wir von zu wird sich auch werden",
    "French": "les des est une dans pour vous avec sur pas qui nous votre sont cette aux être ce c qu",
    "Spanish": "el los las es por con del como más pero está usted sus puede hay muy esta también ser son",
    "Italian": "il di che è della per sono gli nel anche più dei questo alla ha si suo delle nella con",
    "Portuguese": "os da não uma em você mais dos foi pelo ao são isso à está seu sua pela também ser com",
    "Dutch": "het een van niet voor met op aan zijn dat je er maar ook naar om uw wordt deze bij",
}


def _only_one_language() -> dict[str, str]:
    counts = Counter(word for words in _SMALL_WORDS.values() for word in words.split())
    return {word: name for name, words in _SMALL_WORDS.items() for word in words.split() if counts[word] == 1}


_LANGUAGE_OF = _only_one_language()
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str | None:
    """ "English", or a script, such as "Cyrillic"; None where a text is too short or too mixed to tell."""
    text = text[:READ]
    script = "Latin" if text.isascii() else _script_of(text)
    if script != "Latin":
        return script
    hits = Counter(_LANGUAGE_OF[word] for word in _WORD.findall(text.lower()) if word in _LANGUAGE_OF)
    if not hits:
        return None
    [(first, n), *others] = hits.most_common(2)
    return first if n >= ENOUGH and (not others or others[0][1] * 4 <= n) else None


def _script_of(text: str) -> str | None:
    letters = [ord(letter) for letter in text if letter.isalpha()]
    scripts = Counter(
        next((name for low, high, name in _SCRIPTS if low <= code <= high), "another script") for code in letters
    )
    if not scripts:
        return None
    [(script, n)] = scripts.most_common(1)
    return script if n >= 0.8 * len(letters) and n >= 2 else None
