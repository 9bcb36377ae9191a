"""What training may have made worse, as a table of lights: in text and in HTML."""

from __future__ import annotations

from collections.abc import Sequence

from heldout.pipeline.consequences.base import Consequence
from heldout.pipeline.findings import markdown_text
from heldout.pipeline.layout import html_text, markdown_table

#: A light, its colour and its word: nobody has to tell red from green.
LIGHTS = {
    "ok": ("🟢", "#1a7f4b", "ok"),
    "warn": ("🟡", "#8a6d00", "warning"),
    "fail": ("🔴", "#b3261e", "fails"),
    "not_measured": ("⚪", "#5b6673", "not measured"),
}

STYLE = "td.light { white-space: nowrap; font-weight: 600; print-color-adjust: exact }\n"
TITLE = "What training may have made worse"


def by_light(found: Sequence[Consequence]) -> list[Consequence]:
    """What fails first, what was not measured last."""
    order = ("fail", "warn", "ok", "not_measured")
    return sorted(found, key=lambda one: order.index(one.status))


def markdown(found: Sequence[Consequence]) -> list[str]:
    """The table, and what the lit ones look like, as lines of a page of text; none where there are none."""
    if not found:
        return []
    found = by_light(found)
    shown = [f"- {one.name}: {markdown_text(example)}" for one in found for example in one.examples]
    rows = [[" ".join(LIGHTS[one.status][::2]), one.name, _plain(one)] for one in found]
    return [
        "",
        f"## {TITLE}",
        "",
        *markdown_table(("", "consequence", "what was measured"), rows),
        *(["", "Examples:", "", *shown] if shown else []),
    ]


def html(found: Sequence[Consequence]) -> str:
    """The same as HTML."""
    if not found:
        return ""
    rows = "".join(
        f'<tr><td class=light style="color:{LIGHTS[one.status][1]}">● {LIGHTS[one.status][2]}</td>'
        f"<td class=name>{one.name}</td><td>{html_text(_plain(one))}"
        f"{''.join(f'<br><small>{html_text(example)}</small>' for example in one.examples)}</td></tr>"
        for one in by_light(found)
    )
    return f"<h2>{TITLE}</h2><table class=wide>{rows}</table>"


def _plain(one: Consequence) -> str:
    """Its sentence; the light says already that it was not measured."""
    text = one.sentence.removeprefix("not measured: ")
    return f"{text[:1].upper()}{text[1:]}."
