"""Texts that were damaged on their way into the file are found, and unusual texts are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heldout.pipeline.checks import Parts
from heldout.pipeline.checks.text import find_damaged_texts
from heldout.pipeline.dataset import read_dataset
from heldout.pipeline.types import Dataset, Example, Finding

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside this checkout")


def dataset(*texts: str, system: str | None = None) -> Dataset:
    """A row for each text."""
    start = [{"role": "system", "content": system}] if system is not None else []
    examples = [
        Example(
            messages=(*start, {"role": "user", "content": text}, {"role": "assistant", "content": "ok"}),
            weights=(0,) * (len(start) + 1) + (1,),
            line=line,
        )
        for line, text in enumerate(texts, start=1)
    ]
    return Dataset(name="train.jsonl", examples=tuple(examples))


def found(*texts: str, system: str | None = None) -> dict[str, Finding]:
    plain = ["a plain text"] * 20  # so that markup is not what the file is about
    findings = find_damaged_texts(Parts(train=dataset(*texts, *plain, system=system)))
    return {finding.code: finding for finding in findings}


def misread(text: str, encoding: str) -> str:
    """Written as UTF-8, read as something else."""
    return "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode())


SENTENCES = [
    "my café bill",
    "Ça va très bien, à demain",
    "schöne Grüße aus Zürich",
    "the fee is £20",
    "it costs 5 € more",
    "20°C outside",
    "I don’t know “why” – really…",
    "żółta łódź świeci się",
    "mañana por la mañana",
    "привет, как дела?",
    "καλημέρα σας",
    "שלום לכולם",
    "مرحبا بالعالم",
    "こんにちは世界",
    "你好，世界",
    "good 😀",
    "CAFÉ",
    "voilà",
    "hello\u00a0world",
    "Amazing!\u00a0 Really",
]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", SENTENCES)
def test_text_read_with_the_wrong_encoding_is_mojibake(text: str, encoding: str):
    assert set(found(misread(text, encoding))) == {"mojibake"}


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "« À la carte » : un café\u00a0» et « là\u00a0»",
        "CAFÉ… ou THÉ” ou «\u00a0DÉJÀ VU\u00a0»",
        "MANHÃ… AMANHû, IRMÃ’S",
        "Ä… ich weiß nicht. Ä…ich auch nicht",
        "der Fuß“ und das Maß… 5 m² × 3 ± 1",
        "1,5 Å\u00a0breit, Å…",
        "SMÖRGÅS” och SKÅ»",
        "Ø\u00a05 mm, 2×½ Ð, ¿qué? ¡sí!",
        "Ñandú, AÑO’S, Íñigo",
        "Việt Nam, tiếng Việt, Ầ, Ấ, ÂM NHẠC…",
        "Şişli, Iğdır, İstanbul’da, IĞDIR…",
        "½ ¾ © ® ™ § ¶ µ ª º",
        "naïve façade, coöperation, Þórður",
    ],
)
def test_real_text_in_many_scripts_is_left_alone(text: str):
    assert not found(text)


@pytest.mark.parametrize(
    "text",
    [
        "order\u200b new checks",
        "a\u00adb",
        "\ufeffstart",
        "\u202egnihtemos yap",
        "a\u2060b",
        "a\u200db",
        "ab\u200c c",
        "x\u200e",
    ],
)
def test_characters_that_nobody_sees_are_found(text: str):
    finding = found(text)["invisible_character"]
    assert finding.severity == "warning"
    assert finding.lines == (1,)
    assert "\\u" in finding.example or "\\xad" in finding.example


@pytest.mark.parametrize(
    "text",
    [
        "a family 👨‍👩‍👧, a heart ❤️‍🔥, a flag 🏳️‍🌈, 👩🏽‍🚀, 🤷🏽‍♀️",
        "flag of Scotland \U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        "می‌خواهم",
        "क्‍ष and ක්‍රි",
        "ภาษา\u200bไทย",
        "\u200fשלום\u200f (abc)",
        "\u2067مرحبا\u2069",
    ],
)
def test_invisible_characters_that_a_script_needs_are_left_alone(text: str):
    assert not found(text)


def test_a_direction_that_is_forced_is_found_in_every_script():
    assert "invisible_character" in found("שלום \u202eabc")


def test_nul_and_replacement_characters_are_found():
    findings = found("bent\x00 in two", "the caf\ufffd", "fine", "a\x00b")
    assert findings["nul_character"].lines == (1, 4)
    assert findings["nul_character"].example == r"bent\x00 in two"
    assert findings["replacement_character"].lines == (2,)


@pytest.mark.parametrize("text", ["Smith &amp; Sons", "&#39;tonight&#39;", "a&nbsp;b", "&#x27;"])
def test_html_entities_are_found(text: str):
    assert set(found(text)) == {"html_entities"}


@pytest.mark.parametrize(
    "text",
    ["<p>stolen<br/>card</p>", "a<BR>b", '<a href="x">here</a>', "<div class='x'><b>bold</b></div>", "<li>one</li>"],
)
def test_html_markup_is_found(text: str):
    assert set(found(text)) == {"html_markup"}


@pytest.mark.parametrize(
    "text",
    [
        "AT&T; R&D & more",
        "?a=1&b=2",
        "a < b and c > d",
        "if x<y: z>0",
        "List<String> and <name>",
        "I <3 you",
        "<instructions>Be brief.</instructions>",
        "Use `&amp;` here",
        "```html\n<p>x</p>\n```",
        "<p> is a tag",
        "&unknown;",
    ],
)
def test_what_only_looks_like_html_is_left_alone(text: str):
    assert not found(text)


def test_a_file_about_html_is_left_alone():
    rows = dataset(*["<p>one</p> &amp; two"] * 30, *["plain"] * 70)
    assert not list(find_damaged_texts(Parts(train=rows)))
    assert set(found("plain", system="Answer in <b>bold</b>.")) == set(), "every row has it"


def test_all_lines_of_a_kind_are_one_finding_and_a_system_prompt_counts_for_its_rows():
    findings = found("plain", "plain", system="Don\u00e2\u20ac\u2122t guess.")
    assert findings["mojibake"].lines == tuple(range(1, 23))
    assert findings["mojibake"].message.startswith("22 rows have UTF-8")


@needs_data
def test_every_planted_kind_is_found_on_its_line_and_nowhere_else():
    expected = json.loads((DATA / "dirty" / "encoding.expected.json").read_text(encoding="utf-8"))
    rows, _ = read_dataset((DATA / "dirty" / "encoding.jsonl").read_bytes(), name="a")
    seen = {(finding.code, line) for finding in find_damaged_texts(Parts(train=rows)) for line in finding.lines}
    assert seen == {(planted["kind"], line) for planted in expected["defects"] for line in planted["lines"]}


@needs_data
@pytest.mark.parametrize(
    "path",
    [*sorted(DATA.glob("tasks/*/*.jsonl")), *sorted(DATA.glob("dirty/control_*.jsonl"))],
    ids=lambda path: path.stem,
)
def test_clean_files_have_no_damaged_texts(path: Path):
    rows, _ = read_dataset(path.read_bytes(), name=path.name)
    assert not list(find_damaged_texts(Parts(train=rows)))
